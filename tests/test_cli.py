"""The command line, run as a newcomer would: help, matches, descriptors, and what it says when something is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from PIL import Image

import lift_fast._files
from lift_fast import image_stream
from lift_fast.cli import main

TINY = ["--model", "vit_tiny_patch16_224", "--random-weights", "--size", "64"]


@pytest.fixture
def images(tmp_path):
    """Two real photographs, small."""
    folder = tmp_path / "images"
    (folder / "deep").mkdir(parents=True)
    paths = folder / "astronaut.jpg", folder / "deep" / "coffee.png"
    for path, array in zip(paths, (skimage.data.astronaut(), skimage.data.coffee()), strict=True):
        image = Image.fromarray(array)
        image.thumbnail((160, 160))
        image.save(path)
    return paths


def run(*arguments):
    return main([str(argument) for argument in arguments])


def test_help_in_a_subprocess():
    done = subprocess.run([sys.executable, "-m", "lift_fast", "--help"], capture_output=True, text=True, check=True)
    assert "usage: lift-fast" in done.stdout
    assert "example" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("command", [["match"], ["extract"], ["train"], ["info"]])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        run(*command, "--help")
    assert not stop.value.code
    said = capsys.readouterr()
    assert "usage: lift-fast" in said.out
    assert "example" in said.out
    assert said.err == ""


def test_help_shows_words_not_python(capsys):
    for command, wanted in (
        (["eval", "cka"], "with 95 % confidence"),
        (["show"], "rows of the sheet: similarity pca saliency (all)"),
        (["match"], "HxW, rounded to whole patches (448)"),
        (["extract"], "or as HxW (448)"),
    ):
        with pytest.raises(SystemExit):
            run(*command, "--help")
        assert wanted in " ".join(capsys.readouterr().out.split())


def test_version(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out.startswith("lift_fast 0.")


def test_no_command_prints_help(capsys):
    assert run() == 2
    assert "match two images" in capsys.readouterr().out


@pytest.mark.parametrize("lift", [[], ["--random-lift"], ["--random-lift", "--iterations", "2"]])
def test_match(images, tmp_path, capsys, lift):
    out = tmp_path / "result.png"
    dtype = "bfloat16" if lift else "float32"
    options = ("--step", "3", "--dtype", dtype, "--engine", "torch", "--json")
    assert run("match", *images, "--out", out, *TINY, *lift, *options) == 0
    figures = json.loads(capsys.readouterr().out)
    loaded_a, loaded_b = figures["loaded_size_a"], figures["loaded_size_b"]
    assert min(loaded_a) == min(loaded_b) == 64
    factor = {0: 1, 1: 2, 3: 4}[len(lift)]
    assert figures["grid_a"] == [factor * (loaded_a[0] // 16), factor * (loaded_a[1] // 16)]
    seconds = figures["seconds"]
    assert set(seconds) == {"imports", "model", "decode", "backbone", "lift", "match", "draw", "total"}
    assert sum(seconds.values()) - seconds["total"] <= seconds["total"] + 0.001
    assert figures["random_weights"] is True
    with Image.open(out) as sheet:
        assert sheet.size[0] == 1600
        assert sheet.getpixel((2, 2)) == (176, 32, 32)
    rows, columns = (len(range((n - 1) % 3 // 2, n, 3)) for n in loaded_a)
    shapes = {"similarity": (), "distance": (), "confidence": (), "valid": (), "xy_a": (2,), "xy_b": (2,)}
    with np.load(out.with_suffix(".npz")) as data:
        assert {name for name in data.files if name not in shapes} == {
            *(f"{name}_{side}" for name in ("size", "loaded_size", "covered", "grid") for side in "ab"),
            *("random_weights", "settings", "source", "source_bytes", "orientation", "engine"),
        }
        assert figures["dtype"] == json.loads(str(data["settings"]))["dtype"] == dtype
        assert figures["engine"] == str(data["engine"]) == "torch"
        assert data["source"].tolist() == [path.name for path in images]
        assert all(data[name].shape == (rows, columns, *shape) for name, shape in shapes.items())
        assert figures["points"] == rows * columns
        assert int(data["valid"].sum()) == figures["valid"]
        for side, path in zip("ab", images, strict=True):
            with Image.open(path) as original:
                assert data[f"size_{side}"].tolist() == [original.height, original.width] == figures[f"size_{side}"]
                assert (data[f"xy_{side}"] < original.size).all()
        assert data["xy_a"][..., 0].max() > 0.9 * data["size_a"][1]
        # Its values have tests of their own, test_confidence.py.
        assert ((data["confidence"] >= 0) & (data["confidence"] <= 1)).all()
        assert data["confidence"].mean() == pytest.approx(figures["mean_confidence"])
        assert ((data["distance"] <= 1) == data["valid"]).all()
        assert data["random_weights"]
    assert {p.name for p in tmp_path.iterdir()} == {"images", "result.png", "result.npz"}


def test_without_mutual_every_match_is_valid(images, tmp_path, capsys):
    assert run("match", *images, "--out", tmp_path / "m.png", *TINY, "--no-mutual", "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["valid"] == figures["points"]


def test_an_image_matches_itself(images, tmp_path):
    out = tmp_path / "same.png"
    assert run("match", images[0], images[0], "--out", out, *TINY, "--normalize", "pixel", "--quiet") == 0
    with np.load(out.with_suffix(".npz")) as data:
        scale = data["size_a"][::-1] / data["loaded_size_a"][::-1]
        position = (data["xy_a"] + 0.5) / scale
        inner = ((position >= 8) & (position < 56)).all(-1)
        assert np.abs((data["xy_a"] - data["xy_b"]) / scale)[inner].max() < 1.01
        assert data["similarity"][inner].min() > 0.9999
        assert data["confidence"][inner].min() > 0.8


def test_match_says_what_it_does(images, tmp_path, capsys):
    assert run("match", *images, "--out", tmp_path / "m.png", *TINY, "--timing") == 0
    captured = capsys.readouterr()
    assert "no LiFT checkpoint was given" in captured.err
    assert "--lift FILE" in captured.err
    assert "random weights: these features mean nothing" in captured.err
    assert str(tmp_path / "m.npz") in captured.err
    stages = [line.split() for line in captured.out.splitlines()]
    names = ["imports", "model", "decode", "backbone", "lift", "match", "draw", "total"]
    assert [stage[0] for stage in stages] == names
    assert all(float(seconds) >= 0 and unit == "s" for _, seconds, unit in stages)
    assert run("match", *images, "--out", tmp_path / "m.png", *TINY, "--quiet") == 0
    captured = capsys.readouterr()
    assert captured.err == captured.out == ""


def test_text_instead_of_an_image_is_named(images, tmp_path, capsys):
    (tmp_path / "notes.jpg").write_text("no image")
    assert run("match", tmp_path / "notes.jpg", images[1], "--out", tmp_path / "m.png", *TINY) == 2
    assert "notes.jpg cannot be read as an image" in capsys.readouterr().err
    assert not (tmp_path / "m.png").exists()


BAD = {
    "missing image": (["match", "nowhere.jpg", "b.jpg", *TINY], "no image at nowhere.jpg"),
    "suffix": (
        ["match", "{a}", "{b}", "--out", "m.gif", *TINY],
        ".jpeg .webp .pdf, got m.gif",
    ),
    "folder": (["match", "{a}", "{b}", "--out", "no/m.png", *TINY], "the folder no does not exist"),
    "model": (["match", "{a}", "{b}", "--model", "resnet50", "--random-weights"], "resnet50"),
    "lift": (["match", "{a}", "{b}", "--lift", "gone.pth", *TINY], "gone.pth"),
    "weights": (["match", "{a}", "{b}", "--model", "dino_vits16", "--weights", "gone.pth"], "gone.pth"),
    "iterations": (["match", "{a}", "{b}", "--iterations", "2", *TINY], "give --lift FILE"),
    "device": (["match", "{a}", "{b}", "--device", "abacus", *TINY], "abacus"),
    "small": (["match", "{a}", "{b}", "--model", "vit_tiny_patch16_224", "--random-weights", "--size", "9"], "patch"),
    "extract": (["extract", "nowhere", "--out", "o", *TINY], "nowhere"),
}


@pytest.mark.parametrize("case", BAD)
def test_input_that_cannot_be_used_is_said_plainly(case, images, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, message = BAD[case]
    assert run(*(a.format(a=images[0], b=images[1]) for a in arguments)) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.splitlines()[-1].startswith(f"lift-fast {arguments[0]}: ")
    assert "Traceback" not in said


@pytest.mark.parametrize("size", ["0", "-3", "448.5", "64x", "x64"])
def test_bad_sizes_are_refused_by_the_parser(size, capsys):
    with pytest.raises(SystemExit) as stop:
        run("match", "a.jpg", "b.jpg", "--size", size)
    assert stop.value.code == 2
    assert "expected a whole number of at least 1" in capsys.readouterr().err


def test_offline_without_weights_names_file_and_options(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "lift_fast",
            "match",
            *map(str, images),
            "--out",
            str(tmp_path / "m.png"),
            "--model",
            "dino_vits16",
        ],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 2
    assert "vit_small_patch16_224.dino" in done.stderr
    assert "--weights" in done.stderr
    assert "--random-weights" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "m.png").exists()


def test_corrupt_image_is_named(images, tmp_path, capsys):
    images[1].write_bytes(images[1].read_bytes()[:200])
    assert run("match", *images, "--out", tmp_path / "m.png", *TINY) == 2
    assert "coffee.png" in capsys.readouterr().err


def test_extract_keeps_the_folders(images, tmp_path, capsys):
    out = tmp_path / "features"
    folder = images[0].parent
    assert run("extract", folder, "--out", out, *TINY, "--random-lift", "--dtype-out", "float16", "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["written"] == 2
    assert sorted(p.relative_to(out).as_posix() for p in out.rglob("*.npz")) == ["astronaut.npz", "deep/coffee.npz"]
    with np.load(out / "astronaut.npz") as data:
        height, width = data["image_size"]
        assert data["descriptors"].shape == (2 * (height // 16), 2 * (width // 16), 192)
        assert data["descriptors"].dtype == np.float16
        assert np.isfinite(data["descriptors"]).all()
        assert json.loads(str(data["settings"]))["model"] == "vit_tiny_patch16_224"
    assert run("extract", folder, "--out", out, *TINY, "--random-lift", "--dtype-out", "float16", "--json") == 0
    assert json.loads(capsys.readouterr().out)["kept"] == 2
    assert run("extract", folder, "--out", out, *TINY, "--overwrite", "--json", "--batch-size", "4") == 0
    assert json.loads(capsys.readouterr().out)["written"] == 2


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--random-lift"], "(random-lift)"),
        (["--size", "48x64"], "(size)"),
        (["--seed", "1"], "(seed)"),
        (["--facet", "value", "--dtype-out", "float16"], "(facet, dtype-out)"),
    ],
)
def test_extract_never_mixes_settings_in_a_folder(images, tmp_path, capsys, change, named):
    out = tmp_path / "features"
    assert run("extract", images[0], "--out", out, *TINY, "--quiet") == 0
    before = (out / "astronaut.npz").read_bytes()
    assert run("extract", *images, "--out", out, *TINY, *change, "--quiet") == 2
    said = capsys.readouterr().err
    assert f"astronaut.npz was made with other settings {named}; give another --out, or --overwrite\n" in said
    assert [path.name for path in out.iterdir()] == ["astronaut.npz"]
    assert (out / "astronaut.npz").read_bytes() == before
    assert run("extract", *images, "--out", out, *TINY, *change, "--quiet", "--overwrite") == 0
    assert run("extract", *images, "--out", out, *TINY, *change, "--quiet") == 0


def test_extract_goes_on_with_the_demonstration_pair(images, tmp_path, capsys):
    """The LiFT that nobody named is a setting too; the seed is none where nothing is random."""
    out = tmp_path / "features"
    assert run("extract", images[0], "--out", out, "--size", "64", "--quiet") == 0
    assert run("extract", images[0], "--out", out, "--size", "64", "--seed", "3", "--json") == 0
    assert json.loads(capsys.readouterr().out)["kept"] == 1
    assert run("extract", images[0], "--out", out, "--size", "64", "--no-lift", "--quiet") == 2
    assert "other settings (lift)" in capsys.readouterr().err


def test_extract_leaves_files_of_others_alone(images, tmp_path, capsys):
    out = tmp_path / "features"
    out.mkdir()
    np.savez(out / "astronaut.npz", mine=np.arange(3))
    assert run("extract", images[0], "--out", out, *TINY, "--quiet") == 2
    assert "astronaut.npz was not written by lift-fast extract; give another --out" in capsys.readouterr().err


def test_extract_in_batches_equals_one_by_one(images, tmp_path):
    folder = tmp_path / "same"
    folder.mkdir()
    for number in range(3):
        Image.fromarray(skimage.data.chelsea()[: 200 + number, :250]).resize((80, 64)).save(folder / f"{number}.png")
    assert run("extract", folder, "--out", tmp_path / "one", *TINY, "--quiet", "--batch-size", "1") == 0
    assert run("extract", folder, "--out", tmp_path / "two", *TINY, "--quiet", "--batch-size", "2") == 0
    for number in range(3):
        with np.load(tmp_path / "one" / f"{number}.npz") as one, np.load(tmp_path / "two" / f"{number}.npz") as two:
            np.testing.assert_allclose(one["descriptors"], two["descriptors"], atol=1e-4)


def test_extract_skips_and_names_corrupt_images(images, tmp_path, capsys):
    (images[0].parent / "broken.jpg").write_bytes(b"no image")
    assert run("extract", images[0].parent, "--out", tmp_path / "out", *TINY, "--json") == 1
    captured = capsys.readouterr()
    assert "broken.jpg" in captured.err
    figures = json.loads(captured.out)
    assert figures["written"] == 2
    assert len(figures["failed"]) == 1


def test_extract_outlives_images_that_vanish_or_change(images, tmp_path, monkeypatch, capsys):
    length, read = images[0].stat().st_size, image_stream.as_image

    def touched(path, name):
        image = read(path, name)
        if path == images[0]:
            path.unlink()
        else:
            path.write_bytes(path.read_bytes() + b"more")
        return image

    monkeypatch.setattr(image_stream, "as_image", touched)
    assert run("extract", images[0].parent, "--out", tmp_path / "out", *TINY, "--quiet") == 1
    assert capsys.readouterr().err == f"skipped: {images[1]} changed while it was read; run the same command again\n"
    assert [path.name for path in (tmp_path / "out").rglob("*.npz")] == ["astronaut.npz"]
    with np.load(tmp_path / "out" / "astronaut.npz") as data:
        assert int(data["source_bytes"]) == length
    monkeypatch.undo()
    assert run("extract", images[1].parent, "--out", tmp_path / "out" / "deep", *TINY, "--quiet") == 0


def test_extract_collects_what_killed_runs_left_in_subfolders(images, tmp_path):
    (tmp_path / "out" / "deep").mkdir(parents=True)
    (tmp_path / "out" / "deep" / ".coffee.0123abcd.lift_fast-tmp.npz").write_bytes(b"half")
    assert run("extract", images[0].parent, "--out", tmp_path / "out", *TINY, "--quiet") == 0
    assert os.listdir(tmp_path / "out" / "deep") == ["coffee.npz"]


def test_extract_says_in_one_line_that_a_result_has_no_name(images, tmp_path, capsys):
    # With .npz instead of its suffix, of which it has none.
    long = images[0].rename(tmp_path / ("x" * 255))
    assert run("extract", long, "--out", tmp_path / "out", *TINY, "--quiet") == 2
    error = capsys.readouterr().err
    assert "File name too long; rename the image" in error
    assert error.count("\n") == 1


def test_extract_never_lets_two_images_share_a_file(images, tmp_path):
    Image.open(images[0]).save(images[0].with_suffix(".png"))
    assert run("extract", *[images[0], images[0].with_suffix(".png")], "--out", tmp_path / "out", *TINY, "--quiet") == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"astronaut.npz", "astronaut.png.npz"}


def test_interrupted_extract_leaves_no_half_written_file(images, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    save = np.savez

    def interrupted(file, **arrays):
        if out.joinpath("astronaut.npz").exists():
            file.write(b"half")
            raise KeyboardInterrupt
        save(file, **arrays)

    monkeypatch.setattr(np, "savez", interrupted)
    assert run("extract", images[0].parent, "--out", out, *TINY, "--quiet") == 130
    assert "interrupted" in capsys.readouterr().err
    assert [p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()] == ["astronaut.npz"]
    monkeypatch.undo()
    assert run("extract", images[0].parent, "--out", out, *TINY, "--quiet") == 0
    assert len(list(out.rglob("*.npz"))) == 2


def test_info(capsys):
    assert run("info") == 0
    text = capsys.readouterr().out
    assert "torch" in text
    assert "cpu native" in text
    assert "LIFT_FAST_CPU_ISA" in text
    assert run("info", "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert set(data["backends"]) == {"pytorch", "cpu native", "openvino", "compile", "triton", "cuda native"}
    assert all(part["detail"] for part in data["backends"].values())


def test_bugs_keep_their_traceback(images, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr(lift_fast._files.os, "replace", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        run("match", *images, "--out", Path(tmp_path) / "m.png", *TINY)


def test_extract_takes_no_result_for_another_images(images, tmp_path, capsys):
    folder, out = tmp_path / "folder", tmp_path / "out"
    folder.mkdir()
    Image.open(images[1]).save(folder / "b.png")
    assert run("extract", folder, "--out", out, *TINY, "--quiet") == 0
    with np.load(out / "b.npz") as data:
        assert (str(data["source"]), int(data["source_bytes"])) == ("b.png", (folder / "b.png").stat().st_size)
    # Which comes first now, and would have taken b.npz for its own.
    Image.open(images[0]).save(folder / "b.jpg")
    before = (out / "b.npz").read_bytes()
    capsys.readouterr()
    assert run("extract", folder, "--out", out, *TINY, "--quiet") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "contains the descriptors of" in error
    assert "b.png" in error
    assert (out / "b.npz").read_bytes() == before
    assert run("extract", folder, "--out", out, *TINY, "--quiet", "--overwrite") == 0
    for name, source in (("b.npz", "b.jpg"), ("b.png.npz", "b.png")):
        with np.load(out / name) as data:
            assert str(data["source"]) == source
    assert run("extract", folder, "--out", out, *TINY, "--quiet") == 0
    Image.open(images[1]).save(folder / "b.jpg")
    assert run("extract", folder, "--out", out, *TINY, "--quiet") == 2
    assert "another" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "out"),
    [("match", "a.png"), ("match", "link.png"), ("match", "numbers.png"), ("show", "a.png"), ("show", "link.png")],
)
def test_images_are_no_outputs(command, out, images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.open(images[0]).save("a.png")
    os.link("a.png", "link.png")
    Image.open(images[1]).save("numbers.npz", format="PNG")
    before = [Path(name).read_bytes() for name in ("a.png", "numbers.npz")]
    assert run(command, "a.png", "numbers.npz", "--out", out, *TINY) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "is an input" in error
    assert [Path(name).read_bytes() for name in ("a.png", "numbers.npz")] == before


def test_extract_writes_over_no_image(images, tmp_path, capsys):
    Image.open(images[0]).save(tmp_path / "b.npz", format="PNG")
    assert run("extract", tmp_path / "b.npz", "--out", tmp_path, *TINY, "--overwrite") == 2
    assert "is an input" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["info"], ["match", "a.png", "b.png"]])
@pytest.mark.parametrize("name", ["LIFT_FAST_CPU_ISA", "LIFT_FAST_DISABLE_TRITON"])
def test_variables_that_mean_nothing_are_refused(command, name, monkeypatch, capsys):
    monkeypatch.setenv(name, "foo")
    assert run(*command) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"environment variable {name} must be one of" in error


def test_threads_are_bounded(tmp_path, capsys):
    for command in (["match", "a.png", "b.png"], ["train", "a", "--out", "b"], ["extract", "a", "--out", "b"]):
        with pytest.raises(SystemExit) as stop:
            run(*command, "--threads", "1000000000")
        assert stop.value.code == 2
        assert "expected at most" in capsys.readouterr().err
