"""Exact matching of descriptors: ``nearest`` between two sets, ``dense_match`` between two images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy.typing as npt
import torch
from torch import Tensor

from ._text import shown
from .checks import (
    FLOATS,
    as_tensor,
    check_dense,
    check_flag,
    check_pair,
    check_sets,
    check_size,
    check_whole,
    check_window,
)
from .ops.dense_match import op as _dense_match_op  # noqa: F401  registers torch.ops.lift_fast.dense_match
from .ops.nearest import op as _nearest_op  # noqa: F401  registers torch.ops.lift_fast.nearest

_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
# Largest k if there are fewer keys.
_MOST_MATCHES = 1 << 16
# Pixels along one side of an image, and pixels of a query image that is matched without points.
_MOST_SIDE, _MOST_QUERIES = 1 << 20, 1 << 31


class Window(NamedTuple):
    """Restricts :func:`nearest` to keys near the query on a grid (the neighbourhood of video label propagation)."""

    radius: int
    """Cells of the key grid in each direction, >= 0; the neighbourhood is a square of side 2 * radius + 1."""
    query_grid: tuple[int, int]
    """(h, w) with h * w = N, queries row-major."""
    key_grid: tuple[int, int] | None = None
    """(h, w), by default the query grid. The M keys may be several such grids one after the other (frames)."""


class NearestResult(NamedTuple):
    """Result of :func:`nearest`; shown in one line, with the shapes instead of the values."""

    similarity: Tensor
    """[..., N, k] float32 (float64 for float64 input), descending; -inf where there is no match."""
    index: Tensor  # type: ignore[assignment]  # the fixed public name; hides tuple.index
    """[..., N, k] int64 rows of ``key``; -1 where there is no match."""
    valid: Tensor
    """[..., N] bool: the best match exists and passes the requested mutual and ratio tests."""

    def __repr__(self) -> str:
        return _one_line(self)


class DenseMatches(NamedTuple):
    """Result of :func:`dense_match`; shown in one line, with the shapes instead of the values."""

    similarity: Tensor
    """[B, P] float32 (float64 for float64 input); -inf where there is no match."""
    xy: Tensor
    """[B, P, 2] int64 (x, y) pixels of the key image; (-1, -1) where there is no match."""
    valid: Tensor
    """[B, P] bool: a match exists and, with ``mutual``, leads back to the query pixel."""

    def __repr__(self) -> str:
        return _one_line(self)


def nearest(
    query: Tensor | npt.NDArray[Any],
    key: Tensor | npt.NDArray[Any],
    *,
    k: int = 1,
    mutual: bool = False,
    ratio: float | None = None,
    window: Window | tuple[int, tuple[int, int]] | tuple[int, tuple[int, int], tuple[int, int] | None] | None = None,
    normalize: bool = True,
    precision: str = "exact",
) -> NearestResult:
    """For each query descriptor the ``k`` most similar key descriptors. Never stores an N x M matrix. No gradients.

    Equal similarities go to the lowest index. A descriptor that holds NaN or infinity is ignored: as a key it is never
    chosen, as a query it gets index -1, similarity -inf and ``valid`` False. A zero vector has similarity 0 to
    everything. If fewer than ``k`` keys can be chosen, the rest is index -1 and similarity -inf.

    Args:
        query: ``[..., N, C]`` float32, bfloat16, float16 or float64. NumPy arrays are taken as tensors on the CPU.
        key: ``[..., M, C]``, same dtype and device; leading dimensions broadcast.
        k: matches per query, >= 1; at most M, or 65,536 where that is more.
        mutual: keep a match only if the query is also the best one of that key.
        ratio: Lowe's ratio test, 0 < ratio <= 1: the distance to the best key is at most ``ratio`` times that to the
            second; for unit vectors ``1 - s1 <= ratio**2 * (1 - s2)``. Needs ``normalize``.
        window: only keys within a square neighbourhood on a grid, see :class:`Window`. Grids of different size are
            compared by cell centres, measured in cells of the key grid.
        normalize: cosine similarity (each descriptor divided by max(norm, 1e-12)); False: dot product, infinite if it
            leaves the range of the result, but matched by its true size. The check of that range runs on the device,
            but not in a recorded CUDA graph.
        precision: ``"exact"``: equal to the float32 argmax. If the device multiplies bfloat16 faster, candidates are
            searched in bfloat16, and those within its proven rounding bound are rescored in float32. ``"fast"``:
            without rescoring; cosines may be off by up to 2^-7 (dot products by 2^-7 of the product of the longest
            query's and key's lengths), and any of several keys so close may be chosen.

    Returns:
        :class:`NearestResult` of tensors ``(similarity [..., N, k], index [..., N, k], valid [..., N])``.

    Raises:
        TypeError: for inputs that are neither tensors nor arrays, or of another dtype.
        ValueError: for shapes, devices or options that do not fit.
    """
    query, key = as_tensor("query", query), as_tensor("key", key)
    check_pair("query", query, "key", key)
    if query.dim() < 2 or key.dim() < 2:
        raise ValueError(f"query must be [..., N, C] and key [..., M, C], got {_shape(query)} and {_shape(key)}")
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"query and key must have the same number of channels, got {_shape(query)} and {_shape(key)}")
    # There are no matches beyond the number of keys, and a huge k would fill the memory.
    k = check_whole("k", k, 1, max(key.shape[-2], _MOST_MATCHES))
    mutual, normalize = check_flag("mutual", mutual), check_flag("normalize", normalize)
    if not isinstance(precision, str) or precision not in ("exact", "fast"):
        raise ValueError(f'precision must be "exact" or "fast", got {shown(precision)}')
    if ratio is not None:
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio <= 1:
            raise ValueError(f"ratio must lie in (0, 1], got {shown(ratio)}")
        if not normalize:
            raise ValueError("ratio compares distances of unit vectors; pass normalize=True")
    n, m = query.shape[-2], key.shape[-2]
    leading, (queries, keys) = check_sets(("query", query), ("key", key))
    flat_window = None
    if window is not None:
        try:
            radius, grid, key_grid = Window(*window)
        except Exception:
            # An object that cannot be unpacked may raise anything.
            raise ValueError(
                f"window must be (radius, query grid[, key grid]) with (h, w) for a grid, got {shown(window)}"
            ) from None
        names = ("window.radius", "window.query_grid", "window.key_grid")
        flat_window = check_window(names, radius, grid, key_grid, n, m)
    similarity, index, valid = torch.ops.lift_fast.nearest(
        queries,
        keys,
        k,
        mutual,
        None if ratio is None else float(ratio),
        flat_window,
        normalize,
        precision == "fast",
    )
    return NearestResult(similarity.view(*leading, n, k), index.view(*leading, n, k), valid.view(*leading, n))


def dense_match(
    query_map: Tensor | npt.NDArray[Any],
    key_map: Tensor | npt.NDArray[Any],
    query_size: Sequence[int],
    key_size: Sequence[int],
    *,
    points: Tensor | npt.NDArray[Any] | None = None,
    normalize: str | None = "grid",
    mutual: bool | float = False,
) -> DenseMatches:
    """Match pixels of the query image to all pixels of the key image, both given as coarse descriptor maps.

    The descriptor of a pixel is the bilinear interpolation (align_corners=False) of its map; the match of a query
    pixel is the key pixel with the largest dot product, the lowest row-major one among equals. Exact for every size.
    A pixel whose interpolation uses a cell with NaN or infinity is ignored: it is never chosen, and as a query gets
    xy (-1, -1), similarity -inf and ``valid`` False. Interpolation uses the cells with a weight above zero: up to four,
    at a cell's centre only that cell, and beyond the outermost centres those of the border. Zero cells have
    similarity 0. No gradients.

    Finite maps of every magnitude are matched. With ``normalize=None`` a similarity beyond the range of its dtype is
    inf or -inf, but its match is correct and valid. On a GPU with ``"pixel"`` and None, products of cells that are
    2^100 times smaller than the largest ones count as zero (in float64 2^900, also on the CPU).

    Args:
        query_map, key_map: ``[B, C, h, w]``, floating point, dense, same B, C, dtype and device; grids may differ.
            NumPy arrays, also of ``points``, are taken as tensors on the CPU.
        query_size, key_size: ``(H, W)`` in pixels, each side at most 2^20. Key images of more than 2^30 pixels (with
            ``"pixel"`` 2^24) are searched in parts.
        points: ``[B, P, 2]`` (x, y) pixels of the query image, rounded down to whole pixels; None for every pixel
            in row-major order (``P = H * W``), fewer than 2^31.
        normalize: ``"grid"``: L2-normalise the cells, interpolate, do not normalise again (the SPair-71k protocol);
            ``"pixel"``: normalise after interpolation (true cosines); None: use the maps as they are. Divisors are
            max(norm, 1e-12).
        mutual: True: valid only if the matched pixel's own best query pixel is the original one. A number: if that
            is at most so many cells of the query map away from it (0.0 is the same as True). Between images few pixels
            of a dense layout pass the strict test, because many share one match; 1.0 serves them.

    Returns:
        :class:`DenseMatches` of tensors ``(similarity [B, P], xy [B, P, 2], valid [B, P])``.

    Raises:
        TypeError: for inputs that are neither tensors nor arrays, or of another dtype.
        ValueError: for shapes, sizes, devices or options that do not fit, and for points outside the image.
    """
    query_map, key_map = as_tensor("query_map", query_map), as_tensor("key_map", key_map)
    points = None if points is None else as_tensor("points", points)
    check_pair("query_map", query_map, "key_map", key_map)
    for name, tensor in (("query_map", query_map), ("key_map", key_map)):
        if tensor.dim() != 4 or 0 in tensor.shape:
            raise ValueError(f"{name} must be [B, C, h, w] without empty dimensions, got {_shape(tensor)}")
    if query_map.shape[:2] != key_map.shape[:2]:
        raise ValueError(f"maps must agree in B and C, got {_shape(query_map)} and {_shape(key_map)}")
    if normalize is not None and (not isinstance(normalize, str) or normalize not in ("grid", "pixel")):
        raise ValueError(f'normalize must be "grid", "pixel" or None, got {shown(normalize)}')
    leads_back, tolerance = _check_mutual(mutual)
    query_hw = check_size("query_size", query_size, _MOST_SIDE)
    key_hw = check_size("key_size", key_size, _MOST_SIDE)
    if points is not None:
        _check_points(points, query_map)
    elif query_hw[0] * query_hw[1] >= _MOST_QUERIES:
        raise ValueError(
            f"query_size {tuple(query_hw)} has 2^31 pixels or more, too many to match all of them; pass points"
        )
    similarity, xy, valid = torch.ops.lift_fast.dense_match(
        query_map.detach(),
        key_map.detach(),
        query_hw,
        key_hw,
        None if points is None else points.detach(),
        normalize or "none",
        leads_back,
        tolerance,
    )
    return DenseMatches(similarity, xy, valid)


def _check_mutual(mutual: object) -> tuple[bool, float]:
    """Whether matches must lead back, and to within how many cells."""
    if not isinstance(mutual, float):
        try:
            return check_flag("mutual", mutual), 0.0
        except TypeError:
            # Not whole numbers: 1 is as often meant as True.
            raise TypeError(
                f"mutual must be True, False or a floating point number of cells such as 1.0, got {shown(mutual)}"
            ) from None
    if not 0 <= mutual < math.inf:
        raise ValueError(f"mutual must be a number of cells, 0.0 or more, got {mutual}")
    return True, float(mutual)


def _one_line(result: NearestResult | DenseMatches) -> str:
    fields = ", ".join(
        f"{name}={f'{value.dtype}'[6:]}{list(value.shape)}" if isinstance(value, Tensor) else f"{name}={value!r}"
        for name, value in zip(result._fields, result, strict=True)
    )
    valid = result.valid
    # Tensors without values, such as those of a compiler, cannot be counted.
    if type(valid) is Tensor and not valid.is_meta:
        fields += f", {int(valid.sum())} of {valid.numel()} valid, on {valid.device}"
    return f"{type(result).__name__}({fields})"


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def _check_points(points: Tensor, query_map: Tensor) -> None:
    check_dense("points", points, (*FLOATS, *_WHOLE))
    if points.dim() != 3 or points.shape[0] != query_map.shape[0] or points.shape[2] != 2:
        raise ValueError(f"points must be [B, P, 2] with B = {query_map.shape[0]}, got {_shape(points)}")
    if points.device != query_map.device:
        raise ValueError(f"points are on {points.device}, the maps on {query_map.device}; move them to one device")
