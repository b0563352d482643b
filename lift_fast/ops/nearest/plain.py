"""``nearest``: for each query descriptor its most similar key descriptors, without ever forming the N x M matrix."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from ... import _env, _native, memory
from .. import devices, library

# Bytes of similarities that exist at one time in the plain implementation.
PRODUCT_BUDGET = 64 << 20
# A shorter row counts as a zero vector of cosine 0; torch.nn.functional.normalize uses the same bound.
NORM_FLOOR = 1e-12

library.define(
    "nearest(Tensor query, Tensor key, int k, bool mutual, float? ratio, int[]? window, bool normalize,"
    " bool fast=False) -> (Tensor, Tensor, Tensor)"
)


def unit_rows(rows: Tensor) -> Tensor:
    """Divide each vector of the last dimension by max(its norm, 1e-12); the norm in float64, so it cannot overflow."""
    if rows.dtype == torch.float64 and rows.numel():
        # Whose squares may pass the range of float64 itself: such rows are brought to numbers of at most one first.
        largest = rows.abs().amax(-1, keepdim=True)
        rows = rows * torch.exp2(-torch.frexp(largest).exponent.double()).where(largest > 1e100, 1)
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=torch.float64).clamp_min(NORM_FLOOR)
    return (rows / norm).to(rows.dtype)


@contextmanager
def full_matmul_precision() -> Iterator[None]:
    """Keep autocast and the shortcuts of TF32 and bfloat16, where the user allowed them, out of exact products."""
    previous = torch.get_float32_matmul_precision()
    with ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if previous != "highest":
            stack.callback(torch.set_float32_matmul_precision, previous)
            torch.set_float32_matmul_precision("highest")
        yield


def nearest_plain(
    query: Tensor,
    key: Tensor,
    k: int,
    mutual: bool,
    ratio: float | None,
    window: list[int] | None,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The plain PyTorch implementation: reference, baseline and fallback. ``query [B, N, C]``, ``key [B, M, C]``.

    Similarities are computed in tiles of at most ``PRODUCT_BUDGET`` bytes. Equal similarities go to the lowest index.
    """
    batch, n, _ = query.shape
    m = key.shape[1]
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    similarity = query.new_full((batch, n, k), -torch.inf, dtype=dtype)
    index = torch.full((batch, n, k), -1, dtype=torch.int64, device=query.device)
    valid = torch.zeros((batch, n), dtype=torch.bool, device=query.device)
    # The ratio test needs the runner-up also where one match is asked for.
    depth = k if ratio is None else max(k, 2)
    columns = max(1, min(m, 1 << 14))
    rows = max(1, PRODUCT_BUDGET // (columns * dtype.itemsize))
    with full_matmul_precision():
        for b in range(batch):
            queries, keys = query[b].to(dtype), key[b].to(dtype)
            if normalize:
                queries, keys = unit_rows(queries), unit_rows(keys)
            best = query.new_full((n, depth), -torch.inf, dtype=dtype)
            best_index = torch.full((n, depth), -1, dtype=torch.int64, device=query.device)
            back = query.new_full((m,), -torch.inf, dtype=dtype)
            back_index = torch.full((m,), -1, dtype=torch.int64, device=query.device)
            for row in range(0, n, rows):
                row_slice = slice(row, row + rows)
                for column in range(0, m, columns):
                    column_slice = slice(column, column + columns)
                    tile = queries[row_slice] @ keys[column_slice].t()
                    tile.masked_fill_(~torch.isfinite(tile), -torch.inf)
                    if window is not None:
                        tile.masked_fill_(_outside(window, row, column, tile), -torch.inf)
                    _merge(best, best_index, row_slice, tile, column)
                    if mutual:
                        value, position = tile.max(0)
                        better = value > back[column_slice]
                        back[column_slice] = torch.where(better, value, back[column_slice])
                        back_index[column_slice] = torch.where(better, position + row, back_index[column_slice])
            similarity[b], index[b] = best[:, :k], best_index[:, :k]
            # Without keys there is no match to lead back.
            found = back_index[best_index[:, 0].clamp_min(0)] if mutual and m else None
            valid[b] = accept(best, best_index, found, ratio)
    return similarity, index, valid


def _merge(best: Tensor, best_index: Tensor, rows: slice, tile: Tensor, column: int) -> None:
    """Fold one tile ``[R, S]`` of similarities, whose first key is ``column``, into the running best ``depth``."""
    depth = best.shape[1]
    if depth == 1:
        # ``max`` promises the first of equal values; an earlier tile keeps its place against an equal later one.
        value, position = tile.max(1, keepdim=True)
    else:
        value, position = _top(tile, min(depth, tile.shape[1]))
    merged = torch.cat([best[rows], value], dim=1)
    merged_index = torch.cat([best_index[rows], torch.where(value == -torch.inf, -1, position + column)], dim=1)
    # A stable sort keeps earlier, lower indices in front of equal later ones.
    merged, order = torch.sort(merged, dim=1, descending=True, stable=True)
    best[rows] = merged[:, :depth]
    best_index[rows] = merged_index.gather(1, order)[:, :depth]


def _top(tile: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """The largest ``depth`` of each row in descending order, lowest index first among equals."""
    # topk promises no order among equals: all that are larger than its last value belong to the result, and of
    # those equal to it the first ones.
    smallest = torch.topk(tile, depth, dim=1).values[:, -1:]
    above, level = tile > smallest, tile == smallest
    room = depth - above.sum(1, keepdim=True)
    chosen = above | (level & (level.cumsum(1) <= room))
    # Each row has exactly ``depth`` of them, and nonzero lists them by ascending index.
    position = chosen.nonzero()[:, 1].view(-1, depth)
    value, order = torch.sort(tile.gather(1, position), dim=1, descending=True, stable=True)
    return value, position.gather(1, order)


def _outside(window: list[int], row: int, column: int, tile: Tensor) -> Tensor:
    """Which pairs of a tile lie further apart on the grid than the window's radius."""
    radius, query_h, query_w, key_h, key_w = window
    query = torch.arange(row, row + tile.shape[0], device=tile.device)[:, None]
    key = torch.arange(column, column + tile.shape[1], device=tile.device)[None]
    # Cell centres compared in units that keep integers exact: (2 y' + 1) / key_h against (2 y + 1) / query_h.
    key = key % (key_h * key_w)
    dy = (2 * (key // key_w) + 1) * query_h - (2 * (query // query_w) + 1) * key_h
    dx = (2 * (key % key_w) + 1) * query_w - (2 * (query % query_w) + 1) * key_w
    return (dy.abs() > 2 * radius * query_h) | (dx.abs() > 2 * radius * query_w)


def accept(best: Tensor, best_index: Tensor, back: Tensor | None, ratio: float | None) -> Tensor:
    """Which queries keep their match, ``[..., N]`` bool.

    Args:
        best, best_index: ``[..., N, depth]``, depth >= 2 with ``ratio``.
        back: ``[..., N]``, the query that is most similar to the best key, for the mutual check.
        ratio: Lowe's ratio.
    """
    valid = best_index[..., 0] >= 0
    if back is not None:
        valid = valid & (back == torch.arange(back.shape[-1], device=back.device))
    if ratio is not None:
        # |a - b|^2 = 2 - 2 cos for unit vectors: Lowe's ratio of distances, squared. No runner-up (-inf) passes.
        valid = valid & (1 - best[..., 0] <= ratio**2 * (1 - best[..., 1]))
    return valid


def _nearest_native(
    query: Tensor, key: Tensor, k: int, mutual: bool, ratio: float | None, normalize: bool, fast: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """From the native core's fused similarity and top-k; the same result as :func:`nearest_plain` in float32."""
    batch, n, channels = query.shape
    m = key.shape[1]
    depth = k if ratio is None else max(k, 2)
    queries, keys = query.float().contiguous(), key.float().contiguous()
    similarity = memory.empty((batch, n, depth), dtype=torch.float32, device="cpu")
    index = memory.empty((batch, n, depth), dtype=torch.int64, device="cpu")
    back = memory.empty((batch, n), dtype=torch.int64, device="cpu") if mutual else None
    _native.require().nearest_f32(
        _native.address(queries),
        _native.address(keys),
        batch,
        n,
        m,
        channels,
        normalize,
        not fast,
        depth,
        _native.address(similarity),
        _native.address(index),
        0 if back is None else _native.address(back),
        torch.get_num_threads(),
        _env.cpu_isa(),
    )
    return similarity[..., :k].contiguous(), index[..., :k].contiguous(), accept(similarity, index, back, ratio)


def beyond_range(query: Tensor, key: Tensor) -> bool:
    """Whether dot products may leave the range of float32 (float64 for float64), or all fall below it.

    Waits for the device; never while a graph is recorded.
    """
    if query.dtype == torch.float16 or not query.numel() or not key.numel():
        return False
    if query.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    one, other = _largest(query), _largest(key)
    least, most = _MODERATE[query.dtype == torch.float64]
    return one * other * query.shape[-1] > most or (one > 0 and other > 0 and one * other < least)


# Products of the largest numbers of both sides.
_MODERATE = (1e-28, 1e37), (1e-290, 1e307)


def _largest(rows: Tensor) -> float:
    """Largest finite number, without its sign."""
    low, high = torch.stack(torch.aminmax(rows)).tolist()
    if math.isfinite(low) and math.isfinite(high):
        return max(-low, high)
    return float(rows.abs().masked_fill(~rows.isfinite(), 0).amax())


def within_range(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, int]:
    """Both in float64, each times a power of two that makes its largest number about one; the sum of the exponents.

    A dot product of the originals is one of these times two to that sum.
    """
    exponents = [max(-1000, min(1000, math.frexp(_largest(rows))[1])) for rows in (query, key)]
    query, key = (rows.double() * 2.0**-exponent for rows, exponent in zip((query, key), exponents, strict=True))
    return query, key, sum(exponents)


def _nearest_beyond_range(
    query: Tensor, key: Tensor, k: int, mutual: bool, ratio: float | None, window: list[int] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Dot products that pass the range of the result are infinite there, and found by their true size."""
    queries, keys, exponent = within_range(query, key)
    similarity, index, valid = nearest_plain(queries, keys, k, mutual, ratio, window, False)
    half = exponent // 2
    similarity = similarity * 2.0**half * 2.0 ** (exponent - half)
    return similarity.to(torch.promote_types(query.dtype, torch.float32)), index, valid


def _nearest(
    query: Tensor,
    key: Tensor,
    k: int,
    mutual: bool,
    ratio: float | None,
    window: list[int] | None,
    normalize: bool,
    fast: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    from . import cpu, gpu  # they build on this module

    query, key = library.resolved(query), library.resolved(key)
    if not normalize and beyond_range(query, key):
        return _nearest_beyond_range(query, key, k, mutual, ratio, window)
    if window is not None and cpu.can_run(query, k, window)[0]:
        return cpu.nearest_in_window(query, key, k, mutual, ratio, window, normalize)
    fits = query.device.type == "cpu" and query.dtype != torch.float64 and window is None
    if fits and devices.native_runs()[0] and max(k, 2) <= _native.require().most_neighbours:
        return _nearest_native(query, key, k, mutual, ratio, normalize, fast)
    if gpu.can_run(query, key, k, window)[0]:
        return gpu.nearest_gpu(query, key, k, mutual, ratio, window, normalize, fast)
    return nearest_plain(query, key, k, mutual, ratio, window, normalize)


def _fake_nearest(
    query: Tensor,
    key: Tensor,
    k: int,
    mutual: bool,
    ratio: float | None,
    window: list[int] | None,
    normalize: bool,
    fast: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, n, _ = query.shape
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    similarity = query.new_empty((batch, n, k), dtype=dtype)
    return similarity, query.new_empty((batch, n, k), dtype=torch.int64), query.new_empty((batch, n), dtype=torch.bool)


library.implement("nearest", _nearest, fake=_fake_nearest)
