"""``nearest`` in plain PyTorch, the specification of every backend, and products beyond the range of their dtype."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from ...witnesses import capturing

# Bytes of similarities at one time in the plain implementation.
PRODUCT_BUDGET = 64 << 20
# A shorter row counts as a zero vector of cosine 0; torch.nn.functional.normalize uses the same bound.
NORM_FLOOR = 1e-12


def unit_rows(rows: Tensor) -> Tensor:
    """Divide each vector of the last dimension by max(its norm, 1e-12); the norm in float64, so it cannot overflow."""
    if rows.dtype == torch.float64 and rows.numel():
        # Squares may leave the range of float64 itself: scale such rows to numbers of at most one.
        largest = rows.abs().amax(-1, keepdim=True)
        rows = rows * torch.exp2(-torch.frexp(largest).exponent.double()).where(largest > 1e100, 1)
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=torch.float64).clamp_min(NORM_FLOOR)
    return (rows / norm).to(rows.dtype)


@contextmanager
def full_matmul_precision() -> Iterator[None]:
    """Switch autocast off, and the TF32 and bfloat16 shortcuts that the user may have allowed."""
    previous = torch.get_float32_matmul_precision()
    with ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if previous != "highest":
            stack.callback(torch.set_float32_matmul_precision, previous)
            torch.set_float32_matmul_precision("highest")
        yield


def search(
    query: Tensor, key: Tensor, depth: int, mutual: bool, window: list[int] | None, normalize: bool, fast: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The ``depth`` most similar keys of each query, and whether the first is mutual; every backend has this function.

    Similarities are computed in tiles of at most ``PRODUCT_BUDGET`` bytes. Equal similarities go to the lowest index.

    Args:
        query: ``[B, N, C]``.
        key: ``[B, M, C]``.
        depth: >= 1.
        mutual: also check whether the best key's own best query is this one.
        window: ``[radius, query_h, query_w, key_h, key_w]``; the keys are any number of grids one after the other.
        normalize: cosines instead of dot products.
        fast: allow a backend to compare rounded products; ignored here.

    Returns:
        similarity ``[B, N, depth]`` float32 (float64 for float64), descending, and index ``[B, N, depth]`` int64; -inf
        and -1 where there is no match. With ``mutual`` a bool ``[B, N]``, True for a mutual match; else None.
    """
    batch, n, _ = query.shape
    m = key.shape[1]
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    similarity = query.new_full((batch, n, depth), -torch.inf, dtype=dtype)
    index = torch.full((batch, n, depth), -1, dtype=torch.int64, device=query.device)
    back = torch.full((batch, m), -1, dtype=torch.int64, device=query.device)
    columns = max(1, min(m, 1 << 14))
    rows = max(1, PRODUCT_BUDGET // (columns * dtype.itemsize))
    with full_matmul_precision():
        for b in range(batch):
            queries, keys = query[b].to(dtype), key[b].to(dtype)
            if normalize:
                queries, keys = unit_rows(queries), unit_rows(keys)
            most = query.new_full((m,), -torch.inf, dtype=dtype)
            for row in range(0, n, rows):
                row_slice = slice(row, row + rows)
                for column in range(0, m, columns):
                    column_slice = slice(column, column + columns)
                    tile = queries[row_slice] @ keys[column_slice].t()
                    tile.masked_fill_(~torch.isfinite(tile), -torch.inf)
                    if window is not None:
                        tile.masked_fill_(_outside(window, row, column, tile), -torch.inf)
                    _merge(similarity[b], index[b], row_slice, tile, column)
                    if mutual:
                        value, position = tile.max(0)
                        better = value > most[column_slice]
                        most[column_slice] = torch.where(better, value, most[column_slice])
                        back[b, column_slice] = torch.where(better, position + row, back[b, column_slice])
    return similarity, index, leads_back(back, index) if mutual else None


def leads_back(back: Tensor, index: Tensor) -> Tensor:
    """``[B, N]`` bool: whether each query is the best query ``back [B, M]`` of its match ``index[..., 0] [B, N]``."""
    first = index[..., 0]
    if not back.shape[1]:
        return first >= 0
    rows = torch.arange(first.shape[1], device=first.device)
    return (back.gather(1, first.clamp_min(0)) == rows) & (first >= 0)


def _merge(best: Tensor, best_index: Tensor, rows: slice, tile: Tensor, column: int) -> None:
    """Fold one tile ``[R, S]`` of similarities, whose first key is ``column``, into the running best ``depth``."""
    depth = best.shape[1]
    if depth == 1:
        # ``max`` returns the first of equal values; an earlier tile stays ahead of an equal later one.
        value, position = tile.max(1, keepdim=True)
    else:
        value, position = _top(tile, min(depth, tile.shape[1]))
    merged = torch.cat([best[rows], value], dim=1)
    merged_index = torch.cat([best_index[rows], torch.where(value == -torch.inf, -1, position + column)], dim=1)
    # A stable sort keeps lower indices ahead of equal later ones.
    merged, order = torch.sort(merged, dim=1, descending=True, stable=True)
    best[rows] = merged[:, :depth]
    best_index[rows] = merged_index.gather(1, order)[:, :depth]


def _top(tile: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """The largest ``depth`` of each row in descending order, lowest index first among equals."""
    # topk may return any of equal values: take all above its last value, and the first of those equal to it.
    smallest = torch.topk(tile, depth, dim=1).values[:, -1:]
    above, level = tile > smallest, tile == smallest
    room = depth - above.sum(1, keepdim=True)
    chosen = above | (level & (level.cumsum(1) <= room))
    # Each row has exactly ``depth`` chosen keys; nonzero lists them by ascending index.
    position = chosen.nonzero()[:, 1].view(-1, depth)
    value, order = torch.sort(tile.gather(1, position), dim=1, descending=True, stable=True)
    return value, position.gather(1, order)


def reach(window: list[int]) -> tuple[int, int]:
    """The radius in y and x in units that keep cell centres whole numbers: 1 / (2 query_h key_h) of a grid's height."""
    radius, query_h, query_w, key_h, key_w = window
    # A radius as long as the grid reaches every key; products of a longer one may overflow 64 bits.
    radius = min(radius, max(key_h, key_w))
    return 2 * radius * query_h, 2 * radius * query_w


def _outside(window: list[int], row: int, column: int, tile: Tensor) -> Tensor:
    """Which pairs of a tile lie further apart on the grid than the window's radius."""
    _, query_h, query_w, key_h, key_w = window
    query = torch.arange(row, row + tile.shape[0], device=tile.device)[:, None]
    key = torch.arange(column, column + tile.shape[1], device=tile.device)[None]
    # (2 y' + 1) / key_h against (2 y + 1) / query_h.
    key = key % (key_h * key_w)
    dy = (2 * (key // key_w) + 1) * query_h - (2 * (query // query_w) + 1) * key_h
    dx = (2 * (key % key_w) + 1) * query_w - (2 * (query % query_w) + 1) * key_w
    reach_y, reach_x = reach(window)
    return (dy.abs() > reach_y) | (dx.abs() > reach_x)


def beyond_range(query: Tensor, key: Tensor) -> bool:
    """Whether dot products may overflow float32 (float64 for float64), or all of them underflow.

    Waits for the device. Returns False while a CUDA graph is recorded.
    """
    if query.dtype == torch.float16 or not query.numel() or not key.numel() or capturing(query):
        return False
    one, other = _largest(query), _largest(key)
    least, most = _MODERATE[query.dtype == torch.float64]
    return one * other * query.shape[-1] > most or (one > 0 and other > 0 and one * other < least)


# Range of safe products of both sides' largest numbers, for float32 and float64.
_MODERATE = (1e-28, 1e37), (1e-290, 1e307)


def _largest(rows: Tensor) -> float:
    """Largest finite absolute value."""
    low, high = torch.stack(torch.aminmax(rows)).tolist()
    if math.isfinite(low) and math.isfinite(high):
        return max(-low, high)
    return float(rows.abs().masked_fill(~rows.isfinite(), 0).amax())


def within_range(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, int]:
    """Both in float64, each scaled by a power of two to a largest number of about one; the sum of the exponents.

    A dot product of the originals is the dot product of these times two to that sum.
    """
    exponents = [max(-1000, min(1000, math.frexp(_largest(rows))[1])) for rows in (query, key)]
    query, key = (rows.double() * 2.0**-exponent for rows, exponent in zip((query, key), exponents, strict=True))
    return query, key, sum(exponents)


def search_beyond_range(
    query: Tensor, key: Tensor, depth: int, mutual: bool, window: list[int] | None, normalize: bool, fast: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """:func:`search` for dot products: matches by their true size those that are infinite in the result's dtype."""
    queries, keys, exponent = within_range(query, key)
    similarity, index, mutually = search(queries, keys, depth, mutual, window, normalize)
    half = exponent // 2
    similarity = similarity * 2.0**half * 2.0 ** (exponent - half)
    return similarity.to(torch.promote_types(query.dtype, torch.float32)), index, mutually
