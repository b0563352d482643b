"""``dense_match`` on the GPU: tables of cell similarities in bands, each searched by one launch.

The search runs in the native core's CUDA kernel, or in Triton if there is none. In addition to its results a call needs
a table of at most 256 MB and, for cosines of pixels, some numbers per key pixel and per patch. It never waits for the
device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import _env, devices, memory
from ...kernels.strips import Band, Scales, Strips
from . import cuda
from .bilinear import Norms, StretchedMap, cut_strips, index_of, scales_of

# Bytes of cell similarities that exist at one time.
_TABLE_BUDGET = 256 << 20


def can_run(query: StretchedMap, key: StretchedMap) -> tuple[bool, str]:
    """Whether a kernel supports these maps; its name, or the reason if none does."""
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
    """The kernel for a device: "cuda" if the native core's runs there, else "triton"; or ``backend``.

    RuntimeError with the reason if ``backend`` cannot run.
    """
    if backend is None:
        return "cuda" if devices.cuda_runs(device)[0] else "triton"
    if backend not in ("cuda", "triton"):
        raise ValueError(f'backend must be "cuda", "triton" or None, got {backend!r}')
    runs, reason = devices.cuda_runs(device) if backend == "cuda" else (not _env.triton_disabled(), "")
    if not runs:
        reason = reason or "switched off by LIFT_FAST_DISABLE_TRITON=1"
        raise RuntimeError(f"dense_match's {backend} kernel cannot run: {reason}; pass backend=None")
    return backend


def _kernels(backend: str) -> Any:
    """The module with the kernels ``match`` and ``spans``."""
    if backend == "cuda":
        return cuda
    # Imported only here: Triton is optional and slow to load.
    from ...kernels import dense_match as kernels

    return kernels


class _Cosines:
    """What divides the similarities to an image's pixels by their norms."""

    def __init__(self, image: StretchedMap, backend: str) -> None:
        norms = Norms(image)
        self.inverse = norms.of_all()
        """[H, W]"""
        self._gram, self._spans = norms.gram, _kernels(backend).spans

    def scales(self, strips: tuple[Strips, Strips]) -> Scales:
        scales = scales_of(self.inverse, strips)
        return scales._replace(spans=self._spans(self._gram, strips, scales.high))


def fits(query: StretchedMap, key: StretchedMap) -> tuple[bool, str]:
    """:func:`can_run` without the check of the device and its kernels."""
    if query.tokens.dtype != torch.float32:
        return False, f"the kernel computes in float32, not in {query.tokens.dtype}"
    if max(key.pixels, query.pixels) >= 2**31 - 1:
        return False, f"images must have less than 2^31 pixels, got {query.size} and {key.size}"
    if 4 * 4 * key.tokens.shape[0] > _TABLE_BUDGET:
        return False, f"maps must have at most {_TABLE_BUDGET // 16} cells, got {key.grid}"
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
    launch = _kernels(backend).match
    similarity = memory.new_empty(query.tokens, len(points))
    index = memory.empty(len(points), dtype=torch.int64, device=similarity.device)
    rows = _TABLE_BUDGET // (4 * key.tokens.shape[0])
    ways = _ways(query, key, per_pixel, backend)
    for start in range(0, len(points), rows):
        part = slice(start, min(start + rows, len(points)))
        table = query.descriptors(points[part], per_pixel) @ key.tokens.t()
        for way in ways:
            launch(table, way.key, way.scales, similarity[part], index[part], **way.condition)
    return similarity, index


