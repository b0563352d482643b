"""Matching under known warps: the protocol against a plain implementation, its ground truth, and the command."""

from __future__ import annotations

import json
import math
from importlib.metadata import version

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from evaluation_data import textured, tiny_backbone
from PIL import Image
from torch import nn

from lift_fast import LiFT, ViTLiFTExtractor, load_lift, save_lift
from lift_fast.backbones import FrozenViT
from lift_fast.cli import main
from lift_fast.evaluation import warp
from lift_fast.evaluation.methods import Batch, build_methods
from lift_fast.testing import randomize

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = ["--model", "vit_tiny_patch16_224", "--random-weights", "--layer", "0"]


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "photographs"
    (root / "deep").mkdir(parents=True)
    for index, (name, size) in enumerate({"a.png": (150, 90), "deep/b.png": (80, 130), "c.png": (64, 64)}.items()):
        textured(size, index).save(root / name)
    return root


class Where(nn.Module):
    """An oracle that reads off a coloured gradient where in the scene each pixel lies: its red and green."""

    def forward(self, imgs, x):
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        place = (imgs * std + mean)[:, :2]
        angles = torch.cat([f(place * math.pi * k) for k in (0.5, 1.0, 2.0, 4.0) for f in (torch.sin, torch.cos)], 1)
        return F.normalize(angles, dim=1)


def returns_number():
    return 3


@pytest.mark.parametrize("seed", range(5))
def test_homography_takes_corners_within_the_documented_range(seed):
    matrix = warp.random_homography(np.random.default_rng(seed))
    corners = warp.project(matrix, np.array([[0.0, 0], [1, 0], [1, 1], [0, 1]]))
    assert np.isfinite(corners).all()
    # Half a diagonal, enlarged, plus corner jitter and shift.
    reach = (math.sqrt(0.5) + 0.08 * math.sqrt(2)) * 1.4 + 0.1 * math.sqrt(2)
    assert (np.linalg.norm(corners - 0.5, axis=1) <= reach).all()
    assert np.allclose(warp.project(np.linalg.inv(matrix), corners), [[0, 0], [1, 0], [1, 1], [0, 1]])


@pytest.mark.parametrize("size", [48, 160])
@pytest.mark.parametrize("shape", [(200, 140), (90, 130)])
def test_a_dot_is_where_the_ground_truth_says(size, shape):
    random = np.random.default_rng(3)
    matrix = warp.random_homography(random)
    for _ in range(5):
        place = random.uniform(0.35, 0.65, 2)
        base = min(shape)
        x, y = place * base + [(shape[0] - base) / 2, (shape[1] - base) / 2]
        ys, xs = np.mgrid[: shape[1], : shape[0]] + 0.5
        dot = 255 * np.exp(-((xs - x) ** 2 + (ys - y) ** 2) / (2 * 2.5**2))
        scene = Image.fromarray(np.rint(dot).astype(np.uint8)).convert("RGB")
        expected = warp.project(np.linalg.inv(matrix), place[None])[0] * size - 0.5
        view = np.asarray(warp.render(scene, matrix, size).convert("L"), dtype=np.float64)
        ys, xs = np.mgrid[:size, :size]
        centre = np.array([(view * xs).sum(), (view * ys).sum()]) / view.sum()
        # A tenth of a pixel of view and scene: 8 bits, and perspective moves the centre of mass of a dot this wide.
        assert np.linalg.norm(centre - expected) < 0.1 + 0.1 * size / base


