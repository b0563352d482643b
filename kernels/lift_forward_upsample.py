"""LiFT's composed upsample on the GPU: transposed convolution, first 3x3 convolution and ReLU as one implicit GEMM.

Each of the four phases (a, b) of the fine grid reads a 2x2 window of the coarse grid, features and image features, and
a 3x3 window of the fine image features. Nothing is concatenated and the upsampled map is never formed.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .. import memory
from . import launch
from .launch import product_precision
from .lift_forward_activation import operand, relu
from .lift_forward_upsample_wide import upsample_wide_kernel
from .tiles import Tile, cdiv, columns_of, next_power_of_2


class UpsampleWeights(NamedTuple):
    """The stage's weights as :func:`upsample` reads them: output channels padded, input channels contiguous."""

    coarse: Tensor
    """[4 phases, N, 4 taps, C]"""
    image: Tensor | None
    """[4 phases, N, 4 taps, G]"""
    fine: Tensor | None
    """[N, 9 taps, F]"""
    bias: Tensor
    """[9 position classes, N] float32, 0 the first row (column) of the fine grid, 2 the last, 1 between"""
    bias_terms: Tensor
    """[N, 32], the same for wide accumulators: three terms for each class, with digits that products keep"""
    channels: int
    """c <= N, output channels"""


@triton.jit
def _accumulate(a, weight, columns, stride, inside, acc, WIDE: tl.constexpr, PIECES: tl.constexpr, PREC: tl.constexpr):
    """acc[piece] += a @ weight[piece].T for accumulators of WIDE output channels; ``columns`` are the first's."""
    result = ()
    for piece in tl.static_range(PIECES):
        b = tl.load(weight + (columns + piece * WIDE)[None, :] * stride, mask=inside[:, None], other=0.0)
        result = result + (tl.dot(a, b, acc[piece], input_precision=PREC),)
    return result


