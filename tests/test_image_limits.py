"""What no image may ask for: pixels and cells without end, files that are no files, arguments of any kind."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import lift_fast
from lift_fast import demonstration, images, show
from lift_fast._files import require_regular_file
from lift_fast._text import one_line, quoted
from lift_fast.backbones import load_backbone
from lift_fast.cli import main
from lift_fast.training.data import GlobalBatches, TrainingImages, build_loader, fit_square

NETWORK = ["--model", "vit_tiny_patch16_224", "--random-weights", "--quiet"]
pytestmark = pytest.mark.usefixtures("one_thread")


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def photograph(width: int = 90, height: int = 70) -> Image.Image:
    rows, columns = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([rows * 3, columns * 2, rows + columns], -1).astype(np.uint8))


@pytest.fixture(scope="module")
def extractor() -> lift_fast.ViTLiFTExtractor:
    return lift_fast.ViTLiFTExtractor(demonstration.BACKBONE, demonstration.LIFT, device="cpu", silent=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Sound images among those that ask for too much, or are none."""
    photograph().save(tmp_path / "a.png")
    photograph().rotate(90, expand=True).save(tmp_path / "z.png")
    Image.new("RGB", (1, 100_000)).save(tmp_path / "strip.png")
    os.mkfifo(tmp_path / "pipe.png")
    return tmp_path


# Sizes


