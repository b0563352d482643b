"""Times of device work: events around many calls, the median; graphs for calls that the host launches too slowly."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

Run = Callable[..., Any]


def milliseconds(run: Run, inputs: Sequence[tuple[Any, ...]], device: torch.device, seconds: float = 0.3) -> float:
    """Median time of one call, taking turns among ``inputs`` so that no single set stays in the cache."""
    if device.type != "cuda":
        # A rehearsal: once is enough.
        return _wall(run, inputs[0])
    turns = itertools.cycle(inputs)
    for _ in range(max(3, len(inputs))):
        run(*next(turns))
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    run(*next(turns))
    torch.cuda.synchronize(device)
    count = max(10, min(200, int(seconds / max(time.perf_counter() - start, 1e-6))))
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for first, last in events:
        arguments = next(turns)
        first.record()
        run(*arguments)
        last.record()
    torch.cuda.synchronize(device)
    return statistics.median(first.elapsed_time(last) for first, last in events)


def replay_milliseconds(run: Run, arguments: tuple[Any, ...], device: torch.device, replays: int = 200) -> float:
    """Time of one call when it is replayed as a CUDA graph, many replays one after the other."""
    if device.type != "cuda":
        return milliseconds(run, [arguments], device)
    replay = recorded(lambda: run(*arguments), device)
    times = []
    for _ in range(5):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        replay()
        first.record()
        for _ in range(replays):
            replay()
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last) / replays)
    return statistics.median(times)


def recorded(call: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """The same call as a CUDA graph: without the time that Python and launches take."""
    if device.type != "cuda":
        return call
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # What it returns must stay alive: the graph writes there.
        result = call()
    return lambda: (graph.replay(), result)


def peak_bytes(call: Callable[[], Any], device: torch.device, warm: bool = True) -> int | None:
    """Bytes that one call holds at its peak beyond what was there before, its result included; None on the CPU.

    ``warm``: call it once before, so that what it keeps is there before.
    """
    if device.type != "cuda":
        return None
    if warm:
        call()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()
    torch.cuda.synchronize(device)
    del result
    return torch.cuda.max_memory_allocated(device) - before


def host_milliseconds(run: Run, arguments: tuple[Any, ...], device: torch.device) -> float:
    """Time in which the host launches one call, without waiting for the device."""
    if device.type != "cuda":
        return _wall(run, arguments)
    times = []
    for _ in range(100):
        torch.cuda.synchronize(device)
        times.append(_wall(run, arguments))
    return statistics.median(times)


def _wall(run: Run, arguments: tuple[Any, ...]) -> float:
    start = time.perf_counter()
    run(*arguments)
    return 1000 * (time.perf_counter() - start)
