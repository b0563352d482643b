"""What an export leaves alone, its files, and its errors."""

from __future__ import annotations

import copy
import os
import re
import shutil
import sys

import onnxruntime
import pytest
import torch
from lift_networks import inputs, network
from torch import nn

from lift_fast import FrozenViT, LiFT, ViTLiFTExtractor, export_onnx
from lift_fast.export import export_program, onnx_file

pytestmark = pytest.mark.usefixtures("one_thread")


def run(path, imgs, tokens):
    found = onnxruntime.InferenceSession(path).run(None, {"imgs": imgs.numpy(), "tokens": tokens.numpy()})[0]
    return torch.from_numpy(found)


def test_the_network_and_the_programs_settings_stay():
    lift = network(6, 16, seed=1).bfloat16().train()
    before = copy.deepcopy(lift.state_dict())
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu"), torch.inference_mode():
            program = export_program(lift)
            assert torch.get_default_dtype() == torch.float64
            assert torch.is_inference_mode_enabled()
            assert torch.is_autocast_enabled("cpu")
    finally:
        torch.set_default_dtype(torch.float32)
    assert lift.training
    assert all(p.requires_grad and p.grad is None for p in lift.parameters())
    assert all(torch.equal(value, before[name]) for name, value in lift.state_dict().items())
    assert {weight.dtype for weight in program.state_dict.values()} == {torch.float32, torch.int64}
    imgs, tokens = inputs(16, 40, 70, 6)
    with torch.no_grad():
        expected = lift.eval().float()(imgs, tokens)
    torch.testing.assert_close(program.module()(imgs, tokens), expected, rtol=1e-5, atol=1e-5)


def test_weights_made_in_inference_mode():
    with torch.inference_mode():
        lift = network(6, 16, seed=1)
    imgs, tokens = inputs(16, 40, 70, 6)
    with torch.inference_mode():
        expected = lift(imgs, tokens)
    given = export_program(lift).module()(imgs, tokens)
    torch.testing.assert_close(given, expected.clone(), rtol=1e-5, atol=1e-5)


def test_weights_beyond_the_formats_bound_lie_in_a_second_file(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "_MOST_BYTES", 1000)
    imgs, tokens = inputs(16, 40, 70, 6)
    path = tmp_path / "lift.onnx"
    path.write_text("older")
    older = tmp_path / "lift.onnx.0123456789ab.data"
    older.write_text("its weights")
    lift = network(6, 16, seed=1)
    assert export_onnx(lift, path) == path
    assert len(path.read_bytes()) < 40_000
    with torch.no_grad():
        torch.testing.assert_close(run(path, imgs, tokens), lift(imgs, tokens), rtol=1e-5, atol=1e-5)
    # What reads the older file meanwhile keeps its weights.
    assert older.read_text() == "its weights"
    names = sorted(p.name for p in tmp_path.iterdir() if p != older)
    assert [names[0], len(names)] == ["lift.onnx", 2]
    assert re.fullmatch(r"lift\.onnx\.[0-9a-f]{12}\.data", names[1])


def test_a_failure_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "lift.onnx"
    path.write_text("old")

    def fail(*_):
        raise RuntimeError("disk on fire")

    monkeypatch.setattr(onnx_file, "_annotate", fail)
    # With a second file, which must not stay either.
    monkeypatch.setattr(onnx_file, "_MOST_BYTES", 1000)
    with pytest.raises(RuntimeError, match="on fire"):
        export_onnx(network(6, 16, seed=1), path)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("lift.onnx", "old")]


