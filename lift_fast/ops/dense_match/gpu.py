"""``dense_match`` on the GPU: tables of cell similarities in bands, each searched by one launch.

The search runs in the native core's CUDA kernel, or in Triton where that is missing. A call needs, beside its results,
a table of at most 256 MB and one number per key pixel; it never waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ... import _env, devices, memory
from ...kernels.strips import Band, Scales, Strips
from . import cuda
from .op import Picture, cut_strips

# Bytes of cell similarities that exist at one time.
_TABLE_BUDGET = 256 << 20


def can_run(query: Picture, key: Picture) -> tuple[bool, str]:
    """Whether one of the kernels serves these pictures: which, or why none does."""
    device = query.tokens.device
    if device.type != "cuda":
        return False, f"the maps are on {device}, not on a CUDA device"
    served, reason = fits(query, key)
    if not served:
        return False, reason
    if cuda.can_run(device)[0]:
        return True, "CUDA C++"
    runs, reason = devices.kernels_run(device, query.tokens.dtype)
    return runs, "Triton" if runs else reason


def select(device: torch.device, backend: str | None = None) -> str:
    """Which kernel searches on a device: "cuda" where the native core has one that runs, else "triton".

    Raises:
        RuntimeError: if the one that was asked for by name cannot run; says why.
    """
    if backend is None:
        return "cuda" if cuda.can_run(device)[0] else "triton"
    if backend not in ("cuda", "triton"):
        raise ValueError(f'backend must be "cuda", "triton" or None, got {backend!r}')
    runs, reason = cuda.can_run(device) if backend == "cuda" else (not _env.triton_disabled(), "")
    if not runs:
        reason = reason or "switched off by LIFT_FAST_DISABLE_TRITON=1"
        raise RuntimeError(f"dense_match's {backend} kernel cannot run: {reason}; leave the choice to the package")
    return backend


def _search(backend: str) -> Any:
    """The launcher of a kernel; Triton is imported only for its own."""
    if backend == "cuda":
        return cuda.match
    from ...kernels import dense_match as kernel

    return kernel.match


def fits(query: Picture, key: Picture) -> tuple[bool, str]:
    """:func:`can_run` without the question of the device and its kernels."""
    if query.tokens.dtype != torch.float32:
        return False, f"the kernel computes in float32, not in {query.tokens.dtype}"
    if max(key.pixels, query.pixels) >= 2**31 - 1:
        return False, f"pictures of less than 2^31 pixels, got {query.size} and {key.size}"
    if 4 * 4 * key.tokens.shape[0] > _TABLE_BUDGET:
        return False, f"maps of at most {_TABLE_BUDGET // 16} cells, got {key.grid}"
    return True, ""


# A few KB each. Graphs that were captured read them: none may be dropped for as long as anyone is likely to replay one.
@lru_cache(maxsize=4096)
def _strips(
    cells: int, pixels: int, device: torch.device, rows: tuple[int, int] | None = None, joined: bool = False
) -> tuple[Strips, list[int], list[int]]:
    """One axis on the device, or a part of its pixels, and the cells before and after each of its strips."""
    cut = cut_strips(cells, pixels, rows, joined)
    longest = int((cut.first[1:] - cut.first[:-1]).max())
    parts = (part.to(device) for part in (cut.low, cut.high, cut.first, cut.weight))
    return Strips(cells, cut.pixels, *parts, longest), cut.low.tolist(), cut.high.tolist()


def _axes(picture: Picture, joined: bool = False) -> tuple[Strips, Strips]:
    (height, width), (pixels_y, pixels_x) = picture.grid, picture.size
    device = picture.tokens.device
    y = _strips(height, pixels_y, device, picture.part, joined)[0]
    return y, _strips(width, pixels_x, device, None, joined)[0]


@lru_cache(maxsize=4096)
def _joins(grid: tuple[int, int], size: tuple[int, int], part: tuple[int, int] | None) -> bool:
    """Whether joined strips are far fewer. Even enlargements have one beyond each outermost centre alone."""
    axes = cut_strips(grid[0], size[0], part), cut_strips(grid[1], size[1])
    return any(axis.low.shape[0] > axis.cells + 1 + axis.cells // 4 for axis in axes)


def _ways(query: Picture, key: Picture, backend: str) -> list[tuple[bool, dict[str, Any]]]:
    """How to launch a search: whether strips are joined, and what else the launcher is told.

    Where pixels lie at the centres of cells, strips of a single cell are up to half of all: they are joined to others
    where every cell is finite, which the device alone knows. So there are two launches, one of which does nothing.
    """
    if backend != "cuda" or not (_joins(query.grid, query.size, None) or _joins(key.grid, key.size, key.part)):
        return [(False, {})]
    finite = torch.isfinite(query.tokens.sum() + key.tokens.sum()).int()
    return [(joined, {"when": cuda.When(finite, joined)}) for joined in (True, False)]


def _scales(inverse: Tensor | None, axes: tuple[Strips, Strips]) -> Scales | None:
    """The inverse norms ``[H, W]`` of a picture's pixels, and their range in each patch; None without them."""
    if inverse is None:
        return None
    rows = high = low = inverse
    for dim in (1, 0):
        axis = axes[dim]
        # Each strip's pixels, the last one repeated.
        offset = torch.arange(axis.longest, device=inverse.device)
        at = torch.minimum(axis.first[:-1, None] + offset, axis.first[1:, None] - 1).flatten()
        high = high.index_select(dim, at).unflatten(dim, (axis.count, axis.longest)).amax(dim + 1)
        low = low.index_select(dim, at).unflatten(dim, (axis.count, axis.longest)).amin(dim + 1)
        rows = high if dim == 1 else rows
    # NaN next to cells that take no part.
    largest = inverse.nan_to_num(0.0, posinf=0.0).max().view(1)
    return Scales(inverse.flatten(), high.flatten(), low.flatten(), largest, rows.flatten())


