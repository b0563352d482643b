"""Measures the tile shapes of LiFT's GPU kernels once per device; :mod:`.ops.lift_forward.tiles` stores them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import devices
from .kernels.tiles import Tile
from .lift import LiFT
from .ops.lift_forward import gpu, tiles
from .ops.lift_forward.plan import build_plan
from .ops.lift_forward.tiles import Work
from .testing import relative_error


def tune(
    lift: LiFT, shape: Sequence[int], dtype: torch.dtype = torch.bfloat16, *, quiet: bool = False
) -> dict[str, Tile]:
    """Measure the tiles of LiFT's GPU kernels for images of one shape, and store the fastest on disk.

    Takes about a minute, nearly all of it compilation. The results apply to images with about as many pixels, on every
    device of the same model. A tile that does not run, or whose result differs from the default's, is skipped.

    Args:
        lift: the network, on a CUDA device.
        shape: ``(B, 3, H, W)`` of the images.
        dtype: dtype of the computation: bfloat16, float16 or float32.
        quiet: print nothing.

    Returns:
        The tile chosen for each piece of work.

    Raises:
        RuntimeError: if the Triton kernels do not run.
        ValueError: for a shape or dtype that does not fit.
    """
    device = lift.outc.weight.device
    if device.type != "cuda":
        raise RuntimeError(f"tune measures GPU kernels, but the network is on {device}; move it with .cuda()")
    runs, reason = devices.triton_runs(device)
    if not runs:
        raise RuntimeError(f"the Triton kernels do not run here: {reason}")
    if len(shape) != 4 or shape[1] != 3 or min(shape[0], shape[2] // lift.patch_size, shape[3] // lift.patch_size) < 1:
        raise ValueError(
            f"shape must be (B, 3, H, W) with at least one patch of {lift.patch_size} pixels, got {tuple(shape)}"
        )
    if dtype not in devices.KERNEL_DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, devices.KERNEL_DTYPES))}, got {dtype}")
    with torch.no_grad():
        plan = gpu.prepare_gpu(build_plan(*lift._plan_sources(), lift.architecture), device, dtype)
        h, w = shape[2] // lift.patch_size, shape[3] // lift.patch_size
        scale = 16 if lift.architecture.pool else 8
        imgs = torch.randn(shape[0], 3, scale * h, scale * w, device=device, dtype=dtype)
        x = torch.randn(shape[0], h, w, lift.in_channels, device=device, dtype=dtype)
        f, g = gpu.encode_image(plan, imgs) if lift.use_image else (None, None)
        u = gpu.upsample(plan, x, f, g)
        chosen: dict[str, Tile] = {}
        for work, run in (
            (gpu.upsample_work(plan, x), lambda tile: gpu.upsample(plan, x, f, g, tile)),
            (gpu.head_work(plan, u), lambda tile: gpu.head(plan, u, tile=tile)),
        ):
            chosen[work.key()] = _fastest(work, device, run, quiet)
    tiles.store(tiles.cache_file(device), chosen)
    tiles.forget()
    return chosen


def _fastest(work: Work, device: torch.device, run: Callable[[Tile], Tensor], quiet: bool) -> Tile:
    first = tiles.tile_for(work, device)
    expected = run(first)
    limit = 1e-5 if work.dtype == torch.float32 else 1e-2
    best, least = first, _milliseconds(lambda: run(first))
    for tile in tiles.candidates(work, device):
        if tile == first:
            continue
        try:
            error = relative_error(run(tile), expected)
            time = _milliseconds(lambda tile=tile: run(tile))  # type: ignore[misc]
        except Exception as reason:  # Triton's own: out of resources, or a compiler's failure on an odd tile.
            if not quiet:
                print(f"{work.key()} {tuple(tile)}: skipped, {type(reason).__name__}")
            continue
        if error <= limit and time < least:
            best, least = tile, time
    if not quiet:
        print(f"{work.key()} {tuple(best)}: {1000 * least:.1f} us")
    return best


def _milliseconds(run: Callable[[], Any]) -> float:
    """Median time of one launch on the device."""
    times = []
    for repeat in range(13):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        stop.record()
        stop.synchronize()
        # The first three warm up.
        if repeat >= 3:
            times.append(start.elapsed_time(stop))
    return sorted(times)[len(times) // 2]
