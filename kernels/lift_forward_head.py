"""LiFT's head on the GPU: second 3x3 convolution, ReLU and the 1x1 output convolution in one kernel.

Back-to-back GEMM: a block keeps all c channels of its positions in registers, so their map never reaches memory.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .. import memory
from . import launch
from .launch import product_precision
from .lift_forward_activation import larger, operand, relu
from .lift_forward_head_wide import head_wide_kernel
from .tiles import Tile, cdiv, columns_of, shared_memory

# A shorter descriptor counts as a zero vector; torch.nn.functional.normalize uses the same bound.
NORM_FLOOR = 1e-12


class HeadWeights(NamedTuple):
    """The stage's weights as :func:`head` reads them: channels padded, input channels contiguous."""

    conv: Tensor
    """[N, 9 taps, N]: output, tap, input channel"""
    conv_bias: Tensor
    """[N] float32"""
    out: Tensor
    """[M, N]: output, input channel"""
    out_bias: Tensor
    """[M] float32"""
    channels: int
    """c <= N"""
    out_channels: int
    """C <= M"""


@triton.jit
def _project(
    hidden, out_weight, out_bias, block, N: tl.constexpr, WIDE: tl.constexpr, OUT_WIDE: tl.constexpr,
    PIECES: tl.constexpr, PREC: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Output channels ``block * OUT_WIDE ...`` of the 1x1 convolution: [ROWS, OUT_WIDE] float32."""
    at = block * OUT_WIDE + tl.arange(0, OUT_WIDE)
    acc = tl.zeros((ROWS, OUT_WIDE), dtype=tl.float32)
    for piece in tl.static_range(PIECES):
        inner = piece * WIDE + tl.arange(0, WIDE)
        weight = tl.load(out_weight + at[None, :] * N + inner[:, None])
        acc = tl.dot(hidden[piece], weight, acc, input_precision=PREC)
    return acc + tl.load(out_bias + at)[None, :]


@triton.jit
def head_kernel(
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
    OUT_STAGES: tl.constexpr,
    NORMALIZE: tl.constexpr,
    FLOOR: tl.constexpr,
    PREC: tl.constexpr,
):
    PIECES: tl.constexpr = N // WIDE
    positions = batch * height * width
    position = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = position < positions
    column = position % width
    row = (position // width) % height
    image = (position // (width * height)).to(tl.int64)

    columns = tl.arange(0, WIDE)
    depth = tl.arange(0, DEPTH)
    acc = ()
    for _ in tl.static_range(PIECES):
        acc = acc + (tl.zeros((ROWS, WIDE), dtype=tl.float32),)
    STEPS: tl.constexpr = (CHANNELS + DEPTH - 1) // DEPTH
    # The window's first cell, which may lie outside the image; each step adds an offset that all positions share.
    top = row - 1
    left = column - 1
    corner = u + (((image * height + top) * width + left) * CHANNELS)[:, None]
    # Taps innermost, for the L1 cache: see the upsample kernel.
    for step in tl.range(0, 9 * STEPS, num_stages=STAGES):
        tap = step % 9
        channel = (step // 9) * DEPTH + depth
        inside = channel < CHANNELS
        y = top + tap // 3
        z = left + tap % 3
        valid = exists & (y >= 0) & (y < height) & (z >= 0) & (z < width)
        at = ((tap // 3) * width + tap % 3) * CHANNELS + channel
        a = tl.load(corner + at[None, :], mask=valid[:, None] & inside[None, :], other=0.0, cache_modifier=".ca")
        weight = conv_weight + tap * N + channel[:, None]
        result = ()
        for piece in tl.static_range(PIECES):
            b = tl.load(weight + (columns + piece * WIDE)[None, :] * (9 * N), mask=inside[:, None], other=0.0)
            result = result + (tl.dot(a, b, acc[piece], input_precision=PREC),)
        acc = result

    hidden = ()
    for piece in tl.static_range(PIECES):
        biased = acc[piece] + tl.load(conv_bias + piece * WIDE + columns)[None, :]
        activated = relu(biased)
        if N > CHANNELS:
            # Infinity times the padding's zeros is NaN, which the next product would spread.
            activated = tl.where((piece * WIDE + columns < CHANNELS)[None, :], activated, 0.0)
        hidden = hidden + (operand(activated, u.dtype.element_ty, PREC),)

    scale = tl.full((ROWS,), 1.0, dtype=tl.float32)
    if NORMALIZE:
        # The norm needs all output channels before the first is written: the product is cheap enough to compute twice.
        square = tl.zeros((ROWS,), dtype=tl.float32)
        for block in tl.range(0, M // OUT_WIDE, num_stages=OUT_STAGES):
            value = _project(hidden, out_weight, out_bias, block, N, WIDE, OUT_WIDE, PIECES, PREC, ROWS)
            square += tl.sum(value * value, axis=1)
        scale = 1.0 / larger(tl.sqrt(square), FLOOR)
    target = out + position.to(tl.int64)[:, None] * OUT_CHANNELS
    for block in tl.range(0, M // OUT_WIDE, num_stages=OUT_STAGES):
        value = _project(hidden, out_weight, out_bias, block, N, WIDE, OUT_WIDE, PIECES, PREC, ROWS)
        if NORMALIZE:
            value *= scale[:, None]
        at = block * OUT_WIDE + tl.arange(0, OUT_WIDE)
        mask = exists[:, None] & (at < OUT_CHANNELS)[None, :]
        tl.store(target + at[None, :], value.to(out.dtype.element_ty), mask=mask)


def accumulators_of(weights: HeadWeights) -> list[int]:
    """Accumulators of a block: all output channels of the 3x3 convolution, so there is one choice."""
    return [weights.conv.shape[0] // columns_of(weights.channels)]


def _out_stages(weights: HeadWeights, tile: Tile, u: Tensor) -> int:
    """How many blocks of the 1x1 convolution's weights can be in flight along with the positions' hidden channels."""
    inner, itemsize = weights.conv.shape[0], u.element_size()
    room = shared_memory(launch.capability(u.device)) - (4 << 10) - tile.rows * inner * itemsize
    return max(1, min(3, room // (inner * columns_of(weights.out_channels) * itemsize)))


def head(u: Tensor, weights: HeadWeights, tile: Tile, normalize: bool = False) -> Tensor:
    """Second 3x3 convolution, ReLU, 1x1 convolution; optionally divides each descriptor by its norm.

    Args:
        u: ``[B, H, W, c]`` contiguous, from :func:`lift_fast.kernels.lift_forward_upsample.upsample`.
        weights: in the dtype of ``u``.
        tile: see :mod:`lift_fast.kernels.tiles`.
        normalize: L2-normalise, with max(norm, 1e-12), from the float32 sums.

    Returns:
        ``[B, H, W, C]`` contiguous, in the dtype of ``u``.
    """
    batch, height, width, channels = u.shape
    out = memory.new_empty(u, (batch, height, width, weights.out_channels))
    launch.run(
        head_wide_kernel if tile.wide else head_kernel,
        (cdiv(batch * height * width, tile.rows),),
        u,
        weights.conv,
        weights.conv_bias,
        weights.out,
        weights.out_bias,
        out,
        batch,
        height,
        width,
        CHANNELS=channels,
        N=weights.conv.shape[0],
        OUT_CHANNELS=weights.out_channels,
        M=weights.out.shape[0],
        ROWS=tile.rows,
        WIDE=tile.columns * tile.merged,
        OUT_WIDE=columns_of(weights.out_channels),
        DEPTH=tile.depth,
        STAGES=tile.stages,
        **({"CACHED": tile.cached} if tile.wide else {}),
        OUT_STAGES=_out_stages(weights, tile, u),
        NORMALIZE=normalize,
        FLOOR=NORM_FLOOR,
        PREC=product_precision(u.dtype),
        num_warps=tile.warps,
    )
    return out