def plain_pck(extractor, lift_iter, view, size, alphas):
    """The protocol's steps 4 and 5, word by word, for a square without remainder."""
    maps = []
    for image in view[:2]:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (extractor.mean, extractor.std))
        tokens = extractor.extract_descriptors_iterative_lift(((pixels - mean) / std).double(), lift_iter)
        side = math.isqrt(tokens.shape[1])
        coarse = F.normalize(tokens.transpose(1, 2).unflatten(2, (side, side)).double(), dim=1)
        maps.append(F.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=False)[0])
    distances = []
    for (x, y), truth in zip(view.points, view.truth, strict=True):
        similarity = torch.einsum("c,chw->hw", maps[0][:, y, x], maps[1]).flatten()
        # Beyond the outermost cells' centres all pixels are equal: the lowest of them counts.
        best = int((similarity > similarity.max() - 1e-12).nonzero()[0])
        distances.append(math.hypot(best % size - truth[0], best // size - truth[1]))
    return [sum(d < alpha * size for d in distances) / len(distances) for alpha in alphas], distances


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_those_of_the_plain_protocol(seed):
    size, protocol = 64, warp.WarpProtocol(points=17, alphas=(0.3, 0.1, 0.05))
    backbone = tiny_backbone(seed)
    lift = randomize(LiFT(24, 16), seed).eval().double()
    methods = build_methods(["backbone", "lift", "lift-2"], backbone, lift)
    views = [warp.make_view(textured((90, 70), 10 * seed + i), f"{i}", size, seed, protocol) for i in range(2)]
    normalise = warp.normaliser(backbone.mean, backbone.std, torch.device("cpu"), torch.float64)
    with torch.inference_mode():
        scores = warp.evaluate_batch(methods, views, size, normalise, protocol)
        extractor = ViTLiFTExtractor(
            model=backbone,
            channel=None,
            patch=None,
            stride=None,
            layer=None,
            device="cpu",
            silent=True,
            lift=lift,
            dtype=torch.float64,
        )
        for times, name in enumerate(("backbone", "lift", "lift-2")):
            for view, found in zip(views, scores[name], strict=True):
                pck, distances = plain_pck(extractor, times, view, size, protocol.alphas)
                assert found.pck == pytest.approx(pck, abs=1e-9)
                assert found.error == pytest.approx(np.mean(distances), abs=1e-6)
                assert found.median == pytest.approx(np.median(distances), abs=1e-6)


def test_an_oracle_finds_every_point_and_constants_are_at_chance(monkeypatch):
    size, protocol = 96, warp.WarpProtocol(points=60, photometric=False)
    ramp = np.linspace(0, 1, 200)
    scene = np.stack([np.tile(ramp, (200, 1)), np.tile(ramp[:, None], (1, 200)), np.zeros((200, 200))], -1)
    view = warp.make_view(Image.fromarray((255 * scene).astype(np.uint8)), "ramp", size, 5, protocol)
    methods = build_methods([f"oracle={__name__}:Where", "backbone"], tiny_backbone(dtype=torch.float32))
    normalise = warp.normaliser((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), torch.device("cpu"), torch.float32)
    scores = warp.evaluate_batch(methods, [view], size, normalise, protocol)
    assert scores["oracle"][0].pck[1] == 1
    assert scores["oracle"][0].error < 1.5
    assert scores["backbone"][0].pck[2] < 0.5


def test_views_depend_on_name_and_seed_alone():
    protocol = warp.WarpProtocol(points=9)
    image = textured((70, 90), 1)
    one, again = (warp.make_view(image, "x/y.png", 64, 2, protocol) for _ in range(2))
    assert np.array_equal(np.asarray(one.second), np.asarray(again.second))
    assert np.array_equal(one.points, again.points)
    larger = warp.make_view(image, "x/y.png", 128, 2, protocol)
    assert np.abs((larger.truth + 0.5) / 128 - (one.truth + 0.5) / 64).max() < 2 / 64
    for other in (warp.make_view(image, "z.png", 64, 2, protocol), warp.make_view(image, "x/y.png", 64, 3, protocol)):
        assert not np.array_equal(one.truth, other.truth)
    assert (one.truth >= 64 / 32 - 0.5).all()
    assert (one.truth <= 64 * 31 / 32 - 0.5).all()


def test_backbone_runs_once_for_all_methods(monkeypatch):
    backbone = tiny_backbone(dtype=torch.float32)
    calls = []
    forward = FrozenViT.forward
    monkeypatch.setattr(FrozenViT, "forward", lambda self, imgs: calls.append(imgs.shape) or forward(self, imgs))
    methods = build_methods(["backbone", "bilinear", "random-lift", "double-size", "stride-8"], backbone, seed=1)
    features = {method.name: method(batch) for batch in [Batch(torch.randn(2, 3, 64, 48))] for method in methods}
    assert len(calls) == 3
    shapes = {name: tuple(found.map.shape) for name, found in features.items()}
    assert shapes == {
        "backbone": (2, 24, 4, 3),
        "bilinear": (2, 24, 8, 6),
        "random-lift": (2, 13, 8, 6),
        "double-size": (2, 24, 8, 6),
        "stride-8": (2, 24, 7, 5),
    }
    assert features["stride-8"].covered == (4, 4, 56, 40)
    assert all(found.covered == (0, 0, 64, 48) for name, found in features.items() if name != "stride-8")


WRONG = {
    "unknown": (["nearest"], "unknown method 'nearest'"),
    "twice": (["backbone", "backbone"], "two methods are called 'backbone'"),
    "no lift": (["lift"], "lift needs a LiFT"),
    "stride": (["stride-99"], "stride must be an integer from 1 to the patch size 16"),
    "label": (["a b=x.pth"], "a label is letters"),
    "missing": (["x=gone.pth"], "gone.pth"),
    "module": (["x=no_such_module:f"], "no_such_module:f cannot be built"),
    "no module": ([f"x={__name__}:returns_number"], "returned a int; expected an nn.Module"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_methods_are_refused(case):
    names, message = WRONG[case]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        build_methods(names, tiny_backbone(dtype=torch.float32))


class Strange(nn.Module):
    def forward(self, imgs, x):
        return x[:, :-1]


def test_heads_must_be_interleaved_and_modules_must_return_maps():
    backbone = tiny_backbone(dtype=torch.float32)
    with pytest.raises(ValueError, match="head_order='interleaved'"):
        build_methods(["backbone"], FrozenViT(backbone.model))
    (method,) = build_methods([f"x={__name__}:Strange"], backbone)
    with pytest.raises(ValueError, match=r"Strange returned \[1, 5, 24\]; expected \[B, C, h, w\]"):
        method(Batch(torch.randn(1, 3, 32, 48)))


def run(*arguments):
    return main([str(argument) for argument in arguments])


def test_command(folder, tmp_path, capsys):
    save_lift(randomize(LiFT(192, 16, use_image=False), 0), tmp_path / "blind.pth")
    out, table = tmp_path / "r.json", tmp_path / "r.md"
    options = ["--sizes", "32", "64", "--points", "11", "--seeds", "2", "--out", out, "--quiet"]
    methods = ["--method", "backbone", "bilinear", "lift", f"blind={tmp_path / 'blind.pth'}"]
    assert run("eval", "warp", "--root", folder, *TINY, "--random-lift", *methods, *options, "--table", table) == 0
    captured = capsys.readouterr()
    content = json.loads(out.read_text())
    assert content["complete"]
    assert content["skipped"] == {}
    assert content["options"]["photographs"] == ["a.png", "c.png", "deep/b.png"]
    assert content["record"]["weights"]["blind"]["file"] == "blind.pth"
    assert len(content["record"]["weights"]["blind"]["sha256"]) == 64
    assert content["record"]["versions"]["torch"] == version("torch")
    # The table says what the scores say.
    first = json.loads(out.read_text())["scores"]
    pck = np.array(
        [[first[seed]["64"]["lift"][name][0] for name in content["options"]["photographs"]] for seed in "01"]
    )
    assert content["summary"]["sizes"]["64"]["lift"]["PCK@0.1"][0] == pytest.approx(100 * pck.mean())
    assert table.read_text() in captured.out
    assert "**64 pixels, 3 photographs, 2 warps each**" in captured.out
    assert "PCK@0.05 - bilinear" in captured.out

    # Going on recomputes nothing; other options are refused; LaTeX by the suffix.
    content["scores"]["1"]["64"]["lift"].pop("a.png")
    content["complete"] = False
    out.write_text(json.dumps(content))
    latex = tmp_path / "r.tex"
    assert run("eval", "warp", "--root", folder, *TINY, "--random-lift", *methods, *options, "--table", latex) == 0
    again = json.loads(out.read_text())
    assert again["scores"] == first
    assert again["complete"]
    assert r"\begin{tabular}{l" in latex.read_text()
    capsys.readouterr()
    assert run("eval", "warp", "--root", folder, *TINY, "--random-lift", *methods, *options, "--points", "12") == 2
    assert "made with other settings (points)" in capsys.readouterr().err


def test_command_takes_the_held_out_and_names_bad_files(folder, tmp_path, capsys):
    (folder / "b.png").write_bytes(b"no image")
    status = run(
        "eval", "warp", "--root", folder, "--held-out", "0.5", *TINY, "--method", "bilinear", "--sizes", "32",
        "--points", "5", "--json", "--quiet",
    )  # fmt: skip
    captured = capsys.readouterr()
    content = json.loads(captured.out)
    assert content["options"]["photographs"] == ["b.png", "deep/b.png"]
    assert list(content["skipped"]) == ["b.png"]
    assert content["summary"]["photographs"] == 1
    assert status == 1
    assert "skipped: b.png" in captured.err


class Same(nn.Module):
    """Descriptors that are all alike: every match is the first pixel."""

    def forward(self, imgs, x):
        return torch.ones_like(imgs)


def coloured(sheet, colour):
    return int((np.asarray(sheet) == colour).all(-1).sum())


def test_sheet_shows_right_and_wrong_matches():
    size, protocol = 96, warp.WarpProtocol(points=30, photometric=False)
    ramp = np.linspace(0, 1, 200)
    scene = np.stack([np.tile(ramp, (200, 1)), np.tile(ramp[:, None], (1, 200)), np.zeros((200, 200))], -1)
    view = warp.make_view(Image.fromarray((255 * scene).astype(np.uint8)), "ramp", size, 5, protocol)
    right, wrong = np.rint(view.truth).astype(np.int64), np.zeros_like(view.points)
    sheets = {}
    for name, found in {"right": right, "wrong": wrong}.items():
        sheets[name] = warp.draw_sheet([warp.Pair("ramp", view, {name: found})], 0.05, points=4)
    assert sheets["right"].size == sheets["wrong"].size
    assert coloured(sheets["right"], warp.RIGHT) > 500
    assert coloured(sheets["right"], warp.WRONG) == 0
    assert coloured(sheets["wrong"], warp.WRONG) > 500
    assert coloured(sheets["wrong"], warp.RIGHT) == 0
    # Methods stand beside each other, photographs below.
    pair = warp.Pair("ramp", view, {"right": right, "wrong": wrong})
    both = warp.draw_sheet([pair, pair], 0.05, points=4)
    assert both.width > 1.9 * sheets["right"].width
    assert both.height > 1.7 * sheets["right"].height
    assert coloured(both, warp.RIGHT) > 2 * 400
    assert coloured(both, warp.WRONG) > 2 * 400
    for pairs, points in (([], 4), ([pair], 0)):
        with pytest.raises(ValueError, match="at least one pair and one point"):
            warp.draw_sheet(pairs, 0.05, points)


def test_sheet_matches_are_those_that_are_scored(folder):
    size, protocol = 64, warp.WarpProtocol(points=21)
    backbone = tiny_backbone(dtype=torch.float32)
    methods = build_methods(["backbone", f"same={__name__}:Same"], backbone)
    normalise = warp.normaliser(backbone.mean, backbone.std, torch.device("cpu"), torch.float32)
    (folder / "b.png").write_bytes(b"no image")
    paths = sorted(folder.rglob("*.png"))
    pairs = list(warp.match_pairs(methods, paths, folder, size, normalise, protocol, seed=3))
    assert [pair.name for pair in pairs] == ["a.png", "c.png", "deep/b.png"]
    for pair in pairs:
        assert (pair.matches["same"] == 0).all()
        with torch.inference_mode():
            scores = warp.evaluate_batch(methods, [pair.view], size, normalise, protocol)
        distance = np.linalg.norm(pair.matches["backbone"] - pair.view.truth, axis=1)
        assert scores["backbone"][0].error == pytest.approx(distance.mean())


@pytest.mark.parametrize(("total", "count", "chosen"), [(9, 3, [1, 4, 7]), (2, 4, [0, 1]), (5, 5, [0, 1, 2, 3, 4])])
def test_sheet_spreads_its_photographs(total, count, chosen):
    assert warp.choose(list(range(total)), count) == chosen


def test_command_draws_a_sheet(folder, tmp_path, capsys):
    (folder / "b.png").write_bytes(b"no image")
    sheet, table = tmp_path / "sheet.png", tmp_path / "r.md"
    options = ["--sizes", "32", "64", "--points", "9", "--quiet", "--table", table, "--sheet", sheet]
    assert run("eval", "warp", "--root", folder, *TINY, "--method", "backbone", *options, "--sheet-count", "2") == 1
    with Image.open(sheet) as image:
        assert image.format == "PNG"
        assert image.height > 2 * 320
    drawn = sheet.read_bytes()
    assert run("eval", "warp", "--root", folder, *TINY, "--method", "backbone", *options, "--sheet-count", "1") == 1
    assert sheet.read_bytes() != drawn
    # Nothing to draw is said, and no reason to lose the figures.
    for path in folder.rglob("*.png"):
        path.write_bytes(b"no image")
    sheet.unlink()
    capsys.readouterr()
    assert run("eval", "warp", "--root", folder, *TINY, "--method", "backbone", *options) == 1
    assert "there is no photograph to draw" in capsys.readouterr().err
    assert not sheet.exists()


USAGE = {
    "sheet": (["--root", "{}", "--sheet", "sheet.jpg"], "--sheet must end in .png, got sheet.jpg"),
    "sheet's folder": (["--root", "{}", "--sheet", "nowhere/x.png"], "the folder nowhere does not exist"),
    "root": (["--root", "nowhere"], "nowhere"),
    "out": (["--root", "{}", "--out", "nowhere/x.json"], "the folder nowhere does not exist"),
    "method": (["--root", "{}", "--method", "bicubic"], "unknown method 'bicubic'"),
    "size": (["--root", "{}", "--method", "backbone", "--sizes", "8"], "sizes of at least a patch"),
    "reference": (
        ["--root", "{}", "--method", "backbone", "--reference", "lift"],
        "the reference 'lift' is not one of",
    ),
    "held out": (["--root", "{}", "--held-out", "2"], "held_out must be a fraction"),
    "device": (["--root", "{}", "--random-lift", "--device", "gpu7"], "gpu7"),
}


@pytest.mark.parametrize("case", USAGE)
def test_usage_errors(case, folder, capsys):
    arguments, message = USAGE[case]
    assert run("eval", "warp", *(a.format(folder) for a in arguments), *TINY, "--quiet") == 2
    assert message in capsys.readouterr().err


def test_no_image_checkpoint_is_read_as_such(tmp_path):
    save_lift(LiFT(24, 16, use_image=False), tmp_path / "x.pth")
    (method,) = build_methods([f"x={tmp_path / 'x.pth'}"], tiny_backbone(dtype=torch.float32))
    assert not load_lift(tmp_path / "x.pth", patch_size=16).use_image
    assert method(Batch(torch.randn(1, 3, 32, 32))).map.shape == (1, 13, 4, 4)


def test_summary_pairs_photographs_and_leaves_out_skipped_ones():
    scores = {
        "0": {
            "32": {
                "a": {"x": [0.2, 5.0, 4.0], "y": [0.4, 3.0, 2.0], "z": [1.0, 0.0, 0.0]},
                "b": {"x": [0.3, 4.0, 4.0], "y": [0.5, 2.0, 2.0], "z": [0.0, 9.0, 9.0]},
            }
        }
    }
    options = {"alphas": [0.1], "seeds": 1, "sizes": [32], "methods": ["a", "b"], "photographs": ["x", "y", "z"]}
    content = {"options": {**options, "reference": "a"}, "scores": scores, "skipped": {"z": "broken"}}
    summary = warp.summarise(content)
    assert summary["photographs"] == 2
    entry = summary["sizes"]["32"]["b"]
    assert entry["PCK@0.1"][0] == pytest.approx(40)
    # The same difference on every photograph: an interval of no width.
    assert entry["difference"]["PCK@0.1"] == pytest.approx([10, 10, 10])
    assert entry["error"] == pytest.approx([3.0, 2.0, 4.0])