def test_the_largest_images_in_use_are_within_the_default_limit():
    for size in ((4096, 4096), (8192, 4096), (20_000, 1000)):
        images.check_size(size)
    for patch in (8, 14, 16):
        images.check_cells(4096 // patch, 4096 // patch, "x")
    # A stride of one pixel, and LiFT to the density of pixels, on 448 pixels.
    images.check_cells(448, 448, "x")


def test_a_strip_is_refused_before_it_is_resized(extractor):
    strip = Image.new("RGB", (1, 100_000))
    with pytest.raises(ValueError, match=r"would be loaded at 64 x 6400000, more than the 33554432.*--max-pixels"):
        extractor.preprocess(strip, 64)
    message = "1 x 100000 pixels is too long: with its longer side at 1792 pixels .*would have 0, and 16 are needed"
    with pytest.raises(ValueError, match=f"b: .*{message}"):
        lift_fast.match_images(photograph(), strip, extractor=extractor, size=64)
    methods: list = []
    with pytest.raises(ValueError, match=f"name: .*{message}"):
        show.load("name", strip, 64, extractor.backbone, methods)
    # At a size of its own choice it is an image like others.
    assert extractor.preprocess(strip, (64, 64))[0].shape == (1, 3, 64, 64)


def test_the_limit_is_one_number_and_can_be_set():
    with images.pixel_limit(100 * 100):
        assert images.max_pixels() == 10_000
        assert images.resize(photograph(), (100, 100)).size == (100, 100)
        with pytest.raises(ValueError, match="101 x 100, more than the 10000"):
            images.resize(photograph(), (100, 101))
        images.check_cells(12, 13, "x")
        with pytest.raises(ValueError, match="13 x 13, more than the 156"):
            images.check_cells(13, 13, "x")
    assert images.max_pixels() == 1 << 25
    for bad in (0, -1, 2.5, True, "9"):
        with pytest.raises(ValueError, match="max_pixels must be"):
            images.set_max_pixels(bad)


def test_a_file_may_hold_four_times_as_many(tmp_path):
    photograph(100, 80).save(tmp_path / "a.png")
    with images.pixel_limit(2000):
        assert images.read_image(tmp_path / "a.png").size == (100, 80)
    with (
        images.pixel_limit(1999),
        pytest.raises(
            ValueError,
            match=r"a\.png is too large: 100 x 80 pixels, but a file may hold 7996 \(four times --max-pixels 1999\)",
        ),
    ):
        images.read_image(tmp_path / "a.png")


def test_pillows_limit_is_raised_with_ours_and_put_back(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    photograph(100, 80).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png is too large: .*2000 pixels.*set_max_pixels"):
        images.read_image(tmp_path / "a.png")
    with images.pixel_limit(2000):
        assert images.read_image(tmp_path / "a.png").size == (100, 80)
    assert Image.MAX_IMAGE_PIXELS == 1000


def test_tokens_are_bounded_before_the_backbone_runs(extractor):
    backbone = load_backbone(demonstration.BACKBONE, stride=1)
    with pytest.raises(ValueError, match="at stride 1 make a grid of 985 x 985, more than the 524288"):
        backbone(torch.zeros(1, 3, 1000, 1000))
    with pytest.raises(ValueError, match="32 x 15 pixels are smaller than one patch"):
        backbone(torch.zeros(1, 3, 15, 32))
    for method in (extractor.extract_descriptors_iterative_lift, extractor.matching_map):
        for many in (10, 64, 2**63):
            with pytest.raises(ValueError, match=f"lift_iter={many} on 64 x 64 pixels"):
                method(torch.zeros(1, 3, 64, 64), lift_iter=many)
    assert extractor.check_size(64, 64, 2) == (16, 16)


def test_long_sides_are_bounded_in_proportion():
    bounded = images.bounded_size
    # Ordinary shapes and panoramas of 4 : 1 keep what they had; so does any size that is given exactly, or not at all.
    for size in ((640, 480), (480, 640), (4000, 1000), (1, 1), (448, 448)):
        for load_size in (448, 518, 1024):
            assert bounded(size, load_size) == images.resized_size(size, load_size)
    for load_size in (None, (448, 4480), (10_000, 3)):
        assert bounded((20_000, 30), load_size) == images.resized_size((20_000, 30), load_size)
    assert bounded((4000, 500), 448) == (1792, 224)
    assert bounded((500, 4000), 448) == (224, 1792)
    assert bounded((2000, 20), 448) == (1792, 17)
    assert bounded((4000, 500), 1024) == (4096, 512)
    assert bounded((4000, 500), 224) == (1792, 224)
    assert bounded((4000, 500), 100) == (800, 100)
    assert bounded((4000, 500), 448, 1000) == (1000, 125)
    assert bounded((4000, 500), 448, 3584) == (3584, 448)
    assert bounded((4000, 500), None, 1000) == (1000, 125)
    assert bounded((400, 300), None, 1000) == (400, 300)
    assert bounded((4000, 500), (300, 400), 400) == (400, 300)
    rng = np.random.default_rng()
    for width, height, length, bound, patch in rng.integers(1, 3000, (500, 5)).tolist():
        long, short = max(width, height), min(width, height)
        free = images.resized_size((width, height), length)
        if max(free) > bound and bound * short // long < patch:
            with pytest.raises(ValueError, match="is too long"):
                bounded((width, height), length, bound, patch)
            continue
        found = bounded((width, height), length, bound, patch)
        assert max(found) == min(bound, max(free))
        assert found == free or abs(found[0] * height - found[1] * width) < long
    with pytest.raises(ValueError, match="300x4000 is more than max_side, 1000 pixels"):
        bounded((40, 30), (300, 4000), 1000)
    for bad in (0, -1, 2.5, "x", True):
        with pytest.raises(ValueError, match="max_side must be pixels"):
            bounded((40, 30), 32, bad)


def test_a_long_image_is_matched_in_bounded_time(extractor):
    strip, made = Image.new("RGB", (2000, 20)), extractor
    found = lift_fast.match_images(strip, photograph(), extractor=made, size=448, points=[[1999, 19]])
    assert found.picture_a.size == (1792, 16)
    found = lift_fast.match_images(strip, photograph(), extractor=made, size=32, points=[[5, 5]], max_side=1600)
    assert found.picture_a.size == (1600, 16)
    for bad, message in (
        (0, "max_side must be an integer >= 1, got 0"),
        (1599, "2000 x 20 pixels is too long.*1599 pixels .*15"),
    ):
        with pytest.raises(ValueError, match=message):
            lift_fast.match_images(strip, strip, extractor=made, max_side=bad)
    loaded = show.load("name", strip, 64, extractor.backbone, [])
    assert loaded.size == (16, 1792)
    assert show.load("name", photograph(), 64, extractor.backbone, [], 32).size[1] == 32


def test_match_refuses_in_one_line(folder, capsys):
    assert run("match", folder / "a.png", folder / "strip.png", "--out", folder / "m.png", "--size", 64, *NETWORK) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"{folder / 'strip.png'}: an image of 1 x 100000 pixels is too long: with its longer side at 1792" in said
    options = ["--size", 64, *NETWORK, "--max-pixels", 10**9, "--max-side", 80]
    assert run("match", folder / "a.png", folder / "z.png", "--out", folder / "m.png", *options) == 0
    with np.load(folder / "m.npz") as data:
        assert [data["loaded_size_a"].max(), data["loaded_size_b"].max()] == [80, 80]
    assert images.max_pixels() == 1 << 25


def test_extract_names_what_it_skips_and_goes_on(folder, capsys):
    out = folder / "out"
    Image.new("RGB", (2000, 20)).save(folder / "low.png")
    assert run("extract", folder, "--out", out, "--size", 64, *NETWORK[:-1], "--json") == 1
    captured = capsys.readouterr()
    figures = json.loads(captured.out)
    assert figures["written"] == 3
    strip, pipe = sorted(figures["failed"], reverse=True)
    assert "strip.png: an image of 1 x 100000 pixels" in strip
    assert pipe.endswith("pipe.png is a named pipe; expected an image")
    assert sorted(path.name for path in out.iterdir()) == ["a.npz", "low.npz", "z.npz"]
    # In its own size it is lower than a patch.
    assert run("extract", folder, "--out", out, "--size", "15x64", *NETWORK[:-1], "--overwrite") == 1
    said = capsys.readouterr().err
    assert said.count("smaller than one patch") == 4
    assert "wrote 0 files" in said
    assert "5 of 5 images were skipped" in said


def test_training_takes_others_and_counts(folder, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"strip\.png: an image of 1 x 100000 pixels"):
        fit_square(folder / "strip.png", 512, "crop")
    with pytest.raises(ValueError, match="would be loaded at 100000 x 100000"):
        fit_square(folder / "a.png", 100_000, "squash")
    train = ["train", folder, "--out", tmp_path / "run", "--size", 64, "--batch-size", 4, "--epochs", 1, "--workers", 1]
    assert run(*train, "--fit", "crop", *NETWORK[:-1], "--layer", 1, "--device", "cpu", "--precision", "float32") == 0
    said = capsys.readouterr().err
    assert "strip.png: an image of 1 x 100000 pixels would be loaded at 64 x 6400000, more than the 33554432" in said
    assert "pipe.png is a named pipe" in said
    assert "2 unreadable images were replaced by others" in said
    too_large = ["train", folder, "--out", tmp_path / "no", "--size", 1 << 20, *NETWORK]
    assert run(*too_large, "--batch-size", 2) == 2
    assert "would be loaded at 1048576 x 1048576" in capsys.readouterr().err


def test_reading_processes_keep_the_limit(folder):
    files = TrainingImages([folder / "a.png"], 64, "crop", 0.0, 0)
    with images.pixel_limit(64 * 64):
        sample = next(iter(build_loader(files, GlobalBatches(1, 1, 0), 1, pin=False)))
    assert sample.failed
    assert "more than the 4096" in sample.unreadable[0]


# Files


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "folder"])
def test_what_is_no_regular_file_is_refused_unopened(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = Path("a.png")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    begun = time.perf_counter()
    with socket.socket(socket.AF_UNIX) as server:
        if kind == "socket":
            server.bind("a.png")
        with pytest.raises(ValueError, match=rf"a\.png is a (named )?{kind}; expected an image"):
            images.read_image(path)
        with pytest.raises(ValueError, match=rf"a\.png is a (named )?{kind}; expected a weight file"):
            require_regular_file(path, "weight file")
        with pytest.raises(ValueError, match=rf"a\.png is a (named )?{kind}; expected a checkpoint file"):
            lift_fast.load_lift(path, patch_size=16)
        if kind != "folder":
            with pytest.raises(ValueError, match=rf"a\.png is a (named )?{kind}"):
                images.list_images(path)
            assert images.list_images(".") == [path]
        photograph().save("b.png")
        for command in (["match", path, "b.png"], ["match", "b.png", path], ["show", path], ["show", "b.png", path]):
            assert run(*command, *NETWORK) == 2
            said = capsys.readouterr().err
            assert f"a.png is a {'named ' if kind == 'pipe' else ''}{kind}; expected an image" in said
            assert said.count("\n") == 1
    assert time.perf_counter() - begun < 20


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "loop.png", "file.png/a.png"])
def test_names_of_no_file(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("loop.png").symlink_to("loop.png")
    Path("file.png").touch()
    with pytest.raises((ValueError, FileNotFoundError)) as refused:
        images.read_image(name)
    assert "image" in str(refused.value)
    assert str(refused.value).isprintable()
    with pytest.raises((ValueError, FileNotFoundError), match="no checkpoint file") as refused:
        lift_fast.load_lift(name, patch_size=16)
    assert ("File name too long" in str(refused.value)) == name.startswith("x")


def test_no_file_at_all(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint file"):
        lift_fast.load_lift(tmp_path / "lift.pth", patch_size=16)


STRANGE = ["a\nb.png", "\x1b[31mred\x1b[0m.png", "\u202egnp.exe.png", os.fsdecode(b"latin\xe9.png"), "tab\t.png"]


@pytest.mark.parametrize("name", STRANGE)
def test_strange_names_are_quoted_wherever_they_are_said(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photograph().save("good.png")
    try:
        os.rename("good.png", name)
    except (OSError, UnicodeError):
        pytest.skip("this file system takes no such name")
    (tmp_path / f"bad {name}").write_text("no image")
    assert quoted(name) == repr(name)
    out = name.removesuffix(".png") + "m.png"
    assert run("match", name, name, "--out", out, "--size", 32, *NETWORK[:-1]) == 0
    assert run("show", name, "--out", "s.png", "--html", "s.html", "--size", 32, "--method", "backbone", *NETWORK) == 0
    assert run("match", f"bad {name}", name, "--out", out, *NETWORK) == 2
    assert run("extract", ".", "--out", f"{name} features", "--size", 32, *NETWORK[:-1], "--json") == 1
    captured = capsys.readouterr()
    assert all(line.isprintable() for line in captured.err.split("\n"))
    assert repr(out)[1:-1] in captured.err
    assert json.loads(captured.out)["out"] == f"{name} features"
    assert name not in Path("s.html").read_text(encoding="utf-8")


def test_names_and_messages():
    assert quoted("plain name é.png") == "plain name é.png"
    assert quoted(Path("a\nb")) == r"'a\nb'"
    assert one_line("two\nlines \x1b[0m and 'quotes' \udcff") == r"two\nlines \x1b[0m and 'quotes' \udcff"


# Arguments

PICTURES = {
    "empty": (lambda: Image.new("RGB", (0, 0)), ValueError, "is empty, 0 x 0 pixels"),
    "no width": (lambda: Image.new("L", (0, 5)), ValueError, "is empty, 0 x 5 pixels"),
    "number": (lambda: 5, TypeError, "got int"),
    "None": (lambda: None, TypeError, "got NoneType"),
    "bytes of a name": (lambda: b"a.png", ValueError, "cannot be read as an image: its format is not known"),
    "NaN": (lambda: Image.fromarray(np.full((20, 20), np.nan, np.float32)), ValueError, "must lie in 0 to 1"),
}
ARRAYS = {
    "sparse": (lambda: torch.rand(20, 20).to_sparse(), ValueError, "dense tensor .* got a torch.sparse_coo tensor"),
    "meta": (lambda: torch.rand(20, 20, device="meta"), ValueError, "dense tensor .* got a meta tensor"),
    "complex": (lambda: torch.rand(20, 20, dtype=torch.complex64), ValueError, "must be uint8 or floating point"),
    "nested": (lambda: torch.nested.nested_tensor([torch.rand(2)]), ValueError, "dense tensor"),
    "no pixels": (lambda: np.zeros((0, 20, 3), np.uint8), ValueError, r"must be \[H, W, 3\]"),
    "objects": (lambda: np.full((20, 20), None), ValueError, "must be uint8 or floating point"),
    "strings": (lambda: np.full((20, 20), "a"), ValueError, "must be uint8 or floating point"),
}


@pytest.mark.parametrize("case", [*PICTURES, *ARRAYS])
def test_exotic_images(case, extractor):
    make, kind, message = {**PICTURES, **ARRAYS}[case]
    with pytest.raises(kind, match=message):
        lift_fast.match_images(make(), photograph(), extractor=extractor, size=32)
    with pytest.raises(kind, match=message):
        lift_fast.match_images(photograph(), make(), extractor=extractor, size=32)
    if case in PICTURES:
        with pytest.raises(kind, match=message):
            extractor.preprocess(make(), 32)
    else:
        with pytest.raises(TypeError, match="path must be"):
            extractor.preprocess(make(), 32)


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "La", "P", "PA", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "I;16", "I"]
)
def test_modes_without_a_file(mode, extractor):
    rgb = photograph()
    if mode == "I;16":
        grey = Image.fromarray(np.asarray(rgb.convert("L")).astype(np.uint16) * 257)
        expected = rgb.convert("L").convert("RGB")
    elif mode == "I":
        grey = Image.fromarray(np.asarray(rgb.convert("L")).astype(np.int32) * 257)
        expected = rgb.convert("L").convert("RGB")
    else:
        through = {"La": "LA", "RGBa": "RGBA", "PA": "P"}.get(mode)
        grey = rgb.convert(through).convert(mode) if through else rgb.convert(mode)
        expected = (grey.convert(through) if mode in ("La", "RGBa") else grey).convert("RGB")
    assert np.array_equal(np.asarray(extractor.preprocess(grey)[1]), np.asarray(expected))
    matches = lift_fast.match_images(grey, rgb, extractor=extractor, size=32, step=4)
    assert bool(torch.isfinite(matches.confidence).all())


def test_views_with_the_negative_bit():
    values = torch.complex(torch.rand(20, 20), -torch.rand(20, 20))
    assert np.array_equal(np.asarray(images.as_image(values.conj().imag)), np.asarray(images.as_image(-values.imag)))


OPTIONS = {
    "size bool": ({"size": True}, ValueError, "load_size must be"),
    "size large": ({"size": 2**62}, ValueError, "a: an image of 90 x 70 pixels would be loaded at"),
    "size huge": ({"size": (2**70, 5)}, ValueError, "would be loaded at"),
    "size text": ({"size": "448"}, ValueError, "load_size must be"),
    "lift_iter": ({"lift_iter": 2**63}, ValueError, "lift_iter=9223372036854775808"),
    "lift_iter bool": ({"lift_iter": True}, ValueError, "lift_iter must be an integer"),
    "step float": ({"step": 1.5}, ValueError, "step must be an integer"),
    "mutual": ({"mutual": "no"}, TypeError, "mutual must be True or False"),
    "timing": ({"timing": 1}, TypeError, "timing must be True or False"),
    "normalize": ({"normalize": "Grid"}, ValueError, "normalize must be"),
    "normalize None": ({"normalize": None}, ValueError, "normalize must be"),
    "extractor": ({"extractor": "dino_vits8"}, TypeError, "extractor must be"),
    "points complex": ({"points": torch.zeros(1, 2, dtype=torch.complex64)}, ValueError, "points must be"),
    "points bool": ({"points": [[True, False]]}, ValueError, "points must be"),
    "points sparse": ({"points": torch.zeros(1, 2).to_sparse()}, ValueError, "points must be"),
    "points meta": ({"points": torch.zeros(1, 2, device="meta")}, ValueError, "points must be"),
    "points text": ({"points": "all"}, ValueError, "points must be"),
    "points ragged": ({"points": [[1, 2], [3]]}, ValueError, "points must be"),
    "points huge": ({"points": [[2**70, 1]]}, ValueError, "points must"),
    "points NaN": ({"points": [[float("nan"), 1]]}, ValueError, "points must lie inside A"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_exotic_options_of_match_images(case, extractor):
    options, kind, message = OPTIONS[case]
    with pytest.raises(kind, match=message):
        lift_fast.match_images(photograph(), photograph(), **{"extractor": extractor, "size": 64, **options})


def test_a_step_beyond_the_image_is_its_middle(extractor):
    found = lift_fast.match_images(photograph(), photograph(), extractor=extractor, size=64, step=2**63)
    assert found.xy_a.shape == (1, 1, 2)


def test_numpys_integers_are_whole_numbers():
    plain = lift_fast.ViTLiFTExtractor(demonstration.BACKBONE, device="cpu", silent=True, random_lift=True, seed=1)
    options = {"stride": 16, "layer": -1, "seed": 1}
    numbers = {name: np.int64(value) for name, value in options.items()}
    same = lift_fast.ViTLiFTExtractor(demonstration.BACKBONE, device="cpu", silent=True, random_lift=True, **numbers)
    assert (type(same.stride), same.stride, type(same.layer), same.layer) == (int, plain.stride, int, plain.layer)
    matches = [
        lift_fast.match_images(photograph(), photograph(), extractor=each, size=one(64), step=one(8), lift_iter=one(1))
        for each, one in ((plain, int), (same, np.int32))
    ]
    assert torch.equal(matches[0].xy_b, matches[1].xy_b)
    batch, _ = same.preprocess(photograph(), np.int64(64))
    for each in (same.matching_map, same.extract_descriptors_iterative_lift):
        assert torch.equal(each(batch, lift_iter=np.int64(2)), each(batch, lift_iter=2))
    with pytest.raises(ValueError, match=r"lift_iter must be an integer >= 0, got array"):
        same.matching_map(batch, lift_iter=np.array([1, 2]))


BUILD = {
    "device": ({"device": "a"}, ValueError, "device must be cpu, cuda"),
    "device number": ({"device": 2.5}, ValueError, "device must be cpu, cuda"),
    "dtype": ({"dtype": "single"}, ValueError, "dtype must be torch.float32"),
    "dtype integer": ({"dtype": torch.int8}, ValueError, "dtype must be torch.float32"),
    "float8": ({"dtype": torch.float8_e4m3fn}, ValueError, "dtype must be torch.float32"),
    "seed": ({"seed": 2**70, "random_lift": True}, ValueError, "seed must be an integer of at most 64 bits"),
    "facet": ({"facet": "keys"}, ValueError, "facet must be one of 'key'"),
    "layer": ({"layer": 6}, ValueError, "layer must be an integer from -6 to 5"),
    "layer huge": ({"layer": 2**70}, ValueError, "layer must be an integer from -6 to 5"),
    "stride": ({"stride": 0}, ValueError, "stride must be an integer from 1"),
    "patch": ({"patch": 2**62}, ValueError, "patch=4611686018427387904 does not fit"),
}


@pytest.mark.parametrize("case", BUILD)
def test_exotic_options_of_the_extractor(case):
    options, kind, message = BUILD[case]
    with pytest.raises(kind, match=message):
        lift_fast.ViTLiFTExtractor(demonstration.BACKBONE, **{"device": "cpu", "silent": True, **options})


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ((0.5, 0.5, float("nan")), (0.5,) * 3),
        ((0.5,) * 3, (0.5, 0.5, float("inf"))),
        ((0.5,) * 3, (0.5, 0.0, 0.5)),
        ((0.5,) * 3, (0.5, -0.1, 0.5)),
        (None, (0.5,) * 3),
        (0.5, (0.5,) * 3),
        ("abc", (0.5,) * 3),
        ((0.5, 0.5, 10**400), (0.5,) * 3),
    ],
)
def test_exotic_mean_and_std(mean, std):
    with pytest.raises(ValueError, match="std"):
        images.to_tensor(photograph(), mean, std)
    with pytest.raises(TypeError, match=r"image must be a PIL\.Image"):
        images.to_tensor(np.zeros((2, 2, 3)), (0.5,) * 3, (0.5,) * 3)


def test_an_image_that_comes_is_not_the_one_that_goes(extractor):
    came = photograph(64, 64)
    for went in (images.as_image(came), extractor.preprocess(came)[1], extractor.preprocess(came, 64)[1]):
        assert went is not came
        went.putpixel((0, 0), (1, 2, 3))
        assert came.getpixel((0, 0)) == (0, 0, 0)
