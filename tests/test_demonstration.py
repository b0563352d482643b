"""The demonstration pair that ships with the package: it is there, small, and its features mean something."""

from __future__ import annotations

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

CAT = Path(__file__).resolve().parents[1] / "examples" / "photographs" / "cat.jpg"


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
