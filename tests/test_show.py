"""``lift-fast show``: similarity, principal components, the sheet, and the page in a real browser."""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

import lift_fast.show
from lift_fast import load_backbone
from lift_fast.cli import main
from lift_fast.evaluation.methods import Features, build_methods
from lift_fast.show import Shown, build_page, cell_position, draw_sheet, load, pca_colours, similarity_map
from lift_fast.show.page import _pack
from lift_fast.show.sheet import best_match

CAT = Path(__file__).resolve().parents[1] / "examples" / "photographs" / "cat.jpg"
BROWSE = Path(__file__).with_name("browse.py")


def random_image(width, height, seed=0):
    random = np.random.default_rng(seed)
    small = random.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def shown(name="a", grid=(5, 7), size=(80, 112), stored=(224, 160), channels=6, seed=0, covered=None, method="m"):
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(1, channels, *grid, generator=generator)
    return Shown(name, random_image(*stored, seed), size, {method: Features(found, covered or (0, 0, *size))})


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (5, 3), (11, 13)])
@pytest.mark.parametrize("other", [(1, 1), (4, 6)])
def test_similarity_is_that_of_interpolated_descriptors(grid, other):
    a, b = (shown(grid=g, seed=s).features["m"] for s, g in enumerate((grid, other)))
    random = np.random.default_rng(7)
    for x, y in [(0.0, 0.0), (112.0, 80.0), *random.uniform(0, 1, (8, 2)) * (112, 80)]:
        # PyTorch's own interpolation, in float64, at one place.
        place = torch.tensor([[[[x / 112 * 2 - 1, y / 80 * 2 - 1]]]], dtype=torch.float64)
        query = F.grid_sample(a.map.double(), place, mode="bilinear", padding_mode="border", align_corners=False)
        query = F.normalize(query[0, :, 0, 0], dim=0)
        expected = torch.einsum("c,chw->hw", query, F.normalize(b.map.double(), dim=1)[0])
        assert np.abs(similarity_map(a, b, (x, y)) - expected.numpy()).max() < 1e-6


def test_cells_lie_where_the_method_says():
    features = shown(grid=(9, 13), covered=(4, 4, 72, 104)).features["m"]
    assert cell_position(features, (8.0, 16.0)) == (0.0, 1.0)
    assert cell_position(features, (0.0, 0.0)) == (0.0, 0.0)
    assert cell_position(features, (112.0, 80.0)) == (12.0, 8.0)


@pytest.mark.parametrize("channels", [2, 3, 8])
def test_principal_components_are_those_of_the_singular_value_decomposition(channels):
    maps = [torch.randn(channels, 9, 5), torch.randn(channels, 4, 6)]
    images = pca_colours(maps)
    assert [p.shape for p in images] == [(9, 5, 3), (4, 6, 3)]
    rows = np.concatenate([F.normalize(m.double(), dim=0).flatten(1).T.numpy() for m in maps])
    rows -= rows.mean(0)
    u, s, _ = np.linalg.svd(rows, full_matrices=False)
    for k in range(3):
        ours = np.concatenate([p[..., k].ravel() for p in images]).astype(float)
        if k >= channels:
            assert set(ours) == {128.0}
            continue
        component = u[:, k] * s[k]
        component *= 1 if (component**3).sum() > 0 else -1
        low, high = np.quantile(component, [0.01, 0.99])
        expected = np.clip((component - low) / (high - low), 0, 1) * 255
        assert np.abs(ours - expected).max() <= 0.5 + 1e-6


def test_a_constant_image_has_no_components():
    for image in pca_colours([torch.ones(8, 3, 4), torch.ones(8, 1, 1)]):
        assert set(image.ravel()) == {128}


def cosines_of_all_pixels(source, target, method, pixel):
    """Of a pixel (column, row) of the source's covered part, with all of the target's, in float64."""
    descriptors = [
        F.normalize(
            F.interpolate(each.features[method].map.double(), each.features[method].covered[2:], mode="bilinear")[0],
            dim=0,
        )
        for each in (source, target)
    ]
    return torch.einsum("c,chw->hw", descriptors[0][:, pixel[1], pixel[0]], descriptors[1])