@triton.jit
def upsample_kernel(
    x,
    g,
    f,
    coarse_weight,
    image_weight,
    fine_weight,
    bias,
    out,
    batch,
    height,
    width,
    C: tl.constexpr,
    G: tl.constexpr,
    N: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    PIECES: tl.constexpr,
    DEPTH: tl.constexpr,
    IMAGE_DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    PREC: tl.constexpr,
):
    # Neighbouring blocks share coarse cells, which then stay in the cache, as the weights always do.
    COLUMN_BLOCKS: tl.constexpr = N // (WIDE * PIECES)
    program = tl.program_id(0)
    phase = program % 4
    column_block = (program // 4) % COLUMN_BLOCKS
    row_block = program // (4 * COLUMN_BLOCKS)
    phase_row = phase // 2
    phase_column = phase % 2

    positions = batch * height * width
    position = row_block * ROWS + tl.arange(0, ROWS)
    exists = position < positions
    column = position % width
    row = (position // width) % height
    image = (position // (width * height)).to(tl.int64)

    columns = column_block * (WIDE * PIECES) + tl.arange(0, WIDE)
    acc = ()
    for _ in tl.static_range(PIECES):
        acc = acc + (tl.zeros((ROWS, WIDE), dtype=tl.float32),)

    depth = tl.arange(0, DEPTH)
    STEPS: tl.constexpr = (C + DEPTH - 1) // DEPTH
    # The window's first cell, which may lie outside the image; each step adds an offset that all positions share.
    top = row + phase_row - 1
    left = column + phase_column - 1
    corner = x + (((image * height + top) * width + left) * C)[:, None]
    # Taps innermost: windows overlap, so most of a step's inputs came into the L1 cache with the step before.
    for step in tl.range(0, 4 * STEPS, num_stages=STAGES):
        tap = step % 4
        channel = (step // 4) * DEPTH + depth
        inside = channel < C
        y = top + tap // 2
        z = left + tap % 2
        valid = exists & (y >= 0) & (y < height) & (z >= 0) & (z < width)
        at = ((tap // 2) * width + tap % 2) * C + channel
        a = tl.load(corner + at[None, :], mask=valid[:, None] & inside[None, :], other=0.0, cache_modifier=".ca")
        weight = coarse_weight + (phase * (N * 4) + tap) * C + channel[:, None]
        acc = _accumulate(a, weight, columns, 4 * C, inside, acc, WIDE, PIECES, PREC)

    if G > 0:
        image_depth = tl.arange(0, IMAGE_DEPTH)
        IMAGE_STEPS: tl.constexpr = (G + IMAGE_DEPTH - 1) // IMAGE_DEPTH
        corner = g + (((image * height + top) * width + left) * G)[:, None]
        for step in tl.range(0, 4 * IMAGE_STEPS, num_stages=STAGES):
            tap = step % 4
            channel = (step // 4) * IMAGE_DEPTH + image_depth
            inside = channel < G
            y = top + tap // 2
            z = left + tap % 2
            valid = exists & (y >= 0) & (y < height) & (z >= 0) & (z < width)
            at = ((tap // 2) * width + tap % 2) * G + channel
            a = tl.load(corner + at[None, :], mask=valid[:, None] & inside[None, :], other=0.0, cache_modifier=".ca")
            weight = image_weight + (phase * (N * 4) + tap) * G + channel[:, None]
            acc = _accumulate(a, weight, columns, 4 * G, inside, acc, WIDE, PIECES, PREC)
        top = 2 * row + phase_row - 1
        left = 2 * column + phase_column - 1
        corner = f + (((image * (2 * height) + top) * (2 * width) + left) * G)[:, None]
        for step in tl.range(0, 9 * IMAGE_STEPS, num_stages=STAGES):
            tap = step % 9
            channel = (step // 9) * IMAGE_DEPTH + image_depth
            inside = channel < G
            y = top + tap // 3
            z = left + tap % 3
            valid = exists & (y >= 0) & (y < 2 * height) & (z >= 0) & (z < 2 * width)
            at = ((tap // 3) * (2 * width) + tap % 3) * G + channel
            a = tl.load(corner + at[None, :], mask=valid[:, None] & inside[None, :], other=0.0, cache_modifier=".ca")
            weight = fine_weight + tap * G + channel[:, None]
            acc = _accumulate(a, weight, columns, 9 * G, inside, acc, WIDE, PIECES, PREC)

    y = 2 * row + phase_row
    z = 2 * column + phase_column
    # 0 the first row (column) of the fine grid, 2 the last, 1 between; an image of one cell has both.
    row_class = tl.where(y == 0, 0, tl.where(y == 2 * height - 1, 2, 1))
    column_class = tl.where(z == 0, 0, tl.where(z == 2 * width - 1, 2, 1))
    position_class = row_class * 3 + column_class
    target = out + (((image * (2 * height) + y) * (2 * width) + z) * CHANNELS)[:, None]
    for piece in tl.static_range(PIECES):
        at = columns + piece * WIDE
        value = acc[piece] + tl.load(bias + position_class[:, None] * N + at[None, :])
        value = operand(relu(value), out.dtype.element_ty, PREC)
        tl.store(target + at[None, :], value, mask=exists[:, None] & (at < CHANNELS)[None, :])


def accumulators_of(weights: UpsampleWeights) -> list[int]:
    """Numbers of accumulators of a block, most first: whole fractions of the output channels, up to 192 channels."""
    count = weights.bias.shape[1] // columns_of(weights.channels)
    return [pieces for pieces in (3, 2, 1) if count % pieces == 0]


def upsample(x: Tensor, f: Tensor | None, g: Tensor | None, weights: UpsampleWeights, tile: Tile) -> Tensor:
    """Composed upsample, first 3x3 convolution, ReLU.

    Args:
        x: ``[B, h, w, C]`` contiguous features.
        f, g: ``[B, 2h, 2w, G]`` and ``[B, h, w, G]`` contiguous image features; None for a network without image.
        weights: in the dtype of ``x``.
        tile: see :mod:`lift_fast.kernels.tiles`.

    Returns:
        ``[B, 2h, 2w, c]`` contiguous, in the dtype of ``x``.
    """
    batch, height, width, channels = x.shape
    image = 0 if f is None else f.shape[3]
    out = memory.new_empty(x, (batch, 2 * height, 2 * width, weights.channels))
    padded_channels = weights.bias.shape[1]
    column_blocks = padded_channels // (tile.columns * tile.accumulators)
    blocks = 4 * column_blocks * cdiv(batch * height * width, tile.rows)
    wide = tile.wide
    if wide:
        pieces = {"BLOCK": tile.columns * tile.accumulators, "WIDE": tile.columns * tile.merged, "CACHED": tile.cached}
    else:
        pieces = {"WIDE": tile.columns, "PIECES": tile.accumulators}
    launch.run(
        upsample_wide_kernel if wide else upsample_kernel,
        (blocks,),
        x,
        g,
        f,
        weights.coarse,
        weights.image,
        weights.fine,
        weights.bias_terms if wide else weights.bias,
        out,
        batch,
        height,
        width,
        C=channels,
        G=image,
        N=padded_channels,
        CHANNELS=weights.channels,
        ROWS=tile.rows,
        **pieces,
        DEPTH=tile.depth,
        IMAGE_DEPTH=max(16, min(tile.depth, next_power_of_2(max(image, 1)))),
        STAGES=tile.stages,
        PREC=product_precision(x.dtype),
        num_warps=tile.warps,
    )
    return out
