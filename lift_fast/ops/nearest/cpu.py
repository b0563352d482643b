"""``nearest`` on the CPU, in the native core: similarity and the best keys in one pass, without a table of all pairs.

With a window it visits only pairs that lie near each other on the grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _env, _native, devices, memory
from .plain import leads_back, reach

# The native core sorts a query's matches in a window by insertion, which is slow for more.
MOST_MATCHES = 256
# Longest side of a grid.
_LARGEST_SIDE = 1 << 30


def can_run(query: Tensor, k: int, window: list[int] | None) -> tuple[bool, str]:
    """Whether the native core can search for these queries, and the reason if not."""
    if query.device.type != "cpu" or query.dtype == torch.float64:
        return False, f"the native core computes in float32 on the CPU, not in {query.dtype} on {query.device}"
    runs, reason = devices.native_runs()
    if not runs:
        return False, reason
    most = _native.require().most_neighbours if window is None else MOST_MATCHES
    if k > most:
        return False, f"the native core finds at most {most} matches for each query, not {k}"
    if window is not None and max(window[1:]) > _LARGEST_SIDE:
        return False, f"the native core takes grids of at most 2^30 cells a side, not {max(window[1:])}"
    return True, ""


def search(
    query: Tensor, key: Tensor, depth: int, mutual: bool, window: list[int] | None, normalize: bool, fast: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """:func:`lift_fast.ops.nearest.plain.search` in float32.

    ``fast`` skips the float32 rescoring after a search in fewer bits; windows are always searched in float32.
    """
    if window is not None:
        similarity, index = search_windows(query, key, depth, window, normalize)
        return similarity, index, leads_back(search_back(query, key, window, normalize), index) if mutual else None
    batch, n, channels = query.shape
    queries, keys = query.float().contiguous(), key.float().contiguous()
    similarity = memory.empty((batch, n, depth), dtype=torch.float32, device="cpu")
    index = memory.empty((batch, n, depth), dtype=torch.int64, device="cpu")
    # The query most similar to each query's first key, -1 without one.
    back = memory.empty((batch, n), dtype=torch.int64, device="cpu") if mutual else None
    _native.require().nearest_f32(
        _native.address(queries),
        _native.address(keys),
        batch,
        n,
        key.shape[1],
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
    return similarity, index, None if back is None else back == torch.arange(n)


def search_windows(query: Tensor, key: Tensor, k: int, window: list[int], normalize: bool) -> tuple[Tensor, Tensor]:
    """The ``k`` best keys in each query's window, at most MOST_MATCHES; arguments as :func:`.plain.search`.

    Returns similarity ``[B, N, k]`` float32, descending, and index ``[B, N, k]`` int64; -inf and -1 for none.
    """
    _, query_h, query_w, key_h, key_w = window
    return _run_windows(query, key, k, (query_h, query_w), (key_h, key_w), reach(window), normalize)


def search_back(query: Tensor, key: Tensor, window: list[int], normalize: bool) -> Tensor:
    """``[B, M]`` int64: each key's best query among those whose windows hold it, or -1; see :func:`search_windows`."""
    _, query_h, query_w, key_h, key_w = window
    return _run_windows(key, query, 1, (key_h, key_w), (query_h, query_w), reach(window), normalize)[1][..., 0]


def _run_windows(
    query: Tensor,
    key: Tensor,
    k: int,
    query_grid: tuple[int, int],
    key_grid: tuple[int, int],
    cells: tuple[int, int],
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    batch, n, channels = query.shape
    query, key = query.float().contiguous(), key.float().contiguous()
    similarity = memory.empty((batch, n, k), dtype=torch.float32, device="cpu")
    index = memory.empty((batch, n, k), dtype=torch.int64, device="cpu")
    _native.require().window_nearest_f32(
        _native.address(query),
        _native.address(key),
        batch,
        n // (query_grid[0] * query_grid[1]),
        *query_grid,
        key.shape[1] // (key_grid[0] * key_grid[1]),
        *key_grid,
        channels,
        k,
        *cells,
        normalize,
        _native.address(similarity),
        _native.address(index),
        torch.get_num_threads(),
        _env.cpu_isa(),
    )
    return similarity, index