def test_best_match_is_that_of_all_pixels():
    a, b = shown(seed=1, covered=(4, 4, 72, 104)), shown("b", seed=2, stored=(111, 90))
    for x, y in [(100.3, 40.9), (0.0, 0.0), (224.0, 160.0)]:
        column, row = (min(max(int(v / 2) - 4, 0), n - 1) for v, n in ((x, 104), (y, 72)))
        scores = cosines_of_all_pixels(a, b, "m", (column, row))
        point, similarity = best_match(a, b, "m", (x, y))
        assert abs(similarity - float(scores.max())) < 1e-5
        there = int(point[1] * 80 / 90), int(point[0] * 112 / 111)
        assert float(scores[there]) > float(scores.max()) - 1e-5


@pytest.fixture(scope="module")
def nearly_identical():
    """A photograph, and itself enlarged by 3 % and moved by a few pixels: [x, y] of the second are at 1.03 x + 5."""
    backbone = load_backbone("demo_vitt16", head_order="interleaved")
    methods = build_methods(["backbone", "lift"], backbone, "lift_demo_vitt16")
    image = Image.open(CAT).convert("RGB")
    back = (1 / 1.03, 0, -5 / 1.03, 0, 1 / 1.03, -5 / 1.03)
    moved = image.transform(image.size, Image.Transform.AFFINE, back, Image.Resampling.BICUBIC)
    return [load(name, each, 144, backbone, methods) for name, each in (("a", image), ("b", moved))]


def test_lift_finds_nearly_the_same_place_at_least_as_well_as_the_backbone(nearly_identical):
    first, second = nearly_identical
    points = np.random.default_rng(3).uniform(0.2, 0.8, (40, 2)) * first.image.size
    distance = {}
    for method in ("backbone", "lift"):
        found = [best_match(first, second, method, tuple(point)) for point in points]
        for point, (best, similarity) in list(zip(points, found, strict=True))[:8]:
            pixel = tuple(int(v * n / m) for v, n, m in zip(point, first.size[::-1], first.image.size, strict=True))
            scores = cosines_of_all_pixels(first, second, method, pixel)
            assert abs(similarity - float(scores.max())) < 1e-5
            there = [int(v * n / m) for v, n, m in zip(best, second.size[::-1], second.image.size, strict=True)]
            assert float(scores[there[1], there[0]]) > float(scores.max()) - 1e-5
        true = 1.03 * points + 5
        distance[method] = np.linalg.norm([best for best, _ in found] - true, axis=1)
        itself = [best_match(first, first, method, tuple(point)) for point in points]
        assert min(similarity for _, similarity in itself) > 1 - 1e-5
        # A loaded pixel is 3.1 of the photograph's.
        assert np.abs([best for best, _ in itself] - points).max() < 1.6
    assert np.median(distance["lift"]) < np.median(distance["backbone"])
    assert distance["lift"].mean() < distance["backbone"].mean()


@pytest.fixture(scope="module")
def pair():
    backbone = load_backbone("demo_vitt16", head_order="interleaved")
    methods = build_methods(["backbone", "bilinear", "stride-8", "lift"], backbone, "lift_demo_vitt16")
    first = load('<b onload="injected=1">&"\'.jpg', Image.open(CAT).convert("RGB"), 96, backbone, methods)
    second = load("</script><script>injected=1", random_image(90, 133), (128, 80), backbone, methods)
    return first, second


def test_images_are_read_upright_in_whole_patches(pair):
    first, second = pair
    assert (first.size, second.size) == ((96, 144), (128, 80))
    assert first.features["lift"].map.shape[2:] == (12, 18)
    assert second.features["backbone"].map.shape[2:] == (8, 5)
    assert first.covered("stride-8") == (4 / 96, 4 / 144, 88 / 96, 136 / 144)


@pytest.mark.parametrize("views", [("similarity",), ("pca",), ("saliency",), ("similarity", "pca", "saliency")])
def test_sheet_has_a_panel_for_each_method(pair, views):
    one, two = (draw_sheet(pair[:n], [(100.5, 80.5)], views, caption="c") for n in (1, 2))
    assert one.width == two.width == 14 + 5 * 314
    assert two.height > one.height
    # Every panel holds an image: more than one colour in each.
    pixels = np.asarray(one)[60:]
    for column in range(5):
        part = pixels[:, 14 + column * 314 : 14 + column * 314 + 300].reshape(-1, 3)
        assert len(np.unique(part, axis=0)) > 8


