"""The engine ``torch.compile``: results, bounds, changed weights, and a missing compiler."""

from __future__ import annotations

import argparse
import copy
import os
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils import cpp_extension

import lift_fast
from lift_fast.backbones import EngineError, FrozenViT
from lift_fast.backbones.engines import compiled
from lift_fast.backbones.engines.graph import Network
from lift_fast.backbones.network import VisionTransformer
from lift_fast.cli import eval_options, options

pytestmark = pytest.mark.usefixtures("one_thread")


def network() -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(32, 2, 2, 8, (4, 4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def exact(model: VisionTransformer, imgs: Tensor) -> Tensor:
    with torch.no_grad():
        return FrozenViT(copy.deepcopy(model).double(), engine="torch")(imgs.double())


def error(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours.double() - theirs).abs().max() / theirs.abs().max())


def test_cuda_without_a_gpu_is_no_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "_is_compiled", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    # Both places where Python keeps the module.
    monkeypatch.setattr(torch.utils, "cpp_extension", cpp_extension)
    monkeypatch.delitem(sys.modules, "torch.utils.cpp_extension")
    backbone = FrozenViT(network(), engine="compile")
    compiled.Compiled(backbone, Network(backbone))
    assert "torch.utils.cpp_extension" in sys.modules
    assert caplog.records == []


@pytest.mark.slow
def test_compiled_equals_the_modules() -> None:
    model = network()
    backbone = FrozenViT(model, engine="compile")
    with torch.inference_mode():
        for shape in ((1, 3, 32, 32), (3, 3, 40, 17), (2, 3, 24, 70)):
            imgs = images(*shape)
            assert error(backbone(imgs), exact(model, imgs)) <= 1e-5
            assert backbone.engine_used == "compile", backbone.engine_reason
        imgs = images(3, 3, 40, 17)
        model.load_state_dict({name: 1.1 * value for name, value in model.state_dict().items()})
        assert error(backbone(imgs), exact(model, imgs)) <= 1e-5
        assert backbone.engine_used == "compile"
    imgs = images(3, 3, 40, 17).requires_grad_()
    backbone(imgs).sum().backward()
    assert imgs.grad is not None
    assert backbone.engine_used == "torch"


@pytest.mark.slow
def test_the_number_of_programs_is_bounded() -> None:
    model, imgs = network(), images(2, 3, 40, 32)
    backbone = FrozenViT(model, engine="compile", layer=0)
    with torch._dynamo.config.patch(recompile_limit=1), torch.no_grad():
        backbone(imgs)
        assert backbone.engine_used == "compile"
        one = backbone(imgs[:1])
        assert (backbone.engine_used, backbone.engine_reason) == ("torch", "too many kinds of shapes")
        assert torch.allclose(one, backbone(imgs)[:1], atol=1e-5)
        assert backbone.engine_used == "compile"


def test_a_missing_compiler_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    runs, reason = compiled.installed("cpu")
    assert not runs
    if not torch.cuda.is_available():
        with pytest.raises(EngineError, match=r"engine='compile' cannot run .* and no-such-compiler is not found"):
            FrozenViT(network(), engine="compile")
        assert lift_fast.backends()["compile"].detail == reason
    monkeypatch.setenv("CXX", "ccache g++")
    assert "without arguments, got 'ccache g++'" in compiled.installed("cpu")[1]
    monkeypatch.setenv("CXX", os.environ.get("SHELL", "/bin/sh"))
    assert compiled.installed("cpu")[0]


def test_other_devices_are_a_reason() -> None:
    runs, reason = compiled.installed("meta")
    assert not runs
    assert "needs a CPU or a CUDA device, got meta" in reason


@pytest.mark.parametrize("build", [options.build_extractor, eval_options.build])
def test_the_wait_is_announced(build, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(compiled, "installed", lambda kind: (True, ""))
    for more, announced in (((), True), (("--quiet",), False), (("--engine", "torch"), False)):
        parser = argparse.ArgumentParser()
        options.add_model_options(parser)
        options.add_output_options(parser)
        arguments = parser.parse_args(["--device", "cpu", "--engine", "compile", *more])
        arguments.method = ["lift"]
        build(arguments)
        assert ("compiles before the first image" in capsys.readouterr().err) == announced
