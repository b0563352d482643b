"""The native decoder against its formulas in float64, on every instruction set that this CPU has."""

import pytest
import torch
from torch.nn import functional as F

from lift_fast import _native, memory
from lift_fast.testing import poisoned_outputs, relative_error

if not _native.can_run()[0]:
    pytest.skip(_native.can_run()[1], allow_module_level=True)

native = _native.require()
KERNELS = [(dtype, isa) for dtype in ("float32", "bfloat16") for isa in native.lift_forward_isas(dtype)]
# Relative to float64; F(4x4, 3x3) costs a digit of float32, the bfloat16 kernel rounds the operands of each GEMM.
LIMIT = {"float32": 1e-5, "bfloat16": 1e-2}
# (C, G, F): the published widths, odd C, channels around vector and panel widths, no image.
CHANNELS = [(384, 32, 32), (33, 5, 3), (6, 0, 0), (97, 17, 33), (130, 32, 0), (64, 0, 16)]
SIDES = (1, 2, 3, 5, 7, 8, 13)
GRIDS = [(1, side, side) for side in SIDES] + [(2, 1, 13), (3, 5, 2), (2, 8, 3), (1, 7, 12)]


def random_weights(channels):
    tokens, coarse, fine = channels
    c = tokens // 2

    def random(*shape, fan_in=10.0):
        return torch.randn(*shape, dtype=torch.float64) / fan_in**0.5

    return (
        random(2, 2, 2, 2, tokens + coarse, c, fan_in=4 * (tokens + coarse)),
        random(3, 3, fine, c, fan_in=9 * max(fine, 1)),
        random(3, 3, c),
        random(3, 3, c, c, fan_in=4.5 * c),
        random(c),
        random(c, tokens, fan_in=c / 2),
        random(tokens),
    )


def random_inputs(channels, grid, dtype):
    tokens, coarse, fine = channels
    batch, h, w = grid
    shapes = ((batch, h, w, tokens), (batch, h, w, coarse), (batch, 2 * h, 2 * w, fine))
    return [torch.randn(shape).to(getattr(torch, dtype)) for shape in shapes]


def linear(pixels, weight):
    # As one matrix product: matmul on a strided window would copy the weight for every row.
    return (pixels.flatten(0, -2) @ weight).view(*pixels.shape[:-1], weight.shape[1])


def reference(weights, x, g, f):
    phase, fine, edge_bias, conv, conv_bias, out, out_bias = weights
    x, g, f = x.double(), g.double(), f.double()
    batch, h, w, _ = x.shape
    coarse = F.pad(torch.cat([x, g], -1), (0, 0, 1, 1, 1, 1))
    rows = torch.tensor([0] + [1] * (2 * h - 2) + [2])
    columns = torch.tensor([0] + [1] * (2 * w - 2) + [2])
    u = edge_bias[rows][:, columns].repeat(batch, 1, 1, 1)
    for a, b, p, q in torch.cartesian_prod(*[torch.arange(2)] * 4).tolist():
        u[:, a::2, b::2] += linear(coarse[:, a + p : a + p + h, b + q : b + q + w], phase[a, b, p, q])
    padded = F.pad(f, (0, 0, 1, 1, 1, 1))
    for dy in range(3):
        for dx in range(3):
            u += linear(padded[:, dy : dy + 2 * h, dx : dx + 2 * w], fine[dy, dx])
    u = F.pad(u.relu(), (0, 0, 1, 1, 1, 1))
    windows = [(u[:, dy : dy + 2 * h, dx : dx + 2 * w], conv[dy, dx]) for dy in range(3) for dx in range(3)]
    v = sum(linear(window, weight) for window, weight in windows)
    return linear((v + conv_bias).relu(), out) + out_bias


def sizes(channels):
    tokens, coarse, fine = channels
    return tokens, tokens // 2, coarse, fine


def pack(weights, channels, dtype, isa="auto"):
    packed = memory.empty(native.lift_forward_packed_size(*sizes(channels), dtype, isa), dtype=torch.uint8)
    addresses = [weight.data_ptr() for weight in weights]
    native.lift_forward_pack(*addresses, *sizes(channels), dtype, packed.data_ptr(), packed.numel(), isa)
    return packed


def decode(packed, x, g, f, isa="auto", threads=2):
    batch, h, w, tokens = x.shape
    channels = (tokens, g.shape[-1], f.shape[-1])
    dtype = str(x.dtype).removeprefix("torch.")
    inputs = (x.data_ptr(), g.data_ptr(), f.data_ptr(), packed.data_ptr(), packed.numel())
    with poisoned_outputs():
        y = memory.empty((batch, 2 * h, 2 * w, tokens), dtype=x.dtype)
        native.lift_forward(*inputs, y.data_ptr(), batch, h, w, *sizes(channels), dtype, threads, isa)
    return y


@pytest.mark.parametrize(("dtype", "isa"), KERNELS)
@pytest.mark.parametrize("channels", CHANNELS)
def test_equals_the_formulas(channels, dtype, isa):
    weights = random_weights(channels)
    packed = pack(weights, channels, dtype, isa)
    for grid in GRIDS if channels[0] < 384 else GRIDS[-4:]:
        inputs = random_inputs(channels, grid, dtype)
        error = relative_error(decode(packed, *inputs, isa=isa), reference(weights, *inputs))
        assert error <= LIMIT[dtype], (grid, error)


