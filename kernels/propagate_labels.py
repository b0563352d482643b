"""Label propagation on the GPU: windowed search and weighted average of labels in one kernel.

A block holds a square patch of neighbouring queries and visits, frame by frame, the rectangle of keys that covers their
windows. The best matches of each query stay in registers, and one comparison rejects most keys.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import memory
from . import launch
from .tiles import cdiv, next_power_of_2

# A query's matches lie in registers; PyTorch's own selection serves larger numbers.
MOST_MATCHES = 32
# Blocks that fill a device: with fewer, patches are made smaller.
_FULL = 96


@triton.jit
def _within_reach(position, queries, keys, reach):
    """Along one axis: the first and the last key whose centre lies within reach of the query's."""
    # Products of two sides need 64 bits. Only numbers >= 0 are divided, because Triton rounds towards zero.
    centre = (2 * position.to(tl.int64) + 1) * keys - queries
    first = tl.where(centre > reach, (centre - reach + 2 * queries - 1) // (2 * queries), 0)
    last = tl.where(centre + reach >= 0, (centre + reach) // (2 * queries), -1)
    return tl.minimum(first, keys).to(tl.int32), tl.minimum(last, keys - 1).to(tl.int32)


@triton.jit
def propagate_labels_kernel(
    query, key, query_part, key_part, labels, out, frames, query_h, query_w, key_h, key_w, reach_y, reach_x, objects,
    temperature, C: tl.constexpr, K: tl.constexpr, TOP: tl.constexpr, SIDE: tl.constexpr, KEYS: tl.constexpr,
    DEPTH: tl.constexpr, OBJECTS: tl.constexpr
):  # fmt: skip
    patches_x = tl.cdiv(query_w, SIDE)
    patches = tl.cdiv(query_h, SIDE) * patches_x
    batch = (tl.program_id(0) // patches).to(tl.int64)
    patch = tl.program_id(0) % patches
    place = tl.arange(0, SIDE * SIDE)
    row = (patch // patches_x) * SIDE + place // SIDE
    column = (patch % patches_x) * SIDE + place % SIDE
    exists = (row < query_h) & (column < query_w)
    # Queries beyond the grid repeat its last row and column, so that they widen no window.
    row = tl.minimum(row, query_h - 1)
    column = tl.minimum(column, query_w - 1)
    row_first, row_last = _within_reach(row, query_h, key_h, reach_y)
    column_first, column_last = _within_reach(column, query_w, key_w, reach_x)
    top, left = tl.min(row_first, 0), tl.min(column_first, 0)
    width = tl.max(column_last, 0) - left + 1
    count = (tl.max(row_last, 0) - top + 1) * width

    cells = key_h * key_w
    at = batch * query_h * query_w + row * query_w + column
    query_rows = query + at[:, None] * C
    part = tl.load(query_part + at)
    slot = tl.arange(0, TOP)[None, :]
    # Slots beyond K hold a value that nothing exceeds.
    best = tl.zeros([SIDE * SIDE, TOP], tl.float32) + tl.where(slot < K, -float("inf"), float("inf"))
    index = tl.zeros([SIDE * SIDE, TOP], tl.int32) - 1
    for frame in range(frames):
        for start in range(0, count, KEYS):
            position = start + tl.arange(0, KEYS)
            # An empty rectangle is never entered.
            y = top + position // width
            x = left + position % width
            inside = position < count
            number = frame * cells + y * key_w + x
            key_at = batch * frames * cells + number
            key_rows = key + key_at[:, None] * C
            acc = tl.zeros([SIDE * SIDE, KEYS], tl.float32)
            for c in range(0, C, DEPTH):
                channel = (c + tl.arange(0, DEPTH))[None, :]
                a = tl.load(query_rows + channel, mask=channel < C, other=0.0)
                b = tl.load(key_rows + channel, mask=inside[:, None] & (channel < C), other=0.0)
                acc = tl.dot(a, b.trans(), acc, input_precision="tf32x3")
            acc += part[:, None] + tl.load(key_part + key_at, mask=inside, other=0.0)[None, :]
            inside = inside[None, :] & (y[None, :] >= row_first[:, None]) & (y[None, :] <= row_last[:, None])
            inside = inside & (x[None, :] >= column_first[:, None]) & (x[None, :] <= column_last[:, None])
            # A comparison with NaN is false; infinite products are excluded too.
            acc = tl.where(inside & (tl.abs(acc) < float("inf")), acc, -float("inf"))
            # Keys come in ascending order, so an equal one later never wins.
            while tl.max((tl.max(acc, 1) > tl.min(best, 1)).to(tl.int32), 0) > 0:
                value, least = tl.max(acc, 1), tl.min(best, 1)
                lane = tl.min(tl.where(acc == value[:, None], tl.arange(0, KEYS)[None, :], KEYS), 1)
                chosen = tl.arange(0, KEYS)[None, :] == lane[:, None]
                # Among equals the highest index leaves, an empty slot first.
                low = best == least[:, None]
                latest = tl.max(tl.where(low, index, -2), 1)
                leaves = tl.min(tl.where(low & (index == latest[:, None]), slot, TOP), 1)
                replaced = (value > least)[:, None] & (slot == leaves[:, None])
                found = tl.sum(tl.where(chosen, number[None, :], 0), 1)
                best = tl.where(replaced, value[:, None], best)
                index = tl.where(replaced, found[:, None], index)
                acc = tl.where(chosen, -float("inf"), acc)

    matched = (index >= 0) & (slot < K)
    best = tl.where(matched, best, -float("inf"))
    # Relative to the best match, whose weight is 1: no overflow, and no sum of zero.
    weight = tl.where(matched, tl.exp((best - tl.max(best, 1)[:, None]) / temperature), 0.0)
    weight = weight / tl.maximum(tl.sum(weight, 1), 1.0)[:, None]
    for first in range(0, objects, OBJECTS):
        label = first + tl.arange(0, OBJECTS)
        average = tl.zeros([SIDE * SIDE, OBJECTS], tl.float32)
        for s in range(K):
            share = tl.sum(tl.where(slot == s, weight, 0.0), 1)
            match = tl.max(tl.where(slot == s, index, -1), 1)
            source = labels + (batch * frames * cells + match)[:, None] * objects + label[None, :]
            rows = tl.load(source, mask=(match >= 0)[:, None] & (label < objects)[None, :], other=0.0)
            average += share[:, None] * rows
        tl.store(
            out + at[:, None] * objects + label[None, :], average, mask=exists[:, None] & (label < objects)[None, :]
        )


def propagate_labels(
    query: Tensor,
    key: Tensor,
    query_part: Tensor,
    key_part: Tensor,
    labels: Tensor,
    window: list[int],
    k: int,
    temperature: float,
) -> Tensor:
    """Average of the labels of each query's ``k`` nearest keys in its window, weighted exp(similarity / temperature).

    Args:
        query, key: ``[B, N, C]`` and ``[B, M, C]`` contiguous float32, without NaN or infinity.
        query_part, key_part: ``[B, N]`` and ``[B, M]`` float32, 0 for a row that takes part, else NaN.
        labels: ``[B, M, L]`` contiguous float32.
        window: ``[radius, query_h, query_w, key_h, key_w]``; a pair of rows y and y' is in it if
        ``|(2 y' + 1) query_h - (2 y + 1) key_h| <= 2 radius query_h``, and likewise in x.
        k: 1 <= k <= MOST_MATCHES.
        temperature: > 0, a normal float32 number.

    Returns:
        ``[B, N, L]`` float32; zeros for a query without match.
    """
    radius, query_h, query_w, key_h, key_w = window
    # A radius as long as the grid reaches every key; a longer one may overflow 64 bits below.
    radius = min(radius, max(key_h, key_w))
    batch, n, channels = query.shape
    m, objects = labels.shape[1:]
    out = memory.new_empty(query, (batch, n, objects))
    if not out.numel():
        return out
    side = 8 if batch * cdiv(query_h, 8) * cdiv(query_w, 8) >= _FULL else 4
    blocks = batch * cdiv(query_h, side) * cdiv(query_w, side)
    launch.run(
        propagate_labels_kernel,
        (blocks,),
        query,
        key,
        query_part,
        key_part,
        labels,
        out,
        m // (key_h * key_w),
        query_h,
        query_w,
        key_h,
        key_w,
        2 * radius * query_h,
        2 * radius * query_w,
        objects,
        temperature,
        C=channels,
        K=k,
        TOP=next_power_of_2(k),
        SIDE=side,
        KEYS=64,
        DEPTH=max(16, min(32, next_power_of_2(channels))),
        OBJECTS=max(1, min(32, next_power_of_2(objects))),
        num_warps=side,
    )
    return out
