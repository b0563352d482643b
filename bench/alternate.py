"""Timing two functions in turn, A B A B ..., so that the machine's drift cancels in the pairs' ratios; peak memory."""

from __future__ import annotations

import ctypes
import gc
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

# Rounds shrink with the length of one call, so that a whole run takes minutes.
_SECONDS, _FEWEST, _MOST = 2.0, 9, 40
# Longer calls run as few times as a median needs: emulated bfloat16 takes ten seconds.
_SLOW_SECONDS, SLOW_ROUNDS = 2.0, 3


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


class Paired(NamedTuple):
    """Seconds of both functions, one entry a round."""

    ours: list[float]
    plain: list[float]

    @property
    def speedup(self) -> float:
        return statistics.median(self._ratios())

    @property
    def quartiles(self) -> tuple[float, float]:
        low, _, high = statistics.quantiles(self._ratios(), n=4)
        return low, high

    def _ratios(self) -> list[float]:
        return [plain / ours for ours, plain in zip(self.ours, self.plain, strict=True)]


def rounds_of(ours: Callable[[], Any], plain: Callable[[], Any], device: str, budget: float = _SECONDS) -> int:
    """Warm up, and choose the rounds for ``budget`` seconds of the slower one."""
    slowest = max(seconds(ours, device), seconds(plain, device))
    if slowest > _SLOW_SECONDS:
        return SLOW_ROUNDS
    for _ in range(2):
        slowest = max(seconds(ours, device), seconds(plain, device))
    return max(_FEWEST, min(_MOST, int(budget / max(slowest, 1e-6))))


def alternate(ours: Callable[[], Any], plain: Callable[[], Any], device: str, rounds: int) -> Paired:
    """Both in turn, after :func:`rounds_of` has warmed them up."""
    found = Paired([], [])
    gc.collect()
    for _ in range(rounds):
        found.ours.append(seconds(ours, device))
        found.plain.append(seconds(plain, device))
    return found
