"""bfloat16 in the fixed interpreter against PyTorch's on the CPU: computed in float32, rounded to nearest even."""

import importlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from lift_fast import interpreter

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

# Of NumPy: 0 / 0.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
if torch.cuda.is_available():
    pytest.skip("with a GPU nothing runs in the interpreter", allow_module_level=True)

LENGTH = 64


@triton.jit
def _combine(a, b):
    # Neither a sum nor a maximum: no shortcut in NumPy.
    return a * 0.5 + b


@triton.jit
def binary_kernel(a, b, out, OP: tl.constexpr, LENGTH: tl.constexpr):
    at = tl.arange(0, LENGTH)
    x, y = tl.load(a + at), tl.load(b + at)
    if OP == "add":
        result = x + y
    elif OP == "subtract":
        result = x - y
    elif OP == "multiply":
        result = x * y
    elif OP == "divide":
        result = x / y
    elif OP == "maximum":
        result = tl.maximum(x, y)
    elif OP == "minimum":
        result = tl.minimum(x, y)
    elif OP == "less":
        result = x < y
    elif OP == "less or equal":
        result = x <= y
    elif OP == "equal":
        result = x == y
    elif OP == "unequal":
        result = x != y
    elif OP == "where":
        result = tl.where((x > y) & (x > 0.0), x, y)
    elif OP == "fma":
        result = tl.fma(x, y, x)
    elif OP == "clamp":
        result = tl.clamp(x, -1.0, 1.0)
    elif OP == "negative":
        result = -x
    elif OP == "absolute":
        result = tl.abs(x)
    elif OP == "constant":
        result = x * tl.full([LENGTH], 0.3, tl.bfloat16)
    else:
        tl.static_assert(False)
    tl.store(out + at, result)


BINARY = {
    "add": torch.add,
    "subtract": torch.sub,
    "multiply": torch.mul,
    "divide": torch.div,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "less": torch.lt,
    "less or equal": torch.le,
    "equal": torch.eq,
    "unequal": torch.ne,
    "where": lambda x, y: torch.where((x > y) & (x > 0), x, y),
    "fma": lambda x, y: (x.double() * y.double() + x.double()).bfloat16(),
    "clamp": lambda x, _: x.clamp(-1, 1),
    "negative": lambda x, _: -x,
    "absolute": lambda x, _: x.abs(),
    "constant": lambda x, _: x * torch.tensor(0.3).bfloat16(),
}


def numbers(*shape):
    """Of either sign and of many magnitudes."""
    return (torch.randn(shape) * torch.exp2(torch.randint(-6, 7, shape))).bfloat16()


@pytest.mark.parametrize("name", BINARY)
def test_elementwise(name):
    a, b = numbers(LENGTH), numbers(LENGTH)
    b[:9] = a[:9]
    a[0], b[0], a[1], b[1] = 0.0, -0.0, -0.5, -0.25
    expected = BINARY[name](a, b)
    out = torch.empty_like(expected)
    binary_kernel[(1,)](a, b, out, OP=name, LENGTH=LENGTH)
    # The sum of a product with 16 bits is rounded to float32 first.
    torch.testing.assert_close(out, expected, rtol=2**-7 if name == "fma" else 0, atol=0, equal_nan=True)


@triton.jit
def cast_kernel(source, out, LENGTH: tl.constexpr):
    at = tl.arange(0, LENGTH)
    tl.store(out + at, tl.load(source + at).to(out.dtype.element_ty))


def bits(*values):
    return torch.tensor(values, dtype=torch.int64).to(torch.int32).view(torch.float32)


# Halfway between two numbers with an even and an odd lower one, next to that, overflow, subnormals, zeros.
HARD = bits(0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x7F7FFFFF, 0xFF7FFFFF, 1, 0x00008001, 0x80000000, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.int32, torch.int8, torch.bool])
def test_conversion_to(dtype):
    source = torch.randn(LENGTH) * 1000
    if dtype.is_floating_point:
        source[:10] = HARD
        source[10:13] = torch.tensor([torch.nan, torch.inf, -torch.inf])
        # NaN that rounding of the bits would turn into infinity or zero.
        source[13:16] = bits(0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF)
    source = source.to(dtype)
    out = torch.empty(LENGTH, dtype=torch.bfloat16)
    cast_kernel[(1,)](source, out, LENGTH=LENGTH)
    assert torch.equal(out.isnan(), source.isnan())
    torch.testing.assert_close(out, source.float().bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.int32, torch.bool])
def test_conversion_from(dtype):
    source = numbers(LENGTH)
    source[:4] = torch.tensor([0.0, -0.0, 1e-40, 2.0])
    out = torch.empty(LENGTH, dtype=dtype)
    cast_kernel[(1,)](source, out, LENGTH=LENGTH)
    assert torch.equal(out, source.to(dtype))


