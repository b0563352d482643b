"""``dense_match`` in the native core, float32 on the CPU.

For a few points each point has its own descriptor. Many points share the similarities of cells instead, interpolated
on both sides: points between the same four query cells search together.
"""

from __future__ import annotations

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
    search = _Search(query, key, per_pixel)
    similarity, index = search.match(points)
    return _cosines(similarity, index, search.own_inverse(points)), index


def match_both_ways(
    query: StretchedMap, key: StretchedMap, points: Tensor | None, per_pixel: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`match`, and the query pixel ``[P]`` that is the best one of each match, or -1; from one table.

    Matches repeat, so each is looked up once; and the query that it comes from is a floor of its similarity.
    """
    count = query.pixels if points is None else len(points)
    search = _Search(query, key, per_pixel)
    if count < max(query.tokens.shape[0], key.tokens.shape[0]):
        return _match_back(query, key, per_pixel, *match(query, key, points, per_pixel))
    similarity, index = search.match(points)
    own = search.own_inverse(points)
    similarity = _cosines(similarity, index, own)
    targets, which = unique_pixels(index, key.pixels)
    if not len(targets):
        return similarity, index, index
    back = search.turned()
    there = points_of(targets, key.size)
    # Products may round otherwise than on the way there.
    floor = similarity.new_full((len(targets),), -torch.inf)
    floor.scatter_reduce_(0, which.clamp_min(0), similarity.masked_fill(index < 0, -torch.inf), "amax")
    floor -= _ROUNDING * floor.abs().amax() if len(floor) and own is None else _ROUNDING
    inverse = back.own_inverse(there)
    _, found = back.match(there, floor if inverse is None else floor.div_(inverse))
    return similarity, index, torch.where(which < 0, -1, found[which])


def _match_back(
    query: StretchedMap, key: StretchedMap, per_pixel: bool, similarity: Tensor, index: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    targets, which = unique_pixels(index, key.pixels)
    if not len(targets):
        return similarity, index, index
    _, found = match(key, query, points_of(targets, key.size), per_pixel)
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


class _Search:
    """Matches of many points of one image in another, from the similarities of cells."""

    def __init__(self, query: StretchedMap, key: StretchedMap, per_pixel: bool) -> None:
        self.query, self.key = query, key
        self.queries, self.keys = (_unit_rows(m.tokens) if m.unnormalized else m.tokens for m in (query, key))
        self.scale, self.own = _scale(key, per_pixel), _scale(query, per_pixel)
        self.table: Tensor | None = None

    def turned(self) -> _Search:
        """The way back."""
        back = object.__new__(_Search)
        back.query, back.key, back.queries, back.keys = self.key, self.query, self.keys, self.queries
        back.scale, back.own = self.own, self.scale
        back.table = None if self.table is None else _allocate(self.table.shape[1], self.table.shape[0])
        if self.table is not None and back.table is not None:
            back.table.copy_(self.table.t())
        return back

    def own_inverse(self, points: Tensor | None) -> Tensor | None:
        """Inverse norms ``[P]`` of the query's descriptors; None if they do not count."""
        if self.own.inverse is None:
            return None
        own = self.own.inverse.flatten()
        return own if points is None else own[index_of(points, self.query.size)]

    def match(self, points: Tensor | None, floor: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Similarity ``[P]``, not divided by the query's norms, and key pixel index ``[P]`` or -1.

        ``floor [P]`` is a similarity that each match should reach; the closer, the faster.
        """
        count = self.query.pixels if points is None else len(points)
        similarity = memory.new_empty(self.queries, count)
        index = memory.empty(count, dtype=torch.int64, device="cpu")
        points = None if points is None else points.contiguous()
        height, width = self.query.grid
        # As many rows of query cells at a time as the budget allows.
        band = max(1, _TABLE_BUDGET // (4 * self.keys.shape[0] * width) - 1)
        for top in range(0, height, band):
            end = min(top + band, height)
            rows = min(end + 1, height) - top
            table = self.table if self.table is not None else _allocate(rows * width, self.keys.shape[0])
            if self.table is None:
                torch.mm(self.queries[top * width : (top + rows) * width], self.keys.t(), out=table)
            _native.require().dense_match_f32(
                _native.address(table),
                rows,
                top,
                end,
                *(axis.arguments() for axis in self.query.strips()),
                0 if points is None else _native.address(points),
                count,
                0 if floor is None else _native.address(floor),
                *(axis.arguments() for axis in self.key.strips()),
                *self.scale.arguments(),
                *self.own.arguments(),
                _native.address(similarity),
                _native.address(index),
                torch.get_num_threads(),
                _env.cpu_isa(),
            )
            self.table = table if rows == height else None
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
