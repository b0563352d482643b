"""``lift-fast match --verify``: what it prints and writes, the warning, and options that do not fit."""

from __future__ import annotations

import builtins
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lift_fast.cli import main

pytest.importorskip("cv2")
pytestmark = pytest.mark.usefixtures("one_thread")
CAT, SECOND = (
    Path(__file__).resolve().parents[1] / "examples/photographs" / name for name in ("cat.jpg", "cat_second_view.jpg")
)
OPTIONS = ["--size", "224", "--normalize", "pixel"]


@pytest.fixture
def noise(tmp_path, monkeypatch):
    """An image that is related to nothing; the folder is the current one."""
    monkeypatch.chdir(tmp_path)
    values = np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(values).resize((320, 240), Image.Resampling.BICUBIC).save(tmp_path / "noise.png")
    return tmp_path / "noise.png"


def run(*arguments):
    return main(["match", *map(str, arguments), *OPTIONS])


def test_verdict_is_printed_and_written(noise, capsys):
    assert run(CAT, SECOND, "--verify", "homography", "--threshold", "5") == 0
    said = capsys.readouterr().err
    assert "drawn matches (" in said
    assert "agree with one homography within 5 px" in said
    assert "verified: " in said
    assert re.search(r"matched in \d+\.\d\d s ", said)
    assert "warning" not in said
    with np.load("matches.npz") as numbers:
        assert numbers["transform"].shape == (3, 3)
        assert not (numbers["inliers"] & ~numbers["valid"]).any()
        assert numbers["inliers"].sum() > 500
    assert run(CAT, SECOND, "--verify", "homography", "--threshold", "5", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["verification"]["verified"]
    assert found["verification"]["threshold"] == 5
    assert np.shape(found["verification"]["matrix"]) == (3, 3)
    assert found["warning"] == ""
    assert 0 < found["trust"]["inlier_share"] <= 1
    assert found["seconds"]["verify"] > 0


def test_one_line_warns_of_unrelated_images(noise, capsys):
    for more in ([], ["--verify", "fundamental"]):
        assert run(CAT, noise, *more) == 0
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
        assert len(lines) == 1
        assert ("do not trust these matches: not verified" if more else "the images seem unrelated") in lines[0]
        assert run(CAT, noise, *more, "--json") == 0
        said = capsys.readouterr()
        assert said.err == ""
        assert f"warning: {json.loads(said.out)['warning']}" == lines[0]
        assert run(CAT, noise, *more, "--quiet") == 0
        assert capsys.readouterr() == ("", "")


def test_a_pair_that_is_not_verified_exports_nothing_and_says_so(noise, capsys):
    pytest.importorskip("h5py")
    more = ["--export", "m.h5", "--export", ".flo", "--verify", "homography"]
    line = "0 matches exported: not verified"
    assert run(CAT, noise, *more) == 0
    assert capsys.readouterr().err.splitlines().count(line) == 1
    assert run(CAT, noise, *more, "--json") == 0
    said = capsys.readouterr()
    assert (json.loads(said.out)["exported"], said.err) == ({"m.h5": 0, "matches.flo": 0}, "")
    assert run(CAT, SECOND, *more, "--json") == 0
    assert min(json.loads(capsys.readouterr().out)["exported"].values()) > 500
    assert run(CAT, SECOND, *more) == 0
    assert "0 matches exported" not in capsys.readouterr().err
    for image in (CAT, SECOND):
        Image.open(image).save(noise.parent / image.name)
    Path("pairs.txt").write_text("cat.jpg cat_second_view.jpg\ncat.jpg noise.png\n")
    more = ["--pairs", "pairs.txt", "--sheets", "none", *more]
    assert run(*more) == 0
    assert "0 matches exported of 1 of 2 pairs: not verified" in capsys.readouterr().err.splitlines()
    assert run(*more, "--json") == 0
    assert json.loads(capsys.readouterr().out)["exported"]["m.h5"] > 500


def test_lists_warn_of_each_pair_and_resume_with_the_same_verification(noise, capsys):
    for image in (CAT, SECOND):
        Image.open(image).save(noise.parent / image.name)
    Path("pairs.txt").write_text("cat.jpg cat_second_view.jpg\ncat.jpg noise.png\n")
    more = ["--pairs", "pairs.txt", "--sheets", "none", "--verify", "homography"]
    assert run(*more) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(lines) == 1
    assert lines[0].startswith("warning: cat.jpg and noise.png: do not trust these matches: not verified")
    with np.load("matches/cat--cat_second_view.npz") as numbers:
        assert numbers["inliers"].any()
    assert run(*more, "--json") == 0
    assert json.loads(capsys.readouterr().out)["kept"] == 2
    for changed in (["--threshold", "9"], ["--seed", "3"]):
        assert run(*more, *changed) == 2
        assert changed[0][2:] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--threshold", "3"], "--threshold belongs to --verify"),
        (["--verify", "homography", "--focal", "500"], "--focal belongs to --verify essential"),
        (["--verify", "homography", "--threshold", "0"], "--threshold must be a number of pixels above 0, got 0"),
        (["--verify", "homography", "--threshold", "nan"], "--threshold must be a number of pixels above 0, got nan"),
        (["--verify", "essential", "--focal", "-4"], "--focal must be a number of pixels above 0, got -4"),
    ],
)
def test_options_that_do_not_fit(more, text, capsys):
    assert run("missing.png", "missing.png", *more) == 2
    assert text in capsys.readouterr().err


def test_without_opencv_the_extra_is_named(monkeypatch, capsys):
    found = builtins.__import__

    def blocked(name, *rest, **more):
        if name == "cv2":
            raise ImportError("No module named 'cv2'")
        return found(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", blocked)
    assert run(CAT, SECOND, "--verify", "homography") == 2
    assert 'pip install "lift_fast[geometry]"' in capsys.readouterr().err
