"""Times of device work: the median of events around many calls; graphs for calls that the host launches slowly."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

Run = Callable[..., Any]


def milliseconds(run: Run, inputs: Sequence[tuple[Any, ...]], device: torch.device, seconds: float = 0.3) -> float:
    """Median time of one call, with ``inputs`` in turn so that no set stays in the cache."""
    if device.type != "cuda":
        # A rehearsal needs one call.
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
    """Time of one call as a CUDA graph, over many replays in a row."""
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
    """The same call as a CUDA graph, without the time of Python and launches."""
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
        # The result must stay alive, because the graph writes there.
        result = call()
    return lambda: (graph.replay(), result)


def peak_bytes(call: Callable[[], Any], device: torch.device, warm: bool = True) -> int | None:
    """Bytes that one call adds at its peak, its result included; None on the CPU.

    ``warm``: call it once before, so that memory that it keeps is not counted.
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


def host_milliseconds(run: Run, arguments: tuple[Any, ...], device: torch.device, calls: int = 20) -> float:
    """Time in which the host launches one call, without waiting for the device.

    Measured over several calls, few enough for the device's queue: the first launch after a wait costs more.
    """
    if device.type != "cuda":
        return _wall(run, arguments)
    times = []
    # Compilation, and the first launches of a launcher.
    for _ in range(4):
        run(*arguments)
    for _ in range(30):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            run(*arguments)
        times.append(1000 * (time.perf_counter() - start) / calls)
    torch.cuda.synchronize(device)
    return statistics.median(times)


def _wall(run: Run, arguments: tuple[Any, ...]) -> float:
    start = time.perf_counter()
    run(*arguments)
    return 1000 * (time.perf_counter() - start)
