"""``nearest`` on the GPU: products on the tensor cores and the best keys of each query in one kernel.

No product leaves the registers. Half-precision descriptors are multiplied as given, or scaled by a power of two, and
their norms divide the sums. Float32 descriptors are multiplied as three TF32 products each;
:mod:`lift_fast.kernels.nearest_float32` searches cosines of many of them in float16.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import memory
from . import launch
from .nearest_rows import FREE, INFINITY, Rows
from .tiles import Tile, cdiv, next_power_of_2, shared_memory

# Parts of the keys for each tile of queries if queries are few.
_CHOSEN_PARTS = 8


class Geometry(NamedTuple):
    """A window: grids of the product's rows and columns, and the largest distance of their cells."""

    row_height: int
    row_width: int
    height: int
    width: int
    reach_y: int
    """Largest ``|(2 y' + 1) * row_height - (2 y + 1) * height|`` of column cell y' and row cell y."""
    reach_x: int
    row_frames: int
    frames: int


@triton.jit
def products(
    query_row, key_row, query_shift, query_scale, key_shift, key_scale, channels, COPIED: tl.constexpr,
    NORMALIZED: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    STAGES: tl.constexpr, PREC: tl.constexpr
):  # fmt: skip
    """Dot products of the rows at ``query_row [ROWS]`` with those at ``key_row [COLUMNS]``: float32."""
    acc = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    depth = tl.arange(0, DEPTH)
    for step in tl.range(0, WIDTH // DEPTH, num_stages=STAGES):
        at = step * DEPTH + depth
        if COPIED:
            # The same rows for every tile of keys: through the L1 cache, for which small stages leave room.
            a = tl.load(query_row[:, None] + at[None, :], cache_modifier=".ca")
            b = tl.load(key_row[None, :] + at[:, None])
        else:
            inside = at < channels
            a = tl.load(query_row[:, None] + at[None, :], mask=inside[None, :], other=0.0)
            b = tl.load(key_row[None, :] + at[:, None], mask=inside[:, None], other=0.0)
            if NORMALIZED:
                a = a * query_shift[:, None] * query_scale[:, None]
                b = b * key_shift[None, :] * key_scale[None, :]
        acc = tl.dot(a, b, acc, input_precision=PREC)
    return acc


@triton.jit
def insert(values, indices, v, column, ROWS: tl.constexpr):
    """Insert the values of ``v [ROWS, COLUMNS]`` that exceed the smallest of a row's list ``[ROWS, PLACES]``."""
    most = tl.max(v, axis=1)
    least = tl.min(values, axis=1)
    while tl.max((most > least).to(tl.int32), axis=0) > 0:
        found = tl.min(tl.where(v == most[:, None], column, FREE), axis=1)
        # The smallest value leaves; among equals the one with the highest index.
        smallest = values == least[:, None]
        last = tl.max(tl.where(smallest, indices, -1), axis=1)
        leaves = smallest & (indices == last[:, None]) & (most > least)[:, None]
        values = tl.where(leaves, most[:, None], values)
        indices = tl.where(leaves, found[:, None], indices)
        v = tl.where(column == found[:, None], -INFINITY, v)
        most = tl.max(v, axis=1)
        least = tl.min(values, axis=1)
    return values, indices


@triton.jit
def _parts(blocks, tiles, SPLITS: tl.constexpr):
    """The number of parts of the keys for each tile of queries, so that all blocks have work."""
    return tl.maximum(tl.minimum(blocks // tl.maximum(tiles, 1), SPLITS), 1)


@triton.jit
def search_kernel(
    query,
    query_shift,
    query_scale,
    query_bias,
    key,
    key_shift,
    key_scale,
    key_bias,
    values_out,
    indices_out,
    back,
    chosen,
    chosen_count,
    n,
    m,
    query_padded,
    key_padded,
    channels,
    row_height,
    row_width,
    height,
    width,
    reach_y,
    reach_x,
    frames,
    COPIED: tl.constexpr,
    NORMALIZED: tl.constexpr,
    WINDOW: tl.constexpr,
    PATCH: tl.constexpr,
    WIDTH: tl.constexpr,
    PLACES: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    PREC: tl.constexpr,
):
    tile = tl.program_id(0)
    split, splits = tl.program_id(1), tl.num_programs(1)
    batch = tl.program_id(2).to(tl.int64)
    lists = splits
    lane = tl.arange(0, ROWS)
    places = tl.arange(0, PLACES)
    top, left, box_width, box = 0, 0, 1, 1
    if WINDOW:
        # A rectangle of neighbouring cells has a smaller neighbourhood than the same number of cells in a row.
        across = tl.cdiv(row_width, PATCH)
        down = tl.cdiv(row_height, ROWS // PATCH)
        frame = tile // (across * down)
        first_y = (tile // across) % down * (ROWS // PATCH)
        first_x = tile % across * PATCH
        y, x = first_y + lane // PATCH, first_x + lane % PATCH
        exists = (y < row_height) & (x < row_width)
        row = tl.where(exists, frame * row_height * row_width + y * row_width + x, 0)
        last_y = tl.minimum(first_y + ROWS // PATCH, row_height) - 1
        last_x = tl.minimum(first_x + PATCH, row_width) - 1
        # Cells that may be near enough to a row of the tile.
        top = tl.maximum((2 * first_y + 1) * height - reach_y - row_height, 0) // (2 * row_height)
        left = tl.maximum((2 * first_x + 1) * width - reach_x - row_width, 0) // (2 * row_width)
        low = (2 * last_y + 1) * height + reach_y - row_height
        right = (2 * last_x + 1) * width + reach_x - row_width
        low = tl.where(low < 0, -1, tl.minimum(low // (2 * row_height), height - 1))
        right = tl.where(right < 0, -1, tl.minimum(right // (2 * row_width), width - 1))
        box_width = tl.maximum(right - left + 1, 0)
        box = tl.maximum(low - top + 1, 0) * box_width
        total = box * frames
        box_width, box = tl.maximum(box_width, 1), tl.maximum(box, 1)
        row_y, row_x = (2 * y + 1) * height, (2 * x + 1) * width
    elif chosen is not None:
        count = tl.load(chosen_count)
        # With few rows most blocks have none: these blocks take parts of the keys.
        parts = _parts(tl.num_programs(0), tl.cdiv(count, ROWS), SPLITS)
        tile, split, splits, lists = tile // parts, tile % parts, parts, SPLITS
        exists = tile * ROWS + lane < count
        row = tl.load(chosen + tile * ROWS + lane, mask=exists, other=0)
        total = tl.where(tile * ROWS < count, m, 0)
    else:
        row = tile * ROWS + lane
        exists = row < n
        total = m
    tiles = tl.cdiv(total, COLUMNS)
    share = tl.cdiv(tiles, splits)

    aux = batch * query_padded + row
    q_shift = tl.load(query_shift + aux)
    q_scale = tl.load(query_scale + aux)
    q_bias = tl.load(query_bias + aux)
    # Rows past the end are read as the last one.
    query_row = query + (aux * WIDTH if COPIED else (batch * n + tl.minimum(row, n - 1)) * channels)

    best = tl.full((ROWS,), -INFINITY, dtype=tl.float32)
    best_index = tl.full((ROWS,), FREE, dtype=tl.int32)
    second = tl.full((ROWS,), -INFINITY, dtype=tl.float32)
    second_index = tl.full((ROWS,), FREE + 1, dtype=tl.int32)
    values = tl.full((ROWS, PLACES), -INFINITY, dtype=tl.float32)
    indices = tl.zeros((ROWS, PLACES), dtype=tl.int32) + FREE + places[None, :]

    for step in tl.range(split * share, tl.minimum(split * share + share, tiles)):
        number = step * COLUMNS + tl.arange(0, COLUMNS)
        column = number
        if WINDOW:
            cell = number % box
            column_y, column_x = top + cell // box_width, left + cell % box_width
            column = (number // box) * (height * width) + column_y * width + column_x
            column = tl.where(number < total, column, 0)
        k_aux = batch * key_padded + column
        k_scale = tl.load(key_scale + k_aux)
        k_bias = tl.load(key_bias + k_aux)
        k_shift = k_scale
        if COPIED:
            key_row = key + k_aux * WIDTH
        else:
            k_shift = tl.load(key_shift + k_aux)
            key_row = key + (batch * m + tl.minimum(column, m - 1)) * channels
        acc = products(
            query_row, key_row, q_shift, q_scale, k_shift, k_scale, channels, COPIED, NORMALIZED, WIDTH, ROWS,
            COLUMNS, DEPTH, STAGES, PREC
        )  # fmt: skip
        v = acc * k_scale[None, :] + k_bias[None, :] if COPIED else acc + k_bias[None, :]
        if not NORMALIZED or not COPIED:
            # Infinite values and NaN take no part.
            v = tl.where(tl.abs(acc) < INFINITY, v, -INFINITY)
        if WINDOW:
            far_y = tl.abs(((2 * column_y + 1) * row_height)[None, :] - row_y[:, None]) > reach_y
            far_x = tl.abs(((2 * column_x + 1) * row_width)[None, :] - row_x[:, None]) > reach_x
            v = tl.where(far_y | far_x | (number >= total)[None, :], -INFINITY, v)
        if back is not None:
            along = tl.max(v * q_scale[:, None] + q_bias[:, None], axis=0)
            bits = along.to(tl.int32, bitcast=True)
            ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
            # Equal values: the tile with the lowest number is the largest.
            packed = (ordered << 32) | (0x7FFFFFFF - tile).to(tl.int64)
            tl.atomic_max(back + k_aux, packed, mask=along > -INFINITY, sem="relaxed")
        if PLACES <= 2:
            most = tl.max(v, axis=1)
            found = tl.min(tl.where(v == most[:, None], column[None, :], FREE), axis=1)
            better = most > best
            if PLACES == 2:
                rest = tl.where(column[None, :] == found[:, None], -INFINITY, v)
                next_most = tl.max(rest, axis=1)
                next_found = tl.min(tl.where(rest == next_most[:, None], column[None, :], FREE), axis=1)
                rival, rival_index = tl.where(better, best, most), tl.where(better, best_index, found)
                newer = better & (next_most > best)
                rival, rival_index = tl.where(newer, next_most, rival), tl.where(newer, next_found, rival_index)
                replaced = better | (rival > second)
                second = tl.where(replaced, rival, second)
                second_index = tl.where(replaced, rival_index, second_index)
            best = tl.where(better, most, best)
            best_index = tl.where(better, found, best_index)
        else:
            values, indices = insert(values, indices, v, column[None, :], ROWS)

    if PLACES == 1:
        values, indices = best[:, None], best_index[:, None]
    elif PLACES == 2:
        values = tl.where(places[None, :] == 0, best[:, None], second[:, None])
        indices = tl.where(places[None, :] == 0, best_index[:, None], second_index[:, None])
    values = tl.where((q_bias == 0.0)[:, None], values, -INFINITY)
    target = (((batch * lists + split) * n + row) * PLACES)[:, None] + places[None, :]
    tl.store(values_out + target, values, mask=exists[:, None])
    tl.store(indices_out + target, indices, mask=exists[:, None])


@triton.jit
def write_sorted(values, indices, similarity_out, index_out, at, k, PLACES: tl.constexpr):
    """Store a list ``[PLACES]`` by descending value, then ascending index; -1 and -inf where there is no match."""
    larger = values[None, :] > values[:, None]
    earlier = (values[None, :] == values[:, None]) & (indices[None, :] < indices[:, None])
    rank = tl.sum((larger | earlier).to(tl.int32), axis=1)
    found = values > -INFINITY
    tl.store(similarity_out + at * k + rank, values, mask=rank < k)
    tl.store(index_out + at * k + rank, tl.where(found, indices, -1).to(tl.int64), mask=rank < k)


@triton.jit
def finish_kernel(
    query,
    query_shift,
    query_scale,
    key,
    key_shift,
    key_scale,
    values_in,
    indices_in,
    chosen,
    chosen_count,
    similarity_out,
    index_out,
    n,
    m,
    query_padded,
    key_padded,
    channels,
    k,
    SPLITS: tl.constexpr,
    PLACES: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Merge the lists of all splits and evaluate the rest in float32, from the descriptors as given."""
    row = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    needed = row < n
    parts = SPLITS
    if chosen is not None:
        count = tl.load(chosen_count)
        needed = row < count
        parts = _parts(tl.cdiv(n, ROWS), tl.cdiv(count, ROWS), SPLITS)
        row = tl.load(chosen + row, mask=needed, other=0)
    lane = tl.arange(0, LANES)
    places = tl.arange(0, PLACES)
    depth = tl.arange(0, DEPTH)
    at = ((batch * SPLITS + lane // PLACES) * n + row) * PLACES + lane % PLACES
    filled = lane < tl.where(needed, parts * PLACES, 0)
    v = tl.load(values_in + at, mask=filled, other=-INFINITY)
    i = tl.load(indices_in + at, mask=filled, other=FREE)
    aux = batch * query_padded + row
    factor = tl.load(query_shift + aux), tl.load(query_scale + aux)
    source = query + (batch * n + row) * channels
    values = tl.full((PLACES,), -INFINITY, dtype=tl.float32)
    indices = places + FREE
    for place in tl.range(0, PLACES):
        most = tl.max(v, axis=0)
        found = tl.min(tl.where(v == most, i, FREE), axis=0)
        if needed & (most > -INFINITY):
            v = tl.where(i == found, -INFINITY, v)
            k_aux = batch * key_padded + found
            k_shift, k_scale = tl.load(key_shift + k_aux), tl.load(key_scale + k_aux)
            other = key + (batch * m + found) * channels
            total = tl.zeros((DEPTH,), dtype=tl.float32)
            for start in tl.range(0, channels, DEPTH):
                inside = start + depth < channels
                a = tl.load(source + start + depth, mask=inside, other=0.0).to(tl.float32)
                b = tl.load(other + start + depth, mask=inside, other=0.0).to(tl.float32)
                total += (a * factor[0] * factor[1]) * (b * k_shift * k_scale)
            exact = tl.sum(total, axis=0)
            exact = tl.where(tl.abs(exact) < INFINITY, exact, most)
            values = tl.where(places == place, exact, values)
            indices = tl.where(places == place, found, indices)
    if needed:
        write_sorted(values, indices, similarity_out, index_out, batch * n + row, k, PLACES)


@triton.jit
def mutual_kernel(
    query,
    query_scale,
    query_bias,
    key,
    index,
    back,
    valid_out,
    n,
    query_padded,
    key_padded,
    k,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    PREC: tl.constexpr,
):
    """Whether each query is the best one of its match, among all tiles of queries and within its tile."""
    PARTS: tl.constexpr = ROWS // COLUMNS
    tile, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    batch = tl.program_id(1).to(tl.int64)
    row = tile * ROWS + tl.arange(0, ROWS)
    own = tile * ROWS + part * COLUMNS + tl.arange(0, COLUMNS)
    found = tl.load(index + (batch * n + own) * k, mask=own < n, other=-1)
    matched = found >= 0
    match = batch * key_padded + tl.where(matched, found, 0)
    aux = batch * query_padded + row
    q_scale, q_bias = tl.load(query_scale + aux), tl.load(query_bias + aux)
    acc = products(
        query + aux * WIDTH, key + match * WIDTH, q_scale, q_scale, q_scale, q_scale, 0, True, True, WIDTH, ROWS,
        COLUMNS, DEPTH, STAGES, PREC
    )  # fmt: skip
    acc = tl.where(tl.abs(acc) < INFINITY, acc, -INFINITY)
    v = acc * q_scale[:, None] + q_bias[:, None]
    most = tl.max(v, axis=0)
    first = tl.min(tl.where(v == most[None, :], row[:, None], FREE), axis=0)
    best_tile = 0x7FFFFFFF - (tl.load(back + match) & 0x7FFFFFFF)
    good = matched & (best_tile == tile) & (first == own)
    tl.store(valid_out + batch * n + own, good.to(tl.int8), mask=own < n)


def default_tile(
    channels: int, itemsize: int, places: int, both: bool, window: bool, capability: tuple[int, int]
) -> Tile:
    """The tile if nothing was measured; its ``accumulators`` are not used here.

    Args:
        channels: channels of a descriptor.
        itemsize: bytes of a multiplied element.
        places: best keys for each query.
        both: whether the other direction is searched too.
        window: whether only neighbours count.
        capability: of the device.
    """
    depth = max(16, min(64, 1 << (channels - 1).bit_length()))
    if itemsize == 4:
        # Three products of each element, all from registers.
        return Tile(32, 64, 1, 16, 4, 2) if window and capability < (9, 0) else Tile(64, 64, 1, 16, 8, 2)
    # On Hopper the sums of a wide tile fit if little else is kept. For both directions two blocks share a
    # multiprocessor: one multiplies while the other compares. On an H200, 50,176 x 50,176 x 384: 4.9 ms instead of 6.7.
    single = places == 1 and not window and (9, 0) <= capability < (10, 0)
    columns = 64 if window else 256 if single and not both else 128
    tile = Tile(128, columns, 1, depth, 4, 3) if single and both else Tile(128, columns, 1, depth, 8, 4)
    while (tile.rows + tile.columns) * tile.depth * itemsize * tile.stages > shared_memory(capability) - (24 << 10):
        tile = tile._replace(stages=tile.stages - 1) if tile.stages > 2 else tile._replace(depth=tile.depth // 2)
    return tile


def candidates(channels: int, capability: tuple[int, int]) -> list[Tile]:
    """Tiles worth measuring for one best key in half precision."""
    depth = default_tile(channels, 2, 1, False, False, capability).depth
    tiles = [
        Tile(rows, columns, 1, depth // shrink, warps, stages)
        for rows, columns, warps in ((128, 256, 8), (128, 128, 8), (128, 128, 4), (64, 256, 4), (256, 128, 8))
        for shrink in (1, 2)
        for stages in (2, 3, 4)
        if depth // shrink >= 16
    ]
    room = shared_memory(capability) - (8 << 10)
    return [tile for tile in tiles if (tile.rows + tile.columns) * tile.depth * 2 * tile.stages <= room]


def split_keys(tiles: int, column_tiles: int, places: int, device: torch.device) -> int:
    """The number of parts of the keys, so that even few queries keep the device busy to the end."""
    return max(1, min(4 * launch.multiprocessors(device) // tiles, column_tiles, 32, 512 // places))


class Found(NamedTuple):
    """The results of :func:`search` for :func:`finish`."""

    values: Tensor
    """``[B, splits, n, places]`` float32"""
    indices: Tensor
    """the same, int32; 2^30 and above if there is none"""
    back: Tensor | None
    """``[B, padded m]`` int64: the largest similarity of each key, and the first tile of queries that reaches it"""
    rows: int
    """queries of a tile"""


def search(
    query: Rows,
    key: Rows,
    depth: int,
    tile: Tile,
    window: Geometry | None = None,
    mutual: bool = False,
    chosen: tuple[Tensor, Tensor] | None = None,
) -> Found:
    """The ``depth`` best keys of each query, in ``places`` (a power of two) per part of the keys.

    Args:
        query, key: of :func:`lift_fast.kernels.nearest_rows.prepare`, both with or both without copies.
        depth: at most 32.
        tile: rows and columns at most 256, ``rows`` a multiple of 16.
        window: queries are the rows, keys the columns.
        mutual: fill ``back``; needs copies, and ``depth`` 1 or 2.
        chosen: ``(rows [n] int32, count [1] int32)``, for a batch of one: search only these queries.
    """
    batch, n, channels = query.given.shape
    m = key.given.shape[1]
    places = next_power_of_2(depth)
    patch = min(16, tile.rows)
    if window is None:
        tiles, column_tiles = cdiv(n, tile.rows), cdiv(m, tile.columns)
    else:
        down, across = tile.rows // patch, patch
        tiles = window.row_frames * cdiv(window.row_height, down) * cdiv(window.row_width, across)
        column_tiles = cdiv(m, 4 * tile.columns)
    if chosen is None:
        splits = blocks = split_keys(tiles * batch, column_tiles, places, query.given.device)
    else:
        # For each tile of chosen rows; the blocks of other rows help.
        splits, blocks = max(1, min(_CHOSEN_PARTS, column_tiles, 16 // places)), 1
    values = memory.new_empty(query.given, (batch, splits, n, places), dtype=torch.float32)
    indices = memory.empty_like(values, dtype=torch.int32)
    back = None
    if mutual:
        back = memory.full((batch, key.bias.shape[1]), -(1 << 63), dtype=torch.int64, device=values.device)
    copied = query.copy is not None
    launch.run(
        search_kernel,
        (tiles, blocks, batch),
        query.copy if copied else query.given,
        query.shift,
        query.scale,
        query.bias,
        key.copy if copied else key.given,
        key.shift,
        key.scale,
        key.bias,
        values,
        indices,
        back,
        chosen[0] if chosen is not None else None,
        chosen[1] if chosen is not None else None,
        n,
        m,
        query.bias.shape[1],
        key.bias.shape[1],
        channels,
        *((*window[:6], window.frames) if window is not None else (1,) * 7),
        COPIED=copied,
        NORMALIZED=query.normalized,
        WINDOW=window is not None,
        PATCH=patch,
        WIDTH=query.copy.shape[2] if query.copy is not None else cdiv(channels, tile.depth) * tile.depth,
        PLACES=places,
        # Not specialised on the number of parts, which follows from the sets' sizes.
        SPLITS=1 if chosen is None else splits,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
        STAGES=tile.stages,
        PREC="tf32" if copied else "tf32x3",
        num_warps=tile.warps,
    )
    return Found(values, indices, back, tile.rows)


def finish(
    query: Rows, key: Rows, found: Found, similarity: Tensor, index: Tensor, chosen: tuple[Tensor, Tensor] | None = None
) -> None:
    """Write ``similarity``, ``index [B, n, k]``: float32 values of the best keys found, in order."""
    batch, n, channels = query.given.shape
    _, splits, _, places = found.values.shape
    launch.run(
        finish_kernel,
        (n, batch),
        query.given,
        query.shift,
        query.scale,
        key.given,
        key.shift,
        key.scale,
        found.values,
        found.indices,
        chosen[0] if chosen is not None else None,
        chosen[1] if chosen is not None else None,
        similarity,
        index,
        n,
        key.given.shape[1],
        query.bias.shape[1],
        key.bias.shape[1],
        channels,
        index.shape[2],
        SPLITS=splits,
        PLACES=places,
        ROWS=found.rows,
        LANES=next_power_of_2(splits * places),
        DEPTH=128,
        num_warps=1,
    )


def mutual(query: Rows, key: Rows, index: Tensor, back: Tensor, tile: Tile) -> Tensor:
    """``[B, n]`` int8: whether each query's first match ``index [B, n, k]`` leads back to it.

    Args:
        query, key: of :func:`lift_fast.kernels.nearest_rows.prepare`, with copies.
        index: of :func:`finish`.
        back: of :func:`search` with a tile of as many rows.
        tile: see there.
    """
    assert query.copy is not None
    batch, n, k = index.shape
    valid = memory.empty((batch, n), dtype=torch.int8, device=index.device)
    # Blackwell's registers hold a smaller part of a product at one time.
    columns = tile.rows // 2 if (10, 0) <= launch.capability(index.device) < (12, 0) else tile.rows
    staged = (tile.rows + columns) * tile.depth * query.copy.element_size()
    launch.run(
        mutual_kernel,
        (cdiv(n, tile.rows) * (tile.rows // columns), batch),
        query.copy,
        query.scale,
        query.bias,
        key.copy,
        index,
        back,
        valid,
        n,
        query.bias.shape[1],
        key.bias.shape[1],
        k,
        WIDTH=query.copy.shape[2],
        ROWS=tile.rows,
        COLUMNS=columns,
        DEPTH=tile.depth,
        STAGES=max(2, min(tile.stages, (64 << 10) // staged)),
        PREC="tf32",
        num_warps=8 if tile.rows == 128 else tile.warps,
    )
    return valid
