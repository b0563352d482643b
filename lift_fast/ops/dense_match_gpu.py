"""``dense_match`` on the GPU: tables of cell similarities in bands, each searched by one launch.

A call needs, beside its results, a table of at most 256 MB and one number per key pixel; it never waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import gpu_plan
from .dense_match import Picture, _cut_strips, sample_bilinear
from .nearest import unit_rows

if TYPE_CHECKING:
    from ..kernels.dense_match import Band, Scales, Strips

# Bytes of cell similarities that exist at one time.
_TABLE_BUDGET = 256 << 20


def can_run(query: Picture, key: Picture) -> tuple[bool, str]:
    """Whether the kernel serves these pictures, and the reason if not."""
    device = query.tokens.device
    if device.type != "cuda":
        return False, f"the maps are on {device}, not on a CUDA device"
    return (
        fits(query, key)
        if gpu_plan.can_run(device, query.tokens.dtype)[0]
        else gpu_plan.can_run(device, query.tokens.dtype)
    )


def fits(query: Picture, key: Picture) -> tuple[bool, str]:
    """:func:`can_run` without the question of the device."""
    if query.tokens.dtype != torch.float32:
        return False, f"the kernel computes in float32, not in {query.tokens.dtype}"
    if max(key.pixels, query.pixels) >= 2**31 - 1:
        return False, f"pictures of less than 2^31 pixels, got {query.size} and {key.size}"
    if 4 * 4 * key.tokens.shape[0] > _TABLE_BUDGET:
        return False, f"maps of at most {_TABLE_BUDGET // 16} cells, got {key.grid}"
    return True, "Triton"


@lru_cache(maxsize=64)
def _strips(cells: int, pixels: int, device: torch.device) -> tuple[Strips, list[int], list[int]]:
    """One axis on the device, and the cells before and after each of its strips."""
    from ..kernels.dense_match import Strips

    cut = _cut_strips(cells, pixels)
    longest = int((cut.first[1:] - cut.first[:-1]).max())
    parts = (part.to(device) for part in (cut.low, cut.high, cut.first, cut.weight))
    return Strips(cells, pixels, *parts, longest), cut.low.tolist(), cut.high.tolist()


def _axes(picture: Picture) -> tuple[Strips, Strips]:
    y, x = (
        _strips(cells, pixels, picture.tokens.device)[0]
        for cells, pixels in zip(picture.grid, picture.size, strict=True)
    )
    return y, x


def _scales(key: Picture, axes: tuple[Strips, Strips]) -> Scales:
    """The inverse norms of the key's pixels, and their range in each patch."""
    from ..kernels.dense_match import Scales

    inverse = key.inverse_norms()
    high, low = inverse, inverse
    for dim, axis in enumerate(axes):
        # Each strip's pixels, the last one repeated.
        offset = torch.arange(axis.longest, device=inverse.device)
        at = torch.minimum(axis.first[:-1, None] + offset, axis.first[1:, None] - 1).flatten()
        high = high.index_select(dim, at).unflatten(dim, (axis.count, axis.longest)).amax(dim + 1)
        low = low.index_select(dim, at).unflatten(dim, (axis.count, axis.longest)).amin(dim + 1)
    # NaN next to cells that take no part.
    largest = inverse.nan_to_num(0.0, posinf=0.0).max().view(1)
    return Scales(inverse.flatten(), high.flatten().contiguous(), low.flatten().contiguous(), largest)


def _parts(low: list[int], high: list[int], most: int) -> Iterator[tuple[int, int]]:
    """Consecutive strips that together need at most ``most`` cells, but at least one strip."""
    start = 0
    while start < len(low):
        stop = start + 1
        while stop < len(low) and high[stop] - low[start] < most:
            stop += 1
        yield start, stop
        start = stop


def _bands(query: Picture, rows: int) -> Iterator[tuple[Band, int, int]]:
    """Parts of the query picture that need at most ``rows`` rows of the table; with the cells after each part."""
    from ..kernels.dense_match import Band

    device = query.tokens.device
    _, low_y, high_y = _strips(query.grid[0], query.size[0], device)
    _, low_x, high_x = _strips(query.grid[1], query.size[1], device)
    for first_x, end_x in _parts(low_x, high_x, max(2, rows // 2)):
        left, right = low_x[first_x], high_x[end_x - 1] + 1
        for first_y, end_y in _parts(low_y, high_y, max(2, rows // (right - left))):
            top = low_y[first_y]
            yield Band((first_y, end_y), (first_x, end_x), top, left, right - left), high_y[end_y - 1] + 1, right


def match_gpu(query: Picture, key: Picture, points: Tensor | None, per_pixel: bool) -> tuple[Tensor, Tensor]:
    """The result of :func:`lift_fast.ops.dense_match.match_exhaustive` for ``points [P, 2]``, None for every pixel."""
    from ..kernels import dense_match as kernel

    if points is not None and len(points) >= max(2 * query.tokens.shape[0], query.pixels // 16):
        # So many: cheaper to match every pixel, with whole groups, and to look them up.
        similarity, index = match_gpu(query, key, None, per_pixel)
        at = points[:, 1] * query.size[1] + points[:, 0]
        return similarity[at], index[at]
    axes = _axes(key)
    scales = _scales(key, axes) if per_pixel else None
    count = query.pixels if points is None else len(points)
    similarity = query.tokens.new_empty(count)
    index = torch.empty(count, dtype=torch.int64, device=similarity.device)
    keys = key.tokens.t()
    rows = _TABLE_BUDGET // (4 * key.tokens.shape[0])
    if points is not None:
        for start in range(0, count, rows):
            part = slice(start, min(start + rows, count))
            descriptors = sample_bilinear(query.tokens, query.grid, query.size, points[part])
            if per_pixel:
                descriptors = unit_rows(descriptors)
            kernel.match(descriptors @ keys, axes, scales, similarity[part], index[part])
        return similarity, index
    cells = query.tokens.unflatten(0, query.grid)
    for band, bottom, right in _bands(query, rows):
        table = cells[band.top : bottom, band.left : right].reshape(-1, cells.shape[2]) @ keys
        kernel.match(table, axes, scales, similarity, index, _axes(query), band)
    if per_pixel:
        similarity = torch.where(index < 0, similarity, similarity * query.inverse_norms().flatten())
    return similarity, index
