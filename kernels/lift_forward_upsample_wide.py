"""The upsample stage with wide accumulators: a candidate for tiles that merge some, to be measured before it is used.

Computes the same as :mod:`lift_fast.kernels.lift_forward_upsample`, from the same weights.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .lift_forward_activation import operand, relu
from .lift_forward_implicit_gemm import accumulate, cells_seen, load_window, zeros


# One compilation for every size of image and batch.
@triton.jit(do_not_specialize=["batch", "height", "width"])
def upsample_wide_kernel(
    x,
    g,
    f,
    coarse_weight,
    image_weight,
    fine_weight,
    bias_terms,
    out,
    batch,
    height,
    width,
    C: tl.constexpr,
    G: tl.constexpr,
    N: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    DEPTH: tl.constexpr,
    IMAGE_DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    CACHED: tl.constexpr,
    PREC: tl.constexpr,
):
    # Neighbouring blocks share coarse cells, which then stay in the cache, as the weights always do.
    COLUMN_BLOCKS: tl.constexpr = N // BLOCK
    program = tl.program_id(0)
    phase = program % 4
    first_column = (program // 4) % COLUMN_BLOCKS * BLOCK
    first = program // (4 * COLUMN_BLOCKS) * ROWS
    phase_row = phase // 2
    phase_column = phase % 2

    own = tl.arange(0, ROWS)
    exists = first + own < batch * height * width
    column = (first + own) % width
    row = (first + own) // width % height
    y = 2 * row + phase_row
    z = 2 * column + phase_column
    # 0 the first row (column) of the fine grid, 2 the last, 1 between; an image of one cell has both.
    row_class = tl.where(y == 0, 0, tl.where(y == 2 * height - 1, 2, 1))
    column_class = tl.where(z == 0, 0, tl.where(z == 2 * width - 1, 2, 1))
    # The bias is a product too: looking it up for every position and channel would need too many registers.
    term = tl.arange(0, 32)
    chosen = (term % 9)[None, :] == (row_class * 3 + column_class)[:, None]
    chosen = (chosen & (term < 27)[None, :]).to(x.dtype.element_ty)
    acc = zeros(ROWS, BLOCK, WIDE)
    acc = accumulate(chosen, bias_terms + first_column * 32, 32, term, term, acc, 32, 32, BLOCK, WIDE, PREC)

    # Offsets within the block fit into 32 bits; the first cell of its first window, maybe outside the image, does not.
    seen = cells_seen(row + phase_row - 1, column + phase_column - 1, height, width, exists, 2)
    start = first.to(tl.int64) + (phase_row - 1) * width + phase_column - 1
    depth = tl.arange(0, DEPTH)
    STEPS: tl.constexpr = (C + DEPTH - 1) // DEPTH
    corner = x + start * C
    weights = coarse_weight + (phase * N + first_column) * (4 * C)
    # Taps innermost, for the L1 cache.
    for step in tl.range(0, 4 * STEPS, num_stages=STAGES):
        tap = step % 4
        k = step // 4 * DEPTH
        base = corner + ((tap // 2 * width + tap % 2) * C + k)
        a = load_window(base, own[:, None] * C + depth[None, :], k + depth, seen, tap, C, DEPTH, CACHED)
        acc = accumulate(a, weights + (tap * C + k), 4 * C, depth, k + depth, acc, C, DEPTH, BLOCK, WIDE, PREC)

    if G > 0:
        depth = tl.arange(0, IMAGE_DEPTH)
        IMAGE_STEPS: tl.constexpr = (G + IMAGE_DEPTH - 1) // IMAGE_DEPTH
        corner = g + start * G
        weights = image_weight + (phase * N + first_column) * (4 * G)
        for step in tl.range(0, 4 * IMAGE_STEPS, num_stages=STAGES):
            tap = step % 4
            k = step // 4 * IMAGE_DEPTH
            base = corner + ((tap // 2 * width + tap % 2) * G + k)
            a = load_window(base, own[:, None] * G + depth[None, :], k + depth, seen, tap, G, IMAGE_DEPTH, CACHED)
            acc = accumulate(
                a, weights + (tap * G + k), 4 * G, depth, k + depth, acc, G, IMAGE_DEPTH, BLOCK, WIDE, PREC
            )
        seen = cells_seen(2 * row + phase_row - 1, 2 * column + phase_column - 1, 2 * height, 2 * width, exists, 3)
        corner = f + (_fine_start(first, width) + (phase_row - 1) * (2 * width) + phase_column - 1) * G
        at = _fine_offset(first, own, width)
        weights = fine_weight + first_column * (9 * G)
        for step in tl.range(0, 9 * IMAGE_STEPS, num_stages=STAGES):
            tap = step % 9
            k = step // 9 * IMAGE_DEPTH
            base = corner + ((tap // 3 * (2 * width) + tap % 3) * G + k)
            a = load_window(base, at[:, None] * G + depth[None, :], k + depth, seen, tap, G, IMAGE_DEPTH, CACHED)
            acc = accumulate(
                a, weights + (tap * G + k), 9 * G, depth, k + depth, acc, G, IMAGE_DEPTH, BLOCK, WIDE, PREC
            )

    target = out + (_fine_start(first, width) + phase_row * (2 * width) + phase_column) * CHANNELS
    inside = _fine_offset(first, own, width)[:, None] * CHANNELS
    for begin in tl.static_range(0, BLOCK, WIDE):
        at = first_column + begin + tl.arange(0, WIDE if begin + WIDE <= BLOCK else BLOCK - begin)
        value = operand(relu(acc[begin // WIDE]), out.dtype.element_ty, PREC)
        tl.store(target + (inside + at[None, :]), value, mask=exists[:, None] & (at < CHANNELS)[None, :])


@triton.jit
def _fine_start(first, width):
    """The fine position of phase (0, 0) in the first column of coarse position ``first``'s row."""
    return (first // width).to(tl.int64) * (4 * width)


@triton.jit
def _fine_offset(first, own, width):
    """Fine positions of phase (0, 0) for coarse positions ``first + own``, from :func:`_fine_start`."""
    return ((first + own) // width - first // width) * (4 * width) + 2 * ((first + own) % width)
