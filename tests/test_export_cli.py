"""The command that writes ONNX files."""

from __future__ import annotations

import json
import sys

import onnxruntime
import pytest
import torch

from lift_fast import LiFT, save_lift
from lift_fast.cli import export, main
from lift_fast.testing import randomize

pytestmark = pytest.mark.usefixtures("one_thread")


def test_maps_of_one_size(tmp_path, capsys, monkeypatch):
    path = tmp_path / "maps.onnx"
    words = ["export", "--what", "matching-map", "--normalize", "--static", "48x70", "--batch", "2", "--check"]
    # A file that is off is reported, not removed.
    monkeypatch.setattr(export, "_MOST_ERROR", 1e-12)
    assert main([*words, "--out", str(path)]) == 1
    said = capsys.readouterr().err
    assert f"wrote {path}" in said
    assert "ONNX Runtime: largest relative error" in said
    assert "batches of 2 x 48 x 70" in said
    assert "warning: above 1e-12; do not use this file" in said
    session = onnxruntime.InferenceSession(path)
    assert session.get_inputs()[0].shape == [2, 3, 48, 70]
    imgs = torch.randn(2, 3, 48, 70)
    (maps,) = session.run(None, {"imgs": imgs.numpy()})
    assert maps.shape == (2, 97, 6, 8)
    torch.testing.assert_close(torch.from_numpy(maps).norm(dim=1), torch.ones(2, 6, 8))


def test_lift_alone_of_a_file(tmp_path, capsys):
    torch.manual_seed(0)
    save_lift(randomize(LiFT(192, 16, image_channels=4), 0), tmp_path / "lift.safetensors")
    words = ["export", "--lift", str(tmp_path / "lift.safetensors"), "--random-weights", "--what", "lift", "--check"]
    assert main([*words, "--out", str(tmp_path / "lift.onnx"), "--json"]) == 0
    told = capsys.readouterr()
    figures = json.loads(told.out)
    assert told.err == ""
    assert figures["what"] == "lift"
    assert figures["bytes"] == (tmp_path / "lift.onnx").stat().st_size
    assert [(each["images"], each["height"], each["width"]) for each in figures["checks"]] == [
        (1, 224, 224),
        (3, 88, 145),
    ]
    assert all(0 < each["relative_error"] < 1e-5 for each in figures["checks"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "x.pt"], r"--out must end in .onnx, got x.pt"),
        (["--out", "nowhere/x.onnx"], "does not exist"),
        (["--normalize"], "--normalize belongs to --what matching-map"),
        (["--batch", "2"], "--batch belongs to --static HxW"),
        (["--dtype", "bfloat16"], "--dtype bfloat16: the file computes in float32"),
        (["--what", "lift", "--no-lift"], "--what lift needs a LiFT; give --lift FILE"),
        (["--what", "lift", "--iterations", "2"], "--iterations belongs to images"),
        (["--opset", "17"], "opset must be an integer >= 18, got 17"),
        (["--static", "8x8"], "size 8 x 8 is smaller than one patch of 16 x 16 pixels"),
        (["--lift", "missing.pth"], "missing.pth"),
    ],
)
def test_errors(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["export", "--quiet", *(() if "--out" in words else ("--out", "x.onnx")), *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("lift-fast export: ")
    assert message in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["448", "x", "4x", "0x4"])
def test_a_size_is_two_numbers(text, capsys):
    with pytest.raises(SystemExit):
        main(["export", "--out", "x.onnx", "--static", text])
    assert "expected" in capsys.readouterr().err


def test_missing_packages_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(export, "find_spec", lambda name: None)
        assert main(["export", "--out", "x.onnx", "--check"]) == 2
    assert "--check needs ONNX Runtime: pip install onnxruntime" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert main(["export", "--out", "x.onnx", "--quiet"]) == 2
    assert 'pip install "lift_fast[onnx]"' in capsys.readouterr().err