def _parts(low: list[int], high: list[int], most: int) -> Iterator[tuple[int, int]]:
    """Consecutive strips that together need at most ``most`` cells, but at least one strip."""
    start = 0
    while start < len(low):
        stop = start + 1
        while stop < len(low) and high[stop] - low[start] < most:
            stop += 1
        yield start, stop
        start = stop


def _whole(query: Picture, axes: tuple[Strips, Strips]) -> Band:
    """All of the query picture, with all of its cells in the table."""
    return Band((0, axes[0].count), (0, axes[1].count), 0, 0, query.grid[1])


def _bands(query: Picture, rows: int) -> Iterator[tuple[Band, int, int]]:
    """Parts of the query picture that need at most ``rows`` rows of the table; with the cells after each part."""
    device = query.tokens.device
    _, low_y, high_y = _strips(query.grid[0], query.size[0], device)
    _, low_x, high_x = _strips(query.grid[1], query.size[1], device)
    for first_x, end_x in _parts(low_x, high_x, max(2, rows // 2)):
        left, right = low_x[first_x], high_x[end_x - 1] + 1
        for first_y, end_y in _parts(low_y, high_y, max(2, rows // (right - left))):
            top = low_y[first_y]
            yield Band((first_y, end_y), (first_x, end_x), top, left, right - left), high_y[end_y - 1] + 1, right


def _many(query: Picture, points: Tensor) -> bool:
    """So many points that it is cheaper to match every pixel, with whole groups, and to look them up."""
    return len(points) >= max(2 * query.tokens.shape[0], query.pixels // 16)


def match_gpu(
    query: Picture, key: Picture, points: Tensor | None, per_pixel: bool, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """The result of :func:`lift_fast.ops.dense_match.op.match_exhaustive` for ``points [P, 2]``, None for every pixel.

    ``backend``: as for :func:`select`.
    """
    backend = select(query.tokens.device, backend)
    if points is not None and _many(query, points):
        similarity, index = match_gpu(query, key, None, per_pixel, backend)
        at = points[:, 1] * query.size[1] + points[:, 0]
        return similarity[at], index[at]
    search = _search(backend)
    count = query.pixels if points is None else len(points)
    similarity = memory.new_empty(query.tokens, count)
    index = memory.empty(count, dtype=torch.int64, device=similarity.device)
    keys = key.tokens.t()
    rows = _TABLE_BUDGET // (4 * key.tokens.shape[0])
    # Bands are cut from strips as they are.
    single = points is not None or rows >= query.tokens.shape[0]
    inverse = key.inverse_norms() if per_pixel else None
    ways = []
    for joined, told in _ways(query, key, backend) if single else [(False, {})]:
        axes = _axes(key, joined)
        ways.append((joined, axes, _scales(inverse, axes), told))
    if points is not None:
        for start in range(0, count, rows):
            part = slice(start, min(start + rows, count))
            table = query.descriptors(points[part], per_pixel) @ keys
            for _, axes, scales, told in ways:
                search(table, axes, scales, similarity[part], index[part], **told)
        return similarity, index
    cells = query.tokens.unflatten(0, query.grid)
    for band, bottom, right in [(None, *query.grid)] if single else _bands(query, rows):
        top, left = (band.top, band.left) if band is not None else (0, 0)
        table = cells[top:bottom, left:right].reshape(-1, cells.shape[2]) @ keys
        for joined, axes, scales, told in ways:
            query_axes = _axes(query, joined)
            search(table, axes, scales, similarity, index, query_axes, band or _whole(query, query_axes), **told)
    if per_pixel:
        similarity = torch.where(index < 0, similarity, similarity * query.inverse_norms().flatten())
    return similarity, index


def checks_mutual(query: Picture, key: Picture, points: Tensor | None, backend: str | None = None) -> bool:
    """Whether :func:`match_mutual` serves these pictures: the CUDA kernels alone do, from one table of every cell."""
    if select(query.tokens.device, backend) != "cuda" or (points is not None and not _many(query, points)):
        return False
    y, x = _axes(query)
    query_cells, key_cells = query.tokens.shape[0], key.tokens.shape[0]
    return (
        4 * query_cells * key_cells <= _TABLE_BUDGET
        and key_cells <= cuda.MOST_MUTUAL_CELLS
        and y.longest * x.longest <= cuda.MOST_MUTUAL_GROUP
    )


def match_mutual(query: Picture, key: Picture, points: Tensor | None, per_pixel: bool) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`match_gpu`, and whether each match is mutual, from one table of similarities.

    Of all query pixels only few can be the best one of their match, so this takes far less than a second search.
    """
    similarity = memory.new_empty(query.tokens, query.pixels)
    index = memory.empty(query.pixels, dtype=torch.int64, device=similarity.device)
    valid = memory.empty(query.pixels, dtype=torch.bool, device=similarity.device)
    table = query.tokens @ key.tokens.t()
    query_norms, key_norms = (picture.inverse_norms() if per_pixel else None for picture in (query, key))
    for joined, told in _ways(query, key, "cuda"):
        query_axes, key_axes = _axes(query, joined), _axes(key, joined)
        whole, scales = _whole(query, query_axes), _scales(key_norms, key_axes)
        cuda.match(table, key_axes, scales, similarity, index, query_axes, whole, **told)
        cuda.mutual(table, query_axes, _scales(query_norms, query_axes), key_axes, index, valid, **told)
    if query_norms is not None:
        similarity = torch.where(index < 0, similarity, similarity * query_norms.flatten())
    if points is None:
        return similarity, index, valid
    at = points[:, 1] * query.size[1] + points[:, 0]
    return similarity[at], index[at], valid[at]
