"""Tiles of the GPU kernels' launches: measured on this model of device, or the default.

A forward pass never measures anything; :func:`lift_fast.tune` does and stores the results on disk.
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

# Increment it when a kernel changes such that measured tiles are no longer valid.
_FORMAT = 2


class Work(NamedTuple):
    """The properties of a launch on which its best tile depends."""

    kernel: str
    positions: int
    """Output positions."""
    channels: int
    """Output channels of the stage."""
    inputs: int
    """Input channels of the stage."""
    counts: tuple[int, ...]
    """Possible numbers of accumulators in a block."""
    dtype: torch.dtype

    def key(self) -> str:
        # Within a factor of two of the positions the best tile hardly changes.
        dtype = str(self.dtype).removeprefix("torch.")
        bucket = max(self.positions - 1, 1).bit_length()
        return f"{self.kernel} {dtype} {self.inputs}->{self.channels} positions<=2^{bucket}"


def cache_file(device: torch.device) -> Path:
    """The file of measured tiles for this model of device."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return _env.cache_folder() / f"tiles-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json"


@cache
def _measured(path: Path) -> dict[str, Tile]:
    """The tiles of one file; warns and returns none if it cannot be read."""
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
    """The tile of a launch; a cache look-up after the first call."""
    known = _measured(cache_file(device)).get(work.key())
    if known is not None and known in candidates(work, device):
        return known
    return tiles.default(work.positions, *_limits(work, device))


_edition = 0


def edition() -> int:
    """A number that changes with each :func:`forget`, after which launches may have other tiles."""
    return _edition


def forget() -> None:
    """Read the file again at the next launch."""
    global _edition
    _measured.cache_clear()
    tile_for.cache_clear()
    # Last, or another thread could cache the old tiles under the new number.
    _edition += 1


def candidates(work: Work, device: torch.device) -> list[Tile]:
    """Every tile worth measuring."""
    return tiles.candidates(*_limits(work, device))


def _limits(work: Work, device: torch.device) -> tuple[int, list[int], int, int, tuple[int, int]]:
    itemsize = work.dtype.itemsize
    columns, depth = tiles.columns_of(work.channels), tiles.depth_of(itemsize, work.inputs)
    return columns, list(work.counts), depth, itemsize, launch.capability(device)


def store(path: Path, chosen: dict[str, Tile]) -> None:
    """Add tiles to a file; its tiles of other work stay."""
    every = {key: list(tile) for key, tile in (_measured(path) | chosen).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps({"format": _FORMAT, "tiles": every}, indent=1) + "\n")
