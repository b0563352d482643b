"""``dense_match`` on the GPU: tables of cell similarities in bands, each searched by one launch.

The search runs in the native core's CUDA kernel, or in Triton where that is missing. A call needs, beside its results,
a table of at most 256 MB and one number per key pixel; it never waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import _env, devices, memory
from ...kernels.strips import Band, Scales, Strips
from . import cuda
from .bilinear import StretchedMap, cut_strips, index_of, scales_of

# Bytes of cell similarities that exist at one time.
_TABLE_BUDGET = 256 << 20


def can_run(query: StretchedMap, key: StretchedMap) -> tuple[bool, str]:
    """Whether one of the kernels serves these maps: which, or why none does."""
    device = query.tokens.device
    if device.type != "cuda":
        return False, f"the maps are on {device}, not on a CUDA device"
    served, reason = fits(query, key)
    if not served:
        return False, reason
    if devices.cuda_runs(device)[0]:
        return True, "CUDA C++"
    runs, reason = devices.kernels_run(device, query.tokens.dtype)
    return runs, "Triton" if runs else reason


def select(device: torch.device, backend: str | None = None) -> str:
    """Which kernel searches on a device: "cuda" where the native core has one that runs, else "triton".

    Raises:
        RuntimeError: if the one that was asked for by name cannot run; says why.
    """
    if backend is None:
        return "cuda" if devices.cuda_runs(device)[0] else "triton"
    if backend not in ("cuda", "triton"):
        raise ValueError(f'backend must be "cuda", "triton" or None, got {backend!r}')
    runs, reason = devices.cuda_runs(device) if backend == "cuda" else (not _env.triton_disabled(), "")
    if not runs:
        reason = reason or "switched off by LIFT_FAST_DISABLE_TRITON=1"
        raise RuntimeError(f"dense_match's {backend} kernel cannot run: {reason}; leave the choice to the package")
    return backend


def _launcher(backend: str) -> Any:
    """Triton is imported only for its own."""
    if backend == "cuda":
        return cuda.match
    from ...kernels import dense_match as kernel

    return kernel.match


def fits(query: StretchedMap, key: StretchedMap) -> tuple[bool, str]:
    """:func:`can_run` without the question of the device and its kernels."""
    if query.tokens.dtype != torch.float32:
        return False, f"the kernel computes in float32, not in {query.tokens.dtype}"
    if max(key.pixels, query.pixels) >= 2**31 - 1:
        return False, f"images of less than 2^31 pixels, got {query.size} and {key.size}"
    if 4 * 4 * key.tokens.shape[0] > _TABLE_BUDGET:
        return False, f"maps of at most {_TABLE_BUDGET // 16} cells, got {key.grid}"
    return True, ""


def match(
    query: StretchedMap, key: StretchedMap, points: Tensor | None, per_pixel: bool, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """As :func:`.plain.match`; ``backend`` as for :func:`select`."""
    backend = select(query.tokens.device, backend)
    if points is None:
        return _match_image(query, key, per_pixel, backend)
    if _many(query, points):
        similarity, index = _match_image(query, key, per_pixel, backend)
        at = index_of(points, query.size)
        return similarity[at], index[at]
    launch = _launcher(backend)
    similarity = memory.new_empty(query.tokens, len(points))
    index = memory.empty(len(points), dtype=torch.int64, device=similarity.device)
    rows = _TABLE_BUDGET // (4 * key.tokens.shape[0])
    ways = _ways(query, key, per_pixel, backend)
    for start in range(0, len(points), rows):
        part = slice(start, min(start + rows, len(points)))
        table = query.descriptors(points[part], per_pixel) @ key.tokens.t()
        for way in ways:
            launch(table, way.key, way.scales, similarity[part], index[part], **way.told)
    return similarity, index


def match_mutual(
    query: StretchedMap, key: StretchedMap, points: Tensor | None, per_pixel: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`match`, and whether each match is mutual, from one table of similarities.

    Of all query pixels only few can be the best one of their match, so this takes far less than a second search.
    """
    valid = memory.empty(query.pixels, dtype=torch.bool, device=query.tokens.device)
    similarity, index = _match_image(query, key, per_pixel, "cuda", valid)
    if points is None:
        return similarity, index, valid
    at = index_of(points, query.size)
    return similarity[at], index[at], valid[at]


