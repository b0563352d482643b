"""Timing two functions against each other so that the machine's drift cancels."""

from __future__ import annotations

import ctypes
import gc
import re
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

# Rounds shrink with the length of one call, so that a whole run takes minutes.
_SECONDS, _FEWEST, _MOST = 2.0, 9, 40
# Longer calls run as few times as a median needs: emulated bfloat16 takes ten seconds.
_SLOW_SECONDS, _SLOW_ROUNDS = 2.0, 3


def seconds(function: Callable[[], Any], device: str) -> float:
    """Wall time of one call, the device's queue drained before and after."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_memory(function: Callable[[], Any], device: str) -> float | None:
    """MiB that one call adds at its peak, its result included; None if unknown."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        # Memory that earlier calls freed must not hide what this one needs.
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return None
    try:
        # Resets the kernel's record of the most memory that the process has held.
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None

    def resident(name: str) -> int:
        return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])

    before = resident("VmRSS")
    function()
    return (resident("VmHWM") - before) / 2**10


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
    slowest = max(seconds(ours, device), seconds(plain, device))
    slow = slowest > _SLOW_SECONDS
    for _ in range(0 if slow else 2):
        slowest = max(seconds(ours, device), seconds(plain, device))
    rounds = _SLOW_ROUNDS if slow else max(_FEWEST, min(_MOST, int(_SECONDS / max(slowest, 1e-6))))
    ratios, plain_times, own_times = [], [], []
    gc.collect()
    for _ in range(rounds):
        own_times.append(seconds(ours, device))
        plain_times.append(seconds(plain, device) / share)
        ratios.append(plain_times[-1] / own_times[-1])
    quartiles = statistics.quantiles(ratios, n=4)
    benchmark.extra_info.update(
        device=torch.cuda.get_device_name() if device == "cuda" else "cpu",
        plain_ms=1e3 * statistics.median(plain_times),
        paired_ms=1e3 * statistics.median(own_times),
        speedup=statistics.median(ratios),
        speedup_quartiles=[quartiles[0], quartiles[2]],
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
