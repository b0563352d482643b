"""How ``dense_match`` cuts images into pieces, for the native core and the kernels in Triton and CUDA C++."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Strips(NamedTuple):
    """One axis of an image, on the device that searches: strips of pixels between the same two cells, or at one."""

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

    def members(self) -> Tensor:
        """The pixels of each strip ``[strips, longest]`` int64, its last one repeated."""
        offset = torch.arange(self.longest, device=self.first.device)
        return torch.minimum(self.first[:-1, None] + offset, self.first[1:, None] - 1)

    def arguments(self) -> tuple[int, ...]:
        """Sizes and addresses, for the native core."""
        parts = (self.low, self.high, self.first, self.weight)
        return (self.cells, self.pixels, self.count, *(part.data_ptr() for part in parts))


# Numbers of a patch in Scales.spans.
SPAN = 16


class Scales(NamedTuple):
    """A positive factor of the similarity to each pixel of an image."""

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
    spans: Tensor | None = None
    """[patches, SPAN] float32: what bounds a patch's cosines, PatchSpan in csrc/dense_match_span.hpp; for kernels"""


class Band(NamedTuple):
    """The part of the query image whose cells a table holds."""

    strips_y: tuple[int, int]
    """first strip and the one after the last"""
    strips_x: tuple[int, int]
    top: int
    """first row of cells in the table"""
    left: int
    width: int
    """cells of a row in the table"""
