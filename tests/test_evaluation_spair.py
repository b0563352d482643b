"""SPair-71k: the protocol against a plain implementation, the reader on good and bad data, and the command."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from evaluation_data import SHAPES, make_spair, published_lift, tiny_backbone
from PIL import Image
from torch import nn

from lift_fast import LiFT
from lift_fast.backbones import FrozenViT
from lift_fast.cli import main
from lift_fast.evaluation import cost, spair
from lift_fast.evaluation.methods import Features, build_methods
from lift_fast.evaluation.runs import read_run
from lift_fast.testing import randomize

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = ["--model", "vit_tiny_patch16_224", "--random-weights", "--layer", "0", "--method", "backbone", "bilinear"]
ALPHAS = (0.3, 0.1, 0.05)


@pytest.fixture
def root(tmp_path):
    return make_spair(tmp_path / "SPair-71k")


# The protocol of the LiFT paper and of the data set's authors, line by line, without anything of the package but the
# features: whole similarity maps, Python loops, files read anew.


def plain_square(path, size):
    image = Image.open(path).convert("RGB")
    width, height = image.size
    canvas = np.zeros((size, size, 3), dtype=np.uint8)
    if height <= width:
        new = int(np.around(size * height / width))
        offset = int((size - new) / 2)
        canvas[offset : offset + new] = np.asarray(image.resize((size, new), Image.Resampling.LANCZOS))
        return canvas, size / width, 0, offset
    new = int(np.around(size * width / height))
    offset = int((size - new) / 2)
    canvas[:, offset : offset + new] = np.asarray(image.resize((new, size), Image.Resampling.LANCZOS))
    return canvas, size / height, offset, 0


def plain_spair(root, describe, size, alphas):
    """Means and figures by category, from 0 to 1; ``describe``: ``[1, 3, S, S]`` -> map."""
    by_category, every_image = {}, {alpha: [] for alpha in alphas}
    for folder in sorted((root / "JPEGImages").iterdir()):
        points, images = {alpha: [] for alpha in alphas}, {alpha: [] for alpha in alphas}
        for path in sorted((root / "PairAnnotation" / "test").glob(f"*:{folder.name}.json")):
            data = json.loads(path.read_text())
            maps, placed = [], []
            for side in ("src", "trg"):
                canvas, scale, left, top = plain_square(folder / data[f"{side}_imname"], size)
                pixels = torch.from_numpy(canvas).permute(2, 0, 1)[None].float() / 255
                mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
                coarse = F.normalize(describe(((pixels - mean) / std).double()), dim=1)
                maps.append(F.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=False)[0])
                placed.append([(x * scale + left, y * scale + top) for x, y in data[f"{side}_kps"]])
            left, top, right, bottom = data["trg_bndbox"]
            limit = max(right - left, bottom - top) * scale
            right_below, right_at_most = {a: [] for a in alphas}, {a: [] for a in alphas}
            for (x, y), (u, v) in zip(*placed, strict=True):
                column, row = (min(max(math.floor(c), 0), size - 1) for c in (x, y))
                similarity = torch.einsum("c,chw->hw", maps[0][:, row, column], maps[1]).flatten()
                # Beyond the outermost cells' centres all pixels are equal: the lowest of them counts.
                best = int((similarity > similarity.max() - 1e-12).nonzero()[0])
                distance = math.sqrt((best % size - u) ** 2 + (best // size - v) ** 2)
                for alpha in alphas:
                    right_below[alpha].append(distance < alpha * limit)
                    right_at_most[alpha].append(distance <= alpha * limit)
            for alpha in alphas:
                points[alpha] += right_below[alpha]
                images[alpha].append(sum(right_at_most[alpha]) / len(right_at_most[alpha]))
        by_category[folder.name] = {f"PCK@{alpha:g}": sum(points[alpha]) / len(points[alpha]) for alpha in alphas} | {
            f"PCK@{alpha:g} per image": sum(images[alpha]) / len(images[alpha]) for alpha in alphas
        }
        for alpha in alphas:
            every_image[alpha] += images[alpha]
    means = {}
    for alpha in alphas:
        name = f"PCK@{alpha:g}"
        means[name] = sum(figures[name] for figures in by_category.values()) / len(by_category)
        means[f"{name} per image"] = sum(every_image[alpha]) / len(every_image[alpha])
    return means, by_category


def run_all(methods, backbone, root, sizes, **options):
    dataset = spair.SPair(root)
    protocol = spair.Protocol(ALPHAS)
    return spair.evaluate(methods, backbone, dataset, dataset.select(), sizes=sizes, protocol=protocol, **options)


@pytest.mark.parametrize("seed", range(3))
def test_figures_are_those_of_the_plain_protocol(seed, tmp_path):
    root = make_spair(tmp_path, seed)
    backbone = tiny_backbone(seed)
    lift = randomize(LiFT(24, 16), seed).eval().double()

    def describe(imgs, times):
        tokens = backbone(imgs).transpose(1, 2).unflatten(2, backbone.grid(*imgs.shape[2:]))
        return published_lift(lift, imgs, tokens) if times else tokens

    methods = build_methods(["backbone", "lift"], backbone, lift)
    # A patch does not divide 56: maps are stretched over the square all the same, and LiFT's image branch alone begins
    # at pixel (2, 2).
    content = run_all(methods, backbone, root, [56, 64], batch_size=3)
    assert content["complete"]
    assert not content["skipped"]
    assert not content["remarks"]
    for size in (56, 64):
        for times, method in enumerate(("backbone", "lift")):
            with torch.inference_mode():
                means, by_category = plain_spair(root, lambda imgs, n=times: describe(imgs, n), size, ALPHAS)
            entry = content["summary"]["sizes"][str(size)][method]
            assert {name: entry[name] for name in means} == pytest.approx({n: 100 * v for n, v in means.items()})
            for category, figures in by_category.items():
                assert entry["categories"][category] == pytest.approx({n: 100 * v for n, v in figures.items()})
    assert len(set(means.values())) > 2


def test_features_are_computed_once_for_an_image_and_a_small_cache_changes_nothing(root, monkeypatch):
    backbone = tiny_backbone()
    seen = []
    forward = FrozenViT.forward
    monkeypatch.setattr(FrozenViT, "forward", lambda self, imgs: seen.append(len(imgs)) or forward(self, imgs))
    methods = build_methods(["backbone", "bilinear"], backbone)
    whole = run_all(methods, backbone, root, [64])
    pairs = [pair for known in spair.SPair(root).select().pairs.values() for pair in known]
    assert sum(seen) == len({path for pair in pairs for path in (pair.source, pair.target)})
    tight = run_all(methods, backbone, root, [64], cache_bytes=1, batch_size=1)
    assert sum(seen) > 2 * len(SHAPES)
    assert tight["scores"] == whole["scores"]


class Broken(nn.Module):
    """Descriptors without a number among them."""

    def forward(self, imgs, x):
        return x.transpose(1, 2).unflatten(2, (4, 4)) * math.nan


def test_descriptors_that_are_not_finite_are_wrong(root):
    backbone = tiny_backbone()
    methods = build_methods([f"broken={__name__}:Broken"], backbone)
    entry = run_all(methods, backbone, root, [64])["summary"]["sizes"]["64"]["broken"]
    assert entry["PCK@0.3"] == entry["PCK@0.3 per image"] == 0


@pytest.mark.parametrize("size", [(90, 61), (61, 90), (50, 50), (1000, 1), (3, 1001), (5, 4)])
@pytest.mark.parametrize("side", [56, 57, 448])
def test_square_and_points_agree(size, side):
    frame = spair.fit(size, side)
    white = np.asarray(spair.square(Image.new("RGB", size, (255, 255, 255)), side))
    inside = np.zeros((side, side), dtype=bool)
    inside[frame.top : frame.top + frame.height, frame.left : frame.left + frame.width] = True
    assert ((white == 255).all(-1) == inside).all()
    corner = frame.place(np.array([[0.0, 0.0], [*size]]))
    # The rounded side moves the far corner by less than a pixel.
    assert corner[0].tolist() == [frame.left, frame.top]
    assert (np.abs(corner[1] - [frame.left + frame.width, frame.top + frame.height]) < 1).all()


def test_equality_at_the_threshold_is_what_tells_the_averages_apart():
    # A box of 40 pixels at scale 0.5 and alpha 0.25: a limit of 5, and a match exactly so far away.
    below, at_most = spair.is_right(np.array([[3.0, 4], [3, 3]]), np.zeros((2, 2)), (10, 0, 30, 40), 0.5, [0.25])
    assert below.tolist() == [[False], [True]]
    assert at_most.tolist() == [[True], [True]]


def test_averages_over_points_and_over_images_differ_as_defined():
    # Two pairs of one category, 4 and 1 key points; one of another category.
    scores = {"cat": {"a": [4, 1, 2], "b": [1, 1, 1]}, "dog": {"c": [2, 0, 0]}}
    options = {
        "alphas": [0.1], "sizes": [56], "methods": ["m"], "seeds": 1, "categories": ["cat", "dog", "cow"],
        "split": "test",
    }  # fmt: skip
    content = {"options": options, "scores": {"56": {"m": scores}}, "draws": None, "left_out": {}, "skipped": {}}
    summary = spair.summarise(content)
    entry = summary["sizes"]["56"]["m"]
    assert entry["categories"]["cat"] == pytest.approx({"PCK@0.1": 40, "PCK@0.1 per image": 75})
    assert entry["PCK@0.1"] == pytest.approx(20)
    assert entry["PCK@0.1 per image"] == pytest.approx(50)
    assert summary["points"] == {"cat": 5, "dog": 2, "cow": 0}
    assert "cow" not in entry["categories"]
    # A pair that had to be left out later on counts nowhere.
    content["left_out"] = {"c": "JPEGImages/dog/x.jpg"}
    assert spair.summarise(content)["sizes"]["56"]["m"]["PCK@0.1"] == pytest.approx(40)
    # Draws are averaged one by one.
    content["left_out"], content["draws"] = {}, [{"cat": ["a"], "dog": ["c"]}, {"cat": ["b"], "dog": ["c"]}]
    entry = spair.summarise(content)["sizes"]["56"]["m"]
    assert entry["PCK@0.1"] == pytest.approx((25 / 2 + 100 / 2) / 2)
    assert entry["seed_std"]["PCK@0.1"] == pytest.approx((50 - 12.5) / math.sqrt(2))


def test_placement_over_what_cells_cover():
    # A 2 x 2 map that covers the left 32 of 48 pixels: one cell alike, the others not.
    source = torch.zeros(1, 4, 2, 2, dtype=torch.float64)
    source[0, :, 0, 0], source[0, :, 0, 1], source[0, :, 1, 0], source[0, :, 1, 1] = torch.eye(4, dtype=torch.float64)
    features = Features(source, (0, 0, 32, 32))
    points = [np.array([[40.0, 5.0]])]
    (covered,) = spair.match_points(features, features, points, 48, "cover")
    (stretched,) = spair.match_points(features, features, points, 48, "stretch")
    assert covered.tolist() == [[24, 0]]
    assert stretched.tolist() == [[36, 0]]


def test_reader_takes_layouts_filters_and_names_without_colons(root, tmp_path):
    dataset = spair.SPair(root)
    assert dataset.layout == "large"
    pairs = dataset.select().pairs
    assert [len(known) for known in pairs.values()] == [7, 7]
    assert all(pair.source_points.shape == pair.target_points.shape for known in pairs.values() for pair in known)
    small = spair.SPair(root, layout="small").select(["cat"]).pairs
    assert [pair.name for pair in small["cat"]] == [pair.name for pair in pairs["cat"]]
    shutil.rmtree(root / "Layout")
    assert spair.SPair(root).layout is None
    assert spair.SPair(root).select().pairs["cat"][3].name == pairs["cat"][3].name
    with pytest.raises(spair.SPairError, match=r"no list of pairs at .*small"):
        spair.SPair(root, layout="small")
    filters = spair.Filters(viewpoint_variation=(0, 2), occlusion=(3,))
    kept = {pair.name for known in dataset.select(filters=filters).pairs.values() for pair in known}
    every = [pair for known in pairs.values() for pair in known]
    assert kept == {
        p.name for p in every if p.difficulty["viewpoint_variation"] != 1 and p.difficulty["occlusion"] == 3
    }
    assert kept
    for with_list in (True, False):
        other = make_spair(tmp_path / f"other{with_list}", colon="_")
        if not with_list:
            shutil.rmtree(other / "Layout")
        found = spair.SPair(other).select()
        assert not found.skipped
        assert [len(known) for known in found.pairs.values()] == [7, 7]


def test_draws_are_nested_repeatable_and_of_their_own_for_each_seed(root):
    (pairs, *_) = spair.SPair(root).select().pairs.values()
    draws = [[pair.name for pair in spair.draw_pairs(pairs, "cat", count, 0)] for count in (2, 5, 7, 99, None)]
    assert set(draws[0]) < set(draws[1]) < set(draws[2])
    assert len(draws[1]) == 5
    assert draws[2] == draws[3] == draws[4] == [pair.name for pair in pairs]
    assert draws[0] == [pair.name for pair in spair.draw_pairs(pairs, "cat", 2, 0)]
    others = {tuple(pair.name for pair in spair.draw_pairs(pairs, "cat", 2, seed)) for seed in range(9)}
    assert len(others) > 1


def change(**fields):
    def spoil(path):
        content = json.loads(path.read_text())
        path.write_text(json.dumps(content | fields))

    return spoil


def without(field):
    def spoil(path):
        content = json.loads(path.read_text())
        del content[field]
        path.write_text(json.dumps(content))

    return spoil


MALFORMED = {
    "missing": (Path.unlink, "no annotation at"),
    "no json": (lambda path: path.write_text('{"src_kps": [[1, 2'), "is not a JSON file"),
    "binary": (lambda path: path.write_bytes(b"\xff\x00\x81"), "is not a JSON file"),
    "list": (lambda path: path.write_text("[1]"), "holds a list"),
    "no box": (without("trg_bndbox"), "no 'trg_bndbox'"),
    "box": (change(trg_bndbox=[5, 5, 5, 5]), "trg_bndbox is"),
    "box of words": (change(trg_bndbox="none"), "malformed annotation"),
    "no points": (change(src_kps=[], trg_kps=[]), "src_kps must be a list of one or more"),
    "fewer points": (change(src_kps=[[1, 2]] * 9), "9 source and"),
    "three numbers": (change(trg_kps=[[1, 2, 3]]), "trg_kps must be"),
    "NaN": (change(trg_kps=[[math.nan, 3]]), "trg_kps must be"),
    "ragged": (change(trg_kps=[[1, 2], [3]]), "malformed annotation"),
    "category": (change(category="dog"), "category is 'dog'"),
    "mirrored": (change(mirror=1), "mirrored"),
    "escape": (change(src_imname="../../secret.jpg"), "expected the name of a file"),
    "no name": (change(trg_imname=None), "expected the name of a file"),
    "size": (change(trg_imsize=[0, 4, 3]), "trg_imsize is"),
    "size of words": (change(trg_imsize="wide"), "malformed annotation"),
    "grade": (change(occlusion="much"), "malformed annotation"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_annotations_are_named_and_left_out(case, root):
    spoil, message = MALFORMED[case]
    victim = sorted((root / "PairAnnotation" / "test").glob("*:cat.json"))[2]
    spoil(victim)
    found = spair.SPair(root).select()
    ((name, reason),) = found.skipped.items()
    assert name == f"PairAnnotation/test/{victim.name}"
    assert str(victim) in reason
    assert message in reason
    assert [len(known) for known in found.pairs.values()] == [6, 7]


def test_disagreement_with_the_images_annotation_is_a_remark(root):
    victim = sorted((root / "PairAnnotation" / "test").glob("*:cat.json"))[0]
    points = json.loads(victim.read_text())["src_kps"]
    change(src_kps=[[x + 5, y] for x, y in points])(victim)
    (root / "ImageAnnotation" / "pottedplant" / "2008_000001.json").write_text("{")
    found = spair.SPair(root).select()
    assert not found.skipped
    assert "key points differ from those of" in found.remarks[f"PairAnnotation/test/{victim.name}"]
    assert "is not a JSON file" in found.remarks["ImageAnnotation/pottedplant/2008_000001.json"]
    assert len(found.remarks) == 2


def test_pairs_of_no_category_are_named_and_lost_folders_make_an_empty_one(root, tmp_path):
    listed = root / "Layout" / "large" / "test.txt"
    listed.write_text(listed.read_text() + "000099-a-b:unicorn\n000100-nonsense\n")
    dataset = spair.SPair(root)
    names = ["PairAnnotation/test/000099-a-b:unicorn.json", "PairAnnotation/test/000100-nonsense.json"]
    assert list(dataset.select().skipped) == names
    assert not dataset.select(["cat"]).skipped
    shutil.rmtree(root / "JPEGImages" / "cat")
    out = tmp_path / "r.json"
    assert run("--root", root, *TINY, "--sizes", "32", "--categories", "cat", "pottedplant", "--out", out) == 1
    assert load(out)["skipped"]["cat"] == "empty category: no usable pair left"
    assert load(out)["summary"]["pairs"]["pottedplant"] == 7


LAYOUT = {
    "nothing": (lambda root: shutil.rmtree(root), "no folder .*PairAnnotation"),
    "no images": (lambda root: shutil.rmtree(root / "JPEGImages"), "no folder .*JPEGImages"),
    "empty list": (lambda root: (root / "Layout/large/test.txt").write_text("\n"), "lists no pair"),
    "path in list": (lambda root: (root / "Layout/large/test.txt").write_text("../x:cat\n"), "expected the name of an"),
    "binary list": (lambda root: (root / "Layout/large/test.txt").write_bytes(b"\xff\xfe"), "cannot be read"),
}


@pytest.mark.parametrize("case", LAYOUT)
def test_folders_that_are_no_spair_are_refused(case, root):
    spoil, message = LAYOUT[case]
    spoil(root)
    with pytest.raises(spair.SPairError, match=message):
        spair.SPair(root)


def run(*arguments):
    return main(["eval", "spair", *(str(argument) for argument in arguments), "--quiet"])


def load(path):
    return json.loads(path.read_text())


def test_command(root, tmp_path, capsys):
    out, table = tmp_path / "r.json", tmp_path / "r.md"
    options = ["--root", root, *TINY, "--sizes", "32", "64", "--out", out]
    assert run(*options, "--table", table, "--per-category") == 0
    captured = capsys.readouterr()
    content = load(out)
    assert content["complete"]
    assert content["summary"]["pairs"] == {"cat": 7, "pottedplant": 7}
    assert content["record"]["versions"]["torch"]
    assert table.read_text() in captured.out
    assert "| method | PCK@0.1 | PCK@0.05 | PCK@0.01 | PCK@0.1 per image |" in captured.out
    assert "**PCK@0.01 per image, 64 pixels**" in captured.out
    assert "| method | cat | pottedplant | mean |" in captured.out
    # The cost protocol reads the same figures.
    scores = cost.accuracies([read_run(out)], "PCK@0.1 per image")
    assert scores["bilinear", 64].value == content["summary"]["sizes"]["64"]["bilinear"]["PCK@0.1 per image"]

    assert run(*options, "--table", tmp_path / "r.tex", "--json") == 0
    assert r"\begin{tabular}{lrrrrrr}" in (tmp_path / "r.tex").read_text()
    printed = json.loads(capsys.readouterr().out)
    assert printed["summary"] == content["summary"]
    assert "scores" not in printed
    assert run(*options, "--occlusion", "1") == 2
    assert "made with other settings (occlusion)" in capsys.readouterr().err


def test_a_category_with_fewer_pairs_than_wanted_is_said(root, tmp_path, capsys):
    options = ["eval", "spair", "--root", str(root), *map(str, TINY), "--sizes", "32", "--method", "backbone"]
    assert main([*options, "--pairs-per-category", "8"]) == 0
    said = capsys.readouterr().err
    assert "2 of 2 categories hold fewer than 8 pairs (the fewest: cat with 7); all of their pairs are taken\n" in said
    assert main([*options, "--pairs-per-category", "7"]) == 0
    assert "fewer than" not in capsys.readouterr().err


def test_an_interrupted_run_goes_on_after_its_last_category(root, tmp_path, monkeypatch):
    out, whole = tmp_path / "r.json", tmp_path / "whole.json"
    options = ["--root", root, *TINY, "--sizes", "32", "64", "--alphas", "0.9", "0.4"]
    options += ["--pairs-per-category", "4", "--seeds", "2"]
    assert run(*options, "--out", whole) == 0
    forward, calls = FrozenViT.forward, []

    def stop(self, imgs):
        calls.append(len(imgs))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return forward(self, imgs)

    with monkeypatch.context() as patch:
        patch.setattr(FrozenViT, "forward", stop)
        assert run(*options, "--out", out) == 130
    left = load(out)
    assert not left["complete"]
    assert "summary" not in left
    assert set(left["scores"]["32"]["bilinear"]) == {"cat", "pottedplant"}
    assert set(left["scores"]["64"]["bilinear"]) == {"cat"}
    calls.clear()
    monkeypatch.setattr(FrozenViT, "forward", lambda self, imgs: calls.append(len(imgs)) or forward(self, imgs))
    assert run(*options, "--out", out) == 0
    # Both draws together, and only what was missing: one category at one size, which fits one batch here.
    assert len(calls) == 1
    content = load(out)
    assert {**content, "record": None} == {**load(whole), "record": None}
    entry = content["summary"]["sizes"]["64"]["backbone"]
    scores, draws = content["scores"]["64"]["backbone"]["cat"], content["draws"]
    assert [len(draw["cat"]) for draw in draws] == [4, 4]
    assert draws[0] != draws[1]
    tables = [np.array([scores[name] for name in draw["cat"]]) for draw in draws]
    expected = np.mean([100 * table[:, 1].sum() / table[:, 0].sum() for table in tables])
    assert entry["categories"]["cat"]["PCK@0.9"] == pytest.approx(expected)
    assert expected > 0
    assert set(entry["seed_std"]) == set(entry["categories"]["cat"])


def test_bad_images_are_named_counted_and_taken_once_they_are_repaired(root, tmp_path, capsys, monkeypatch):
    (root / "JPEGImages" / "tvmonitor").mkdir()
    broken = root / "JPEGImages" / "cat" / "2008_000001.jpg"
    missing = root / "JPEGImages" / "pottedplant" / "2008_000000.jpg"
    kept = {path: path.read_bytes() for path in (broken, missing)}
    broken.write_bytes(kept[broken][:200])
    missing.unlink()
    known = [pair for pairs in spair.SPair(root).select().pairs.values() for pair in pairs]
    touched = {pair.name for pair in known if {pair.source, pair.target} & set(kept)}
    out = tmp_path / "r.json"
    options = ["--root", root, *TINY, "--sizes", "32", "64", "--out", out]
    assert run(*options) == 1
    content, captured = load(out), capsys.readouterr()
    assert set(content["skipped"]) == {
        "JPEGImages/cat/2008_000001.jpg",
        "JPEGImages/pottedplant/2008_000000.jpg",
        "tvmonitor",
    }
    assert str(broken) in content["skipped"]["JPEGImages/cat/2008_000001.jpg"]
    assert "skipped: tvmonitor: empty category: no pair in test" in captured.err
    assert set(content["left_out"]) == touched
    assert content["summary"]["left_out"] == len(touched) > 0
    assert content["summary"]["skipped"] == 3
    assert content["summary"]["pairs"]["tvmonitor"] == 0
    assert sum(content["summary"]["pairs"].values()) == 14 - len(touched)
    # Going on with the same files computes nothing anew; repaired ones are taken.
    with monkeypatch.context() as patch:
        patch.setattr(FrozenViT, "forward", None)
        assert run(*options) == 1
    again = load(out)
    assert {**again, "record": None} == {**content, "record": None}
    for path, data in kept.items():
        path.write_bytes(data)
    (root / "JPEGImages" / "tvmonitor").rmdir()
    capsys.readouterr()
    assert run(*options) == 2
    assert "made with other settings (categories)" in capsys.readouterr().err
    (root / "JPEGImages" / "tvmonitor").mkdir()
    assert run(*options) == 1
    assert list(load(out)["skipped"]) == ["tvmonitor"]
    assert sum(load(out)["summary"]["pairs"].values()) == 14
    # An annotation that is spoilt later on takes its pair out of what was measured before.
    known[0].annotation.write_text("{")
    assert run(*options) == 1
    assert sum(load(out)["summary"]["pairs"].values()) == 13


def test_an_image_of_another_size_than_annotated_is_left_out(root, tmp_path):
    victim = sorted((root / "PairAnnotation" / "test").glob("*:cat.json"))[0]
    change(trg_imsize=[7, 9, 3])(victim)
    out = tmp_path / "r.json"
    assert run("--root", root, *TINY, "--sizes", "32", "--out", out) == 1
    ((name, reason),) = load(out)["skipped"].items()
    assert name == f"PairAnnotation/test/{victim.name}"
    assert "7 x 9 in the annotation" in reason
    assert run("--root", root, *TINY, "--sizes", "32", "--out", out) == 1
    assert list(load(out)["left_out"]) == [victim.stem]


def test_a_category_without_a_usable_image_is_empty(root, tmp_path):
    for path in (root / "JPEGImages" / "cat").iterdir():
        path.write_bytes(b"")
    out = tmp_path / "r.json"
    assert run("--root", root, *TINY, "--sizes", "32", "--out", out) == 1
    content = load(out)
    assert content["skipped"]["cat"] == "empty category: no usable pair left"
    entry = content["summary"]["sizes"]["32"]["backbone"]
    assert entry["PCK@0.1"] == entry["categories"]["pottedplant"]["PCK@0.1"]


USAGE = {
    "root": (["--root", "nowhere"], "no folder nowhere"),
    "category": (["--root", "{}", "--categories", "unicorn"], "has no category unicorn; there are cat, pottedplant"),
    "seeds": (["--root", "{}", "--seeds", "2"], "needs --pairs-per-category"),
    "draw": (["--root", "{}", "--draw", "published"], "needs --pairs-per-category"),
    "alpha": (["--root", "{}", "--alphas", "2"], "alphas must lie in 0 to 1"),
    "alpha twice": (["--root", "{}", "--alphas", "0.1", "0.1"], "each alpha once"),
    "size": (["--root", "{}", "--sizes", "8"], "sizes of at least a patch"),
    "nothing left": (["--root", "{}", "--occlusion", "9"], "no pair is left"),
    "split": (["--root", "{}", "--split", "val"], "no folder"),
    "out": (["--root", "{}", "--out", "nowhere/x.json"], "the folder nowhere does not exist"),
}


@pytest.mark.parametrize("case", USAGE)
def test_usage_errors(case, root, capsys):
    arguments, message = USAGE[case]
    assert run(*(argument.format(root) for argument in arguments), *TINY) == 2
    assert message in capsys.readouterr().err


def test_published_draws(tmp_path, capsys):
    root = make_spair(tmp_path, 0)
    dataset = spair.SPair(root)
    selection = dataset.select()
    backbone = tiny_backbone()
    methods = build_methods(["backbone"], backbone)
    options = {"sizes": [32], "pairs_per_category": 20, "seeds": 2}
    content = spair.evaluate(methods, backbone, dataset, selection, draw="published", **options)
    # What the published program does, whose generator is NumPy's global one.
    state = np.random.get_state()
    for seed, drawn in enumerate(content["draws"]):
        np.random.seed(seed)
        for category, pairs in selection.pairs.items():
            expected = [pairs[index].name for index in np.random.choice(len(pairs), 20)]
            assert drawn[category] == expected
            assert len(set(expected)) < 20
    np.random.set_state(state)
    # A pair counts as often as it was drawn.
    scores = content["scores"]["32"]["backbone"]
    by_seed = []
    for drawn in content["draws"]:
        rows = [np.array([scores[category][name] for name in names], float) for category, names in drawn.items()]
        by_seed.append(np.mean([100 * each[:, 1].sum() / each[:, 0].sum() for each in rows]))
    assert content["summary"]["sizes"]["32"]["backbone"]["PCK@0.1"] == pytest.approx(np.mean(by_seed))
    assert content["summary"]["pairs"] == dict.fromkeys(selection.pairs, 40)
    distinct = spair.evaluate(methods, backbone, dataset, selection, **options)
    assert all(len(set(names)) == len(names) for drawn in distinct["draws"] for names in drawn.values())
    with pytest.raises(ValueError, match="draw must be distinct or published, got 'all'"):
        spair.evaluate(methods, backbone, dataset, selection, draw="all", **options)
