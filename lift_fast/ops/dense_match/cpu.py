"""``dense_match`` in the native core, float32 on the CPU.

For a few points each point has its own descriptor. Many points share the similarities of cells instead, interpolated
on both sides: points between the same four query cells search together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _env, _native, devices, memory
from ..nearest.plain import NORM_FLOOR, unit_rows
from .bilinear import Axis, Norms, StretchedMap, axes_at, pixel_grid

# Bytes of the native core's table of similarities.
_TABLE_BUDGET = 64 << 20
# Points processed together; in addition to the table each needs about 100 bytes.
_MOST_POINTS = 1 << 20
# Up to this many pixels, computing all norms at once is faster.
_MOST_NORMS = 1 << 24


def can_run(tokens: Tensor) -> tuple[bool, str]:
    """Whether the native core supports a map, and the reason if not."""
    if tokens.device.type != "cpu" or tokens.dtype != torch.float32:
        return False, f"the native core takes float32 on the CPU, not {tokens.dtype} on {tokens.device}"
    return devices.native_runs()


def match(query: StretchedMap, key: StretchedMap, points: Tensor | None, per_pixel: bool) -> tuple[Tensor, Tensor]:
    """As :func:`.plain.match`."""
    count = query.pixels if points is None else len(points)
    many = count >= query.tokens.shape[0]
    scale = key.inverse_norms().contiguous() if per_pixel else None
    target = (*(axis.arguments() for axis in key.strips()), 0 if scale is None else _native.address(scale))
    similarity = memory.new_empty(query.tokens, count)
    index = memory.empty(count, dtype=torch.int64, device="cpu")
    # A few points' descriptors are divided by their norms; for many points the similarities are.
    norms = Norms(query) if per_pixel and many else None
    all_norms = norms.of_all().flatten() if norms and points is None and count <= _MOST_NORMS else None
    for start in range(0, count, _MOST_POINTS):
        part = slice(start, min(start + _MOST_POINTS, count))
        at = pixel_grid(query.size, part.start, part.stop, query.tokens.device) if points is None else points[part]
        if not many:
            _match_few(query, key, at, per_pixel, target, similarity[part], index[part])
            continue
        _match_many(query, key, at, target, similarity[part], index[part])
        if norms is not None:
            own = norms.of_points(at) if all_norms is None else all_norms[part]
            similarity[part] *= own.masked_fill(index[part] < 0, 1)
    return similarity, index


def _match_few(
    query: StretchedMap,
    key: StretchedMap,
    at: Tensor,
    unit: bool,
    target: tuple[Any, ...],
    similarity: Tensor,
    index: Tensor,
) -> None:
    """Write the matches of ``at [P, 2]``; ``target``: the key's strips and scale, as arguments of the native core."""
    if 1 not in key.tokens.stride() or 0 in key.tokens.stride():
        key = key._replace(tokens=key.tokens.contiguous())
    at = at.contiguous()
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
        unit,
        *target,
        _native.address(similarity),
        _native.address(index),
        _TABLE_BUDGET,
        torch.get_num_threads(),
        _env.cpu_isa(),
    )


def _match_many(
    query: StretchedMap, key: StretchedMap, at: Tensor, target: tuple[Any, ...], similarity: Tensor, index: Tensor
) -> None:
    """:func:`_match_few` for many points, sorted by the four query cells around them."""
    height, width = query.grid
    y, x = axes_at(at, query.grid, query.size, torch.float32)
    queries, keys = (_unit_rows(m.tokens) if m.unnormalized else m.tokens for m in (query, key))
    if bool(torch.isfinite(queries.sum())):
        # Group points at a cell's centre with those beyond it: a finite cell of weight zero adds nothing.
        y, x = (
            axis._replace(high=(axis.low + 1).clamp_(max=cells - 1))
            for axis, cells in zip((y, x), query.grid, strict=True)
        )
    # Sort by low cells, row-major, then by high cells.
    group, order = torch.sort(4 * (y.low * width + x.low) + 2 * (y.high - y.low) + x.high - x.low)
    y, x = (Axis(*(part[order] for part in axis)) for axis in (y, x))
    weights = torch.stack([x.weight, y.weight], dim=1)
    # As many rows of query cells at a time as the budget allows.
    band = max(1, _TABLE_BUDGET // (4 * keys.shape[0] * width) - 1)
    for top in range(0, height, band):
        ends = torch.tensor([4 * width * top, 4 * width * (top + band)], device="cpu")
        begin, end = torch.searchsorted(group, ends).tolist()
        if begin == end:
            continue
        _, sizes = torch.unique_consecutive(group[begin:end], return_counts=True)
        start = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        leader = begin + start[:-1]
        corners = torch.stack(
            [(row[leader] - top) * width + column[leader] for row in (y.low, y.high) for column in (x.low, x.high)],
            dim=1,
        ).int()
        table = (queries[top * width : (top + band + 1) * width] @ keys.t()).contiguous()
        values = memory.new_empty(table, end - begin)
        found = memory.empty(end - begin, dtype=torch.int64, device="cpu")
        _native.require().dense_match_f32(
            _native.address(table),
            table.shape[0],
            corners.shape[0],
            _native.address(corners),
            _native.address(start),
            _native.address(weights[begin:end]),
            *target,
            _native.address(values),
            _native.address(found),
            torch.get_num_threads(),
            _env.cpu_isa(),
        )
        # Back to the order of the points.
        where = order[begin:end]
        similarity[where], index[where] = values, found


def _unit_rows(rows: Tensor) -> Tensor:
    """:func:`unit_rows` with the norm in the dtype of ``rows [n, C]`` if it does not overflow."""
    # Faster than vector_norm, which reads a map across its memory layout.
    square = (rows * rows).sum(1)
    if bool(torch.isinf(square).any()):
        return unit_rows(rows)
    return rows * square.sqrt_().clamp_min_(NORM_FLOOR).reciprocal_()[:, None]
