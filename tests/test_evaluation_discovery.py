"""CorLoc on generated data sets in the layouts of Pascal VOC and COCO, against boxes and overlaps written out."""

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from evaluation_data import make_coco, make_voc, paint, sizes_and_boxes, voc_object
from PIL import Image
from test_evaluation_tokencut import published

from lift_fast.evaluation.discovery import (
    Prediction,
    corloc,
    discover,
    draw_discovery,
    evaluate,
    iou,
    overlaps,
    prepare,
    score_box,
)
from lift_fast.evaluation.discovery.dataset import read_coco, read_voc
from lift_fast.evaluation.methods import Features
from lift_fast.images import read_image

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


pytestmark = pytest.mark.usefixtures("one_thread")


def whole(imgs, maps):
    return Features(maps, (0, 0, *imgs.shape[2:]))


def colours(batch):
    """Mean colour of each 8 x 8 patch, as features that TokenCut can cut: [1, 3, h, w]."""
    maps = F.avg_pool2d(batch.imgs, 8)
    return Features(maps, (0, 0, 8 * maps.shape[2], 8 * maps.shape[3]))


def nothing(batch):
    return whole(batch.imgs, torch.ones(1, 2, 3, 3))


def whereabouts():
    """What the protocol asks of a backbone."""
    return SimpleNamespace(patch_size=8, mean=MEAN, std=STD, device="cpu", dtype=torch.float32)


def find(image, features=colours, resolution=None):
    return discover(image, prepare(image, whereabouts(), resolution), features, tau=0.2)


def run(data, **options):
    """Predictions by colours, and what was left out."""
    content = evaluate([("colours", colours)], whereabouts(), data, tau=0.2, **options)
    found = [Prediction(**{**entry, "box": tuple(entry["box"])}) for entry in content["predictions"]["colours"]]
    assert content["summary"]["colours"] == corloc(found)
    return found, content["skipped"]


def pixels_of(box):
    """The pixels of a box of whole pixels, one by one."""
    return {(x, y) for x in range(int(box[0]), int(box[2])) for y in range(int(box[1]), int(box[3]))}


@pytest.mark.parametrize("seed", range(5))
def test_overlap_counts_pixels(seed):
    pick = random.Random(seed)
    for _ in range(60):
        a, b = (
            (x, y, x + pick.randint(1, 9), y + pick.randint(1, 9))
            for x, y in ((pick.randint(0, 8), pick.randint(0, 8)) for _ in range(2))
        )
        inside, union = len(pixels_of(a) & pixels_of(b)), len(pixels_of(a) | pixels_of(b))
        assert iou(a, b) == pytest.approx(inside / union, abs=1e-15)
        assert overlaps(a, b) == (2 * inside >= union)
    assert overlaps((0, 0, 2, 1), (0, 0, 1, 1))
    assert iou((0, 0, 1, 1), (5, 5, 6, 6)) == 0
    assert iou((3, 3, 3, 3), (3, 3, 3, 3)) == 0


@pytest.mark.parametrize("seed", range(3))
def test_planted_objects_in_voc_are_all_found(tmp_path, seed):
    contents = {
        f"{i:06d}": (size, box, [voc_object(box, difficult=0, truncated=0)])
        for i, (size, box) in enumerate(sizes_and_boxes(seed, 5))
    }
    make_voc(tmp_path, contents)
    data = read_voc(tmp_path, 2007)
    assert not data.skipped
    assert [sample.boxes for sample in data.samples] == [(box,) for _, box, _ in contents.values()]
    predictions = run(data)[0]
    assert [p.box for p in predictions] == [box for _, box, _ in contents.values()]
    assert corloc(predictions) == {"corloc": 100.0, "pictures": 5, "found": 5, "mean_iou": 1.0, "degenerate": 0}


@pytest.mark.parametrize("images", ["train2014", "images/train2014"])
def test_planted_objects_in_coco_are_all_found(tmp_path, images):
    contents = {}
    for i, (size, box) in enumerate(sizes_and_boxes(7, 4)):
        x0, y0, x1, y1 = box
        exact = [x0 + 0.3, y0 - 0.3, x1 - x0 - 0.1, y1 - y0 + 0.4]
        contents[100 + i] = (size, box, [([0.0, 0.0, 5.0, 5.0], 1), (exact, 0)])
    data = read_coco(make_coco(tmp_path, contents, images))
    # Crowds do not count; corners are rounded.
    assert [sample.boxes for sample in data.samples] == [(box,) for _, box, _ in contents.values()]
    predictions = run(data)[0]
    assert corloc(predictions)["corloc"] == 100


