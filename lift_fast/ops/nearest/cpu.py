"""``nearest`` within a window on the CPU: the native core meets only the pairs that lie near each other on the grid."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _env, _native, memory
from .. import devices
from .plain import accept

# The native core keeps a query's matches in order by insertion, which more of them would make slow.
MOST_MATCHES = 256
# Sides of grids that it takes.
_LARGEST_SIDE = 1 << 30


def can_run(query: Tensor, k: int, window: list[int]) -> tuple[bool, str]:
    """Whether the native core can search these queries' windows, and the reason if not."""
    if query.device.type != "cpu" or query.dtype == torch.float64:
        return False, f"the native core computes in float32 on the CPU, not in {query.dtype} on {query.device}"
    if k > MOST_MATCHES:
        return False, f"the native core finds at most {MOST_MATCHES} matches for each query, not {k}"
    if max(window[1:]) > _LARGEST_SIDE:
        return False, f"the native core takes grids of at most 2^30 cells a side, not {max(window[1:])}"
    return devices.native_runs()


def search(query: Tensor, key: Tensor, k: int, window: list[int], normalize: bool) -> tuple[Tensor, Tensor]:
    """The ``k`` best keys in each query's window.

    Args:
        query: ``[B, N, C]``.
        key: ``[B, M, C]``, any number of key grids one after the other.
        k: 1 <= k <= MOST_MATCHES.
        window: ``[radius, query_h, query_w, key_h, key_w]``.
        normalize: cosines instead of dot products.

    Returns:
        similarity ``[B, N, k]`` float32, descending, and index ``[B, N, k]`` int64; -inf and -1 where there is none.
    """
    _, query_h, query_w, key_h, key_w = window
    return _run(query, key, k, (query_h, query_w), (key_h, key_w), _reach(window), normalize)


def search_back(query: Tensor, key: Tensor, window: list[int], normalize: bool) -> Tensor:
    """``[B, M]`` int64: the best query among those whose windows hold a key, or -1; arguments as :func:`search`."""
    _, query_h, query_w, key_h, key_w = window
    return _run(key, query, 1, (key_h, key_w), (query_h, query_w), _reach(window), normalize)[1][..., 0]


def nearest_in_window(
    query: Tensor, key: Tensor, k: int, mutual: bool, ratio: float | None, window: list[int], normalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The result of :func:`lift_fast.ops.nearest.plain.nearest_plain` with a window, from the native core."""
    # The ratio test needs the runner-up also where one match is asked for.
    similarity, index = search(query, key, k if ratio is None else max(k, 2), window, normalize)
    back = None
    # Without keys there is no match to lead back.
    if mutual and key.shape[1]:
        back = search_back(query, key, window, normalize).gather(1, index[..., 0].clamp_min(0))
    valid = accept(similarity, index, back, ratio)
    return similarity[..., :k].contiguous(), index[..., :k].contiguous(), valid


def _reach(window: list[int]) -> tuple[int, int]:
    """The radius in y and x as the native core measures it: whole numbers, the same in both directions."""
    radius, query_h, query_w, key_h, key_w = window
    radius = min(radius, max(key_h, key_w))
    return 2 * radius * query_h, 2 * radius * query_w


def _run(
    query: Tensor,
    key: Tensor,
    k: int,
    query_grid: tuple[int, int],
    key_grid: tuple[int, int],
    reach: tuple[int, int],
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
        *reach,
        normalize,
        _native.address(similarity),
        _native.address(index),
        torch.get_num_threads(),
        _env.cpu_isa(),
    )
    return similarity, index
