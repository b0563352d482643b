"""Cosines of float32 descriptors, searched in float16 with proven bounds.

:func:`blocks_kernel` keeps the largest product of each block of keys. :func:`rescore_kernel` evaluates in float32 the
blocks that can hold a match, given the measured rounding of the two sets.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import memory
from . import launch
from .nearest import insert, products, split_keys, write_sorted
from .nearest_rows import FREE, HALF_LENGTH, INFINITY, Rows
from .tiles import Tile, next_power_of_2

# Queries whose match may lie in more blocks than this are searched again, in float32.
MOST_BLOCKS = 128


@triton.jit
def blocks_kernel(
    query,
    key,
    key_bias,
    out,
    first_row,
    blocks,
    key_padded,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    LENGTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The largest similarity of each query of a portion to each block of keys: ``[portion, blocks]`` float32."""
    tile, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    lane = tile * ROWS + tl.arange(0, ROWS)
    query_row = query + (first_row + lane).to(tl.int64) * WIDTH
    tiles = key_padded // COLUMNS
    share = tl.cdiv(tiles, splits)
    for step in tl.range(split * share, tl.minimum(split * share + share, tiles)):
        column = step * COLUMNS + tl.arange(0, COLUMNS)
        bias = tl.load(key_bias + column)
        key_row = key + column.to(tl.int64) * WIDTH
        acc = products(
            query_row, key_row, bias, bias, bias, bias, 0, True, True, WIDTH, ROWS, COLUMNS, DEPTH, STAGES, "tf32"
        )  # fmt: skip
        v = tl.reshape(acc + bias[None, :], (ROWS, COLUMNS // BLOCK, BLOCK))
        most = tl.max(v, axis=2) * (1.0 / (LENGTH * LENGTH))
        block = step * (COLUMNS // BLOCK) + tl.arange(0, COLUMNS // BLOCK)
        tl.store(out + lane.to(tl.int64)[:, None] * blocks + block[None, :], most)


@triton.jit
def rescore_kernel(
    query,
    query_shift,
    query_scale,
    query_bias,
    query_residual,
    key,
    key_shift,
    key_scale,
    key_bias,
    key_residual,
    maxima,
    bar,
    chosen,
    chosen_count,
    similarity_out,
    index_out,
    first_row,
    n,
    m,
    channels,
    blocks,
    k,
    rounding,
    BLOCK: tl.constexpr,
    MOST: tl.constexpr,
    PLACES: tl.constexpr,
    LANES: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Evaluate in float32 the blocks that can hold one of a query's ``k`` best keys; list the query if too many can."""
    portion = tl.program_id(0)
    row = first_row + portion
    lane = tl.arange(0, LANES)
    offset = tl.arange(0, BLOCK)
    depth = tl.arange(0, DEPTH)
    places = tl.arange(0, PLACES)
    # |q.k - q'.k'| <= |q - q'| |k'| + |q| |k - k'| for unit vectors, plus the rounding of the sums.
    error = 1.001 * (tl.load(query_residual + row) + tl.load(key_residual)) + rounding
    least = tl.load(bar + portion) - 2.0 * error
    finite = tl.load(query_bias + row) == 0.0
    own = maxima + portion.to(tl.int64) * blocks
    candidates = 0
    for start in tl.range(0, blocks, LANES):
        bound = tl.load(own + start + lane, mask=start + lane < blocks, other=-INFINITY)
        candidates += tl.sum(((bound >= least) & (bound > -INFINITY)).to(tl.int32), axis=0)
    few = candidates <= MOST
    if finite & (few == 0):
        place = tl.atomic_add(chosen_count, 1)
        tl.store(chosen + place, row)
    values = tl.full((1, PLACES), -INFINITY, dtype=tl.float32)
    indices = places[None, :] + FREE
    if finite & few:
        shift, scale = tl.load(query_shift + row), tl.load(query_scale + row)
        source = query + row.to(tl.int64) * channels
        for start in tl.range(0, blocks, LANES):
            bound = tl.load(own + start + lane, mask=start + lane < blocks, other=-INFINITY)
            open_blocks = tl.where((bound >= least) & (bound > -INFINITY), start + lane, FREE)
            block = tl.min(open_blocks, axis=0)
            while block < FREE:
                column = block * BLOCK + offset
                k_shift, k_scale = tl.load(key_shift + column), tl.load(key_scale + column)
                other = key + tl.minimum(column, m - 1).to(tl.int64) * channels
                total = tl.zeros((BLOCK, DEPTH), dtype=tl.float32)
                for channel in tl.range(0, channels, DEPTH):
                    at = channel + depth
                    a = tl.load(source + at, mask=at < channels, other=0.0) * shift * scale
                    b = tl.load(other[:, None] + at[None, :], mask=(at < channels)[None, :], other=0.0)
                    total += a[None, :] * (b * k_shift[:, None] * k_scale[:, None])
                exact = tl.sum(total, axis=1)
                exact = tl.where(tl.load(key_bias + column) == 0.0, exact, -INFINITY)
                values, indices = insert(values, indices, exact[None, :], column[None, :], 1)
                open_blocks = tl.where(open_blocks == block, FREE, open_blocks)
                block = tl.min(open_blocks, axis=0)
    if few | (finite == 0):
        value, found = tl.reshape(values, (PLACES,)), tl.reshape(indices, (PLACES,))
        write_sorted(value, found, similarity_out, index_out, row.to(tl.int64), k, PLACES)


def block_maxima(query: Rows, key: Rows, first: int, count: int, block: int, tile: Tile) -> Tensor:
    """``[count, blocks]``: bounds of the similarities of queries ``first ...`` to each block of keys.

    Args:
        query, key: batches of one, of :func:`lift_fast.kernels.nearest_rows.prepare` with measured copies.
        first, count: multiples of ``tile.rows``.
        block: keys of a block, a power of two that divides ``tile.columns``.
        tile: see :func:`lift_fast.kernels.nearest.search`.
    """
    assert query.copy is not None
    blocks = key.bias.shape[1] // block
    out = memory.new_empty(query.bias, (count, blocks))
    tiles = count // tile.rows
    splits = split_keys(tiles, key.bias.shape[1] // tile.columns, 1, out.device)
    launch.run(
        blocks_kernel,
        (tiles, splits),
        query.copy,
        key.copy,
        key.bias,
        out,
        first,
        blocks,
        key.bias.shape[1],
        WIDTH=query.copy.shape[2],
        BLOCK=block,
        LENGTH=HALF_LENGTH,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
        STAGES=tile.stages,
        num_warps=tile.warps,
    )
    return out


def sum_error(channels: int) -> float:
    """How far the tensor cores' sum of float16 products of two unit vectors may be from the exact sum.

    They align the products of a block and the sum so far to the largest, cut off all below its 23 fractional bits
    (fewer than any of them is known to keep), and truncate the result. No term or partial sum exceeds 1, and the
    largest loses nothing: at most 2^-23 for each product, or 2^-22 if results carry, which doubles the error.
    """
    return (channels + 16) * 2.0**-23


def rescore(
    query: Rows,
    key: Rows,
    maxima: Tensor,
    first: int,
    block: int,
    depth: int,
    chosen: tuple[Tensor, Tensor],
    similarity: Tensor,
    index: Tensor,
) -> None:
    """Write ``similarity``, ``index [1, n, k]`` of a portion's queries; list in ``chosen`` the queries left over.

    Args:
        query, key: as for :func:`block_maxima`.
        maxima: of :func:`block_maxima`.
        first, block: see there.
        depth: places of a query's list, at least k.
        chosen: ``(rows [n] int32, count [1] int32)``, to which rows are added.
        similarity, index: float32, int64.
    """
    assert query.residual is not None
    assert key.residual is not None
    _, n, channels = query.given.shape
    places = next_power_of_2(depth)
    bar = maxima.amax(1) if depth == 1 else maxima.topk(min(depth, maxima.shape[1])).values[:, -1].contiguous()
    if depth > maxima.shape[1]:
        bar = torch.full_like(bar, -torch.inf)
    launch.run(
        rescore_kernel,
        (min(maxima.shape[0], n - first),),
        query.given,
        query.shift,
        query.scale,
        query.bias,
        query.residual,
        key.given,
        key.shift,
        key.scale,
        key.bias,
        key.residual.amax(),
        maxima,
        bar,
        chosen[0],
        chosen[1],
        similarity,
        index,
        first,
        n,
        key.given.shape[1],
        channels,
        maxima.shape[1],
        index.shape[2],
        sum_error(channels),
        BLOCK=block,
        MOST=MOST_BLOCKS,
        PLACES=places,
        LANES=1024 if maxima.shape[1] > 512 else 512,
        DEPTH=max(16, 4096 // block),
        num_warps=4,
    )
