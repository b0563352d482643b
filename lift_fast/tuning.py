"""Tile shapes of the GPU kernels: measured once per device by :func:`tune`, kept on disk, defaults until then.

A forward pass never measures anything: it looks up what was measured, or takes the default of its device.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import _env, devices
from ._files import atomic_path

if TYPE_CHECKING:
    from .kernels.tiles import Tile
    from .lift import LiFT

# Raise it when a kernel changes so that measured tiles no longer mean the same.
_FORMAT = 2


class Work(NamedTuple):
    """One launch of a kernel, as far as its best tile depends on it."""

    kernel: str
    positions: int
    """Output positions."""
    channels: int
    """Output channels of the stage."""
    inputs: int
    """Input channels of the stage."""
    counts: tuple[int, ...]
    """Numbers of accumulators that a block may have."""
    dtype: torch.dtype

    def key(self) -> str:
        # Within a factor of two of the positions the best tile hardly changes.
        dtype = str(self.dtype).removeprefix("torch.")
        bucket = max(self.positions - 1, 1).bit_length()
        return f"{self.kernel} {dtype} {self.inputs}->{self.channels} positions<=2^{bucket}"


def cache_file(device: torch.device) -> Path:
    """Where the measured tiles of this device's model are kept."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return _env.cache_folder() / f"tiles-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json"


@cache
def _measured(path: Path) -> dict[str, Tile]:
    """The tiles of one file; a file that cannot be read is named and left out."""
    from .kernels.tiles import Tile

    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
        if content["format"] != _FORMAT:
            return {}
        return {key: Tile(*(int(number) for number in tile)) for key, tile in content["tiles"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(
            f"tile shapes in {path} cannot be read ({error!r}): using defaults; delete the file", stacklevel=2
        )
        return {}


@lru_cache(maxsize=1024)
def _choose(work: Work, device: torch.device) -> Tile:
    from .kernels import launch, tiles

    known = _measured(cache_file(device)).get(work.key())
    if known is not None and known in _candidates(work, device):
        return known
    columns, depth = tiles.columns_of(work.channels), tiles.depth_of(work.dtype.itemsize, work.inputs)
    return tiles.default(
        work.positions, columns, list(work.counts), depth, work.dtype.itemsize, launch.capability(device)
    )


def tile_for(work: Work, device: torch.device) -> Tile:
    """The tile with which to launch; costs a dictionary look-up after the first call."""
    return _choose(work, device)


_edition = 0


def edition() -> int:
    """Another number after each :func:`forget`: what was launched before may have other tiles now."""
    return _edition


def forget() -> None:
    """Read the file anew at the next launch."""
    global _edition
    _measured.cache_clear()
    _choose.cache_clear()
    # Last: another thread would keep the old tiles under the new number.
    _edition += 1


def _candidates(work: Work, device: torch.device) -> list[Tile]:
    from .kernels import launch, tiles

    columns, depth = tiles.columns_of(work.channels), tiles.depth_of(work.dtype.itemsize, work.inputs)
    return tiles.candidates(columns, list(work.counts), depth, work.dtype.itemsize, launch.capability(device))


def tune(
    lift: LiFT, shape: Sequence[int], dtype: torch.dtype = torch.bfloat16, *, quiet: bool = False
) -> dict[str, Tile]:
    """Measure the tiles of LiFT's GPU kernels for pictures of one shape, and keep the fastest on disk.

    Takes about a minute, nearly all of it compilation. Results count for every picture with about as many pixels, on
    every device of the same model. A tile that does not run, or whose result differs from the default's, is left out.

    Args:
        lift: the network, on a CUDA device.
        shape: ``(B, 3, H, W)`` of the pictures.
        dtype: in which to compute: bfloat16, float16 or float32.
        quiet: print nothing.

    Returns:
        The tile chosen for each piece of work.

    Raises:
        RuntimeError: where the Triton kernels do not run.
        ValueError: for a shape or dtype that does not fit.
    """
    from .ops.lift_forward import gpu as gpu_plan
    from .ops.lift_forward.plan import build_plan

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
        plan = gpu_plan.prepare_gpu(build_plan(*lift._plan_sources(), lift.architecture), device, dtype)
        h, w = shape[2] // lift.patch_size, shape[3] // lift.patch_size
        scale = 16 if lift.architecture.pool else 8
        imgs = torch.randn(shape[0], 3, scale * h, scale * w, device=device, dtype=dtype)
        x = torch.randn(shape[0], h, w, lift.in_channels, device=device, dtype=dtype)
        f, g = gpu_plan.encode_image(plan, imgs) if lift.use_image else (None, None)
        u = gpu_plan.upsample(plan, x, f, g)
        chosen: dict[str, Tile] = {}
        for work, run in (
            (gpu_plan.upsample_work(plan, x), lambda tile: gpu_plan.upsample(plan, x, f, g, tile)),
            (gpu_plan.head_work(plan, u), lambda tile: gpu_plan.head(plan, u, tile=tile)),
        ):
            chosen[work.key()] = _fastest(work, device, run, quiet)
    _store(cache_file(device), chosen)
    forget()
    return chosen


def _fastest(work: Work, device: torch.device, run: Callable[[Tile], Tensor], quiet: bool) -> Tile:
    from .testing import relative_error

    first = tile_for(work, device)
    expected = run(first)
    limit = 1e-5 if work.dtype == torch.float32 else 1e-2
    best, least = first, _milliseconds(lambda: run(first))
    for tile in _candidates(work, device):
        if tile == first:
            continue
        try:
            error = relative_error(run(tile), expected)
            time = _milliseconds(lambda tile=tile: run(tile))  # type: ignore[misc]
        except Exception as reason:  # Triton's own: out of resources, or a compiler's failure on an odd tile.
            if not quiet:
                print(f"{work.key()} {tuple(tile)}: left out, {type(reason).__name__}")
            continue
        if error <= limit and time < least:
            best, least = tile, time
    if not quiet:
        print(f"{work.key()} {tuple(best)}: {1000 * least:.1f} us")
    return best


def _milliseconds(run: Callable[[], Any]) -> float:
    """Median of one launch's time on the device."""
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


def _store(path: Path, chosen: dict[str, Tile]) -> None:
    """Add tiles to a file; what it held for other work stays."""
    tiles: dict[str, Iterable[int]] = {key: list(tile) for key, tile in _measured(path).items()}
    tiles.update({key: list(tile) for key, tile in chosen.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps({"format": _FORMAT, "tiles": tiles}, indent=1) + "\n")
