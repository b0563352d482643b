"""The best keys of each query in half precision: one stream of products, and no index until its end.

Eight keys with products in one thread's registers are a group, and groups form eight classes, by thread and register.
The stream keeps the largest product of each class and its group: about two instructions for each product.
:func:`resolve_kernel` then evaluates the keys of the best group in float32. Loads never pause: the steps of all tiles
of keys are one loop, so the next tile's descriptors arrive while this tile's products are compared.
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

# Keys of a group, eight apart from one another, and classes of groups: how the tensor cores' sums lie in registers.
MEMBERS = 8
CLASSES = 8


@triton.jit
def _keep(top, number, best, group, second, second_group, PLACES: tl.constexpr):
    """Insert the groups ``number`` of values ``top`` into their classes' lists; among equals the earlier one stays."""
    better = top > best
    if PLACES == 2:
        rival, rival_group = tl.where(better, best, top), tl.where(better, group, number)
        replaced = rival > second
        second = tl.where(replaced, rival, second)
        second_group = tl.where(replaced, rival_group, second_group)
    return tl.where(better, top, best), tl.where(better, number, group), second, second_group


@triton.jit
def groups_kernel(
    query,
    query_scale,
    query_bias,
    key,
    key_scale,
    key_bias,
    values_out,
    groups_out,
    back,
    n,
    query_padded,
    key_padded,
    NORMALIZED: tl.constexpr,
    TMA: tl.constexpr,
    WIDTH: tl.constexpr,
    PLACES: tl.constexpr,
    MEMBERS: tl.constexpr,
    CLASSES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    tile, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    batch = tl.program_id(2).to(tl.int64)
    tiles = key_padded // COLUMNS
    share = tl.cdiv(tiles, splits)
    first = split * share
    count = tl.minimum(share, tiles - first)
    STEPS: tl.constexpr = WIDTH // DEPTH
    PER: tl.constexpr = COLUMNS // (CLASSES * MEMBERS)
    depth = tl.arange(0, DEPTH)
    column = tl.arange(0, COLUMNS)
    part = tl.arange(0, PER)
    row = tile * ROWS + tl.arange(0, ROWS)
    query_rows = query
    key_offset = column
    if not TMA:
        query_rows = query + ((batch * query_padded + row) * WIDTH)[:, None] + depth[None, :]
        key_offset = (column * WIDTH)[None, :] + depth[:, None]
    # NaN for rows that take no part: no comparison finds their products larger.
    q_factor = tl.load(query_scale + batch * query_padded + row)
    q_factor += tl.load(query_bias + batch * query_padded + row) * 0.0
    best = tl.full((ROWS, CLASSES), -INFINITY, dtype=tl.float32)
    group = tl.full((ROWS, CLASSES), FREE, dtype=tl.int32)
    second = tl.full((ROWS, CLASSES), -INFINITY, dtype=tl.float32)
    second_group = tl.full((ROWS, CLASSES), FREE, dtype=tl.int32)
    acc = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for at in tl.range(0, count * STEPS, num_stages=STAGES):
        step, k = first + at // STEPS, at % STEPS
        if TMA:
            a = query.load([(batch * query_padded).to(tl.int32) + tile * ROWS, k * DEPTH])
            b = key.load([(batch * key_padded).to(tl.int32) + step * COLUMNS, k * DEPTH]).T
        else:
            a = tl.load(query_rows + k * DEPTH)
            b = tl.load(key + (batch * key_padded + step * COLUMNS) * WIDTH + k * DEPTH + key_offset)
        acc = tl.dot(a, b, acc)
        if k == STEPS - 1:
            here = batch * key_padded + step * COLUMNS + column
            factor = tl.load(key_scale + here) + tl.load(key_bias + here) * 0.0
            if back is not None:
                known = tl.load(back + here, cache_modifier=".cg")
                along = tl.max(tl.where(tl.abs(acc) < INFINITY, acc, -INFINITY) * q_factor[:, None], axis=0)
                if NORMALIZED:
                    along = tl.max(acc * q_factor[:, None], axis=0)
                # Makes -0 and 0 one.
                along += 0.0
                bits = along.to(tl.int32, bitcast=True)
                ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
                # Equal values: the tile with the lowest number is the largest.
                packed = (ordered << 32) | (0x7FFFFFFF - tile).to(tl.int64)
                tl.atomic_max(back + here, packed, mask=(along > -INFINITY) & (packed > known), sem="relaxed")
            v = acc * factor[None, :]
            if not NORMALIZED:
                # Infinite values take no part.
                v = tl.where(tl.abs(v) < INFINITY, v, -INFINITY)
            most = tl.max(tl.reshape(v, (ROWS, PER, MEMBERS, CLASSES)), axis=2)
            if PLACES == 1:
                top = tl.max(most, axis=1)
                number = step * PER + tl.min(tl.where(most == top[:, None, :], part[None, :, None], PER), axis=1)
                best, group, second, second_group = _keep(top, number, best, group, second, second_group, PLACES)
            else:
                for one in tl.static_range(PER):
                    top = tl.max(tl.where(part[None, :, None] == one, most, -INFINITY), axis=1)
                    best, group, second, second_group = _keep(
                        top, step * PER + one, best, group, second, second_group, PLACES
                    )
            acc = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    place = tl.arange(0, CLASSES)
    exists = (row < n)[:, None] & (place >= 0)[None, :]
    target = (((batch * splits + split) * n + row) * (CLASSES * PLACES))[:, None] + place[None, :]
    takes_part = (q_factor == q_factor)[:, None]
    tl.store(values_out + target, tl.where(takes_part, best, -INFINITY), mask=exists)
    tl.store(groups_out + target, group, mask=exists)
    if PLACES == 2:
        tl.store(values_out + target + CLASSES, tl.where(takes_part, second, -INFINITY), mask=exists)
        tl.store(groups_out + target + CLASSES, second_group, mask=exists)


@triton.jit
def resolve_kernel(
    query,
    query_shift,
    query_scale,
    key,
    key_shift,
    key_scale,
    key_bias,
    values_in,
    groups_in,
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
    MEMBERS: tl.constexpr,
    CLASSES: tl.constexpr,
    PARTS: tl.constexpr,
    LANES: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """The best one or two keys of each query, in float32 from the descriptors as given, out of its best groups."""
    row = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    SLOTS: tl.constexpr = CLASSES * PARTS * PLACES
    lane = tl.arange(0, LANES)
    member = tl.arange(0, MEMBERS)
    depth = tl.arange(0, DEPTH)
    at = ((batch * SPLITS + lane // SLOTS) * n + row) * SLOTS + lane % SLOTS
    v = tl.load(values_in + at, mask=lane < SPLITS * SLOTS, other=-INFINITY)
    g = tl.load(groups_in + at, mask=lane < SPLITS * SLOTS, other=FREE)
    least = tl.max(v, axis=0)
    if PLACES == 2 and tl.sum((v == least).to(tl.int32), axis=0) == 1:
        least = tl.max(tl.where(v == least, -INFINITY, v), axis=0)
    # Equal values in several classes may be equal keys; the lowest one wins, so each class is searched.
    open_lanes = tl.where((v >= least) & (v > -INFINITY), lane, LANES)
    aux = batch * query_padded + row
    shift, scale = tl.load(query_shift + aux), tl.load(query_scale + aux)
    source = query + (batch * n + row) * channels
    best, best_index = -INFINITY, FREE
    second, second_index = -INFINITY, FREE
    here = tl.min(open_lanes, axis=0)
    while here < LANES:
        number = tl.sum(tl.where(lane == here, g, 0), axis=0)
        # Each part of a tile has its own classes if there are several.
        number = number * PARTS + here // CLASSES % PARTS
        column = number * (MEMBERS * CLASSES) + member * CLASSES + here % CLASSES
        k_aux = batch * key_padded + column
        k_shift, k_scale = tl.load(key_shift + k_aux), tl.load(key_scale + k_aux)
        other = key + (batch * m + tl.minimum(column, m - 1)) * channels
        total = tl.zeros((MEMBERS, DEPTH), dtype=tl.float32)
        for start in tl.range(0, channels, DEPTH):
            inside = start + depth < channels
            a = tl.load(source + start + depth, mask=inside, other=0.0).to(tl.float32) * shift * scale
            b = tl.load(other[:, None] + (start + depth)[None, :], mask=inside[None, :], other=0.0).to(tl.float32)
            total += a[None, :] * (b * k_shift[:, None] * k_scale[:, None])
        exact = tl.sum(total, axis=1)
        exact = tl.where((tl.load(key_bias + k_aux) == 0.0) & (tl.abs(exact) < INFINITY), exact, -INFINITY)
        for _ in tl.static_range(PLACES):
            most = tl.max(exact, axis=0)
            found = tl.min(tl.where(exact == most, column, FREE), axis=0)
            found = tl.where(most > -INFINITY, found, FREE)
            exact = tl.where(column == found, -INFINITY, exact)
            better = (most > best) | ((most == best) & (found < best_index))
            rival, rival_index = tl.where(better, best, most), tl.where(better, best_index, found)
            best, best_index = tl.where(better, most, best), tl.where(better, found, best_index)
            later = (rival > second) | ((rival == second) & (rival_index < second_index))
            second, second_index = tl.where(later, rival, second), tl.where(later, rival_index, second_index)
        open_lanes = tl.where(open_lanes == here, LANES, open_lanes)
        here = tl.min(open_lanes, axis=0)
    out = (batch * n + row) * k
    tl.store(similarity_out + out, best)
    tl.store(index_out + out, tl.where(best_index == FREE, -1, best_index).to(tl.int64))
    if PLACES == 2:
        tl.store(similarity_out + out + 1, second)
        tl.store(index_out + out + 1, tl.where(second_index == FREE, -1, second_index).to(tl.int64))


class Stream(NamedTuple):
    """How the stream of products is cut and fed."""

    tile: Tile
    feed: str
    """Who loads: "threads"; "tma", the tensor memory accelerator of Hopper and Blackwell; "warp", on Hopper, a warp
    that only loads (:mod:`lift_fast.kernels.nearest_pingpong`)."""


class Groups(NamedTuple):
    """The results of :func:`search` for :func:`resolve`."""

    values: Tensor
    """``[B, splits, n, places * classes]`` float32"""
    numbers: Tensor
    """the same, int32: the group within its class"""
    places: int
    back: Tensor | None
    """``[B, padded m]`` int64: the largest similarity of each key, and the first tile of queries that reaches it"""


def default_stream(
    channels: int, capability: tuple[int, int], depth: int = 1, mutual: bool = False, feed: str = "tma"
) -> Stream:
    """The stream for ``depth`` best keys if nothing was measured, with the given feed if that is supported."""
    if feed == "warp" and depth == 1 and (9, 0) <= capability < (10, 0):
        for tile in _RESIDENT:
            if tile.depth <= channels and _fits_resident(tile, channels, mutual):
                return Stream(tile, "warp")
    step = max(16, min(64, 1 << (channels - 1).bit_length()))
    # Sums of a wide tile fit into the registers of Hopper and into the tensor memory of Blackwell.
    columns = 256 if (9, 0) <= capability < (12, 0) else 128
    tile = Tile(128, columns, 1, step, 8, 4)
    while not _fits(tile, capability):
        tile = tile._replace(stages=tile.stages - 1) if tile.stages > 2 else tile._replace(depth=tile.depth // 2)
    return Stream(tile, "tma" if feed != "threads" and (9, 0) <= capability < (12, 0) else "threads")


def _fits(tile: Tile, capability: tuple[int, int]) -> bool:
    # In addition to the descriptors: factors, barriers, and the columns' maxima passed between threads.
    room = shared_memory(capability) - (24 << 10)
    return (tile.rows + tile.columns) * tile.depth * 2 * tile.stages <= room


# Tiles whose queries stay in shared memory, the preferred one first.
_RESIDENT = tuple(
    Tile(128, 256, 1, depth, 8, stages) for depth, stages in ((64, 4), (64, 3), (32, 8), (32, 7), (32, 4))
)


def _fits_resident(tile: Tile, channels: int, mutual: bool) -> bool:
    """Whether a block's queries fit along with the keys in flight, and with ``both`` the columns' maxima."""
    depths = -(-channels // tile.depth) * tile.depth
    staged = 2 * (tile.rows * depths + tile.columns * tile.depth * tile.stages)
    return staged + 8 * tile.columns + (12 << 10 if mutual else 512) <= shared_memory((9, 0))


def candidates(channels: int, capability: tuple[int, int], mutual: bool) -> dict[str, Stream]:
    """Streams worth measuring for one best key, by name."""
    depth = default_stream(channels, capability).tile.depth
    found = []
    for columns, warps, shrink, stages in ((256, 8, 1, 4), (256, 8, 1, 3), (256, 8, 2, 4), (128, 8, 1, 4)):
        tile = Tile(128, columns, 1, depth // shrink, warps, stages)
        if tile.depth >= 16 and _fits(tile, capability):
            found += [Stream(tile, feed) for feed in (("tma", "threads") if capability >= (9, 0) else ("threads",))]
    if (9, 0) <= capability < (10, 0):
        fitting = (tile for tile in _RESIDENT if tile.depth <= channels and _fits_resident(tile, channels, mutual))
        found += [Stream(tile, "warp") for tile in fitting]
    return {
        f"groups {tile.rows}x{tile.columns}x{tile.depth}, {tile.stages} stages, {feed}": Stream(tile, feed)
        for tile, feed in found
    }


def _splits(tiles: int, key_tiles: int, device: torch.device) -> int:
    """The number of parts of the keys: the fewest whose blocks leave little of the last round idle."""
    multiprocessors = launch.multiprocessors(device)
    most = max(1, min(4 * multiprocessors // tiles, key_tiles, 32))

    def rounds(splits: int) -> float:
        # In tiles of keys: shares are whole tiles.
        return cdiv(tiles * splits, multiprocessors) * cdiv(key_tiles, splits)

    least = min(rounds(splits) for splits in range(1, most + 1))
    return next(splits for splits in range(1, most + 1) if rounds(splits) <= 1.03 * least)


def _descriptor(rows: Rows, block: list[int]) -> object:
    from triton.tools.tensor_descriptor import TensorDescriptor

    assert rows.copy is not None
    return TensorDescriptor.from_tensor(rows.copy.view(-1, rows.copy.shape[2]), block)


def search(query: Rows, key: Rows, depth: int, stream: Stream, mutual: bool = False) -> Groups:
    """The best groups of keys of each query.

    Args:
        query, key: of :func:`lift_fast.kernels.nearest_rows.prepare`, with copies.
        depth: 1 or 2 best keys.
        stream: its tile's columns are whole groups of every class. "warp" needs 128 rows and ``depth`` 1.
        mutual: fill ``back``.
    """
    assert query.copy is not None
    assert key.copy is not None
    tile = stream.tile
    batch, n, _ = query.given.shape
    query_padded, key_padded = query.bias.shape[1], key.bias.shape[1]
    tiles = cdiv(n, tile.rows)
    splits = _splits(tiles * batch, key_padded // tile.columns, query.given.device)
    classes = tile.columns // MEMBERS if stream.feed == "warp" else CLASSES
    values = memory.new_empty(query.given, (batch, splits, n, depth * classes), dtype=torch.float32)
    numbers = memory.empty_like(values, dtype=torch.int32)
    back = None
    if mutual:
        back = memory.full((batch, key_padded), -(1 << 63), dtype=torch.int64, device=values.device)
    # A descriptor's rows are numbered in 32 bits.
    tma = stream.feed != "threads" and batch * max(query_padded, key_padded) < 1 << 31
    with launch.on(query.given):
        if stream.feed == "warp":
            assert tma
            assert depth == 1
            from . import nearest_pingpong

            nearest_pingpong.launch(
                (tiles, splits, batch), query, key, values, numbers, back, tile.columns, tile.depth, tile.stages
            )
            return Groups(values, numbers, depth, back)
        groups_kernel[(tiles, splits, batch)](
            _descriptor(query, [tile.rows, tile.depth]) if tma else query.copy,
            query.scale,
            query.bias,
            _descriptor(key, [tile.columns, tile.depth]) if tma else key.copy,
            key.scale,
            key.bias,
            values,
            numbers,
            back,
            n,
            query_padded,
            key_padded,
            NORMALIZED=query.normalized,
            TMA=tma,
            WIDTH=query.copy.shape[2],
            PLACES=depth,
            MEMBERS=MEMBERS,
            CLASSES=CLASSES,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            DEPTH=tile.depth,
            STAGES=tile.stages,
            num_warps=tile.warps,
        )
    return Groups(values, numbers, depth, back)


def resolve(query: Rows, key: Rows, found: Groups, similarity: Tensor, index: Tensor) -> None:
    """Write ``similarity``, ``index [B, n, depth]``: float32 values of the best keys, in order."""
    batch, n, channels = query.given.shape
    splits, slots = found.values.shape[1], found.values.shape[3]
    with launch.on(query.given):
        resolve_kernel[(n, batch)](
            query.given,
            query.shift,
            query.scale,
            key.given,
            key.shift,
            key.scale,
            key.bias,
            found.values,
            found.numbers,
            similarity,
            index,
            n,
            key.given.shape[1],
            query.bias.shape[1],
            key.bias.shape[1],
            channels,
            index.shape[2],
            SPLITS=splits,
            PLACES=found.places,
            MEMBERS=MEMBERS,
            CLASSES=CLASSES,
            PARTS=slots // found.places // CLASSES,
            LANES=next_power_of_2(splits * slots),
            DEPTH=64,
            num_warps=1,
        )