def test_any_box_counts_and_half_is_enough():
    sample = type("S", (), {"name": "a", "boxes": ((50, 50, 60, 60), (0, 0, 10, 20))})()
    half = score_box(sample, (0, 0, 10, 10), False)
    assert half.found
    assert half.iou == 0.5
    assert not score_box(sample, (0, 0, 10, 9), False).found


def test_hard_objects_count_unless_left_out(tmp_path):
    box = (8, 8, 32, 40)
    other = (0, 0, 6, 6)
    make_voc(
        tmp_path,
        {
            "a": ((80, 64), box, [voc_object(box, difficult=1), voc_object(other, truncated=0, difficult=0)]),
            "b": ((80, 64), box, [voc_object(box, truncated=1)]),
            "c": ((80, 64), box, [voc_object(box)]),
        },
        year=2012,
    )
    assert [s.boxes for s in read_voc(tmp_path, 2012).samples] == [(box, other), (box,), (box,)]
    easy = read_voc(tmp_path / "VOCdevkit", 2012, no_hard=True)
    assert [(s.name, s.boxes) for s in easy.samples] == [("a", (other,)), ("c", (box,))]
    assert easy.skipped == [("b", "no objects")]
    # The year's own folder does as well.
    assert len(read_voc(tmp_path / "VOCdevkit" / "VOC2012", 2012).samples) == 3


def test_bad_voc_annotations_are_named_and_left_out(tmp_path):
    box = (8, 8, 32, 40)
    names = ("good", "cut", "empty", "none", "words", "inverted", "entities", "missing", "binary")
    base = make_voc(tmp_path, {name: ((80, 64), box, [voc_object(box)]) for name in names})
    where = base / "Annotations"
    whole = (where / "good.xml").read_text()
    (where / "cut.xml").write_text(whole[:100])
    (where / "empty.xml").write_text("")
    (where / "none.xml").write_text("<annotation></annotation>")
    (where / "words.xml").write_text(whole.replace("<xmin>9</xmin>", "<xmin>nine</xmin>"))
    (where / "inverted.xml").write_text(whole.replace("<xmin>9</xmin>", "<xmin>70</xmin>"))
    (where / "entities.xml").write_text('<!DOCTYPE a [<!ENTITY b "bb"><!ENTITY c "&b;&b;">]>' + whole)
    (where / "missing.xml").unlink()
    (where / "binary.xml").write_bytes(b"\xff\xfe\x00\x01")
    (where / "good.xml").write_text('<?xml version="1.0" encoding="latin-1"?>' + whole.replace(">9<", "> 9.7 <", 1))
    data = read_voc(tmp_path, 2007)
    assert [sample.name for sample in data.samples] == ["good"]
    assert data.samples[0].boxes == (box,)
    reasons = dict(data.skipped)
    assert set(reasons) == set(names) - {"good"}
    for name, message in (
        ("cut", "cut.xml is not a valid annotation"),
        ("empty", "empty.xml is not a valid annotation"),
        ("none", "no objects"),
        ("words", "words.xml, object 0: expected a number in its bndbox, got 'nine'"),
        ("inverted", "is empty"),
        ("entities", "document type"),
        ("missing", "no annotation at"),
        ("binary", "binary.xml is not a valid annotation"),
    ):
        assert message in reasons[name]


def test_bad_coco_annotations_are_named_and_left_out(tmp_path):
    box = (8, 8, 32, 40)
    things = {
        1: [([8, 8, 24, 32], 0)],
        2: [([8, 8, 24, 32], 1)],
        3: [([8, 8, 24], 0)],
        4: [([8, 8, None, 3], 0)],
        5: [([8, 8, 0, 3], 0)],
        6: [],
    }
    make_coco(tmp_path, {number: ((80, 64), box, entry) for number, entry in things.items()})
    names = tmp_path / "coco_20k_filenames.txt"
    names.write_text("train2014/COCO_train2014_000000000099.jpg\n\n" + names.read_text() + names.read_text())
    data = read_coco(tmp_path)
    assert [sample.name for sample in data.samples] == ["COCO_train2014_000000000001.jpg"]
    reasons = [reason for _, reason in data.skipped]
    assert [next((r for r in reasons if part in r), None) is not None for part in ("id 99", "four numbers", "is empty")]
    assert len(reasons) == 6
    assert reasons.count("no objects") == 2


