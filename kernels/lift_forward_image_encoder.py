"""LiFT's image encoders on the GPU: f from the image, and g from f.

The first kernel computes f from the image. For each window of the second convolution it computes the first convolution
again instead of storing its map: 2.25 times the products, and no memory.
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
from .tiles import cdiv

# Positions of a block; every convolution is 32 channels wide, so registers, not memory, set the limit.
_ROWS = 64


class EncoderWeights(NamedTuple):
    """The encoders' weights as :func:`encode_image` reads them; widths padded to a power of two."""

    first: Tensor
    """[W, 32]: output channel, (channel, row, column) of the 3 x 3 x 3 window and five zeros"""
    first_bias: Tensor
    """[W] float32"""
    second: Tensor
    """[9 taps, W, W]: tap, output, input channel"""
    second_bias: Tensor
    third: Tensor
    third_bias: Tensor
    channels: int
    """F <= W"""
    pool: bool


@triton.jit
def fine_kernel(
    imgs,
    stride_image,
    stride_channel,
    stride_row,
    stride_column,
    first_weight,
    first_bias,
    second_weight,
    second_bias,
    out,
    batch,
    height,
    width,
    CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
    POOL: tl.constexpr,
    ROWS: tl.constexpr,
    PREC: tl.constexpr,
):
    """f on its grid ``height x width``; the second convolution's grid is POOL times that, the first's twice as fine."""
    position = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = position < batch * height * width
    column = position % width
    row = (position // width) % height
    image = (position // (width * height)).to(tl.int64)

    channel = tl.arange(0, WIDE)
    k = tl.arange(0, 32)
    window_channel = k // 9
    window_row = (k % 9) // 3
    window_column = k % 3
    first = tl.load(first_weight + channel[None, :] * 32 + k[:, None])
    first_shift = tl.load(first_bias + channel)
    second_shift = tl.load(second_bias + channel)
    first_height = 2 * POOL * height
    first_width = 2 * POOL * width

    best = tl.zeros((ROWS, WIDE), dtype=tl.float32)
    for place in range(0, POOL * POOL):
        second_row = row * POOL + place // POOL
        second_column = column * POOL + place % POOL
        acc = tl.zeros((ROWS, WIDE), dtype=tl.float32)
        for tap in range(0, 9):
            y = 2 * second_row + tap // 3 - 1
            z = 2 * second_column + tap % 3 - 1
            valid = exists & (y >= 0) & (y < first_height) & (z >= 0) & (z < first_width)
            pixel_row = 2 * y[:, None] + window_row[None, :] - 1
            pixel_column = 2 * z[:, None] + window_column[None, :] - 1
            seen = valid[:, None] & (k < 27)[None, :]
            seen &= (pixel_row >= 0) & (pixel_row < 2 * first_height)
            seen &= (pixel_column >= 0) & (pixel_column < 2 * first_width)
            at = image[:, None] * stride_image + window_channel[None, :].to(tl.int64) * stride_channel
            at += pixel_row.to(tl.int64) * stride_row + pixel_column.to(tl.int64) * stride_column
            pixels = tl.load(imgs + at, mask=seen, other=0.0)
            value = tl.dot(pixels, first, input_precision=PREC) + first_shift[None, :]
            # The second convolution's padding is zero, not the first convolution of padding. The channels that fill the
            # tile are zero too, even for infinite pixels.
            value = relu(value)
            value = tl.where(valid[:, None] & (channel < CHANNELS)[None, :], value, 0.0)
            value = operand(value, imgs.dtype.element_ty, PREC)
            weight = tl.load(second_weight + tap * (WIDE * WIDE) + channel[None, :] * WIDE + channel[:, None])
            acc = tl.dot(value, weight, acc, input_precision=PREC)
        # ReLU before the maximum, because the maximum starts with zero.
        best = larger(best, acc + second_shift[None, :])
    target = out + position.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
    tl.store(target, operand(best, out.dtype.element_ty, PREC), mask=exists[:, None] & (channel < CHANNELS)[None, :])


@triton.jit
def coarse_kernel(
    f,
    weight,
    bias,
    out,
    batch,
    height,
    width,
    CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    PREC: tl.constexpr,
):
    """g on its grid ``height x width`` from f on twice that."""
    position = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = position < batch * height * width
    column = position % width
    row = (position // width) % height
    image = (position // (width * height)).to(tl.int64)
    channel = tl.arange(0, WIDE)
    acc = tl.zeros((ROWS, WIDE), dtype=tl.float32)
    for tap in range(0, 9):
        y = 2 * row + tap // 3 - 1
        z = 2 * column + tap % 3 - 1
        # Windows of stride 2 never pass the far edge of an even grid.
        valid = exists & (y >= 0) & (z >= 0)
        cell = (image * (2 * height) + y) * (2 * width) + z
        mask = valid[:, None] & (channel < CHANNELS)[None, :]
        value = tl.load(f + cell[:, None] * CHANNELS + channel[None, :], mask=mask, other=0.0)
        taps = tl.load(weight + tap * (WIDE * WIDE) + channel[None, :] * WIDE + channel[:, None])
        acc = tl.dot(value, taps, acc, input_precision=PREC)
    value = acc + tl.load(bias + channel)[None, :]
    value = operand(relu(value), out.dtype.element_ty, PREC)
    target = out + position.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
    tl.store(target, value, mask=exists[:, None] & (channel < CHANNELS)[None, :])


def encode_image(imgs: Tensor, weights: EncoderWeights) -> tuple[Tensor, Tensor]:
    """Image encoders.

    Args:
        imgs: ``[B, 3, s*h, s*w]`` images of any strides, s = 16 with pool, else 8.
        weights: in the dtype of ``imgs``.

    Returns:
        f ``[B, 2h, 2w, F]`` and g ``[B, h, w, F]``, contiguous, in the dtype of ``imgs``.
    """
    batch, pool = imgs.shape[0], 2 if weights.pool else 1
    height, width = imgs.shape[2] // (8 * pool), imgs.shape[3] // (8 * pool)
    f = memory.new_empty(imgs, (batch, 2 * height, 2 * width, weights.channels))
    g = memory.new_empty(imgs, (batch, height, width, weights.channels))
    options = {
        "CHANNELS": weights.channels,
        "WIDE": weights.first.shape[0],
        "ROWS": _ROWS,
        "PREC": product_precision(imgs.dtype),
        "num_warps": 4,
    }
    launch.run(
        fine_kernel,
        (cdiv(4 * batch * height * width, _ROWS),),
        imgs,
        *imgs.stride(),
        weights.first,
        weights.first_bias,
        weights.second,
        weights.second_bias,
        f,
        batch,
        2 * height,
        2 * width,
        POOL=pool,
        **options,
    )
    launch.run(
        coarse_kernel,
        (cdiv(batch * height * width, _ROWS),),
        f,
        weights.third,
        weights.third_bias,
        g,
        batch,
        height,
        width,
        **options,
    )
    return f, g
