"""The Triton kernels of ``cosine_loss`` against the plain version: on a GPU, else in Triton's interpreter."""

import importlib
import math
import os

import pytest
import torch

from lift_fast.ops.cosine_loss import gpu, plain

triton = pytest.importorskip("triton")

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 before Triton is imported", allow_module_level=True)

kernel = importlib.import_module("lift_fast.kernels.cosine_loss")
numeric = pytest.mark.numeric("cosine_loss")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Half a unit in the last place, and float32's own rounding.
EPS = {torch.float32: 2e-6, torch.bfloat16: 2**-8 + 2e-6, torch.float16: 2**-11 + 2e-6}
# [outer, C, inner]: one element, primes, powers of two and their neighbours, more channels than one tile holds.
SHAPES = [
    (1, 1, 1),
    (2, 3, 5),
    (1, 13, 17),
    (3, 16, 9),
    (2, 31, 33),
    (1, 97, 7),
    (2, 384, 20),
    (5, 33, 1),
    (1, 2050, 3),
]


def gradient_error(gradient, expected, prediction, dim, reduction):
    """Largest error of a position's gradient, in units of 1 / |prediction|, which it cannot exceed."""
    norm = (prediction.double().square().sum(dim) + 1e-12).sqrt()
    weight = 1 / norm.numel() if reduction == "mean" else 1
    return float((torch.linalg.vector_norm(gradient.double() - expected, dim=dim) * norm / weight).max())


def check(prediction, target, dim, reduction="mean"):
    loss, gradient = gpu.loss_and_gradient(prediction.to(DEVICE), target.to(DEVICE), dim, reduction, True)
    alone, none = gpu.loss_and_gradient(prediction.to(DEVICE), target.to(DEVICE), dim, reduction, False)
    wanted, slope = plain.loss_and_gradient(prediction.double(), target.double(), dim, reduction, True)
    # Sums of up to 2050 products in float32, pairwise: a few units in the last place.
    assert (loss.cpu().double() - wanted).abs().max() <= 2e-6 * max(1, wanted.numel() if reduction == "sum" else 1)
    assert torch.equal(alone, loss)
    assert none is None
    assert gradient.dtype == prediction.dtype
    if reduction != "mean" or prediction.dtype != torch.float16:
        # The mean's gradients lie below float16's range: its backward pass includes the upstream gradient.
        assert gradient_error(gradient.cpu(), slope, prediction, dim, reduction) <= EPS[prediction.dtype]
    if reduction == "none":
        above = torch.randn(loss.shape)
        _, gradient = gpu.loss_and_gradient(*(t.to(DEVICE) for t in (prediction, target)), dim, "none", True, above)
        wanted = slope * above.double().unsqueeze(dim)
        assert gradient_error(gradient.cpu(), wanted, prediction, dim, "none") <= 4 * EPS[prediction.dtype]
    else:
        above = torch.tensor(float(wanted.numel() or 1) * math.prod(prediction.shape) / prediction.shape[dim])
        _, gradient = gpu.loss_and_gradient(*(t.to(DEVICE) for t in (prediction, target)), dim, reduction, True, above)
        scaled = gradient.cpu().double() / above
        assert gradient_error(scaled, slope, prediction, dim, reduction) <= EPS[prediction.dtype]


@numeric
@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_plain_version(shape, dtype):
    generator = torch.Generator().manual_seed(sum(shape))
    x, y = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    check(x, y, 1, "none")
    # The same in the layout of tokens, one input of each, and read backwards from a larger tensor.
    tokens = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x, y)]
    check(*tokens, 1)
    check(x, tokens[1], 1)
    check(torch.cat([x, x], 2)[:, :, ::2], y, 1)


@numeric
def test_zero_vectors_and_infinities():
    x = torch.randn(2, 5, 4)
    y = torch.randn(2, 5, 4)
    x[0, :, 0] = y[1, :, 3] = 0
    check(x, y, 1, "none")
    x[0, 2, 1], y[1, 1, 1] = torch.nan, torch.inf
    loss, _ = gpu.loss_and_gradient(x.to(DEVICE), y.to(DEVICE), 1, "none", True)
    spoilt = torch.zeros(2, 4, dtype=torch.bool)
    spoilt[0, 1] = spoilt[1, 1] = True
    assert torch.equal(~loss.cpu().isfinite(), spoilt)


@numeric
@pytest.mark.parametrize("shape", [(2, 13, 7), (1, 384, 5), (2, 2050, 3)], ids=str)
@pytest.mark.parametrize("scales", [(1e19, 1.0), (1.0, 1e25), (1e33, 1e30), (1e30, 1e-3)], ids=str)
def test_lengths_beyond_the_squares_range(shape, scales):
    generator = torch.Generator().manual_seed(sum(shape))
    x, y = (torch.randn(shape, generator=generator) for _ in range(2))
    # And ordinary positions.
    x[..., 1:] *= scales[0]
    y[..., :-1] *= scales[1]
    check(x, y, 1, "none")
    check(x.transpose(1, 2).contiguous().transpose(1, 2), y, 1, "none")


@numeric
@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("factor", [1.0, -0.3, 0.0, float("nan")])
def test_scales_in_place(dtype, factor):
    values = torch.randn(3, 5, 400).to(dtype).transpose(1, 2).to(DEVICE)
    before = values.clone()
    assert kernel.scale_in_place(values, torch.tensor(factor, device=DEVICE)) is values
    tolerance = EPS[dtype] if factor == -0.3 else 0
    torch.testing.assert_close(values, (before.float() * factor).to(dtype), rtol=tolerance, atol=0, equal_nan=True)


@pytest.mark.parametrize("channels", [1, 2, 3, 31, 96, 192, 193, 384, 768, 1024, 1152, 2048, 2049, 5000])
@pytest.mark.parametrize("inner", [1, 5, 784])
def test_tiles_hold_all_channels_and_little_more(channels, inner):
    first, rest, positions, loop = kernel.tiling(channels, inner)
    assert loop == (channels > 1024)
    assert loop or channels <= first + rest < 2 * channels
    assert (first + rest) * positions <= max(kernel._TILE, 1024 * kernel._LEAST_POSITIONS)
    for power in (first, rest or 1, positions):
        assert power & (power - 1) == 0
    assert kernel.tiling(384, 784)[:2] == (256, 128)