def test_data_sets_that_are_not_there_say_what_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match="VOC2007"):
        read_voc(tmp_path, 2007)
    base = make_voc(tmp_path / "voc", {"a": ((80, 64), (8, 8, 32, 40), [])})
    with pytest.raises(FileNotFoundError, match=r"val\.txt"):
        read_voc(tmp_path / "voc", 2007, split="val")
    (base / "ImageSets" / "Main" / "trainval.txt").write_text("\n")
    with pytest.raises(ValueError, match="lists no image"):
        read_voc(tmp_path / "voc", 2007)
    (base / "ImageSets" / "Main" / "trainval.txt").write_text("../../secret\n")
    with pytest.raises(ValueError, match="leads out"):
        read_voc(tmp_path / "voc", 2007)
    coco = tmp_path / "coco"
    coco.mkdir()
    with pytest.raises(FileNotFoundError, match="coco_20k_filenames"):
        read_coco(coco)
    make_coco(coco, {1: ((80, 64), (8, 8, 32, 40), [([8, 8, 24, 32], 0)])})
    source = coco / "annotations" / "instances_train2014.json"
    for content, message in (("{", "not a JSON"), ("[]", "images"), ('{"images": [3], "annotations": []}', "images")):
        source.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_coco(coco)
    source.unlink()
    with pytest.raises(FileNotFoundError, match="no annotation file"):
        read_coco(coco)
    (coco / "coco_20k_filenames.txt").write_text("cat.jpg\n")
    with pytest.raises(ValueError, match="no image id"):
        read_coco(coco)


