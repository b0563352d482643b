"""The search of :mod:`lift_fast.kernels.nearest_groups` for Hopper, with warps of their own for each kind of work.

One warp loads the descriptors; two groups of four warps each multiply 64 queries, which stay in shared memory, by the
same keys. The groups wait for loads but never for each other: while one compares its sums, the other uses the tensor
cores. Written in Gluon, Triton's language of explicit layouts and barriers.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .nearest_rows import FREE, INFINITY, Rows

# Of a block.
QUERIES = 128


@gluon.jit
def _load(query, key, query_memory, key_memory, query_there, there, free, query_row, key_row, first, count,
          STEPS: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """The warp that loads: the queries once, then the keys of all tiles in steps of their channels."""
    COLUMNS: gl.constexpr = key.block_type.shape[0]
    DEPTH: gl.constexpr = key.block_type.shape[1]
    ROWS: gl.constexpr = query.block_type.shape[0]
    mbarrier.expect(query_there, 2 * STEPS * ROWS * DEPTH * 2)
    for half in gl.static_range(2):
        for k in range(STEPS):
            tma.async_copy_global_to_shared(
                query, [query_row + half * ROWS, k * DEPTH], query_there, query_memory.index(half * STEPS + k)
            )
    for at in range(count * STEPS):
        slot = at % STAGES
        mbarrier.wait(free.index(slot), ((at // STAGES) & 1) ^ 1)
        mbarrier.expect(there.index(slot), COLUMNS * DEPTH * 2)
        tma.async_copy_global_to_shared(
            key,
            [key_row + (first + at // STEPS) * COLUMNS, (at % STEPS) * DEPTH],
            there.index(slot),
            key_memory.index(slot),
        )


@gluon.jit
def _halves(table):
    """The left and the right half of the columns; each thread keeps its own values."""
    return gl.split(gl.permute(gl.reshape(table, [table.shape[0], 2, table.shape[1] // 2]), (0, 2, 1)))


@gluon.jit
def _look_back(products, query_scale, query_bias, back, tile, NORMALIZED: gl.constexpr):
    """Record the largest of each key's products with the tile's queries."""
    ROWS: gl.constexpr = products.shape[0]
    COLUMNS: gl.constexpr = products.shape[1]
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    column = gl.arange(0, COLUMNS, layout=LINE)
    known = gl.load(back + column, cache_modifier=".cg")
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, products.type.layout))
    # NaN for a query that takes no part.
    along = products * (gl.load(query_scale + row) + gl.load(query_bias + row) * 0.0)[:, None]
    if not NORMALIZED:
        # Infinite values take no part.
        along = gl.where(gl.abs(along) < INFINITY, along, -INFINITY)
    # Makes -0 and 0 one.
    along = gl.convert_layout(gl.max(along, axis=0), LINE) + 0.0
    bits = along.to(gl.int32, bitcast=True)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(gl.int64)
    # Equal values: the tile with the lowest number is the largest.
    packed = (ordered << 32) | (0x7FFFFFFF - tile).to(gl.int64)
    gl.atomic_max(back + column, packed, mask=(along > -INFINITY) & (packed > known), sem="relaxed")


@gluon.jit
def _multiply(query_memory, key_memory, factor_memory, query_there, there, free, query_scale, query_bias, key_scale,
              key_bias, values_out, groups_out, back, tile, n, first, count, HALF: gl.constexpr,
              NORMALIZED: gl.constexpr, MUTUAL: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """Four warps that multiply and compare; the queries' pointers, and ``n``, begin at their 64 queries."""
    ROWS: gl.constexpr = query_memory.shape[1]
    COLUMNS: gl.constexpr = key_memory.shape[1]
    PARTS: gl.constexpr = COLUMNS // 64
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    LINE: gl.constexpr = gl.BlockedLayout([COLUMNS // 128], [32], [4], [0])
    column = gl.arange(0, COLUMNS, layout=LINE)
    acc = gl.zeros([ROWS, COLUMNS], gl.float32, SUMS)
    flat = gl.max(gl.reshape(acc, [ROWS, PARTS, 8, 8]), axis=2)
    best = flat - INFINITY
    group = flat.to(gl.int32) + FREE
    mbarrier.wait(query_there, 0)
    at = 0
    for step in range(first, first + count):
        # Loaded early, so that they arrive in time; NaN for a key that takes no part.
        here = step * COLUMNS + column
        factor_memory.store(gl.load(key_scale + here) + gl.load(key_bias + here) * 0.0)
        for k in range(STEPS):
            slot = at % STAGES
            mbarrier.wait(there.index(slot), (at // STAGES) & 1)
            acc = warpgroup_mma(
                query_memory.index(HALF * STEPS + k),
                key_memory.index(slot).permute((1, 0)),
                acc,
                use_acc=k > 0,
                is_async=True,
            )
            acc = warpgroup_mma_wait(1, deps=(acc,))
            # The products before this one are done.
            mbarrier.arrive(free.index((at + STAGES - 1) % STAGES), pred=k > 0)
            at += 1
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(free.index((at + STAGES - 1) % STAGES))
        factor = factor_memory.load(gl.SliceLayout(0, SUMS))
        if MUTUAL:
            # By quarters, for which the registers suffice.
            near, far = _halves(acc)
            one, two = _halves(near)
            three, four = _halves(far)
            _look_back(one, query_scale, query_bias, back + step * COLUMNS, tile, NORMALIZED)
            _look_back(two, query_scale, query_bias, back + step * COLUMNS + COLUMNS // 4, tile, NORMALIZED)
            _look_back(three, query_scale, query_bias, back + step * COLUMNS + COLUMNS // 2, tile, NORMALIZED)
            _look_back(four, query_scale, query_bias, back + step * COLUMNS + COLUMNS // 4 * 3, tile, NORMALIZED)
        v = acc * factor[None, :]
        if not NORMALIZED:
            v = gl.where(gl.abs(v) < INFINITY, v, -INFINITY)
        top = gl.max(gl.reshape(v, [ROWS, PARTS, 8, 8]), axis=2)
        better = top > best
        best = gl.where(better, top, best)
        group = gl.where(better, step, group)
    best, group = gl.reshape(best, [ROWS, PARTS * 8]), gl.reshape(group, [ROWS, PARTS * 8])
    TABLE: gl.constexpr = best.type.layout
    lane = gl.arange(0, ROWS, layout=gl.SliceLayout(1, TABLE))
    place = gl.arange(0, PARTS * 8, layout=gl.SliceLayout(0, TABLE))
    target = lane[:, None] * (PARTS * 8) + place[None, :]
    exists = (lane < n)[:, None] & (place >= 0)[None, :]
    best = gl.where((gl.load(query_bias + lane) == 0.0)[:, None], best, -INFINITY)
    gl.store(values_out + target, best, mask=exists)
    gl.store(groups_out + target, group, mask=exists)


@gluon.jit
def pingpong_kernel(
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
    NORMALIZED: gl.constexpr,
    MUTUAL: gl.constexpr,
    STEPS: gl.constexpr,
    STAGES: gl.constexpr,
):
    ROWS: gl.constexpr = query.block_type.shape[0]
    DEPTH: gl.constexpr = query.block_type.shape[1]
    COLUMNS: gl.constexpr = key.block_type.shape[0]
    SLOTS: gl.constexpr = COLUMNS // 8
    tile, split, splits = gl.program_id(0), gl.program_id(1), gl.num_programs(1)
    batch = gl.program_id(2).to(gl.int64)
    tiles = key_padded // COLUMNS
    share = (tiles + splits - 1) // splits
    first = split * share
    count = gl.maximum(gl.minimum(share, tiles - first), 0)
    query_memory = gl.allocate_shared_memory(query.dtype, [2 * STEPS, ROWS, DEPTH], query.layout)
    key_memory = gl.allocate_shared_memory(key.dtype, [STAGES, COLUMNS, DEPTH], key.layout)
    factors = gl.allocate_shared_memory(gl.float32, [2, COLUMNS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    query_there = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    there = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(query_there, 1)
    for slot in gl.static_range(STAGES):
        mbarrier.init(there.index(slot), 1)
        mbarrier.init(free.index(slot), 2)
    query_at = batch * query_padded + tile * (2 * ROWS)
    key_at = batch * key_padded
    out = ((batch * splits + split) * n + tile * (2 * ROWS)) * SLOTS
    left = n - tile * (2 * ROWS)
    query_scale, query_bias = query_scale + query_at, query_bias + query_at
    key_scale, key_bias, back = key_scale + key_at, key_bias + key_at, back + key_at
    values_out, groups_out = values_out + out, groups_out + out
    gl.warp_specialize(
        [
            (_multiply, (
                query_memory, key_memory, factors.index(0), query_there, there, free, query_scale, query_bias,
                key_scale, key_bias, values_out, groups_out, back, tile, left, first, count, 0, NORMALIZED, MUTUAL,
                STEPS, STAGES
            )),
            (_multiply, (
                query_memory, key_memory, factors.index(1), query_there, there, free, query_scale + ROWS,
                query_bias + ROWS, key_scale, key_bias, values_out + ROWS * SLOTS, groups_out + ROWS * SLOTS, back,
                tile, left - ROWS, first, count, 1, NORMALIZED, MUTUAL, STEPS, STAGES
            )),
            (_load, (
                query, key, query_memory, key_memory, query_there, there, free, query_at.to(gl.int32),
                key_at.to(gl.int32), first, count, STEPS, STAGES
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def launch(
    grid: tuple[int, int, int],
    query: Rows,
    key: Rows,
    values: Tensor,
    numbers: Tensor,
    back: Tensor | None,
    columns: int,
    depth: int,
    stages: int,
) -> None:
    """Fill ``values``, ``numbers`` and ``back`` of :func:`lift_fast.kernels.nearest_groups.search` for one best key."""
    assert query.copy is not None
    assert key.copy is not None
    layout = gl.NVMMASharedLayout(swizzle_byte_width=2 * depth, element_bitwidth=16, rank=2)

    def descriptor(copy: Tensor, rows: int) -> TensorDescriptor:
        return TensorDescriptor.from_tensor(copy.view(-1, copy.shape[2]), [rows, depth], layout)

    pingpong_kernel[grid](
        descriptor(query.copy, QUERIES // 2),
        query.scale,
        query.bias,
        descriptor(key.copy, columns),
        key.scale,
        key.bias,
        values,
        numbers,
        # Any pointer if there is nothing to write.
        numbers if back is None else back,
        query.given.shape[1],
        query.bias.shape[1],
        key.bias.shape[1],
        NORMALIZED=query.normalized,
        MUTUAL=back is not None,
        STEPS=query.copy.shape[2] // depth,
        STAGES=stages,
        num_warps=4,
    )