def test_points_are_named_by_the_pixel_they_lie_in(pair, monkeypatch):
    said = []
    text = ImageDraw.ImageDraw.text
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda *a, **o: (said.append(a[2]), text(*a, **o))[1])
    # Half to even would say 102, 100.
    draw_sheet(pair[:1], [(101.5, 99.5)], ["similarity"])
    assert any("similarity to 101, 99 " in line for line in said)


def test_sheet_refuses_what_it_cannot_draw(pair):
    with pytest.raises(ValueError, match="lies outside"):
        draw_sheet(pair[:1], [(452, 10)])
    with pytest.raises(ValueError, match="unknown view 'depth'"):
        draw_sheet(pair[:1], [(1, 1)], ["depth"])
    with pytest.raises(ValueError, match="dimensions must be at least 1"):
        build_page(pair, dimensions=0)


def test_what_the_reader_must_know_is_on_the_sheet(pair, monkeypatch):
    said = []
    text = ImageDraw.ImageDraw.text
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda *a, **o: (said.append((a[2], o["fill"])), text(*a, **o))[1])
    options = {"caption": "long caption " * 30, "warning": "random weights " * 20, "saliency_note": "Not an object."}
    sheet = draw_sheet(pair[:1], [(1, 1)], **options)
    assert sheet.height > draw_sheet(pair[:1], [(1, 1)]).height + 4 * 20
    red = " ".join(line for line, fill in said if fill == (190, 40, 25))
    assert red.split() == ["random", "weights"] * 20
    assert [line for line, _ in said if "Not an object." in line and "TokenCut" in line]
    # Nothing is cut off on the right.
    assert (np.asarray(sheet)[:, -10:] == 255).all()


def test_too_many_tokens_are_left_out_and_said():
    big = shown(grid=(130, 130), size=(130, 130), stored=(60, 60))
    assert draw_sheet([big], [], ["saliency"]).height > 300


