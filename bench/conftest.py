"""Fixtures: a device, and the comparison of two functions on it."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from .alternate import SLOW_ROUNDS, alternate, peak_memory, rounds_of, seconds


def _compare(
    benchmark: Any,
    ours: Callable[[], Any],
    plain: Callable[[], Any],
    *,
    device: str,
    error: float,
    limit: float,
    name: str | None = None,
    share: float = 1.0,
) -> None:
    """Benchmark ``ours`` and record the speed-up over ``plain``, run in turn with it: A B A B ...

    Nothing is timed if ``error`` exceeds ``limit``. A ``plain`` that would take minutes does only a ``share`` of the
    work; its time is scaled up, and the record contains the share.
    """
    if not error <= limit:
        pytest.fail(f"results differ by {error:.2e}, more than {limit:.0e}: no figure is printed")
    benchmark.extra_info["error"] = error
    rounds = rounds_of(ours, plain, device)
    slow = rounds == SLOW_ROUNDS
    times = alternate(ours, plain, device, rounds)
    times = times._replace(plain=[time / share for time in times.plain])
    benchmark.extra_info.update(
        device=torch.cuda.get_device_name() if device == "cuda" else "cpu",
        plain_ms=1e3 * statistics.median(times.plain),
        paired_ms=1e3 * statistics.median(times.ours),
        speedup=times.speedup,
        speedup_quartiles=list(times.quartiles),
        rounds=rounds,
        threads=torch.get_num_threads(),
    )
    if name is not None:
        benchmark.extra_info["name"] = name
    # Not the first call, which may compile or fill caches.
    benchmark.extra_info["memory_mib"] = peak_memory(ours, device)
    if share == 1:
        benchmark.extra_info["plain_memory_mib"] = peak_memory(plain, device)
    else:
        benchmark.extra_info["plain_share"] = share
    benchmark.pedantic(lambda: seconds(ours, device), rounds=1 if slow else rounds, warmup_rounds=0 if slow else 1)


@pytest.fixture(params=["cpu", "cuda"], scope="session")
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("PyTorch sees no CUDA device")
    return str(request.param)


@pytest.fixture
def compare(benchmark: Any, device: str) -> Callable[..., None]:
    """``compare(ours, plain, error=..., limit=..., name=None, share=1.0)`` on the benchmark's device."""
    return partial(_compare, benchmark, device=device)
