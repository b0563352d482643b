"""LiFT forward, ViT-S width (C = 384), patch 16: the inference plan against the plain module in float32.

The baseline is the plain module, NCHW, float32, eager, as people run it today; the compiled module is measured too.
"""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch

from lift_fast import LiFT, export_onnx
from lift_fast.testing import randomize, relative_error

CASES = [(1, 224), (8, 224), (1, 448), (1, 896)]
LIMITS = {"float32": 1e-5, "bfloat16": 2e-2}


@pytest.fixture
def lift(device):
    torch.manual_seed(0)
    return randomize(LiFT(384, 16), seed=0).eval().requires_grad_(False).to(device)


def inputs(batch, size, device):
    return torch.randn(batch, 3, size, size, device=device), torch.randn(batch, (size // 16) ** 2, 384, device=device)


def plain_module(lift):
    twin = copy.deepcopy(lift)
    twin.fused = False
    return twin


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("batch", "size"), CASES, ids=lambda value: str(value))
def test_plan(benchmark, compare, lift, device, batch, size, dtype):
    benchmark.group = f"LiFT forward, {device}, B{batch} {size}"
    imgs, x = inputs(batch, size, device)
    cast = getattr(torch, dtype)
    plain, ours = plain_module(lift), copy.deepcopy(lift).to(cast)
    cast_imgs, cast_x = imgs.to(cast), x.to(cast)
    with torch.inference_mode():
        error = relative_error(ours(cast_imgs, cast_x), plain(imgs, x))
        compare(lambda: ours(cast_imgs, cast_x), lambda: plain(imgs, x), error=error, limit=LIMITS[dtype])


@pytest.mark.parametrize("variant", ["plain bfloat16 channels_last", "plain float32 compiled"])
@pytest.mark.parametrize(("batch", "size"), CASES, ids=lambda value: str(value))
def test_other_ways(benchmark, compare, lift, device, batch, size, variant):
    """Alternatives to this package, on the same scale: speed-up over the plain module in float32."""
    benchmark.group = f"LiFT forward, {device}, B{batch} {size}"
    imgs, x = inputs(batch, size, device)
    plain = plain_module(lift)
    if "compiled" in variant:
        torch._dynamo.reset()
        other = torch.compile(plain_module(lift), dynamic=False)
        cast_imgs, cast_x, limit = imgs, x, 1e-5
    else:
        other = plain_module(lift).to(torch.bfloat16, memory_format=torch.channels_last)
        cast_imgs, cast_x, limit = imgs.bfloat16().contiguous(memory_format=torch.channels_last), x.bfloat16(), 2e-2
    with torch.inference_mode():
        error = relative_error(other(cast_imgs, cast_x), plain(imgs, x))
        compare(lambda: other(cast_imgs, cast_x), lambda: plain(imgs, x), error=error, limit=limit)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(("batch", "size"), CASES, ids=lambda value: str(value))
def test_exported(benchmark, compare, lift, device, batch, size, engine, tmp_path):
    """The ONNX file of :func:`lift_fast.export_onnx` in other engines."""
    if device != "cpu":
        pytest.skip("compared on the CPU")
    module = pytest.importorskip(engine)
    benchmark.group = f"LiFT forward, {device}, B{batch} {size}"
    path, threads = export_onnx(lift, tmp_path / "lift.onnx"), torch.get_num_threads()
    imgs, x = inputs(batch, size, device)
    given = {"imgs": imgs.numpy(), "tokens": x.numpy()}
    if engine == "onnxruntime":
        options = module.SessionOptions()
        options.intra_op_num_threads = threads
        session = module.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        other = partial(session.run, None, given)
    else:
        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
        other = partial(module.Core().compile_model(path, "CPU", settings), given)
    plain = plain_module(lift)
    with torch.inference_mode():
        error = relative_error(torch.from_numpy(other()[0]), plain(imgs, x))
        compare(other, lambda: plain(imgs, x), error=error, limit=1e-4)
