"""The native core's cosine loss: half precision bit by bit, refused calls, sanitizers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lift_fast.ops import cosine_loss as op

native = pytest.importorskip("lift_fast._C")
ROOT = Path(__file__).resolve().parents[1]
ISAS = native.cpu_isas()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_every_half_precision_number_is_read_and_rounded_as_pytorch_does(isa, dtype, monkeypatch):
    monkeypatch.setenv("LIFT_FAST_CPU_ISA", isa)
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    # Beyond these, which float16 does not reach, squares leave the range of float32.
    size = every.float().abs()
    finite = every[every.isfinite() & (size < 1e15) & ((size > 1e-15) | (size == 0))]
    # Two channels, the second 1 and the target's second 0: the gradient's factors differ at each position.
    x = torch.stack([finite, torch.ones_like(finite)])[None]
    y = torch.stack([torch.ones_like(finite), torch.zeros_like(finite)])[None]
    for reduction in ("none", "sum"):
        loss, gradient = op.cosine_loss_native(x, y, 1, reduction, True)
        wanted_loss, wanted = op.gradient_plain(x.float(), y.float(), 1, reduction)
        torch.testing.assert_close(loss, wanted_loss, rtol=2e-6, atol=2e-6)
        # Rounded once; what is rounded differs by float32's rounding, relative to 1 / |x| as the terms may cancel.
        assert gradient.dtype == dtype
        unit = torch.finfo(dtype).eps / 2
        norm = torch.linalg.vector_norm(x.float(), dim=1, keepdim=True)
        smallest = torch.finfo(dtype).smallest_normal * unit
        assert ((gradient.float() - wanted).abs() <= unit * wanted.abs() + 4e-7 / norm + smallest).all()


@pytest.mark.parametrize("isa", ISAS)
def test_kernels_agree_past_the_caches_and_within(isa, monkeypatch):
    monkeypatch.setenv("LIFT_FAST_CPU_ISA", isa)
    generator = torch.Generator().manual_seed(0)
    # 4.3 MB of gradient are written past the caches, a part of it is not.
    x, y = (torch.randn(2, 100, 5501, generator=generator) for _ in range(2))
    _, large = op.cosine_loss_native(x, y, 1, "sum", True)
    for first, last in ((0, 3), (17, 150), (5400, 5501)):
        _, small = op.cosine_loss_native(x[:, :, first:last], y[:, :, first:last], 1, "sum", True)
        torch.testing.assert_close(large[:, :, first:last], small, rtol=1e-5, atol=1e-7)


def call(**changes):
    x = np.ones((2, 3, 4), np.float32)
    loss, gradient = np.empty((2, 4), np.float32), np.empty_like(x)
    strides = (12, 4, 1)
    arguments = {
        "prediction": x.ctypes.data,
        "target": x.ctypes.data,
        "dtype": "float32",
        "shape": x.shape,
        "prediction_strides": strides,
        "target_strides": strides,
        "gradient_strides": strides,
        "weight": 1.0,
        "loss": loss.ctypes.data,
        "gradient": gradient.ctypes.data,
        "threads": 1,
        **changes,
    }
    native.cosine_loss(**arguments)
    return loss, gradient


def test_call_as_it_is():
    loss, gradient = call()
    assert np.abs(loss).max() < 1e-6
    assert np.abs(gradient).max() < 1e-6


BAD = {
    "dtype": {"dtype": "float64"},
    "negative": {"shape": (2, -3, 4)},
    "huge": {"shape": (1 << 39, 3, 1 << 39)},
    "strides": {"target_strides": (12, -4, 1)},
    "threads": {"threads": 0},
    "loss": {"loss": 0},
    "prediction": {"prediction": 0},
    "isa": {"isa": "sse9"},
}


@pytest.mark.parametrize("case", BAD)
def test_calls_that_cannot_be_are_refused(case):
    with pytest.raises(ValueError, match=r"cosine_loss|sse9"):
        call(**BAD[case])
