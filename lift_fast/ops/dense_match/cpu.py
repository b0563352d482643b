"""``dense_match`` in the native core, float32 on the CPU.

For a few points each point has its own descriptor. Many points share the similarities of cells instead, interpolated
on both sides: points between the same four query cells search together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ... import _env, _native, devices, memory
from ..nearest.plain import NORM_FLOOR, unit_rows
from .bilinear import StretchedMap, index_of, pixel_grid, points_of, unique_pixels

# Bytes of the native core's table of similarities.
_TABLE_BUDGET = 64 << 20
# By how much the similarity of a pair may differ between the two ways, relative to the largest.
_ROUNDING = 1e-5


def can_run(tokens: Tensor) -> tuple[bool, str]:
    """Whether the native core supports a map, and the reason if not."""
    if tokens.device.type != "cpu" or tokens.dtype != torch.float32:
        return False, f"the native core takes float32 on the CPU, not {tokens.dtype} on {tokens.device}"
    return devices.native_runs()


class _Scale(NamedTuple):
    """What divides the similarities to an image's pixels by their norms."""

    inverse: Tensor | None
    """[H, W] float32"""
    gram: Tensor | None
    """[5, h, w] float64, see ``descriptor_norms_f32`` of the native core"""

    def arguments(self) -> tuple[int, int]:
        return (
            0 if self.inverse is None else _native.address(self.inverse),
            0 if self.gram is None else _native.address(self.gram),
        )


def _scale(image: StretchedMap, per_pixel: bool) -> _Scale:
    if not per_pixel:
        return _Scale(None, None)
    begin, end = image.rows
    inverse = memory.empty((end - begin, image.size[1]), dtype=torch.float32, device="cpu")
    gram = memory.empty((5, *image.grid), dtype=torch.float64, device="cpu")
    _native.require().descriptor_norms_f32(
        _native.address(image.tokens),
        image.tokens.stride(1),
        image.tokens.stride(0),
        image.tokens.shape[1],
        *(axis.arguments() for axis in image.strips()),
        NORM_FLOOR,
        _native.address(gram),
        _native.address(inverse),
        torch.get_num_threads(),
        _env.cpu_isa(),
    )
    return _Scale(inverse, gram)


def match(query: StretchedMap, key: StretchedMap, points: Tensor | None, per_pixel: bool) -> tuple[Tensor, Tensor]:
    """As :func:`.plain.match`."""
    count = query.pixels if points is None else len(points)
    if count < query.tokens.shape[0]:
        at = pixel_grid(query.size, 0, count, query.tokens.device) if points is None else points
        return _match_few(query, key, at, per_pixel)
    search = _Search.of(query, key, per_pixel)
    similarity, index = search.match(points)
    return _cosines(similarity, index, search.own_inverse(points)), index


def shares_table(query: StretchedMap, key: StretchedMap, points: Tensor | None) -> bool:
    """Whether :func:`match_both_ways` is the faster way: where both ways have many points."""
    count = query.pixels if points is None else len(points)
    return count >= max(query.tokens.shape[0], key.tokens.shape[0])


