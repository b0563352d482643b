"""``nearest`` on the GPU: which kernels run for which request, and in which order.

* bfloat16 and float16: one pass of tensor-core products of the given descriptors. ``mutual`` is part of that pass, or,
  with a window or more than two matches, a second pass from the keys' side.
* float32, cosines: a float16 search with measured bounds, then float32 for what can win; ``mutual`` is a second search.
* float32 with a window or without ``normalize``, and small sets: three TF32 products for each float32 product.

In addition to its results a call needs half-precision copies of both sets, 64 MB for the float32 search, and a few
numbers for each descriptor. It never waits for the device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ... import devices, memory
from .plain import leads_back, reach

if TYPE_CHECKING:
    from ...kernels.nearest import Geometry
    from ...kernels.nearest_groups import Stream
    from ...kernels.nearest_rows import Rows

# The kernels' limits: matches per query, and the side of a window's grid.
MOST_MATCHES = 32
_MOST_SIDE = 1 << 14
# Bytes of the float32 search's bounds; two portions of them may exist at one time.
_BOUNDS_BUDGET = 32 << 20
# Below this many products, three TF32 products each are cheaper than the two passes of the float32 search.
_SMALL = 1 << 23


def can_run(query: Tensor, key: Tensor, k: int, window: list[int] | None) -> tuple[bool, str]:
    """Whether the kernels support this request, and the reason if not. ``query [B, N, C]``, ``key [B, M, C]``."""
    runs, reason = devices.kernels_run(query.device, query.dtype)
    return fits(query, key, k, window) if runs else (False, reason)


def fits(query: Tensor, key: Tensor, k: int, window: list[int] | None) -> tuple[bool, str]:
    """:func:`can_run` without the check of the device."""
    if query.dtype not in devices.KERNEL_DTYPES:
        return False, f"the kernels compute in {', '.join(map(str, devices.KERNEL_DTYPES))}, not in {query.dtype}"
    if not 0 < query.shape[0] < 1 << 16 or 0 in query.shape or 0 in key.shape:
        return False, f"the kernels need non-empty sets and at most 65535 pairs, got {list(query.shape)}"
    if max(query.shape[1], key.shape[1]) >= 1 << 30 or query.shape[2] >= 1 << 20:
        return False, f"sets must have at most 2^30 descriptors, got {query.shape[1]} and {key.shape[1]}"
    if k > MOST_MATCHES:
        return False, f"k must be at most {MOST_MATCHES}, got {k}"
    if window is not None and max(window[1:]) > _MOST_SIDE:
        return False, f"a window's grids must have sides of at most {_MOST_SIDE}, got {window[1:]}"
    return True, "Triton"


def search(
    query: Tensor,
    key: Tensor,
    depth: int,
    mutual: bool,
    window: list[int] | None,
    normalize: bool,
    fast: bool = False,
    stream: Stream | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """:func:`lift_fast.ops.nearest.plain.search`.

    ``fast`` compares cosines of float32 descriptors rounded to float16; the similarities of the chosen ones are
    computed in float32 from the given descriptors.

    ``stream`` searches groups of keys first, see :mod:`lift_fast.kernels.nearest_groups`; for half precision or
    ``fast``, and at most two matches without a window. It is not the default on any device until measured there.
    """
    from ...kernels import launch, nearest_groups, nearest_rows
    from ...kernels import nearest as kernel

    query, key = query.contiguous(), key.contiguous()
    forward, backward = _geometries(window, key.shape[1])
    exact = query.dtype == torch.float32
    searched = exact and normalize and window is None and (fast or query.shape[1] * key.shape[1] >= _SMALL)
    copy = torch.float16 if searched else None if exact else query.dtype
    capability = launch.capability(query.device)
    itemsize = 4 if copy is None else 2
    # One pass gives both directions if tiles of queries are in the order of the queries.
    both = mutual and copy is not None and window is None and depth <= 2
    tile = kernel.default_tile(query.shape[2], itemsize, depth, both, window is not None, capability)
    if stream is not None:
        assert copy is not None
        assert window is None
        assert depth <= 2
        tile = stream.tile
    queries = nearest_rows.prepare(query, normalize, copy, tile.depth, searched and not fast)
    keys = nearest_rows.prepare(key, normalize, copy, tile.depth, searched and not fast)
    if searched and not fast:
        best, index = _search_float32(queries, keys, depth)
        back = _search_float32(keys, queries, 1)[1] if mutual else None
    else:
        if stream is not None:
            best, index = _empty(queries, depth)
            found = nearest_groups.search(queries, keys, depth, stream, both)
            nearest_groups.resolve(queries, keys, found, best, index)
            first_tile = found.back
        else:
            best, index, first_tile = _search(queries, keys, depth, forward, both)
        if first_tile is not None:
            return best, index, kernel.mutual(queries, keys, index, first_tile, tile) != 0
        back = _search(keys, queries, 1, backward, False)[1] if mutual else None
    return best, index, None if back is None else leads_back(back[:, :, 0], index)


def _geometries(window: list[int] | None, m: int) -> tuple[Geometry | None, Geometry | None]:
    """The window from the queries' and from the keys' side."""
    if window is None:
        return None, None
    from ...kernels.nearest import Geometry

    _, query_h, query_w, key_h, key_w = window
    cells, frames = reach(window), m // (key_h * key_w)
    return (
        Geometry(query_h, query_w, key_h, key_w, *cells, 1, frames),
        Geometry(key_h, key_w, query_h, query_w, *cells, frames, 1),
    )


def _empty(query: Rows, depth: int) -> tuple[Tensor, Tensor]:
    batch, n, _ = query.given.shape
    similarity = memory.new_empty(query.given, (batch, n, depth), dtype=torch.float32)
    return similarity, memory.empty_like(similarity, dtype=torch.int64)


def _search(
    query: Rows, key: Rows, depth: int, window: Geometry | None, both: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    from ...kernels import launch
    from ...kernels import nearest as kernel

    device, channels = query.given.device, query.given.shape[2]
    itemsize = 4 if query.copy is None else 2
    tile = kernel.default_tile(channels, itemsize, depth, both, window is not None, launch.capability(device))
    similarity, index = _empty(query, depth)
    found = kernel.search(query, key, depth, tile, window, both)
    kernel.finish(query, key, found, similarity, index)
    return similarity, index, found.back


def _search_float32(query: Rows, key: Rows, depth: int) -> tuple[Tensor, Tensor]:
    """Cosines of float32 descriptors: bounds from float16 products, then float32 where these do not decide."""
    from ...kernels import launch, nearest_float32
    from ...kernels import nearest as kernel

    similarity, index = _empty(query, depth)
    device, (batch, n, channels) = query.given.device, query.given.shape
    capability = launch.capability(device)
    tile = kernel.default_tile(channels, 2, 1, False, False, capability)
    last = kernel.default_tile(channels, 4, depth, False, False, capability)
    # Small blocks leave little to rescore, but a portion must fill the device.
    block = 32
    while block < tile.columns and _BOUNDS_BUDGET * block < 4 * key.bias.shape[1] * 64 * tile.rows:
        block *= 2
    portion = max(1, _BOUNDS_BUDGET * block // (4 * key.bias.shape[1] * tile.rows)) * tile.rows
    for b in range(batch):
        one, other = _only(query, b), _only(key, b)
        chosen = (
            memory.empty(n, dtype=torch.int32, device=device),
            memory.zeros(1, dtype=torch.int32, device=device),
        )
        out = similarity[b : b + 1], index[b : b + 1]
        for first in range(0, n, portion):
            count = -(-min(portion, n - first) // tile.rows) * tile.rows
            maxima = nearest_float32.block_maxima(one, other, first, count, block, tile)
            nearest_float32.rescore(one, other, maxima, first, block, depth, chosen, *out)
        # The remaining queries have many equally good matches: they get a full search.
        one, other = one._replace(copy=None), other._replace(copy=None)
        kernel.finish(one, other, kernel.search(one, other, depth, last, chosen=chosen), *out, chosen)
    return similarity, index


def _only(rows: Rows, b: int) -> Rows:
    """One pair of the batch."""
    parts = (None if part is None else part[b : b + 1] for part in rows[:-1])
    return type(rows)(*parts, rows.normalized)
