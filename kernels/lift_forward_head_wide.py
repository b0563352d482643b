"""The head with wide accumulators: a candidate for tiles that merge some, to be measured before it is used.

Computes the same as :mod:`lift_fast.kernels.lift_forward_head`, from the same weights.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .lift_forward_activation import larger, operand, relu
from .lift_forward_implicit_gemm import accumulate, cells_seen, load_window, zeros


@triton.jit
def _project(
    hidden, out_weight, out_bias, block, N: tl.constexpr, WIDE: tl.constexpr, OUT_WIDE: tl.constexpr,
    PREC: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Output channels ``block * OUT_WIDE ...`` of the 1x1 convolution: [ROWS, OUT_WIDE] float32."""
    at = block * OUT_WIDE + tl.arange(0, OUT_WIDE)
    acc = tl.zeros((ROWS, OUT_WIDE), dtype=tl.float32)
    for start in tl.static_range(0, N, WIDE):
        inner = start + tl.arange(0, WIDE if start + WIDE <= N else N - start)
        weight = tl.load(out_weight + (at[None, :] * N + inner[:, None]))
        acc = tl.dot(hidden[start // WIDE], weight, acc, input_precision=PREC)
    return acc + tl.load(out_bias + at)[None, :]


# One compilation for every size of image and batch.
@triton.jit(do_not_specialize=["batch", "height", "width"])
def head_wide_kernel(
    u,
    conv_weight,
    conv_bias,
    out_weight,
    out_bias,
    out,
    batch,
    height,
    width,
    CHANNELS: tl.constexpr,
    N: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    M: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    OUT_WIDE: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    CACHED: tl.constexpr,
    OUT_STAGES: tl.constexpr,
    NORMALIZE: tl.constexpr,
    FLOOR: tl.constexpr,
    PREC: tl.constexpr,
):
    first = tl.program_id(0) * ROWS
    own = tl.arange(0, ROWS)
    exists = first + own < batch * height * width
    column = (first + own) % width
    row = (first + own) // width % height
    seen = cells_seen(row - 1, column - 1, height, width, exists, 3)

    depth = tl.arange(0, DEPTH)
    acc = zeros(ROWS, N, WIDE)
    STEPS: tl.constexpr = (CHANNELS + DEPTH - 1) // DEPTH
    # Offsets within the block fit into 32 bits; the first cell of its first window, maybe outside the image, does not.
    corner = u + (first.to(tl.int64) - width - 1) * CHANNELS
    # Taps innermost, for the L1 cache.
    for step in tl.range(0, 9 * STEPS, num_stages=STAGES):
        tap = step % 9
        k = step // 9 * DEPTH
        base = corner + ((tap // 3 * width + tap % 3) * CHANNELS + k)
        a = load_window(base, own[:, None] * CHANNELS + depth[None, :], k + depth, seen, tap, CHANNELS, DEPTH, CACHED)
        weights = conv_weight + (tap * N + k)
        acc = accumulate(a, weights, 9 * N, depth, k + depth, acc, CHANNELS, DEPTH, N, WIDE, PREC)

    hidden = ()
    for start in tl.static_range(0, N, WIDE):
        columns = start + tl.arange(0, WIDE if start + WIDE <= N else N - start)
        activated = relu(acc[start // WIDE] + tl.load(conv_bias + columns)[None, :])
        if N > CHANNELS:
            # Infinity times the padding's zeros is NaN, which the next product would spread.
            activated = tl.where((columns < CHANNELS)[None, :], activated, 0.0)
        hidden = hidden + (operand(activated, u.dtype.element_ty, PREC),)

    scale = tl.full((ROWS,), 1.0, dtype=tl.float32)
    if NORMALIZE:
        # The norm needs all output channels before the first is written: the product is cheap enough to compute twice.
        square = tl.zeros((ROWS,), dtype=tl.float32)
        for block in tl.range(0, M // OUT_WIDE, num_stages=OUT_STAGES):
            value = _project(hidden, out_weight, out_bias, block, N, WIDE, OUT_WIDE, PREC, ROWS)
            square += tl.sum(value * value, axis=1)
        scale = 1.0 / larger(tl.sqrt(square), FLOOR)
    target = out + first.to(tl.int64) * OUT_CHANNELS
    for block in tl.range(0, M // OUT_WIDE, num_stages=OUT_STAGES):
        value = _project(hidden, out_weight, out_bias, block, N, WIDE, OUT_WIDE, PREC, ROWS)
        if NORMALIZE:
            value *= scale[:, None]
        at = block * OUT_WIDE + tl.arange(0, OUT_WIDE)
        mask = exists[:, None] & (at < OUT_CHANNELS)[None, :]
        tl.store(target + (own[:, None] * OUT_CHANNELS + at[None, :]), value.to(out.dtype.element_ty), mask=mask)