@pytest.mark.parametrize(("dtype", "isa"), KERNELS)
def test_result_does_not_depend_on_threads_or_batch(dtype, isa):
    channels = (66, 9, 6)
    packed = pack(random_weights(channels), channels, dtype, isa)
    inputs = random_inputs(channels, (3, 13, 17), dtype)
    expected = decode(packed, *inputs, isa=isa, threads=1)
    for threads in (2, 3, 16):
        assert torch.equal(decode(packed, *inputs, isa=isa, threads=threads), expected)
    alone = decode(packed, *[tensor[1:2].contiguous() for tensor in inputs], isa=isa)
    assert torch.equal(alone, expected[1:2])


def test_many_blocks_and_groups_of_images():
    # u of these images exceeds what one group may hold, and their tiles several blocks.
    channels = (256, 4, 4)
    weights = random_weights(channels)
    inputs = random_inputs(channels, (13, 33, 31), "float32")
    y = decode(pack(weights, channels, "float32"), *inputs)
    for image in (0, 12):
        expected = reference(weights, *[tensor[image : image + 1] for tensor in inputs])
        assert relative_error(y[image : image + 1], expected) <= LIMIT["float32"]


@pytest.mark.parametrize(("dtype", "isa"), KERNELS)
def test_nan_and_infinity_propagate_and_stay_near(dtype, isa):
    channels = (40, 3, 3)
    packed = pack(random_weights(channels), channels, dtype, isa)
    x, g, f = random_inputs(channels, (1, 14, 14), dtype)
    valid = decode(packed, x, g, f, isa=isa)
    for value in (float("nan"), float("inf")):
        x[0, 1, 1, 7] = value
        y = decode(packed, x, g, f, isa=isa)
        assert not y[0, 2:4, 2:4].isfinite().any()
        # Tiles of 3x3 cells, one cell of overlap, then 4x4 pixels and one pixel of overlap.
        assert torch.equal(y[0, 16:], valid[0, 16:])
        assert torch.equal(y[0, :, 16:], valid[0, :, 16:])
    assert decode(packed, *random_inputs(channels, (1, 14, 14), dtype), isa=isa).isfinite().all()


def test_bfloat16_in_float32_arithmetic_rounds_once():
    channels = (48, 8, 8)
    weights = random_weights(channels)
    inputs = random_inputs(channels, (1, 6, 9), "bfloat16")
    exact = reference(weights, *inputs)
    for isa in native.lift_forward_isas("float32"):
        assert relative_error(decode(pack(weights, channels, "bfloat16", isa), *inputs, isa=isa), exact) <= 2.5e-3


def test_empty_batch():
    channels = (16, 2, 2)
    decode(pack(random_weights(channels), channels, "float32"), *random_inputs(channels, (0, 3, 3), "float32"))


def test_refuses_buffers_packed_for_something_else():
    channels = (48, 8, 8)
    weights = random_weights(channels)
    packed = pack(weights, channels, "float32")
    inputs = random_inputs(channels, (1, 2, 2), "float32")
    halves = [tensor.bfloat16() for tensor in inputs]
    with pytest.raises(ValueError, match="not packed for this call"):
        decode(torch.zeros_like(packed), *inputs)
    with pytest.raises(ValueError, match="packed"):
        decode(packed, *halves)
    other = random_inputs((47, 8, 8), (1, 2, 2), "float32")
    with pytest.raises(ValueError, match="not packed for this call"):
        decode(packed, *other)
    with pytest.raises(ValueError, match="bytes"):
        decode(packed[:-1], *inputs)
    for isa in native.lift_forward_isas("float32")[1:]:
        with pytest.raises(ValueError, match="packed"):
            decode(packed, *inputs, isa=isa)


def test_refuses_bad_arguments():
    channels = (48, 8, 8)
    weights = random_weights(channels)
    packed = pack(weights, channels, "float32")
    inputs = random_inputs(channels, (1, 2, 2), "float32")
    with pytest.raises(ValueError, match="threads"):
        decode(packed, *inputs, threads=0)
    with pytest.raises(ValueError, match="got 'sse9'"):
        decode(packed, *inputs, isa="sse9")
    with pytest.raises(ValueError, match="dtype must be"):
        native.lift_forward_packed_size(48, 24, 8, 8, "float16")
    with pytest.raises(ValueError, match="C=0"):
        native.lift_forward_packed_size(0, 24, 8, 8, "float32")
    with pytest.raises(ValueError, match="h=0"):
        native.lift_forward(
            1, 1, 1, packed.data_ptr(), packed.numel(), 1, 1, 0, 2, *sizes(channels), "float32", 1, "auto"
        )
    with pytest.raises(ValueError, match="null"):
        native.lift_forward(
            0, 0, 0, packed.data_ptr(), packed.numel(), 0, 1, 2, 2, *sizes(channels), "float32", 1, "auto"
        )
    addresses = [weight.data_ptr() for weight in weights]
    with pytest.raises(ValueError, match="bytes"):
        native.lift_forward_pack(*addresses, *sizes(channels), "float32", packed.data_ptr(), packed.numel() - 1)