def test_the_weights_of_a_replaced_file_go_unless_another_names_them(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "_MOST_BYTES", 1000)
    path = tmp_path / "lift.onnx"
    seen = []
    for seed in (1, 2, 2):
        export_onnx(network(6, 16, seed=seed), path)
        (weights,) = tmp_path.glob("*.data")
        seen.append(weights.name)
    assert seen[0] != seen[1] == seen[2]
    shutil.copy(path, tmp_path / "copy.onnx")
    monkeypatch.undo()
    export_onnx(network(6, 16, seed=3), path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy.onnx", "lift.onnx", seen[2]]
    run(tmp_path / "copy.onnx", *inputs(16, 40, 70, 6))


@pytest.mark.parametrize("same", [False, True])
def test_a_failed_last_write_leaves_only_the_old_files(same, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "_MOST_BYTES", 1000)
    path = tmp_path / "lift.onnx"
    export_onnx(network(6, 16, seed=1), path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    replace = os.replace

    def fail(source, target):
        if target == path:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        export_onnx(network(6, 16, seed=1 if same else 2), path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_leftovers_of_killed_exports_are_collected(tmp_path):
    for name in (".lift.0123abcd.lift_fast-tmp.onnx", ".lift.0123abcd.lift_fast-tmp.onnx.data"):
        (tmp_path / name).write_bytes(b"half")
    export_onnx(network(6, 16, seed=1), tmp_path / "lift.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["lift.onnx"]


def broken(lift: LiFT) -> LiFT:
    lift.outc.weight.data[0] = float("nan")
    return lift


class Stubborn(nn.ReLU):
    def forward(self, x):
        return x if float(x.sum()) > 0 else x.relu()


def edited() -> LiFT:
    lift = network(6, 16, seed=1)
    lift.up1.conv_1.double_conv[2] = Stubborn()
    return lift


@pytest.mark.parametrize(
    ("make", "keywords", "kind", "message"),
    [
        (lambda: nn.Linear(2, 2), {}, TypeError, "a LiFT, a FrozenViT or a ViTLiFTExtractor, got Linear"),
        (lambda: LiFT, {}, TypeError, "got LiFT"),
        (lambda: broken(network(6, 16, seed=1)), {}, ValueError, r"outc\.weight has values that are not finite"),
        (lambda: network(6, 16, 1).to("meta"), {}, ValueError, "is on the meta device"),
        (edited, {}, ValueError, r"LiFT cannot be exported: .*; try dynamic=False"),
        (edited, {"dynamic": False}, ValueError, "LiFT cannot be exported: (?!.*try dynamic)"),
        (None, {"output": "tokens"}, ValueError, "output must be 'descriptors' or 'matching_map', got 'tokens'"),
        (None, {"normalize": True}, ValueError, "normalize belongs to output='matching_map'"),
        (None, {"size": (64, 64)}, ValueError, "size and batch belong to dynamic=False"),
        (None, {"dynamic": False, "size": (64, 15)}, ValueError, "size 64 x 15 is smaller than one patch"),
        (None, {"dynamic": False, "size": 64}, ValueError, r"size must be \(H, W\)"),
        (None, {"dynamic": False, "batch": 0}, ValueError, "batch must be an integer >= 1"),
        (None, {"iterations": 2}, ValueError, "iterations=2 repeats the LiFT of an extractor"),
        (None, {"dynamic": "no"}, TypeError, "dynamic must be True or False"),
        (None, {"opset": 17}, ValueError, "opset must be an integer >= 18"),
        (None, {"path": "lift.pt"}, ValueError, r"path must end in \.onnx"),
        (None, {"path": "a\0b.onnx"}, ValueError, "a file name holds no zero byte"),
        (None, {"path": "nowhere/lift.onnx"}, ValueError, "does not exist"),
    ],
)
def test_errors(make, keywords, kind, message, tmp_path):
    net = network(6, 16, seed=1) if make is None else make()
    with pytest.raises(kind, match=message):
        export_onnx(net, tmp_path / keywords.pop("path", "lift.onnx"), **keywords)
    assert not list(tmp_path.iterdir())


def test_a_backbone_has_no_matching_map(tmp_path):
    extractor = ViTLiFTExtractor("demo_vitt16", device="cpu", silent=True)
    assert isinstance(extractor.backbone, FrozenViT)
    with pytest.raises(ValueError, match="a backbone alone has no matching_map"):
        export_program(extractor.backbone, output="matching_map")
    lift = network(6, 16, seed=1)
    lift.outc = nn.Sequential(lift.outc)
    with pytest.raises(ValueError, match="matching_map needs a 1x1 convolution as outc"):
        export_program(lift, output="matching_map")


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked(conv):
    conv.register_forward_hook(lambda module, given, found: 2 * found)
    return conv


def with_own_forward(conv):
    forward = conv.forward
    conv.forward = lambda x: 2 * forward(x)
    return conv


@pytest.mark.parametrize(
    "make",
    [
        hooked,
        with_own_forward,
        lambda conv: Doubled(conv.in_channels, conv.out_channels, 1),
        *(
            lambda conv, options=options: nn.Conv2d(conv.in_channels, conv.out_channels, 1, **options)
            for options in ({"padding": 1}, {"stride": 2}, {"groups": 3}, {"padding": "same"})
        ),
    ],
)
def test_a_matching_map_needs_a_plain_last_layer(make):
    lift = network(6, 16, seed=1)
    export_program(lift, output="matching_map")
    lift.outc = make(lift.outc)
    with pytest.raises(ValueError, match="matching_map needs a 1x1 convolution as outc"):
        export_program(lift.eval(), output="matching_map")


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_missing_packages_are_named(missing, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r'pip install "lift_fast\[onnx\]"'):
        export_onnx(network(6, 16, seed=1), tmp_path / "lift.onnx")