def test_every_bfloat16_goes_there_and_back():
    every = np.arange(1 << 16, dtype=np.uint16)
    values = interpreter.float32_of(every)
    nan = np.isnan(values)
    assert np.array_equal(nan, torch.from_numpy(every.view(np.int16)).view(torch.bfloat16).isnan().numpy())
    assert np.array_equal(interpreter.bfloat16_of(values)[~nan], every[~nan])
    assert np.isnan(interpreter.float32_of(interpreter.bfloat16_of(values)))[nan].all()


@triton.jit
def product_kernel(a, b, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x = tl.load(a + m[:, None] * K + k[None, :])
    y = tl.load(b + k[:, None] * N + n[None, :])
    tl.store(out + m[:, None] * N + n[None, :], tl.dot(x, y, tl.full([M, N], 1.0, tl.float32)))


def test_matrix_product():
    a, b, out = torch.randn(16, 32).bfloat16(), torch.randn(32, 8).bfloat16(), torch.empty(16, 8)
    product_kernel[(1,)](a, b, out, M=16, N=8, K=32)
    torch.testing.assert_close(out.double(), a.double() @ b.double() + 1, rtol=0, atol=1e-5)


@triton.jit
def reduction_kernel(source, out, OP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    at = row[:, None] * COLUMNS + column[None, :]
    x = tl.load(source + at)
    if OP == "sum":
        tl.store(out + row, tl.sum(x, axis=1))
    elif OP == "max":
        tl.store(out + row, tl.max(x, axis=1))
    elif OP == "min":
        tl.store(out + row, tl.min(x, axis=1))
    elif OP == "argmax":
        tl.store(out + row, tl.argmax(x, axis=1))
    elif OP == "reduce maximum":
        tl.store(out + row, tl.reduce(x, 1, tl.standard._elementwise_max))
    elif OP == "sum of all":
        tl.store(out, tl.sum(x))
    elif OP == "reduce":
        tl.store(out + row, tl.reduce(x, 1, _combine))
    elif OP == "cumsum":
        tl.store(out + at, tl.associative_scan(x, 1, tl.standard._sum_combine))
    elif OP == "cumprod":
        tl.store(out + at, tl.associative_scan(x, 1, tl.standard._prod_combine))
    elif OP == "scan":
        tl.store(out + at, tl.associative_scan(x, 1, _combine))
    else:
        tl.static_assert(False)


def scan(x):
    total, found = x[:, 0], [x[:, 0]]
    for column in x.unbind(1)[1:]:
        total = total * 0.5 + column
        found.append(total)
    return torch.stack(found, 1)


REDUCTIONS = {
    "sum": lambda x: x.double().sum(1).bfloat16(),
    "max": lambda x: x.amax(1),
    "min": lambda x: x.amin(1),
    # The first of equal values, which torch.argmax does not guarantee.
    "argmax": lambda x: torch.from_numpy(x.float().numpy().argmax(1)).to(torch.int32),
    "reduce maximum": lambda x: x.amax(1),
    "sum of all": lambda x: x.double().sum().bfloat16()[None],
    "reduce": lambda x: scan(x)[:, -1],
    "cumsum": lambda x: x.double().cumsum(1).bfloat16(),
    "cumprod": lambda x: x.double().cumprod(1).bfloat16(),
    "scan": scan,
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reduction(name):
    # Few bits: sums are exact in float32, products nearly so.
    x = (torch.randint(-40, 41, (4, 16)) / 16 + 1 / 64).bfloat16()
    expected = REDUCTIONS[name](x)
    out = torch.empty_like(expected)
    reduction_kernel[(1,)](x, out, OP=name, ROWS=4, COLUMNS=16)
    torch.testing.assert_close(out, expected, rtol=2**-7 if name == "cumprod" else 0, atol=0)


@triton.jit
def loop_kernel(bounds, out):
    total = 0
    for number in range(tl.load(bounds), tl.load(bounds + 1)):
        total += number
    tl.store(out, total)


def test_loop_bounds_that_a_kernel_reads():
    bounds, out = torch.tensor([3, 7], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    loop_kernel[(1,)](bounds, out)
    assert out.tolist() == [18]


def test_too_late():
    code = "import triton; from lift_fast import interpreter; interpreter.enable()"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.stderr.strip().endswith("set TRITON_INTERPRET=1, or call lift_fast.interpreter.enable() first")


def test_types_are_stored_as_triton_stores_them():
    interpreter_of_triton = importlib.import_module("triton.runtime.interpreter")
    stored = interpreter_of_triton._get_np_dtype
    for dtype, expected in (
        (tl.int1, np.bool_),
        (tl.bfloat16, np.uint16),
        (tl.float8e5, np.uint8),
        (tl.int64, np.int64),
        (tl.pointer_type(tl.float32), np.uint64),
    ):
        assert stored(dtype) == stored(tl.block_type(dtype, [4, 2])) == np.dtype(expected)


def test_nothing_is_computed_only_to_be_dropped():
    options = importlib.import_module("triton.runtime.interpreter").interpreter_builder.options
    assert options.sanitize_overflow == options.debug
