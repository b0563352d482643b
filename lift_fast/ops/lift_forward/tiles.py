"""Which tile a launch of the GPU kernels takes: the one that was measured on this model of device, or its default.

A forward pass never measures anything: :func:`lift_fast.tune` does, and keeps what it found on disk.
"""

from __future__ import annotations

import json
import re
import warnings
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from ... import _env
from ..._files import atomic_path
from ...kernels import launch, tiles
from ...kernels.tiles import Tile

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
def tile_for(work: Work, device: torch.device) -> Tile:
    """The tile with which to launch; costs a dictionary look-up after the first call."""
    known = _measured(cache_file(device)).get(work.key())
    if known is not None and known in candidates(work, device):
        return known
    return tiles.default(work.positions, *_limits(work, device))


_edition = 0


def edition() -> int:
    """Another number after each :func:`forget`: what was launched before may have other tiles now."""
    return _edition


def forget() -> None:
    """Read the file anew at the next launch."""
    global _edition
    _measured.cache_clear()
    tile_for.cache_clear()
    # Last: another thread would keep the old tiles under the new number.
    _edition += 1


def candidates(work: Work, device: torch.device) -> list[Tile]:
    """Every tile worth measuring."""
    return tiles.candidates(*_limits(work, device))


def _limits(work: Work, device: torch.device) -> tuple[int, list[int], int, int, tuple[int, int]]:
    itemsize = work.dtype.itemsize
    columns, depth = tiles.columns_of(work.channels), tiles.depth_of(itemsize, work.inputs)
    return columns, list(work.counts), depth, itemsize, launch.capability(device)


def store(path: Path, chosen: dict[str, Tile]) -> None:
    """Add tiles to a file; what it held for other work stays."""
    every = {key: list(tile) for key, tile in (_measured(path) | chosen).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps({"format": _FORMAT, "tiles": every}, indent=1) + "\n")
