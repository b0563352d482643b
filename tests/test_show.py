"""``lift-fast show``: similarity, principal components, the sheet, and the page in a real browser."""

from __future__ import annotations

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
        maps = F.normalize(a.map.double(), dim=1)
        query = F.grid_sample(maps, place, mode="bilinear", padding_mode="border", align_corners=False)[0, :, 0, 0]
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


def test_best_match_is_that_of_all_pixels():
    a, b = shown(seed=1, covered=(4, 4, 72, 104)), shown("b", seed=2, stored=(111, 90))
    maps = [
        F.interpolate(F.normalize(x.features["m"].map.double(), dim=1), x.features["m"].covered[2:], mode="bilinear")[0]
        for x in (a, b)
    ]
    for x, y in [(100.3, 40.9), (0.0, 0.0), (224.0, 160.0)]:
        column, row = (min(max(int(v / 2) - 4, 0), n - 1) for v, n in ((x, 104), (y, 72)))
        scores = torch.einsum("c,chw->hw", maps[0][:, row, column], maps[1])
        point, similarity = best_match(a, b, "m", (x, y))
        assert abs(similarity - float(scores.max())) < 1e-5
        there = int(point[1] * 80 / 90), int(point[0] * 112 / 111)
        assert float(scores[there]) > float(scores.max()) - 1e-5


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
    maps = [F.normalize(torch.randn(6, *grid), dim=0) for grid in ((7, 9), (1, 5))]
    packed, error = _pack(maps, dimensions)
    restored = []
    for each, found in zip(packed, maps, strict=True):
        import base64

        codes = np.frombuffer(base64.b64decode(each["codes"]), np.int8).reshape(-1, min(dimensions, 6))
        factors = np.frombuffer(base64.b64decode(each["factors"]), "<f4")
        assert each["grid"] == list(found.shape[1:])
        restored.append(codes.astype(float) * factors[:, None])
    exact = maps[0].flatten(1).T.double().numpy() @ maps[1].flatten(1).double().numpy()
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
    core = re.search(r'<script id="core">(.*?)</script>', page, re.DOTALL)[1]
    points = [[0.0, 0.0], [1.0, 1.0], [0.31, 0.77], [0.5, 0.04]]
    (tmp_path / "data.json").write_text(json.dumps([content_of(page)["methods"], points]))
    program = f"""{core}
const [methods, points] = JSON.parse(require("fs").readFileSync(process.argv[2]));
console.log(JSON.stringify(methods.map((method) => {{
  const maps = method.maps.map(decode);
  return points.map(([x, y]) => {{
    const values = similarities(descriptorAt(maps[0], x, y), maps[1]);
    return [[...values], best(values), centreOf(maps[1], best(values))];
  }});
}})));"""
    (tmp_path / "program.js").write_text(program)
    run = subprocess.run(
        ["node", tmp_path / "program.js", tmp_path / "data.json"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    first, second = pair
    for (method, error), answers in zip(errors.items(), json.loads(run.stdout), strict=True):
        a, b = first.features[method], second.features[method]
        for (x, y), (values, best, centre) in zip(points, answers, strict=True):
            exact = similarity_map(a, b, (x * first.size[1], y * first.size[0]))
            # The error was measured at cells; between them it is an average of theirs, on another sample.
            assert np.abs(np.array(values).reshape(exact.shape) - exact).max() < 2 * error.most + 1e-3
            assert best == int(np.argmax(values))
            top, left, height, width = second.covered(method)
            h, w = exact.shape
            assert np.allclose(centre, [left + (best % w + 0.5) * width / w, top + (best // w + 0.5) * height / h])


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
            exact = similarity_map(a, b, (x * source.size[1], y * source.size[0])).ravel()
            near = 2 * errors[method].most + 1e-3
            # Positions come back in whole pixels of the screen.
            near += 0.02
            assert abs(float(answer["similarity"]) - exact.max()) < near
            assert exact[int(answer["cell"])] > exact.max() - 2 * near
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
    assert "cat_second_view.jpg" in page.read_text(encoding="utf-8")


def test_command_line_alone_takes_its_defaults(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["show", str(CAT), "--size", "48", "--views", "pca"]) == 0
    assert Image.open("show.png").size[0] == 14 + 6 * 314
    assert "demonstration pair" in capsys.readouterr().err
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
