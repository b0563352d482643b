"""What the kernels do to a sum before the next product: ReLU that keeps NaN, and rounding to TF32."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def larger(a, b):
    """The larger one, NaN if one is NaN: the hardware's maximum and Triton's would drop it."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def relu(value):
    return larger(value, 0.0)


@triton.jit
def operand(value, dtype: tl.constexpr, PREC: tl.constexpr):
    """A float32 ``value >= 0`` in ``dtype``; float32 to the nearest TF32 if products compute in TF32.

    Tensor cores cut off the digits beyond TF32, so every product would be a little too small and errors would add up.
    """
    if dtype == tl.float32 and PREC == "tf32":
        nearest = ((value.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        # Neither infinity nor NaN.
        return tl.where(value < 3e38, nearest, value)
    return value.to(dtype)
