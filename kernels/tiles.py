"""Tile shapes of the Triton kernels: those that a kernel may use, and its default if nothing was measured."""

from __future__ import annotations

import itertools
from typing import NamedTuple

# Blocks that fill a device: these kernels are for devices with about 100 multiprocessors.
_FULL = 96
# Bytes of shared memory that a block may use, by compute capability (CUDA programming guide, technical
# specifications); later members of a family fall back to its first.
_SHARED_MEMORY = {
    (8, 0): 163 << 10,
    (8, 6): 99 << 10,
    (8, 7): 163 << 10,
    (8, 9): 99 << 10,
    (9, 0): 227 << 10,
    (10, 0): 227 << 10,
    (12, 0): 99 << 10,
}


# Most output channels of one product of Hopper's instructions.
_WIDEST = 256


class Tile(NamedTuple):
    """How a block of a kernel cuts its work."""

    rows: int
    """Output positions, a power of two."""
    columns: int
    """Output channels of one accumulator, a power of two."""
    accumulators: int
    """Accumulators of a block, side by side; they share each load of the inputs."""
    depth: int
    """Input channels of one step, a power of two."""
    warps: int
    stages: int
    """Loads in flight."""
    merged: int = 1
    """How many of the accumulators form one wider accumulator, a power of two; the rest form another. More than 1 is
    for kernels of their own, which are only candidates: no default uses it."""
    cached: int = 0
    """1: inputs pass through the L1 cache, which overlapping windows share, in copies half as wide; 0: they bypass it.
    Only for these kernels too."""

    @property
    def wide(self) -> bool:
        """Whether it is for the kernels with wide accumulators."""
        return self.merged > 1 or self.cached == 1


# Triton's functions of these names, which also serve kernels, cost the host 2 us a call.
def cdiv(count: int, size: int) -> int:
    """The number of pieces of ``size`` that hold ``count``."""
    return -(-count // size)


def next_power_of_2(count: int) -> int:
    """The smallest power of two that is not below ``count`` >= 1."""
    return 1 << (count - 1).bit_length()


def shared_memory(capability: tuple[int, int]) -> int:
    """Bytes of shared memory that a block may use at this compute capability."""
    known = [key for key in _SHARED_MEMORY if key <= capability]
    return _SHARED_MEMORY[max(known)] if known else 48 << 10


def columns_of(channels: int) -> int:
    """Width of one accumulator: the narrowest that wastes nothing at the paper's widths, 64 at most."""
    return max(16, min(64, 1 << (channels - 1).bit_length()))


def padded(channels: int) -> int:
    """Output channels rounded up to whole accumulators."""
    columns = columns_of(channels)
    return -(-channels // columns) * columns


def depth_of(itemsize: int, channels: int) -> int:
    """Input channels of one step: 128 bytes a row, less for narrow networks."""
    return max(16, min(128 // itemsize, 1 << (channels - 1).bit_length()))


def fits(tile: Tile, itemsize: int, capability: tuple[int, int]) -> bool:
    """Whether the tile's staged loads fit into shared memory and its accumulators into registers."""
    columns = tile.accumulators * tile.columns
    staged = (tile.rows + columns) * tile.depth * itemsize * tile.stages
    registers = tile.rows * columns / (32 * tile.warps)
    # Of a thread's 255 registers. Before Hopper, and in float32, the operands of a product take registers too.
    room = 96 if capability >= (9, 0) and itemsize == 2 else 64
    if tile.wide:
        left = tile.accumulators % tile.merged
        if tile.merged > tile.accumulators or left & (left - 1) or tile.merged * tile.columns > _WIDEST:
            return False
        # The upsample stage's bias lies next to the loads, 32 terms for each channel; its blocks have at most 192.
        staged += 32 * min(columns, 192) * itemsize
        # Their kernels keep little else in registers, and Hopper's products keep no operands there.
        room = 192 if tile.warps == 8 and tile.merged > 1 else 96
    return staged <= shared_memory(capability) - (2 << 10) and registers <= room


def candidates(columns: int, counts: list[int], depth: int, itemsize: int, capability: tuple[int, int]) -> list[Tile]:
    """Every tile worth measuring, for each number of accumulators in ``counts``; merged accumulators first.

    Merging is for half-precision products of Hopper and of the data centre's Blackwells, which read their operands from
    shared memory, again for each accumulator.
    """
    merging = (9, 0) <= capability < (12, 0) and itemsize == 2
    tiles = [
        Tile(rows, columns, accumulators, depth // shrink, warps, stages, merged, cached)
        for merged in ((4, 2, 1) if merging else (1,))
        for cached in ((1, 0) if merging else (0,))
        for accumulators in counts
        for rows in ((64, 128, 256) if merged > 1 else (64, 128) if cached else (16, 32, 64, 128))
        for warps in (4, 8)
        for shrink in ((1,) if merged > 1 or cached else (1, 2))
        for stages in ((3, 4) if cached else (2, 3, 4))
        if depth // shrink >= 16
    ]
    return [tile for tile in tiles if fits(tile, itemsize, capability)]


def default(
    positions: int, columns: int, counts: list[int], depth: int, itemsize: int, capability: tuple[int, int]
) -> Tile:
    """The tile if nothing was measured: large if the work fills the device, small if it would leave it idle.

    Args:
        positions: output positions of the launch.
        columns: output channels of an accumulator.
        counts: numbers of accumulators that a block may have; the largest covers all output channels, or as many as
            a block can hold.
        depth: input channels of a step.
        itemsize: bytes per element.
        capability: of the device.
    """
    most = max(counts)
    # Hopper's and Blackwell's products take 64 rows; 32 and 16 are for work that would leave the device idle.
    shapes = [(rows, accumulators) for rows in (128, 64, 32, 16) for accumulators in counts]
    shapes.sort(key=lambda shape: (shape[0] < 64, -shape[0] * shape[1]))
    for shrink in (1, 2):
        for rows, accumulators in shapes:
            blocks = -(-positions // rows) * (most // accumulators)
            if blocks < _FULL and (rows, accumulators) != shapes[-1]:
                continue
            for stages, warps in itertools.product((4, 3, 2), (4, 8)):
                tile = Tile(rows, columns, accumulators, max(16, depth // shrink), warps, stages)
                if fits(tile, itemsize, capability):
                    return tile
    return Tile(16, columns, counts[-1], 16, 8, 2)
