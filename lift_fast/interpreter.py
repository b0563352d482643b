"""Triton's interpreter with fixes for wrong results and slow paths; tests and the rehearsed GPU report run in it.

Triton 3.6 to 3.9 have two bugs that keep the interpreter from testing a kernel:

* Triton 3.6 computes a loop's bound by ``int(array)`` of a one-dimensional array, which NumPy 2.4 rejects.
* bfloat16 is stored as 16 bits in uint16, and NumPy adds, multiplies, compares and sums these as integers. A conversion
  from float32 cuts the lower bits off, while a GPU rounds to the nearest, ties to even.

An upper bound on NumPy in the ``test`` extra would fix only the first, and the tests would not run on the NumPy that
users install. The fixes wrap Triton's own methods, so a Triton release that fixes one of them keeps its fix.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import sys
from typing import Any

import numpy as np


def enable() -> None:
    """Run kernels on the CPU, in Triton's interpreter; call this before Triton is imported. No effect without Triton.

    Raises:
        RuntimeError: if Triton has been imported to compile: its functions then do not run in the interpreter.
    """
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            "Triton is imported already; set TRITON_INTERPRET=1, or call lift_fast.interpreter.enable() first"
        )
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton") is not None:
        _mend()


def float32_of(bits: np.ndarray) -> np.ndarray:
    """The float32 values of bfloat16 numbers, given as uint16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def bfloat16_of(values: np.ndarray) -> np.ndarray:
    """float32 rounded to the nearest bfloat16, ties to even, as uint16; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).reshape(np.shape(values))
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)


@functools.cache
def _mend() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    handle_type, builder = interpreter.TensorHandle, interpreter.InterpreterBuilder

    def wide(value: Any) -> Any:
        """bfloat16 as float32, which is exact; anything else unchanged."""
        # The result of a comparison holds bools but has its operands' type.
        if isinstance(value, handle_type) and value.dtype.scalar.is_bf16() and value.data.dtype == np.uint16:
            return handle_type(float32_of(value.data), tl.float32)
        return value

    def narrow(handle: Any) -> Any:
        return handle_type(bfloat16_of(handle.data), tl.bfloat16)

    def in_float32(method: Any) -> Any:
        """Compute in float32 and round once, as a GPU's bfloat16 arithmetic does."""

        def wrapped(self: Any, *arguments: Any) -> Any:
            widened = [wide(argument) for argument in arguments]
            result = method(self, *widened)
            same = all(one is other for one, other in zip(arguments, widened, strict=True))
            return result if same or result.data.dtype != np.float32 else narrow(result)

        return wrapped

    for name in ("unary_op", "binary_op", "create_fma"):
        setattr(builder, name, in_float32(getattr(builder, name)))

    product, cast = builder.create_dot, builder.cast_impl

    def create_dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        return product(self, wide(a), wide(b), *others)

    def cast_impl(self: Any, source: Any, to: Any) -> Any:
        source = wide(source)
        return narrow(cast(self, source, tl.float32)) if to.scalar.is_bf16() else cast(self, source, to)

    def get_bf16(self: Any, value: float) -> Any:
        return narrow(self.get_fp32(value))

    builder.create_dot, builder.cast_impl, builder.get_bf16 = create_dot, cast_impl, get_bf16

    # Reductions and scans with a NumPy shortcut; the others call a function of the kernel on each pair.
    base = interpreter.ReduceScanOpInterface
    to_tensor = base.to_tensor

    def to_tensor_rounded(self: Any, values: Any, dtype: Any) -> Any:
        if dtype.is_bf16() and np.asarray(values).dtype == np.float32:
            values = bfloat16_of(values)
        return to_tensor(self, values, dtype)

    def of_float32(method: Any) -> Any:
        def wrapped(self: Any, tensor: Any, *arguments: Any, **options: Any) -> Any:
            return method(self, tl.tensor(wide(tensor.handle), tensor.type), *arguments, **options)

        return wrapped

    base.to_tensor = to_tensor_rounded
    for owner, name in (
        (interpreter.ReduceOps, "sum"),
        (interpreter.ReduceOps, "min_max"),
        (interpreter.ScanOps, "cumsum"),
        (interpreter.ScanOps, "cumprod"),
    ):
        setattr(owner, name, of_float32(getattr(owner, name)))

    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_lang_tensor
    _hasten(interpreter, tl)


def _hasten(interpreter: Any, tl: Any) -> None:
    """Skip work that takes three fifths of the time without any effect."""
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        # Integer overflow is computed for every sum and product, but without ``debug`` the result is not used.
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)

    # Triton builds a dictionary of all types at each call, and of all members of the language at each function call.
    of_scalar = functools.cache(interpreter._get_np_dtype)

    def get_np_dtype(dtype: Any) -> np.dtype:
        element = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
        return np.dtype(np.uint64) if isinstance(element, tl.pointer_type) else of_scalar(element)

    @functools.cache
    def builtins_of(package: Any) -> list[str]:
        return [name for name in dir(package) if tl.core.is_builtin(getattr(package, name, None))]

    def patch_builtin(package: Any, builder: Any, scope: Any) -> None:
        for name in builtins_of(package):
            member = getattr(package, name)
            if tl.core.is_builtin(member):
                interpreter._patch_attr(package, name, member, builder, scope)

    interpreter._get_np_dtype, interpreter._patch_builtin = get_np_dtype, patch_builtin
