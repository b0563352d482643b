"""Compiles the kernels of smoke and figures on all cores, into the disk cache that all processes share.

Runs as a program: ``python -m bench.gpu.warm_up --capability 90 --workers 16``; with ``--tiles`` it compiles the many
kernels that only the figures of tiles launch. It uses no device, so it compiles for GPUs that are absent too. Launches
that differ only in run-time sizes share one compilation.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from . import smoke, workloads
from .launches import OPERATORS, Launch


class NoDevice:
    """Replaces Triton's driver; nothing is launched."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def works() -> list[Callable[[int], list[Launch]]]:
    """The calls of smoke and figures as functions of the compute capability, the longest compilations first."""
    forward, search = partial(partial, OPERATORS["lift_forward"]), partial(partial, OPERATORS["nearest"])
    dense, loss = partial(partial, OPERATORS["dense_match"]), partial(partial, OPERATORS["cosine_loss"])
    found = []
    for _, batch, side, patch, channels in (workloads.ONE, workloads.MANY, workloads.LARGE, *workloads.FURTHER):
        found.append(forward(channels=channels, patch=patch, batch=batch, side=side, dtype=torch.bfloat16))
    large = {"n": workloads.DESCRIPTORS, "m": workloads.DESCRIPTORS, "channels": workloads.CHANNELS}
    for options in ({}, {"mutual": True}, {"ratio": 0.9}, {"k": 5}):
        found.append(search(**large, dtype=torch.bfloat16, **options))
    for options in ({}, {"mutual": True}, {"fast": True}):
        found.append(search(**large, dtype=torch.float32, **options))
    window = [12, *4 * [workloads.GRID]]
    cells = workloads.GRID**2
    found.append(search(n=cells, m=7 * cells, channels=workloads.CHANNELS, dtype=torch.bfloat16, k=5, window=window))
    for dtype in smoke.DTYPES:
        for channels, patch, h, w, batch in smoke.NETWORKS:
            side = (patch * h, patch * w)
            network = forward(channels=channels, patch=patch, batch=batch, side=side, dtype=dtype)
            found += [network, partial(network.func, **network.keywords, normalize=True)]
        for n, m, channels, options in smoke.NEAREST:
            found.append(search(n=n, m=m, channels=channels, dtype=dtype, **options))
        for patch, h, w, batch in smoke.ENCODERS:
            side = (patch * h, patch * w)
            found.append(forward(channels=8, patch=patch, batch=batch, side=side, dtype=dtype))
        batch, channels, *sides = workloads.LOSS_SHAPE
        found.append(loss(shape=(batch, channels, sides[0] * sides[1]), dtype=dtype))
        for batch, channels, h, w in smoke.LOSSES:
            for tokens in (False, True):
                found.append(loss(shape=(batch, channels, h * w), dtype=dtype, tokens=tokens))
    for dtype in (torch.float32, torch.bfloat16):
        found.append(forward(channels=384, patch=16, batch=2, side=(80, 112), dtype=dtype))
        found.append(forward(channels=192, patch=16, batch=2, side=workloads.SIDE, dtype=dtype))
    for normalize in ("grid", "pixel"):
        for points in (None, workloads.POINTS):
            found.append(
                dense(grid=2 * [workloads.GRID], size=2 * [workloads.SIDE], normalize=normalize, points=points)
            )
            for grid, _, size, _ in smoke.MAPS:
                found.append(dense(grid=grid, size=size, normalize=normalize, points=points))
    grids = [*smoke.PROPAGATIONS, ((workloads.GRID, workloads.GRID), 8, workloads.CHANNELS, 4, 5, 12)]
    for grid, frames, channels, objects, k, radius in grids:
        batch = 1 if grid[0] == workloads.GRID else 2
        shape = {"channels": channels, "grid": grid, "frames": frames, "batch": batch, "k": k, "objects": objects}
        found.append(partial(OPERATORS["propagate_labels"], **shape, dtype=torch.float32, radius=radius))
    return found


def tiles_of_works() -> list[Callable[[int], list[Launch]]]:
    """The calls of the figures of tiles and streams: three times as much to compile as all others."""
    found = []
    for _, batch, side, patch, channels in (workloads.ONE, workloads.MANY):
        tiles = {"channels": channels, "patch": patch, "batch": batch, "side": side, "dtype": torch.bfloat16}
        found.append(partial(OPERATORS["lift_tiles"], **tiles))
    large = {"n": workloads.DESCRIPTORS, "m": workloads.DESCRIPTORS, "channels": workloads.CHANNELS}
    for kind in ("nearest_streams", "nearest_tiles"):
        found.append(partial(OPERATORS[kind], **large, dtype=torch.bfloat16))
    return found


def distinct(launches: list[Launch]) -> list[Launch]:
    """One launch of each compilation."""

    def kind(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return str(value.dtype), value.storage_offset() * value.element_size() % 16 == 0
        if isinstance(value, bool) or not isinstance(value, int):
            return type(value).__name__ if isinstance(value, float) else repr(value)
        # A 1 becomes a constant, and the launcher distinguishes multiples of 16 and long numbers.
        return value == 1, value % 16 == 0, abs(value) >= 1 << 31

    found: dict[Any, Launch] = {}
    for kernel, args, options in launches:
        key = (kernel.fn.__module__, kernel.fn.__name__, tuple(map(kind, args)), repr(sorted(options.items())))
        found.setdefault(key, (kernel, args, options))
    return list(found.values())


_launches: list[Launch] = []


def _compile(number: int) -> dict[str, Any]:
    kernel, args, options = _launches[number]
    start = time.monotonic()
    row: dict[str, Any] = {"kernel": kernel.fn.__name__}
    try:
        compiled = kernel.warmup(*args, grid=(1,), **options)
        row["shared"] = compiled.metadata.shared
    except Exception as error:
        row["failure"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[-1][:200]}"
    row["seconds"] = round(time.monotonic() - start, 2)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.warm_up", description=__doc__.splitlines()[0])
    parser.add_argument("--capability", type=int, required=True, help="such as 90")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--tiles", action="store_true", help="compile only the kernels of the figures of tiles")
    parser.add_argument("--most", type=int, help="compile at most so many")
    arguments = parser.parse_args()
    start = time.monotonic()
    driver.set_active(NoDevice(arguments.capability))
    chosen = tiles_of_works() if arguments.tiles else works()
    launches = [launch for work in chosen for launch in work(capability=arguments.capability)]
    _launches[:] = distinct(launches)[: arguments.most]
    listed = time.monotonic() - start
    # Forked, because PyTorch and Triton are then imported once and no device is open.
    with ProcessPoolExecutor(arguments.workers, multiprocessing.get_context("fork")) as pool:
        rows = list(pool.map(_compile, range(len(_launches)), chunksize=1))
    failures = [f"{row['kernel']}: {row['failure']}" for row in rows if "failure" in row]
    print(
        json.dumps(
            {
                "launches": len(launches),
                "compiled": len(rows),
                "failures": sorted(set(failures)),
                "seconds to list": round(listed, 1),
                "seconds of all compilers": round(sum(row["seconds"] for row in rows), 1),
                "longest": max((row["seconds"] for row in rows), default=0.0),
                "seconds": round(time.monotonic() - start, 1),
                "triton": triton.__version__,
            }
        )
    )
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