def test_images_that_do_not_decode_are_left_out_and_counted(tmp_path):
    box = (8, 8, 32, 40)
    base = make_voc(tmp_path, {name: ((80, 64), box, [voc_object(box)]) for name in ("a", "b", "c", "d")})
    (base / "JPEGImages" / "b.jpg").unlink()
    whole = (base / "JPEGImages" / "c.jpg").read_bytes()
    (base / "JPEGImages" / "c.jpg").write_bytes(whole[: len(whole) // 2])
    (base / "Annotations" / "d.xml").unlink()
    predictions, skipped = run(read_voc(tmp_path, 2007))
    assert [p.name for p in predictions] == ["a"]
    assert set(skipped) == {"b", "c", "d"}
    for name, file in (("b", "b.jpg"), ("c", "c.jpg"), ("d", "d.xml")):
        assert file in skipped[name]
    assert corloc([])["corloc"] is None
    (base / "JPEGImages" / "a.jpg").unlink()
    with pytest.raises(ValueError, match="no image of VOC2007"):
        run(read_voc(tmp_path, 2007))


def test_images_are_taken_as_stored(tmp_path):
    # Annotations speak of the stored pixels, whatever way up the camera was held.
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg", upright=False).size == (30, 20)


@pytest.mark.parametrize("resolution", [None, 64, 72])
def test_boxes_come_back_in_the_images_pixels(tmp_path, resolution):
    paint(tmp_path / "a.png", (128, 64), (32, 16, 64, 48), 0)
    found = find(Image.open(tmp_path / "a.png").convert("RGB"), resolution=resolution)
    assert found.box == pytest.approx((32, 16, 64, 48), abs=0 if resolution is None else 20)
    assert found.covered == (0, 0, 1, 1)
    with pytest.raises(ValueError, match=r"\[1, C, h, w\]"):
        find(Image.new("RGB", (16, 16)), lambda batch: whole(batch.imgs, batch.imgs[0]))


def test_padding_is_zero_after_normalisation_and_clipped_away(tmp_path):
    seen = []

    def features(batch):
        seen.append(batch.imgs)
        return colours(batch)

    # The object touches the right and lower end, which lie inside a patch.
    paint(tmp_path / "a.png", (61, 45), (32, 24, 61, 45), 0)
    image = Image.open(tmp_path / "a.png").convert("RGB")
    found = find(image, features)
    assert seen[0].shape == (1, 3, 48, 64)
    assert (seen[0][:, :, 45:] == 0).all()
    assert (seen[0][:, :, :, 61:] == 0).all()
    expected = (torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - 0.5) / 0.25
    torch.testing.assert_close(seen[0][0, :, :45, :61], expected.float(), rtol=0, atol=1e-6)
    assert found.box == (32, 24, 61, 45)
    assert found.covered == (0, 0, 48 / 45, 64 / 61)


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path):
    box = (8, 8, 32, 40)
    make_voc(tmp_path, {name: ((80, 64), box, [voc_object(box)]) for name in "abcd"})
    data = read_voc(tmp_path, 2007)
    out = tmp_path / "run.json"
    journal = tmp_path / "run.colours.jsonl"
    expected, _ = run(data)
    seen = []

    def stop(name, sample, *_):
        seen.append(sample.name)
        if sample.name == "b":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(data, out=out, show=stop)
    # Killed while it wrote a line.
    journal.write_text(journal.read_text() + '{"name": "c", "bo')
    seen.clear()
    again, _ = run(data, out=out, show=lambda name, sample, *_: seen.append(sample.name))
    assert again == expected
    assert seen == ["c", "d"]
    assert json.loads(out.read_text())["summary"]["colours"]["corloc"] == 100
    # Nothing is left to compute; an image that has gone meanwhile is not missed.
    data.samples[0].path.unlink()
    assert run(data, out=out, show=stop, record={"date": "now"})[0] == expected
    with pytest.raises(ValueError, match=r"run\.colours\.jsonl was made with other settings \(seed\); give"):
        run(data, out=out, record={"seed": 1})
    journal.write_text(journal.read_text() + "nonsense\n")
    with pytest.raises(ValueError, match="line 6"):
        run(data, out=out)
    for first in ("", "nonsense\n", "[1]\n", '{"settings": 3}\n'):
        journal.write_text(first)
        with pytest.raises(ValueError, match="no settings in its first line; give another file, or delete it"):
            run(data, out=out)


def test_sheet_shows_image_eigenvector_and_boxes(tmp_path):
    box = (8, 8, 32, 40)
    make_voc(tmp_path, {"a": ((90, 70), box, [voc_object((8, 8, 40, 40))])})
    sample = read_voc(tmp_path, 2007).samples[0]
    image = read_image(sample.path, upright=False)
    found = find(image)
    sheet = np.asarray(draw_discovery(sample, image, found, score_box(sample, found.box, False)))
    assert (sheet == (220, 40, 40)).all(2).sum() > 300
    assert (sheet == (40, 200, 80)).all(2).sum() > 100
    # Nothing to show is shown too.
    flat = find(image, nothing)
    prediction = Prediction("a", flat.box, 0.1, False, True)
    assert draw_discovery(sample, image, flat, prediction).size == sheet.shape[1::-1]


def test_command(tmp_path, capsys):
    from lift_fast.cli import main

    contents = {f"{i}": (size, box, [voc_object(box)]) for i, (size, box) in enumerate(sizes_and_boxes(1, 3))}
    base = make_voc(tmp_path, contents)
    (base / "JPEGImages" / "2.jpg").unlink()
    options = ["eval", "discovery", "--dataset", "voc07", "--root", str(tmp_path), "--quiet", "--json"]
    model = ["--model", "vit_tiny_patch16_224", "--random-weights", "--random-lift", "--device", "cpu"]
    out = tmp_path / "run.json"
    sheets = tmp_path / "sheets"
    small = [*options, *model, "--method", "lift", "--resolution", "56", "--out", str(tmp_path / "small.json")]
    assert main(small) == 1
    assert json.loads(capsys.readouterr().out)["options"]["rule"] == "published"
    assert main([*small, "--rule", "exact"]) == 2
    assert "(rule)" in capsys.readouterr().err
    files = ["--out", str(out), "--table", str(tmp_path / "run.md"), "--pictures", str(sheets), "--picture-count", "1"]
    assert main([*options, *model, *files, "--method", "backbone", "lift"]) == 1
    shown = capsys.readouterr()
    figures = json.loads(shown.out)
    assert set(figures["summary"]) == {"backbone", "lift"}
    assert figures["summary"]["lift"]["pictures"] == 2
    assert "2.jpg" in shown.err
    content = json.loads(out.read_text())
    assert content["summary"] == figures["summary"]
    assert [p["name"] for p in content["predictions"]["lift"]] == ["0", "1"]
    assert content["record"]["versions"]
    assert "CorLoc" in (tmp_path / "run.md").read_text()
    assert sorted(p.name for p in sheets.iterdir()) == ["0_backbone.png", "0_lift.png"]
    for wrong, message in (
        ([*options[:4], "--root", str(tmp_path / "none")], "VOCdevkit"),
        ([*options, "--resolution", "15"], "smaller than one patch"),
        ([*options, "--rule", "exact"], "give --resolution S"),
        ([*options, "--list", "x"], "--list is an option of coco20k"),
        (
            ["eval", "discovery", "--dataset", "coco20k", "--root", str(tmp_path), "--no-hard"],
            "--no-hard is an option of VOC",
        ),
        ([*options, "--pictures", str(out)], "run.json is a file; expected a folder"),
    ):
        assert main([*wrong, *model]) == 2
        assert message in capsys.readouterr().err


def published_square(path, boxes, side):
    """The LiFT paper's evaluation of one image at S x S, step by step: its box there, and whether it counts."""
    image = Image.open(path).convert("RGB")
    pixels = np.asarray(image.resize((side, side), Image.Resampling.BILINEAR), dtype=np.float64) / 255
    tensor = torch.from_numpy((pixels - MEAN) / STD).permute(2, 0, 1)[None].float()
    cells = 1 + (side - 8) // 8
    tokens = F.avg_pool2d(tensor, 8).flatten(2)[0].T
    *_, (top, left, bottom, right) = published(tokens, (cells, cells), 0.2)
    scale = side / cells
    found = [scale * left, scale * top, min(scale * right, side), min(scale * bottom, side)]
    good = []
    for box in boxes:
        truth = [int(v * side / n) for v, n in zip(box, image.size * 2, strict=True)]
        wide = max(0.0, min(found[2], truth[2]) - max(found[0], truth[0]))
        tall = max(0.0, min(found[3], truth[3]) - max(found[1], truth[1]))
        area = (found[2] - found[0]) * (found[3] - found[1]) + (truth[2] - truth[0]) * (truth[3] - truth[1])
        # The published term against division by zero.
        good.append(wide * tall / (area - wide * tall + 1e-7) >= 0.5)
    return found, any(good)


@pytest.mark.parametrize("side", [56, 60, 64])
def test_resized_images_are_scored_as_published(tmp_path, side):
    contents = {}
    for number, (size, box) in enumerate(sizes_and_boxes(side, 12)):
        # True boxes shifted and shrunk, so that some count and some do not.
        x, y = number % 4, number // 4
        contents[f"{number}"] = (size, box, [voc_object((box[0] + 2 * x, box[1] + 3 * y, box[2] + x, box[3]))])
    make_voc(tmp_path, contents)
    data = read_voc(tmp_path, 2007)
    found, _ = run(data, resolution=side)
    results = []
    for prediction, sample in zip(found, data.samples, strict=True):
        if prediction.degenerate:
            # The published program's cut is then whatever rounding makes of it.
            continue
        box, good = published_square(sample.path, sample.boxes, side)
        width, height = Image.open(sample.path).size
        back = (box[0] * width / side, box[1] * height / side, box[2] * width / side, box[3] * height / side)
        assert prediction.box == pytest.approx(back)
        assert prediction.found == good
        results.append(good)
    assert len(results) > 8
    assert len(set(results)) == 2
    exact, _ = run(data, resolution=side, rule="exact")
    if side % 8:
        # Padding makes a row and a column more.
        assert [p.box for p in exact] != [p.box for p in found]
    assert run(data, rule="published") == run(data, rule="exact")


def test_half_an_overlap_is_none_where_the_published_program_divides():
    sample = type("S", (), {"name": "a", "boxes": ((0, 0, 10.9, 20.9),)})()
    # True boxes are cut to whole pixels: (0, 0, 10, 20).
    assert score_box(sample, (0, 0, 10, 10.01), False, ((100, 100), 100)).found
    half = score_box(sample, (0, 0, 10, 10), False, ((100, 100), 100))
    assert (half.iou, half.found) == (0.5, False)
    assert score_box(sample, (0, 0, 20, 20), False, ((200, 200), 100)).box == (0, 0, 20, 20)


def test_an_unknown_rule_is_named():
    with pytest.raises(ValueError, match="rule must be published or exact, got 'mine'"):
        prepare(Image.new("RGB", (20, 20)), whereabouts(), 16, "mine")


def test_features_that_are_not_finite_leave_an_image_out_for_all_methods(tmp_path):
    box = (8, 8, 32, 40)
    make_voc(tmp_path, {name: ((80, 64), box, [voc_object(box)]) for name in "abc"})
    count = 0

    def broken(batch):
        nonlocal count
        count += 1
        maps, covered = colours(batch)
        return Features(maps * (torch.nan if count == 2 else 1), covered)

    out = tmp_path / "r.json"
    methods = [("colours", colours), ("broken", broken)]
    content = evaluate(methods, whereabouts(), read_voc(tmp_path, 2007), tau=0.2, out=out)
    assert content["skipped"] == {
        "b": "broken: features hold NaN or infinity; check that the image and the weights are finite"
    }
    for name in ("colours", "broken"):
        assert [entry["name"] for entry in content["predictions"][name]] == ["a", "c"]
