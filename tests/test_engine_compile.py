"""The engine ``torch.compile``: results, bounds, changed weights, and a missing compiler."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from torch import Tensor

import lift_fast
from lift_fast.backbones import EngineError, FrozenViT
from lift_fast.backbones.engines import compiled
from lift_fast.backbones.network import VisionTransformer

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
    monkeypatch.setenv("CXX", os.environ.get("SHELL", "/bin/sh"))
    assert compiled.installed("cpu")[0]


def test_other_devices_are_a_reason() -> None:
    runs, reason = compiled.installed("meta")
    assert not runs
    assert "needs a CPU or a CUDA device, got meta" in reason