def match_both_ways(
    query: StretchedMap, key: StretchedMap, points: Tensor | None, per_pixel: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`match`, and the query pixel ``[P]`` that is the best one of each match, or -1; from one table.

    Matches repeat, so each is looked up once; and the query that it comes from is a floor of its similarity.
    """
    search = _Search.of(query, key, per_pixel)
    similarity, index = search.match(points)
    own = search.own_inverse(points)
    similarity = _cosines(similarity, index, own)
    targets, which = unique_pixels(index, key.pixels)
    if not len(targets):
        return similarity, index, index
    back = search.turned()
    there = points_of(targets, key.size)
    floor = similarity.new_full((len(targets),), -torch.inf)
    floor.scatter_reduce_(0, which.clamp_min(0), similarity.masked_fill(index < 0, -torch.inf), "amax")
    # Products may round otherwise than on the way there.
    floor -= _ROUNDING if own is not None else _ROUNDING * floor.abs().amax()
    inverse = back.own_inverse(there)
    _, found = back.match(there, floor if inverse is None else floor.div_(inverse))
    return similarity, index, torch.where(which < 0, -1, found[which])


def _cosines(similarity: Tensor, index: Tensor, own: Tensor | None) -> Tensor:
    return similarity if own is None else similarity.mul_(own.masked_fill(index < 0, 1))


def _match_few(query: StretchedMap, key: StretchedMap, at: Tensor, per_pixel: bool) -> tuple[Tensor, Tensor]:
    """Match ``at [P, 2]``, each by its own descriptor."""
    if 1 not in key.tokens.stride() or 0 in key.tokens.stride():
        key = key._replace(tokens=key.tokens.contiguous())
    at = at.contiguous()
    similarity = memory.new_empty(query.tokens, len(at))
    index = memory.empty(len(at), dtype=torch.int64, device="cpu")
    scale = _scale(key, per_pixel)
    maps = (
        (_native.address(m.tokens), m.tokens.stride(1), m.tokens.stride(0), m.grid, m.unnormalized)
        for m in (query, key)
    )
    _native.require().dense_match_points_f32(
        _native.address(at),
        len(at),
        query.tokens.shape[1],
        *maps,
        query.size,
        per_pixel,
        *(axis.arguments() for axis in key.strips()),
        *scale.arguments(),
        _native.address(similarity),
        _native.address(index),
        _TABLE_BUDGET,
        torch.get_num_threads(),
        _env.cpu_isa(),
    )
    return similarity, index


class _Side(NamedTuple):
    """An image of a search, with what the search needs of it."""

    image: StretchedMap
    rows: Tensor
    """[h * w, C], of unit length if they are normalised"""
    scale: _Scale

    @staticmethod
    def of(image: StretchedMap, per_pixel: bool) -> _Side:
        rows = _unit_rows(image.tokens) if image.unnormalized else image.tokens
        return _Side(image, rows, _scale(image, per_pixel))


@dataclass
class _Search:
    """Matches of many points of one image in another, from the similarities of cells."""

    query: _Side
    key: _Side
    table: Tensor | None = None
    """[query cells, key cells], kept where it fits into the budget as a whole"""

    @staticmethod
    def of(query: StretchedMap, key: StretchedMap, per_pixel: bool) -> _Search:
        return _Search(_Side.of(query, per_pixel), _Side.of(key, per_pixel))

    def turned(self) -> _Search:
        """The way back."""
        table = None
        if self.table is not None:
            table = _allocate(*self.table.t().shape)
            table.copy_(self.table.t())
        return _Search(self.key, self.query, table)

    def own_inverse(self, points: Tensor | None) -> Tensor | None:
        """Inverse norms ``[P]`` of the query's descriptors; None if they do not count."""
        if self.query.scale.inverse is None:
            return None
        own = self.query.scale.inverse.flatten()
        return own if points is None else own[index_of(points, self.query.image.size)]

    def match(self, points: Tensor | None, floor: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Similarity ``[P]``, not divided by the query's norms, and key pixel index ``[P]`` or -1.

        ``floor [P]`` is a similarity that each match should reach; the closer, the faster.
        """
        (query, queries, own), (key, keys, scale) = self.query, self.key
        count = query.pixels if points is None else len(points)
        similarity = memory.new_empty(queries, count)
        index = memory.empty(count, dtype=torch.int64, device="cpu")
        points = None if points is None else points.contiguous()
        height, width = query.grid
        # As many rows of query cells at a time as the budget allows.
        band = max(1, _TABLE_BUDGET // (4 * keys.shape[0] * width) - 1)
        for top in range(0, height, band):
            end = min(top + band, height)
            rows = min(end + 1, height) - top
            table = self.table
            if table is None:
                table = _allocate(rows * width, keys.shape[0])
                torch.mm(queries[top * width : (top + rows) * width], keys.t(), out=table)
            _native.require().dense_match_f32(
                _native.address(table),
                rows,
                top,
                end,
                *(axis.arguments() for axis in query.strips()),
                0 if points is None else _native.address(points),
                count,
                0 if floor is None else _native.address(floor),
                *(axis.arguments() for axis in key.strips()),
                *scale.arguments(),
                *own.arguments(),
                _native.address(similarity),
                _native.address(index),
                torch.get_num_threads(),
                _env.cpu_isa(),
            )
            if rows == height:
                self.table = table
        return similarity, index


def _allocate(rows: int, columns: int) -> Tensor:
    table = memory.empty((rows, columns), dtype=torch.float32, device="cpu")
    _native.require().advise_huge_pages(_native.address(table), 4 * table.numel())
    return table


def _unit_rows(rows: Tensor) -> Tensor:
    """:func:`unit_rows` with the norm in the dtype of ``rows [n, C]`` if it does not overflow."""
    # Faster than vector_norm, which reads a map across its memory layout.
    square = (rows * rows).sum(1)
    if bool(torch.isinf(square).any()):
        return unit_rows(rows)
    return rows * square.sqrt_().clamp_min_(NORM_FLOOR).reciprocal_()[:, None]
