"""How ``dense_match`` cuts pictures into pieces on the GPU, for its kernels in Triton and in CUDA C++ alike."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Strips(NamedTuple):
    """One axis of a picture: the pixels between neighbouring cells, on the device."""

    cells: int
    pixels: int
    low: Tensor
    """[strips] int32, the cell before the strip's pixels"""
    high: Tensor
    """[strips] int32, the cell after them"""
    first: Tensor
    """[strips + 1] int32 pixels"""
    weight: Tensor
    """[pixels] float32, share of the cell after"""
    longest: int
    """pixels of the longest strip"""

    @property
    def count(self) -> int:
        return self.low.shape[0]


class Scales(NamedTuple):
    """What the similarity to each pixel of a picture is multiplied by, positive."""

    pixel: Tensor
    """[H * W] float32"""
    high: Tensor
    """[patches] float32: the largest of each patch"""
    low: Tensor
    """[patches] float32"""
    largest: Tensor
    """[1] float32"""
    rows: Tensor
    """[H * strips along x] float32: the largest of each strip's pixels in each row"""


class Band(NamedTuple):
    """The part of the query picture whose cells a table holds."""

    strips_y: tuple[int, int]
    """first strip and the one after the last"""
    strips_x: tuple[int, int]
    top: int
    """first row of cells in the table"""
    left: int
    width: int
    """cells of a row in the table"""
