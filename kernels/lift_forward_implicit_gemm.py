"""What the convolution kernels with wide accumulators share: the cells of a window that exist, and the products.

A block's accumulators lie side by side: as many of WIDE output channels as fit into its BLOCK channels, then one of
the rest. Wide accumulators read the inputs less often from shared memory, which limits the products on Hopper.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def cells_seen(top, left, height, width, exists, SIDE: tl.constexpr):
    """Bit ``SIDE * dy + dx`` for each cell (dy, dx) of a window that lies in the image; 0 where ``exists`` is false.

    One register a position; comparing rows and columns with the image's would take two in every step.
    """
    ONE_ROW: tl.constexpr = (1 << SIDE) - 1
    ONE_COLUMN: tl.constexpr = ((1 << (SIDE * SIDE)) - 1) // ((1 << SIDE) - 1)
    rows = tl.zeros_like(top)
    columns = tl.zeros_like(left)
    for i in tl.static_range(SIDE):
        rows |= tl.where((top + i >= 0) & (top + i < height), ONE_ROW << (SIDE * i), 0)
        columns |= tl.where((left + i >= 0) & (left + i < width), ONE_COLUMN << i, 0)
    return tl.where(exists, rows & columns, 0)


@triton.jit
def zeros(ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """The block's accumulators."""
    result = ()
    for start in tl.static_range(0, BLOCK, WIDE):
        result = result + (tl.zeros((ROWS, WIDE if start + WIDE <= BLOCK else BLOCK - start), dtype=tl.float32),)
    return result


@triton.jit
def load_window(
    base, own, channel, seen, tap, CHANNELS: tl.constexpr, DEPTH: tl.constexpr, CACHED: tl.constexpr
):  # fmt: skip
    """[positions, DEPTH] of the window's cell ``tap``, which begins at ``base`` plus the positions' own offsets."""
    mask = ((seen >> tap) & 1 != 0)[:, None]
    if CHANNELS % DEPTH != 0:
        mask = mask & (channel < CHANNELS)[None, :]
    pointers = base + own
    if CACHED:
        # Neighbouring windows overlap: most of a step's inputs came into the L1 cache with the step before. Triton's
        # copies of 16 bytes bypass that cache, whatever the load says; copies of 8 bytes do not.
        pointers = tl.max_contiguous(pointers, [1, 8 // (base.dtype.element_ty.primitive_bitwidth // 8)])
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def accumulate(
    a, weight, stride, depth, channel, acc, CHANNELS: tl.constexpr, DEPTH: tl.constexpr, BLOCK: tl.constexpr,
    WIDE: tl.constexpr, PREC: tl.constexpr
):  # fmt: skip
    """acc += a @ weight.T; ``weight`` points at the block's first output channel, ``stride`` apart from the next."""
    result = ()
    for start in tl.static_range(0, BLOCK, WIDE):
        at = start + tl.arange(0, WIDE if start + WIDE <= BLOCK else BLOCK - start)
        pointers = weight + (at[None, :] * stride + depth[:, None])
        if CHANNELS % DEPTH != 0:
            b = tl.load(pointers, mask=(channel < CHANNELS)[:, None], other=0.0)
        else:
            b = tl.load(pointers)
        result = result + (tl.dot(a, b, acc[start // WIDE], input_precision=PREC),)
    return result