def content_of(page):
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_page_is_one_file_and_escapes_names(pair):
    page, errors = build_page(pair, caption="<i>", warning="</script>")
    assert set(errors) == {"backbone", "bilinear", "stride-8", "lift"}
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!data:)""", page)
    assert not re.search(
        r"https?:|//[a-z]+\.|@import|fetch\(|XMLHttpRequest", re.sub(r'"[A-Za-z0-9+/=]{200,}"', "", page)
    )
    assert page.count("</script>") == 3
    assert "<b onload" not in page
    content = content_of(page)
    assert [each["name"] for each in content["pictures"]] == [each.name for each in pair]
    assert content["warning"] == "</script>"


@pytest.mark.parametrize("dimensions", [1, 3, 6, 50])
def test_page_errors_are_those_of_its_numbers(dimensions):
    maps = [torch.randn(6, *grid) * 3 for grid in ((7, 9), (1, 5))]
    packed, error = _pack(maps, dimensions)
    restored = []
    for each, found in zip(packed, maps, strict=True):
        codes = np.frombuffer(base64.b64decode(each["codes"]), np.int8).reshape(-1, min(dimensions, 6))
        factors = np.frombuffer(base64.b64decode(each["factors"]), "<f4")
        assert each["grid"] == list(found.shape[1:])
        restored.append(codes.astype(float) * factors[:, None])
    rows = [F.normalize(each.flatten(1).double(), dim=0).T.numpy() for each in maps]
    exact = rows[0] @ rows[1].T
    lengths = [np.frombuffer(base64.b64decode(each["lengths"]), "<f4") for each in packed]
    true = [np.linalg.norm(each.flatten(1).double().numpy(), axis=0) for each in maps]
    assert np.allclose(np.concatenate(lengths), np.concatenate(true) / np.concatenate(true).max(), rtol=1e-6)
    close = restored[0] @ restored[1].T
    assert abs(error.most - np.abs(exact - close).max()) < 1e-5
    assert abs(error.mean - np.abs(exact - close).mean()) < 1e-5
    assert abs(error.same_best - (exact.argmax(1) == close.argmax(1)).mean()) <= 2 / 63
    if dimensions >= 6:
        # Eight bits: half a step in each factor of each product.
        assert error.most < 2 * np.sqrt(6) / 254 + 6 / 254**2


def test_large_maps_are_averaged_for_the_page():
    content = content_of(build_page([shown(grid=(113, 224), size=(113, 224))])[0])
    assert [each["grid"] for each in content["methods"][0]["maps"]] == [[112, 112], [112, 112]]


@pytest.mark.skipif(shutil.which("node") is None, reason="no node on this machine")
def test_page_computes_what_python_computes(pair, tmp_path):
    page, errors = build_page(pair)
    points = [[0.0, 0.0], [1.0, 1.0], [0.31, 0.77], [0.5, 0.04], *np.random.default_rng(1).random((8, 2)).tolist()]
    first, second = pair
    for (method, error), answers in zip(errors.items(), in_node(page, points, tmp_path), strict=True):
        a, b = first.features[method], second.features[method]
        near = 2 * error.most + 1e-3
        for (x, y), (values, similarity, position) in zip(points, answers, strict=True):
            exact = similarity_map(a, b, (x * first.size[1], y * first.size[0]))
            # The error was measured at cells; between them it is an average of theirs, on another sample.
            assert np.abs(np.array(values).reshape(exact.shape) - exact).max() < near
            # The best place between cells, by every eighth of a cell of the exact descriptors.
            fine = F.interpolate(b.map.double(), tuple(8 * n for n in exact.shape), mode="bilinear")
            best = similarity_map(a, Features(fine.float(), b.covered), (x * first.size[1], y * first.size[0])).max()
            assert max(values) - 1e-6 <= similarity
            assert abs(similarity - best) < near + 0.01
            there = position[0] * second.size[1], position[1] * second.size[0]
            query = interpolated(a, (x * first.size[1], y * first.size[0]))
            assert abs(float(query @ interpolated(b, there)) - similarity) < near


@pytest.mark.skipif(shutil.which("node") is None, reason="no node on this machine")
def test_page_finds_an_image_in_itself(nearly_identical, tmp_path):
    first = nearly_identical[0]
    page, _ = build_page([first])
    points = np.random.default_rng(2).uniform(0.1, 0.9, (12, 2)).tolist()
    for method, answers in zip(first.features, in_node(page, points, tmp_path), strict=True):
        cells = first.features[method].map.shape[:1:-1]
        for point, (values, similarity, position) in zip(points, answers, strict=True):
            assert 0.97 < similarity < 1.01
            assert similarity > max(values) - 1e-6
            # Half of an eighth of a cell, and what the compression moves it.
            assert (np.abs(np.subtract(position, point)) * cells).max() < 0.3


def interpolated(features, point):
    """The unit descriptor [C] at (x, y) in pixels of the loaded image, float64."""
    top, left, height, width = features.covered
    place = torch.tensor([[[[(point[0] - left) / width * 2 - 1, (point[1] - top) / height * 2 - 1]]]]).double()
    found = F.grid_sample(features.map.double(), place, mode="bilinear", padding_mode="border", align_corners=False)
    return F.normalize(found[0, :, 0, 0], dim=0)


def in_node(page, points, folder):
    """For each method and point (x, y) in 0 to 1 of A: similarities of B's cells, the best one and its position."""
    core = re.search(r'<script id="core">(.*?)</script>', page, re.DOTALL)[1]
    (folder / "data.json").write_text(json.dumps([content_of(page)["methods"], points]))
    program = f"""{core}
const [methods, points] = JSON.parse(require("fs").readFileSync(process.argv[2]));
console.log(JSON.stringify(methods.map((method) => {{
  const maps = method.maps.map(decode);
  return points.map(([x, y]) => {{
    const descriptor = descriptorAt(maps[0], cellAt(maps[0], x, y)), values = similarities(descriptor, maps[1]);
    const {{ similarity, place }} = best(descriptor, maps[1], values);
    return [[...values], similarity, positionOf(maps[1], place)];
  }});
}})));"""
    (folder / "program.js").write_text(program)
    run = subprocess.run(
        ["node", folder / "program.js", folder / "data.json"], capture_output=True, text=True, check=True, timeout=120
    )
    return json.loads(run.stdout)