def checks_mutual(query: StretchedMap, key: StretchedMap, points: Tensor | None, backend: str | None = None) -> bool:
    """Whether :func:`match_mutual` serves these maps: the CUDA kernels alone do, from one table of every cell."""
    if select(query.tokens.device, backend) != "cuda" or (points is not None and not _many(query, points)):
        return False
    y, x = query.strips()
    query_cells, key_cells = query.tokens.shape[0], key.tokens.shape[0]
    return (
        4 * query_cells * key_cells <= _TABLE_BUDGET
        and key_cells <= cuda.MOST_MUTUAL_CELLS
        and y.longest * x.longest <= cuda.MOST_MUTUAL_GROUP
    )


def _many(query: StretchedMap, points: Tensor) -> bool:
    """So many points that it is cheaper to match every pixel, with whole groups, and to look them up."""
    return len(points) >= max(2 * query.tokens.shape[0], query.pixels // 16)


def _match_image(
    query: StretchedMap, key: StretchedMap, per_pixel: bool, backend: str, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`match` of every pixel; ``valid [H * W]``: where to write whether matches are mutual."""
    launch = _launcher(backend)
    similarity = memory.new_empty(query.tokens, query.pixels)
    index = memory.empty(query.pixels, dtype=torch.int64, device=similarity.device)
    rows = _TABLE_BUDGET // (4 * key.tokens.shape[0])
    # Bands are cut from strips as they are.
    single = rows >= query.tokens.shape[0]
    ways = _ways(query, key, per_pixel, backend, joinable=single)
    own = query.inverse_norms() if per_pixel else None
    cells = query.tokens.unflatten(0, query.grid)
    for band, bottom, right in [(None, *query.grid)] if single else _bands(query, rows):
        top, left = (band.top, band.left) if band is not None else (0, 0)
        table = cells[top:bottom, left:right].reshape(-1, cells.shape[2]) @ key.tokens.t()
        for way in ways:
            cut = band or Band((0, way.query[0].count), (0, way.query[1].count), 0, 0, query.grid[1])
            launch(table, way.key, way.scales, similarity, index, way.query, cut, **way.told)
            if valid is not None:
                cuda.mutual(table, way.query, scales_of(own, way.query), way.key, index, valid, **way.told)
    if own is not None:
        similarity *= own.flatten().masked_fill(index < 0, 1)
    return similarity, index


class _Way(NamedTuple):
    """How to launch a search."""

    query: tuple[Strips, Strips]
    key: tuple[Strips, Strips]
    scales: Scales | None
    told: dict[str, Any]
    """what else the launcher is told"""


def _ways(query: StretchedMap, key: StretchedMap, per_pixel: bool, backend: str, joinable: bool = True) -> list[_Way]:
    """The launches of which one does the search.

    Where pixels lie at the centres of cells, strips of a single cell are up to half of all: they are joined to others
    where every cell is finite, which the device alone knows. So there are two launches, one of which does nothing.
    """
    inverse = key.inverse_norms() if per_pixel else None

    def way(joined: bool, **told: Any) -> _Way:
        strips = key.strips(joined)
        return _Way(query.strips(joined), strips, scales_of(inverse, strips), told)

    # Joined strips are far fewer. Even enlargements have one beyond each outermost centre alone.
    joins = any(axis.count > axis.cells + 1 + axis.cells // 4 for axis in (*query.strips(), *key.strips()))
    if backend != "cuda" or not (joinable and joins):
        return [way(False)]
    finite = torch.isfinite(query.tokens.sum() + key.tokens.sum()).int()
    return [way(joined, when=cuda.When(finite, joined)) for joined in (True, False)]


def _bands(query: StretchedMap, rows: int) -> Iterator[tuple[Band, int, int]]:
    """Parts of the query image that need at most ``rows`` rows of the table; with the cells after each part."""
    strips = (
        cut_strips(cells, pixels, torch.device("cpu")) for cells, pixels in zip(query.grid, query.size, strict=True)
    )
    (low_y, high_y), (low_x, high_x) = ((axis.low.tolist(), axis.high.tolist()) for axis in strips)
    for first_x, end_x in _parts(low_x, high_x, max(2, rows // 2)):
        left, right = low_x[first_x], high_x[end_x - 1] + 1
        for first_y, end_y in _parts(low_y, high_y, max(2, rows // (right - left))):
            top = low_y[first_y]
            yield Band((first_y, end_y), (first_x, end_x), top, left, right - left), high_y[end_y - 1] + 1, right


def _parts(low: list[int], high: list[int], most: int) -> Iterator[tuple[int, int]]:
    """Consecutive strips that together need at most ``most`` cells, but at least one strip."""
    start = 0
    while start < len(low):
        stop = start + 1
        while stop < len(low) and high[stop] - low[start] < most:
            stop += 1
        yield start, stop
        start = stop
