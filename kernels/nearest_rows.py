"""Sets of descriptors for the searches of ``nearest``: norms, the rows that take part, half-precision copies."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import memory
from . import launch
from .tiles import cdiv

# A shorter descriptor counts as a zero vector; torch.nn.functional.normalize uses the same bound.
NORM_FLOOR = 1e-12
# Larger than every index; free places of a list carry it and the numbers after it.
FREE = tl.constexpr(1 << 30)
INFINITY = tl.constexpr(float("inf"))
# Float16 copies of unit vectors are this much longer, so that no element that matters is subnormal.
HALF_LENGTH = 4096.0
# Rows are padded to whole tiles of every shape.
_PADDING = 256


class Rows(NamedTuple):
    """One set of descriptors, ready to be multiplied."""

    given: Tensor
    """``[B, n, C]`` contiguous"""
    copy: Tensor | None
    """``[B, padded n, padded C]`` in half precision; None if the kernels read ``given``"""
    shift: Tensor
    """``[B, padded n]`` float32 powers of two that keep squares in range; rows count as ``given * shift * scale``"""
    scale: Tensor
    """``[B, padded n]`` float32"""
    bias: Tensor
    """``[B, padded n]`` float32: 0, or -inf for rows that take no part"""
    residual: Tensor | None
    """``[B, padded n]`` float32 norms of the float16 copy's rounding errors"""
    normalized: bool


@triton.jit
def prepare_kernel(
    given,
    copy,
    shift_out,
    scale_out,
    bias_out,
    residual_out,
    n,
    padded,
    channels,
    WIDTH: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SHIFT: tl.constexpr,
    LENGTH: tl.constexpr,
    FLOOR: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    batch = tl.program_id(1).to(tl.int64)
    exists = row < n
    source = given + ((batch * n + row) * channels)[:, None]
    depth = tl.arange(0, DEPTH)
    largest = tl.zeros((ROWS,), dtype=tl.float32)
    # Becomes NaN when an element is not finite.
    zero_if_finite = tl.zeros((ROWS,), dtype=tl.float32)
    for start in tl.range(0, channels, DEPTH):
        at = start + depth
        x = tl.load(source + at[None, :], mask=exists[:, None] & (at < channels)[None, :], other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(x), axis=1))
        zero_if_finite += tl.sum(x * 0.0, axis=1)
    takes_part = exists & (zero_if_finite == 0.0)
    shift = tl.full((ROWS,), 1.0, dtype=tl.float32)
    if SHIFT:
        exponent = ((largest.to(tl.int32, bitcast=True) >> 23) & 255) - 127
        shift = ((127 - tl.minimum(tl.maximum(exponent, -100), 100)) << 23).to(tl.float32, bitcast=True)
        shift = tl.where(takes_part, shift, 1.0)
    scale = tl.full((ROWS,), 1.0, dtype=tl.float32)
    if NORMALIZE:
        square = tl.zeros((ROWS,), dtype=tl.float32)
        for start in tl.range(0, channels, DEPTH):
            at = start + depth
            x = tl.load(source + at[None, :], mask=takes_part[:, None] & (at < channels)[None, :], other=0.0)
            x = x.to(tl.float32) * shift[:, None]
            square += tl.sum(x * x, axis=1)
        # Rounded to nearest: by default both are approximations on a GPU.
        length = tl.maximum(tl.sqrt_rn(square), FLOOR * shift)
        scale = tl.where(takes_part, tl.div_rn(tl.full((ROWS,), 1.0, dtype=tl.float32), length), 1.0)
    if copy is not None:
        lost = tl.zeros((ROWS,), dtype=tl.float32)
        target = copy + ((batch * padded + row) * WIDTH)[:, None]
        for start in tl.range(0, WIDTH, DEPTH):
            at = start + depth
            x = tl.load(source + at[None, :], mask=takes_part[:, None] & (at < channels)[None, :], other=0.0)
            if SHIFT:
                x = x.to(tl.float32) * shift[:, None]
            if residual_out is not None:
                x *= scale[:, None]
                rounded = (x * LENGTH).to(copy.dtype.element_ty)
                error = x - rounded.to(tl.float32) * (1.0 / LENGTH)
                lost += tl.sum(error * error, axis=1)
                x = rounded
            mask = (row < padded)[:, None] & (at < WIDTH)[None, :]
            tl.store(target + at[None, :], x.to(copy.dtype.element_ty), mask=mask)
        if residual_out is not None:
            # Upwards, because the sum is rounded too.
            tl.store(residual_out + batch * padded + row, tl.sqrt_rn(lost) * 1.0001, mask=row < padded)
    tl.store(shift_out + batch * padded + row, shift, mask=row < padded)
    tl.store(scale_out + batch * padded + row, scale, mask=row < padded)
    tl.store(bias_out + batch * padded + row, tl.where(takes_part, 0.0, -INFINITY), mask=row < padded)


def prepare(given: Tensor, normalize: bool, copy: torch.dtype | None, depth: int = 16, measured: bool = False) -> Rows:
    """Norms of descriptors, the rows that take part, and a copy for the tensor cores.

    Args:
        given: ``[B, n, C]`` contiguous, not empty.
        normalize: whether to compute cosines.
        copy: dtype of the copy: that of ``given``, or float16 for float32; None for no copy.
        depth: the copy's channels are padded to a multiple of this.
        measured: for :mod:`lift_fast.kernels.nearest_float32`: the copy holds unit vectors, with the norms of their
        rounding errors.
    """
    batch, n, channels = given.shape
    padded = -(-n // _PADDING) * _PADDING
    width = -(-channels // depth) * depth

    def vector() -> Tensor:
        return memory.new_empty(given, (batch, padded), dtype=torch.float32)

    rows = Rows(
        given=given,
        copy=None if copy is None else memory.new_empty(given, (batch, padded, width), dtype=copy),
        shift=vector(),
        scale=vector(),
        bias=vector(),
        residual=vector() if measured else None,
        normalized=normalize,
    )
    launch.run(
        prepare_kernel,
        (cdiv(padded, 16), batch),
        given,
        rows.copy,
        rows.shift,
        rows.scale,
        rows.bias,
        rows.residual,
        n,
        padded,
        channels,
        WIDTH=width,
        NORMALIZE=normalize,
        # Float16 products never exceed the range of float32.
        SHIFT=normalize and given.dtype != torch.float16,
        LENGTH=HALF_LENGTH,
        FLOOR=NORM_FLOOR,
        ROWS=16,
        DEPTH=128,
        num_warps=4,
    )
    return rows