def test_page_in_a_real_browser(pair, tmp_path):
    if importlib.util.find_spec("PyQt6") is None or importlib.util.find_spec("PyQt6.QtWebEngineWidgets") is None:
        pytest.skip("no browser: PyQt6-WebEngine is not installed")
    page, errors = build_page(pair)
    path = tmp_path / "page.html"
    path.write_text(page, encoding="utf-8")
    moves = [[0, 0.3, 0.4], [1, 0.7, 0.6], [0, 0.9, 0.1]]
    environment = {**os.environ, "QT_QPA_PLATFORM": "offscreen", "QTWEBENGINE_DISABLE_SANDBOX": "1"}
    command = [sys.executable, str(BROWSE), f"{path}#method=stride-8&a=0.25,0.5", json.dumps(moves)]
    # A point from the address is pinned, so the mouse would not move it.
    pinned = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    if not pinned.stdout.startswith("running"):
        pytest.skip(f"the browser does not start on this machine: {pinned.stderr[-300:]}")
    command[2] = str(path)
    moved = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    for run, method, places in (
        (pinned, "stride-8", [[0, 0.25, 0.5]] * 4),
        (moved, "lift", [[0, 0.5, 0.5], *moves]),
    ):
        found = json.loads(run.stdout.splitlines()[1])
        assert found["console"] == []
        assert len(found["answers"]) == 4
        for answer, (image, x, y) in zip(found["answers"], places, strict=True):
            source, target = pair[image], pair[1 - image]
            a, b = source.features[method], target.features[method]
            exact = similarity_map(a, b, (x * source.size[1], y * source.size[0]))
            near = 2 * errors[method].most + 1e-3
            # Positions come back in whole pixels of the screen.
            near += 0.02
            # Between the cells there is a place at least as good as the best of them.
            assert exact.max() - near < float(answer["similarity"]) < 1 + near
            column, row = (float(v) for v in answer["cell"].split(","))
            assert exact[round(row), round(column)] > exact.max() - 0.2
            assert answer["text"].startswith(f"{'AB'[image]} (")
            assert ("pinned" in answer["text"]) == (run is pinned)
            assert answer["resources"] == []
            assert answer["injected"] == "undefined"
            assert answer["names"][0].startswith(f"A: {pair[0].name}, 451 x 300")
            assert method in answer["error"]


def test_command_line(tmp_path, capsys):
    other = CAT.with_name("cat_second_view.jpg")
    out, page = tmp_path / "s.png", tmp_path / "s.html"
    options = ["--size", "64", "--out", str(out), "--html", str(page), "--json", "--method", "backbone", "lift"]
    assert main(["show", str(CAT), str(other), "--point", "30,40", "--point", "450,299", *options]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["methods"]["lift"]["grids"] == [[8, 12], [8, 12]]
    assert figures["methods"]["backbone"]["page_error"]["most"] < 0.1
    assert Image.open(out).size[0] == 14 + 3 * 314
    content = content_of(page.read_text(encoding="utf-8"))
    assert content["pictures"][1]["name"].endswith("cat_second_view.jpg")
    assert "textures, not objects" in content["warning"]


def test_only_the_demonstration_backbone_lacks_saliency(tmp_path, monkeypatch):
    notes = []
    draw = lift_fast.show.draw_sheet
    monkeypatch.setattr(
        lift_fast.show, "draw_sheet", lambda *a, **o: (notes.append(o["saliency_note"]), draw(*a, **o))[1]
    )
    out = ["--size", "32", "--out", str(tmp_path / "s.png"), "--method", "backbone", "--quiet"]
    assert main(["show", str(CAT), *out]) == 0
    assert main(["show", str(CAT), *out, "--random-weights", "--no-lift"]) == 0
    assert "not objects" in notes[0]
    assert notes[1] == ""


def test_command_line_alone_takes_its_defaults(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["show", str(CAT), "--size", "48", "--views", "pca"]) == 0
    assert Image.open("show.png").size[0] == 14 + 6 * 314
    error = capsys.readouterr().err
    assert "emonstration pair" in error
    assert "not objects" not in error
    assert main(["show", str(CAT), "--size", "48", "--no-lift", "--views", "pca", "--quiet"]) == 0
    assert Image.open("show.png").size[0] == 14 + 4 * 314


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--point", "451,0"], "lies outside"),
        (["--out", "x.jpg"], "must end in .png"),
        (["--html", "x.txt"], "must end in .html"),
        (["--out", "nowhere/x.png"], "does not exist"),
        (["--tau", "2"], "between -1 and 1"),
        (["--method", "upsample"], "upsample"),
        (["--method", "lift", "--no-lift"], "needs a LiFT"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    assert main(["show", str(CAT), "--size", "32", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["1", "1,", "a,b", "-1,2", "1.5,2"])
def test_points_are_whole_pixels(text):
    with pytest.raises(SystemExit):
        main(["show", str(CAT), f"--point={text}"])


def test_missing_image_is_named(tmp_path, capsys):
    assert main(["show", str(tmp_path / "none.jpg")]) == 2
    assert "no image at" in capsys.readouterr().err
