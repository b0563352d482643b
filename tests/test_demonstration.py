"""The demonstration pair that ships with the package: it is there, small, and its features mean something."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lift_fast import LiFT, ViTLiFTExtractor, demonstration, load_backbone, load_lift, match_images
from lift_fast.cli import main
from lift_fast.evaluation import warp
from lift_fast.evaluation.methods import build_methods

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
CAT = EXAMPLES / "photographs" / "cat.jpg"


def test_files_are_small_and_half_precision():
    files = [demonstration.backbone_file(), demonstration.lift_file(demonstration.LIFT)]
    assert sum(file.stat().st_size for file in files) < 12e6
    for file in files:
        state = load_file(file)
        assert {v.dtype for v in state.values() if v.is_floating_point()} == {torch.float16}
        assert all(v.isfinite().all() for v in state.values())


def test_both_load_by_name():
    backbone = load_backbone("demo_vitt16")
    assert (backbone.embed_dim, backbone.depth, backbone.patch_size) == (192, 6, 16)
    assert not backbone.random_weights
    assert backbone.position_rule == "timm"
    lift = load_lift("lift_demo_vitt16", patch_size=16)
    assert lift.in_channels == 192
    extractor = ViTLiFTExtractor("demo_vitt16", "lift_demo_vitt16", device="cpu", silent=True)
    assert not extractor.random_weights
    assert extractor.extract_descriptors(torch.zeros(1, 3, 64, 48)).shape == (1, 8 * 6, 192)


def test_a_file_of_that_name_is_no_rival(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("lift_demo_vitt16").write_text("something else")
    assert load_lift("lift_demo_vitt16", patch_size=16).in_channels == 192
    assert demonstration.lift_file("other.pth") == Path("other.pth")


def test_missing_weights_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(demonstration, "_FOLDER", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"demo_vitt16\.safetensors are missing; install lift_fast again"):
        demonstration.backbone_file()


def test_features_mean_something():
    """PCK@0.05 under known warps: well above a random network, and better with LiFT than interpolated."""
    image, protocol, size = Image.open(CAT).convert("RGB"), warp.WarpProtocol(points=100), 224
    views = [warp.make_view(image, "cat.jpg", size, seed, protocol) for seed in range(8)]
    found = {}
    for name, random in (("pair", False), ("random", True)):
        backbone = load_backbone("demo_vitt16", random_weights=random, head_order="interleaved")
        methods = ["bilinear", "random-lift"] if random else ["bilinear", "lift", "random-lift"]
        normalise = warp.normaliser(backbone.mean, backbone.std, torch.device("cpu"), torch.float32)
        with torch.inference_mode():
            scores = warp.evaluate_batch(
                build_methods(methods, backbone, None if random else demonstration.LIFT),
                views,
                size,
                normalise,
                protocol,
            )
        found |= {(name, m): np.mean([s.pck[1] for s in scores[m]]) for m in methods}
    assert found["pair", "bilinear"] > found["random", "bilinear"] + 0.1
    assert found["pair", "lift"] > found["pair", "random-lift"] + 0.1
    assert found["pair", "lift"] > found["pair", "bilinear"], found


def test_command_line_and_one_liner_take_it(tmp_path, capsys):
    other = CAT.with_name("cat_second_view.jpg")
    assert main(["match", str(CAT), str(other), "--out", str(tmp_path / "m.png"), "--size", "160"]) == 0
    captured = capsys.readouterr()
    assert "demonstration pair" in captured.err
    assert "demo_vitt16 keys + LiFT (lift_demo_vitt16)" in captured.err
    with np.load(tmp_path / "m.npz") as data:
        assert not data["random_weights"]
        by_command = data["xy_b"]
    by_call = match_images(CAT, other, size=160, step=4)
    assert np.array_equal(by_call.numpy()["xy_b"], by_command)


ASIDE = {
    "other facet": ["--facet", "value"],
    "other layer": ["--layer", "3"],
    "random": ["--random-weights"],
    "none": ["--no-lift"],
}


@pytest.mark.parametrize("case", ASIDE)
def test_its_lift_follows_only_what_it_was_trained_on(case, tmp_path, capsys):
    options = [str(CAT), str(CAT), "--out", str(tmp_path / "m.png"), "--size", "64", *ASIDE[case]]
    assert main(["match", *options]) == 0
    captured = capsys.readouterr().err
    assert "no LiFT" in captured
    assert ("--lift FILE adds LiFT" in captured) == (case != "none")


def test_its_own_lift_in_its_place(tmp_path, capsys):
    from lift_fast import save_lift

    save_lift(LiFT(192, 16), tmp_path / "mine.pth")
    options = ["match", str(CAT), str(CAT), "--out", str(tmp_path / "m.png"), "--size", "64", "--lift"]
    assert main([*options, str(tmp_path / "mine.pth")]) == 0
    assert "LiFT (mine.pth)" in capsys.readouterr().err


@pytest.fixture
def script(monkeypatch):
    file = EXAMPLES / "train_demonstration_backbone.py"
    spec = importlib.util.spec_from_file_location("train_demonstration_backbone", file)
    module = importlib.util.module_from_spec(spec)
    # Its dataclass looks itself up.
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def photographs(tmp_path):
    folder = tmp_path / "photographs"
    folder.mkdir()
    cat = Image.open(CAT).resize((96, 80))
    for number in range(10):
        cat.rotate(9 * number).save(folder / f"{number}.png")
    return folder


def test_the_script_trains_what_loads_under_its_name(script, photographs, tmp_path, monkeypatch):
    # Fewer photographs than a batch has; small views.
    monkeypatch.setitem(script.STAGES, 1, script.Stage(1, 1e-3, ((4, 4),), 8))
    first, log, second = tmp_path / "new" / "1.safetensors", tmp_path / "logs" / "1.csv", tmp_path / "2.safetensors"
    script.main([str(photographs), "--out", str(first), "--log", str(log), "--threads", "1"])
    assert len(log.read_text().splitlines()) == 2
    script.main([str(photographs), "--start", str(first), "--out", str(second), "--learning-rate", "1e-9"])
    trained, gone_on, shipped = load_file(first), load_file(second), load_file(demonstration.backbone_file())
    assert {k: (v.shape, v.dtype) for k, v in trained.items()} == {k: (v.shape, v.dtype) for k, v in shipped.items()}
    assert all((trained[name] - gone_on[name]).abs().max() < 1e-3 for name in trained)


@pytest.mark.parametrize("precise", [torch.float32, torch.bfloat16])
def test_the_script_computes_in_bfloat16_only_where_the_processor_does(script, precise, monkeypatch):
    monkeypatch.setattr(script, "resolve_precision", lambda wish, device: precise)
    seen = []

    def stop(model, views, parts):
        seen.append(torch.is_autocast_enabled("cpu"))
        raise InterruptedError

    monkeypatch.setattr(script, "keys_and_tokens", stop)
    model = torch.nn.Identity().eval()
    with pytest.raises(InterruptedError):
        script.step_batch([torch.zeros(3, 80, 96, dtype=torch.uint8)], model, [0], (4, 4), script.STAGES[1], [0])
    assert seen == [precise == torch.bfloat16]


def test_the_script_says_what_it_cannot_do_before_it_trains(script, photographs, tmp_path, capsys):
    out = ["--out", str(tmp_path / "1.safetensors")]
    (tmp_path / "file").touch()
    for arguments, message in (
        ([str(tmp_path / "nowhere"), *out], "no file or folder at"),
        ([str(CAT), *out], "1 photographs leave none to hold out; give at least ten"),
        ([str(photographs), "--out", str(tmp_path / "file" / "1.safetensors")], "is a file; expected a folder"),
        ([str(photographs), *out, "--start", str(tmp_path / "gone.safetensors")], "gone.safetensors"),
        ([str(photographs), *out, "--start", str(tmp_path / "file")], "error: "),
    ):
        with pytest.raises(SystemExit):
            script.main(arguments)
        assert message in capsys.readouterr().err
