"""1 - cosine at each position and its gradient on the GPU: both inputs are read once, into registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .tiles import cdiv, next_power_of_2

# Elements of one input that a block of 8 warps holds: both inputs take 48 registers of a thread.
_TILE = 6144
# Channels beyond this are read a second time, mostly from the L2 cache.
_MOST_CHANNELS = 1024
_LOOP_CHANNELS = 512
# A warp's least share of one channel if positions lie side by side: whole sectors of the L2 cache.
_LEAST_POSITIONS = 8
_SCALE_BLOCK = 2048
# Squared norms beyond which sums and factors may leave the range of float32, and the factor for such vectors.
MODERATE = tl.constexpr(1e28)
SMALLER = tl.constexpr(2.0**-80)


@triton.jit
def _load(base, outer, channel, position, channels, inner, channel_stride, inner_stride, OTHER: tl.constexpr):
    """[channels, positions] of one outer index; OTHER outside."""
    mask = (channel[:, None] < channels) & (position[None, :] < inner)
    at = channel[:, None].to(tl.int64) * channel_stride + position[None, :].to(tl.int64) * inner_stride
    return tl.load(base + outer + at, mask=mask, other=OTHER)


@triton.jit
def _store(base, outer, channel, position, channels, inner, channel_stride, inner_stride, value):
    mask = (channel[:, None] < channels) & (position[None, :] < inner)
    at = channel[:, None].to(tl.int64) * channel_stride + position[None, :].to(tl.int64) * inner_stride
    tl.store(base + outer + at, value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _sums(
    prediction, target, at_x, at_y, position, channels, inner, prediction_channel, prediction_inner, target_channel,
    target_inner, factor_x, factor_y, FIRST: tl.constexpr, POSITIONS: tl.constexpr
):  # fmt: skip
    """Dot product and squared norms ``[POSITIONS]`` of vectors times factors, read in portions of channels."""
    product = tl.zeros([POSITIONS], tl.float32)
    own = tl.zeros([POSITIONS], tl.float32)
    other = tl.zeros([POSITIONS], tl.float32)
    for start in range(0, channels, FIRST):
        c = start + tl.arange(0, FIRST)
        x = _load(prediction, at_x, c, position, channels, inner, prediction_channel, prediction_inner, 0.0)
        y = _load(target, at_y, c, position, channels, inner, target_channel, target_inner, 0.0)
        x, y = x.to(tl.float32) * factor_x, y.to(tl.float32) * factor_y
        product += tl.sum(x * y, 0)
        own += tl.sum(x * x, 0)
        other += tl.sum(y * y, 0)
    return product, own, other


@triton.jit
def cosine_loss_kernel(
    prediction, target, gradient, loss, upstream, channels, inner,
    prediction_outer, prediction_channel, prediction_inner,
    target_outer, target_channel, target_inner,
    gradient_outer, gradient_channel, gradient_inner,
    weight, epsilon,
    FIRST: tl.constexpr, REST: tl.constexpr, POSITIONS: tl.constexpr, LOOP: tl.constexpr, GRADIENT: tl.constexpr,
    UPSTREAM: tl.constexpr
):  # fmt: skip
    blocks = tl.cdiv(inner, POSITIONS)
    outer = (tl.program_id(0) // blocks).to(tl.int64)
    position = (tl.program_id(0) % blocks) * POSITIONS + tl.arange(0, POSITIONS)
    at_x, at_y, at_g = outer * prediction_outer, outer * target_outer, outer * gradient_outer
    channel = tl.arange(0, FIRST)
    if LOOP:
        product, own, other = _sums(
            prediction, target, at_x, at_y, position, channels, inner, prediction_channel, prediction_inner,
            target_channel, target_inner, 1.0, 1.0, FIRST, POSITIONS
        )  # fmt: skip
    else:
        x = _load(prediction, at_x, channel, position, channels, inner, prediction_channel, prediction_inner, 0.0)
        y = _load(target, at_y, channel, position, channels, inner, target_channel, target_inner, 0.0)
        x, y = x.to(tl.float32), y.to(tl.float32)
        product, own, other = tl.sum(x * y, 0), tl.sum(x * x, 0), tl.sum(y * y, 0)
        if REST:
            # The channels beyond a power of two get a tile of their own: 384 are 256 + 128, not 512.
            last = FIRST + tl.arange(0, REST)
            u = _load(prediction, at_x, last, position, channels, inner, prediction_channel, prediction_inner, 0.0)
            v = _load(target, at_y, last, position, channels, inner, target_channel, target_inner, 0.0)
            u, v = u.to(tl.float32), v.to(tl.float32)
            product += tl.sum(u * v, 0)
            own += tl.sum(u * u, 0)
            other += tl.sum(v * v, 0)
    # Vectors whose squares leave the range of float32 are scaled by 2^-80.
    smaller_x = tl.where(own <= MODERATE, 1.0, SMALLER)
    smaller_y = tl.where(other <= MODERATE, 1.0, SMALLER)
    if not LOOP:
        x, y = x * smaller_x[None, :], y * smaller_y[None, :]
        if REST:
            u, v = u * smaller_x[None, :], v * smaller_y[None, :]
    if tl.min(smaller_x * smaller_y, 0) < 1.0:
        if LOOP:
            product, own, other = _sums(
                prediction, target, at_x, at_y, position, channels, inner, prediction_channel, prediction_inner,
                target_channel, target_inner, smaller_x[None, :], smaller_y[None, :], FIRST, POSITIONS
            )  # fmt: skip
        else:
            product, own, other = tl.sum(x * y, 0), tl.sum(x * x, 0), tl.sum(y * y, 0)
            if REST:
                product += tl.sum(u * v, 0)
                own += tl.sum(u * u, 0)
                other += tl.sum(v * v, 0)
    # Epsilon is negligible beside such a length.
    own = 1.0 / tl.sqrt(own + tl.where(smaller_x == 1.0, epsilon, 0.0))
    other = 1.0 / tl.sqrt(other + tl.where(smaller_y == 1.0, epsilon, 0.0))
    cosine = product * own * other
    tl.store(loss + outer * inner + position, 1.0 - cosine, mask=position < inner)
    if GRADIENT:
        share = weight
        if UPSTREAM == 1:
            share *= tl.load(upstream)
        elif UPSTREAM == 2:
            share *= tl.load(upstream + outer * inner + position, mask=position < inner, other=0.0)
        toward, along = (-share * own * other)[None, :], (share * cosine * own * own)[None, :]
        smaller_x, smaller_y = smaller_x[None, :], smaller_y[None, :]
        if LOOP:
            for start in range(0, channels, FIRST):
                c = start + channel
                x = _load(prediction, at_x, c, position, channels, inner, prediction_channel, prediction_inner, 0.0)
                y = _load(target, at_y, c, position, channels, inner, target_channel, target_inner, 0.0)
                g = toward * (y.to(tl.float32) * smaller_y) + along * (x.to(tl.float32) * smaller_x)
                g *= smaller_x
                _store(gradient, at_g, c, position, channels, inner, gradient_channel, gradient_inner, g)
        else:
            g = (toward * y + along * x) * smaller_x
            _store(gradient, at_g, channel, position, channels, inner, gradient_channel, gradient_inner, g)
            if REST:
                g = (toward * v + along * u) * smaller_x
                _store(gradient, at_g, last, position, channels, inner, gradient_channel, gradient_inner, g)


@triton.jit
def scale_kernel(values, factor, count, BLOCK: tl.constexpr):
    scale = tl.load(factor)
    if scale != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(values + at, mask=at < count).to(tl.float32) * scale
        tl.store(values + at, value.to(values.dtype.element_ty), mask=at < count)


def tiling(channels: int, inner: int) -> tuple[int, int, int, bool]:
    """(FIRST, REST, POSITIONS, LOOP) of :func:`cosine_loss_kernel`."""
    if channels > _MOST_CHANNELS:
        first, rest, loop = _LOOP_CHANNELS, 0, True
    else:
        first = 1 << (channels.bit_length() - 1)
        rest, loop = next_power_of_2(channels - first) if channels > first else 0, False
        # Little is gained if the rest is as large.
        first, rest = (2 * first, 0) if rest >= first else (first, rest)
    room = max(1, _TILE // (first + rest))
    positions = max(_LEAST_POSITIONS, 1 << (room.bit_length() - 1))
    return first, rest, min(positions, next_power_of_2(inner)), loop


def cosine_loss(
    prediction: Tensor,
    target: Tensor,
    gradient: Tensor | None,
    loss: Tensor,
    weight: float,
    epsilon: float,
    upstream: Tensor | None = None,
) -> None:
    """Launch :func:`cosine_loss_kernel`.

    Args:
        prediction, target: ``[outer, C, inner]`` of one dtype, any strides; float32, bfloat16 or float16, not empty.
        gradient: same, written with ``weight`` times the gradient for ``prediction``; None for the loss alone.
        loss: ``outer * inner`` float32, written.
        weight, epsilon: the gradient's factor; the term added to squared norms.
        upstream: another factor of the gradient, contiguous float32: one element, or ``outer * inner``.
    """
    outer, channels, inner = prediction.shape
    first, rest, positions, loop = tiling(channels, inner)
    into = prediction if gradient is None else gradient
    launch.run(
        cosine_loss_kernel,
        (outer * cdiv(inner, positions),),
        prediction,
        target,
        into,
        loss,
        prediction if upstream is None else upstream,
        channels,
        inner,
        *prediction.stride(),
        *target.stride(),
        *into.stride(),
        weight,
        epsilon,
        FIRST=first,
        REST=rest,
        POSITIONS=positions,
        LOOP=loop,
        GRADIENT=gradient is not None,
        UPSTREAM=0 if upstream is None else 2 if upstream.dim() else 1,
        num_warps=8 if (first + rest) * positions > _TILE // 4 else 4,
    )


def scale_in_place(values: Tensor, factor: Tensor) -> Tensor:
    """Multiply a dense tensor by a scalar on its device; a factor of one reads and writes nothing.

    Args:
        values: of any dense memory format.
        factor: one float32.
    """
    launch.run(
        scale_kernel,
        (cdiv(values.numel(), _SCALE_BLOCK),),
        values,
        factor.to(torch.float32),
        values.numel(),
        BLOCK=_SCALE_BLOCK,
        num_warps=4,
    )
    return values