def match_mutual(
    query: StretchedMap, key: StretchedMap, points: Tensor | None, per_pixel: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`match`, and whether each match is mutual, from one table of similarities.

    Few query pixels can be the best one of their match, so this costs far less than a second search.
    """
    valid = memory.empty(query.pixels, dtype=torch.bool, device=query.tokens.device)
    similarity, index = _match_image(query, key, per_pixel, "cuda", valid)
    if points is None:
        return similarity, index, valid
    at = index_of(points, query.size)
    return similarity[at], index[at], valid[at]


def checks_mutual(query: StretchedMap, key: StretchedMap, points: Tensor | None, backend: str | None = None) -> bool:
    """Whether :func:`match_mutual` supports these maps: only the CUDA kernels do, if all cells fit into one table."""
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
    """Whether it is cheaper to match every pixel, in whole groups, and to look the points up."""
    return len(points) >= max(2 * query.tokens.shape[0], query.pixels // 16)


def _match_image(
    query: StretchedMap, key: StretchedMap, per_pixel: bool, backend: str, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`match` of every pixel; writes to ``valid [H * W]``, if given, whether matches are mutual."""
    launch = _kernels(backend).match
    similarity = memory.new_empty(query.tokens, query.pixels)
    index = memory.empty(query.pixels, dtype=torch.int64, device=similarity.device)
    rows = _TABLE_BUDGET // (4 * key.tokens.shape[0])
    # Bands are cut from strips that are not joined.
    single = rows >= query.tokens.shape[0]
    ways = _ways(query, key, per_pixel, backend, joinable=single)
    own = _Cosines(query, backend) if per_pixel else None
    cells = query.tokens.unflatten(0, query.grid)
    for band, bottom, right in [(None, *query.grid)] if single else _bands(query, rows):
        top, left = (band.top, band.left) if band is not None else (0, 0)
        table = cells[top:bottom, left:right].reshape(-1, cells.shape[2]) @ key.tokens.t()
        for way in ways:
            cut = band or Band((0, way.query[0].count), (0, way.query[1].count), 0, 0, query.grid[1])
            launch(table, way.key, way.scales, similarity, index, way.query, cut, **way.condition)
            if valid is not None:
                scales = own.scales(way.query) if own is not None else None
                cuda.mutual(table, way.query, scales, way.key, index, valid, **way.condition)
    if own is not None:
        similarity *= own.inverse.flatten().masked_fill(index < 0, 1)
    return similarity, index


class _Way(NamedTuple):
    """How to launch a search."""

    query: tuple[Strips, Strips]
    key: tuple[Strips, Strips]
    scales: Scales | None
    condition: dict[str, cuda.When]
    """``when`` for the CUDA kernels, empty for an unconditional launch."""


def _ways(query: StretchedMap, key: StretchedMap, per_pixel: bool, backend: str, joinable: bool = True) -> list[_Way]:
    """One launch, or two with opposite conditions.

    If pixels lie at the centres of cells, up to half of the strips have a single cell. These are joined to others if
    every cell is finite, which only the device knows. So there are two launches, one of which does nothing.
    """
    cosines = _Cosines(key, backend) if per_pixel else None

    def way(joined: bool, **condition: cuda.When) -> _Way:
        strips = key.strips(joined)
        scales = cosines.scales(strips) if cosines is not None else None
        return _Way(query.strips(joined), strips, scales, condition)

    # Joining pays where it removes many strips; even enlargements have single cells only beyond the outermost centres.
    joins = any(axis.count > axis.cells + 1 + axis.cells // 4 for axis in (*query.strips(), *key.strips()))
    if backend != "cuda" or not (joinable and joins):
        return [way(False)]
    finite = torch.isfinite(query.tokens.sum() + key.tokens.sum()).int()
    return [way(joined, when=cuda.When(finite, joined)) for joined in (True, False)]


def _bands(query: StretchedMap, rows: int) -> Iterator[tuple[Band, int, int]]:
    """Parts of the query image that need at most ``rows`` rows of the table, each with its bottom and right cell."""
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
    """Runs ``[start, stop)`` of at least one strip that need at most ``most`` cells."""
    start = 0
    while start < len(low):
        stop = start + 1
        while stop < len(low) and high[stop] - low[start] < most:
            stop += 1
        yield start, stop
        start = stop
