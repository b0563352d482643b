"""What the kernels do to a sum on its way into the next product: NaN is kept, and TF32 is rounded to."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def larger(a, b):
    """The larger one, NaN where one is: the hardware's maximum, and Triton's, would drop it."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def relu(value):
    return larger(value, 0.0)


@triton.jit
def operand(value, dtype: tl.constexpr, PREC: tl.constexpr):
    """A float32 ``value >= 0`` in ``dtype``; float32 to the nearest TF32 where products compute in that.

    Tensor cores drop the digits that TF32 lacks, which makes every product a little too small and their errors add up.
    """
    if dtype == tl.float32 and PREC == "tf32":
        nearest = ((value.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        # Neither infinity nor NaN.
        return tl.where(value < 3e38, nearest, value)
    return value.to(dtype)
