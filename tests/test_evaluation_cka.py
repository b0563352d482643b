"""Linear CKA against the textbook's centring matrices, and its curves over input sizes."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from lift_fast.evaluation.charts import Series, _dashes, line_chart
from lift_fast.evaluation.cka import (
    StreamingCKA,
    centres,
    draw_curves,
    linear_cka,
    sample,
    scale_invariance,
    table,
)
from lift_fast.evaluation.methods import Features
from lift_fast.evaluation.results import load_json

pytestmark = pytest.mark.usefixtures("one_thread")


def textbook(x, y):
    """HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with K = X X^T, L = Y Y^T and the centring matrix H."""
    n = len(x)
    k, m = (f.double() @ f.double().T for f in (x, y))
    h = torch.eye(n, dtype=torch.float64) - 1 / n
    hsic = [torch.trace(a @ h @ b @ h) for a, b in ((k, m), (k, k), (m, m))]
    return float(hsic[0] / (hsic[1] * hsic[2]).sqrt())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", [(2, 3, 5), (17, 5, 40), (40, 7, 7), (101, 13, 3), (30, 1, 1)])
def test_agrees_with_the_textbook(shape, seed):
    n, a, b = shape
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, a, generator=generator) + 3
    y = x @ torch.randn(a, b, generator=generator) + torch.randn(n, b, generator=generator)
    expected = textbook(x, y)
    assert linear_cka(x, y) == pytest.approx(expected, rel=1e-9)
    assert linear_cka(y, x) == pytest.approx(expected, rel=1e-9)
    streaming = StreamingCKA()
    for part in torch.arange(n).split(6):
        streaming.update(x[part], y[part])
    assert streaming.count == n
    assert streaming.value() == pytest.approx(expected, rel=1e-9)


def test_invariances():
    x = torch.randn(50, 12, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64)).Q
    assert linear_cka(x, -2.5 * x @ turn + 7) == pytest.approx(1, abs=1e-12)
    assert 0 <= linear_cka(x, torch.randn(50, 12)) < 0.9
    # Far from the origin, as features with a large mean are.
    streaming = StreamingCKA()
    for part in torch.arange(50).split(9):
        streaming.update(x[part] + 1e6, x[part] @ turn - 1e6)
    assert streaming.value() == pytest.approx(1, abs=1e-8)


def test_constant_features_have_no_cka():
    assert math.isnan(linear_cka(torch.ones(5, 3), torch.randn(5, 2)))
    assert math.isnan(StreamingCKA().value())


def test_bad_input_is_refused():
    for x, y in ((torch.ones(3, 2), torch.ones(4, 2)), (torch.ones(3), torch.ones(3)), (torch.ones(0, 2),) * 2):
        with pytest.raises(ValueError, match="same N positions"):
            linear_cka(x, y)
    with pytest.raises(ValueError, match="NaN"):
        linear_cka(torch.full((3, 2), math.nan), torch.ones(3, 2))
    streaming = StreamingCKA()
    streaming.update(torch.ones(3, 2), torch.ones(3, 2))
    with pytest.raises(ValueError, match="2 and 2 channels"):
        streaming.update(torch.ones(3, 2), torch.ones(3, 4))


@pytest.mark.parametrize("covered", [(0, 0, 40, 60), (2, 3, 36, 54)])
def test_sampling_is_bilinear_between_the_cells_centres(covered):
    maps = torch.randn(1, 2, 4, 6)
    top, left, height, width = covered
    positions = centres(7, 5)
    found = sample(Features(maps, covered), positions, (40, 60)).view(7, 5, 2)
    for row in range(7):
        for column in range(5):
            # In units of cells, from the centre of the first.
            y = ((row + 0.5) / 7 * 40 - top) / height * 4 - 0.5
            x = ((column + 0.5) / 5 * 60 - left) / width * 6 - 0.5
            y, x = min(max(y, 0), 3), min(max(x, 0), 5)
            y0, x0 = min(int(y), 2), min(int(x), 4)
            v, u = y - y0, x - x0
            block = maps[0, :, y0 : y0 + 2, x0 : x0 + 2].double()
            weights = torch.tensor([[(1 - v) * (1 - u), (1 - v) * u], [v * (1 - u), v * u]], dtype=torch.float64)
            torch.testing.assert_close(found[row, column], (block * weights).sum((1, 2)), rtol=1e-9, atol=1e-9)


def patches(batch):
    """Mean colours of 8 x 8 pixels."""
    maps = F.avg_pool2d(batch.imgs, 8)
    return Features(maps, (0, 0, *batch.imgs.shape[2:]))


def noise(batch):
    height, width = batch.imgs.shape[2:]
    generator = torch.Generator().manual_seed(height)
    return Features(torch.randn(1, 9, height // 8, width // 8, generator=generator), (0, 0, height, width))


@pytest.fixture
def photographs(tmp_path):
    random = np.random.default_rng(0)
    for number in range(4):
        rough = Image.fromarray(random.integers(0, 255, (5, 6, 3), dtype=np.uint8))
        rough.resize((90, 70), Image.Resampling.BICUBIC).save(tmp_path / f"{number}.png")
    return sorted(tmp_path.glob("*.png"))


def test_curves(photographs, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(photographs[0].read_bytes()[:200])
    steps = []
    content = scale_invariance(
        [("patches", patches), ("noise", noise)],
        [*photographs, broken],
        sizes=(16, 32, 64),
        reference=64,
        grid=6,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        progress=steps.append,
    )
    assert len(steps) == 5
    assert content["pictures"] == 4
    assert list(content["skipped"]) == [str(broken)]
    smooth, random = content["curves"]["patches"], content["curves"]["noise"]
    assert smooth["64"]["cka"] == pytest.approx([1, 1, 1], abs=1e-12)
    assert smooth["64"]["pooled"] == pytest.approx(1)
    # Smooth images keep their colours when they shrink; noise that is drawn anew keeps nothing.
    assert 1 > smooth["32"]["cka"][0] > smooth["16"]["cka"][0] > 0.3
    assert smooth["32"]["cka"][0] > random["32"]["cka"][0]
    assert smooth["16"]["cka"][1] <= smooth["16"]["cka"][0] <= smooth["16"]["cka"][2]
    # One figure, step by step.
    values, pooled = [], []
    for path in photographs:
        image = Image.open(path).convert("RGB")
        rows = []
        for size in (16, 64):
            pixels = np.asarray(image.resize((size, size), Image.Resampling.LANCZOS), dtype=np.float64) / 127.5 - 1
            cells = torch.from_numpy(pixels).permute(2, 0, 1).reshape(3, size // 8, 8, size // 8, 8).mean((2, 4))
            spread = F.interpolate(cells[None], size=(6, 6), mode="bilinear", align_corners=False)
            rows.append(spread[0].flatten(1).T)
        values.append(textbook(*rows))
        pooled.append(rows)
    assert smooth["16"]["cka"][0] == pytest.approx(np.mean(values), rel=1e-5)
    assert smooth["16"]["pooled"] == pytest.approx(
        textbook(*(torch.cat(side) for side in zip(*pooled, strict=True))), rel=1e-5
    )
    assert "noise" in table(content).markdown()
    chart = draw_curves(content)
    assert chart.width == 1000
    for colour in ((0, 114, 178), (213, 94, 0)):
        assert (np.asarray(chart) == colour).all(2).sum() > 100


def test_constant_images_are_left_out_of_the_mean(tmp_path, photographs):
    grey = tmp_path / "grey.png"
    Image.new("RGB", (30, 30), (90, 90, 90)).save(grey)
    options = {"sizes": (16,), "reference": 32, "grid": 3, "mean": (0.0,) * 3, "std": (1.0,) * 3}
    with_grey = scale_invariance([("patches", patches)], [grey, *photographs], **options)
    without = scale_invariance([("patches", patches)], photographs, **options)
    assert with_grey["curves"]["patches"]["16"]["cka"][0] == pytest.approx(without["curves"]["patches"]["16"]["cka"][0])
    nothing = scale_invariance([("patches", patches)], [grey], **options)
    assert math.isnan(nothing["curves"]["patches"]["16"]["cka"][0])
    with pytest.raises(ValueError, match="at least one point"):
        draw_curves(nothing)


def test_an_interrupted_run_goes_on_where_it_stopped(photographs, tmp_path, monkeypatch):
    monkeypatch.setattr("lift_fast.evaluation.cka.run._SAVE_SECONDS", 0.0)
    broken = tmp_path / "0 broken.png"
    broken.write_bytes(b"no image")
    out, partial = tmp_path / "cka.json", tmp_path / "cka.partial.pt"
    seen = []

    def counted(batch):
        seen.append(1)
        if len(seen) == limit:
            raise KeyboardInterrupt
        return patches(batch)

    def run(**changes):
        options = {"sizes": (16, 32), "reference": 64, "grid": 5, "mean": (0.5,) * 3, "std": (0.5,) * 3}
        seen.clear()
        return scale_invariance(
            [("patches", counted), ("noise", noise)], [broken, *photographs], root=tmp_path, **{**options, **changes}
        )

    limit = 0
    expected = run()
    # Three maps of each image; the third image breaks off in the middle.
    limit = 3 * 2 + 2
    with pytest.raises(KeyboardInterrupt):
        run(out=out)
    assert partial.is_file()
    assert not out.exists()
    with pytest.raises(ValueError, match=r"cka\.partial\.pt was made with other settings \(grid\);"):
        run(out=out, grid=4)
    limit = 0
    content = run(out=out, record={"date": "then"})
    assert len(seen) == 3 * 2
    assert not partial.exists()
    assert content["curves"] == expected["curves"]
    assert content["skipped"] == expected["skipped"]
    assert list(content["skipped"]) == ["0 broken.png"]
    assert content["scores"] == expected["scores"]
    assert list(content["scores"]["noise"]["16"]) == [path.name for path in photographs]
    # Complete: nothing is computed again, and nothing is overwritten by other options.
    assert run(out=out, record={"date": "now"}) == load_json(out)
    assert not seen
    with pytest.raises(ValueError, match=r"made with other settings \(reference\);"):
        run(out=out, reference=48)
    out.unlink()
    partial.write_bytes(b"cut off")
    with pytest.raises(ValueError, match=r"partial\.pt cannot be resumed .* delete it"):
        run(out=out)
    with pytest.raises(ValueError, match="each size must be given once"):
        run(sizes=(16, 16))


def test_nothing_to_read_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot read any of 1"):
        scale_invariance([], [tmp_path / "none.png"], mean=(0,) * 3, std=(1,) * 3)
    with pytest.raises(ValueError, match="grid"):
        scale_invariance([], [], grid=1, mean=(0,) * 3, std=(1,) * 3)


@pytest.mark.parametrize("log_x", [False, True])
def test_chart_of_any_numbers(log_x):
    for points in ([(1, 0)], [(1, 5), (1000, 5)], [(0.01, -3), (0.02, 1e6)], [(56, 0.2), (112, 0.21), (448, 0.9)]):
        line = Series("a", points, [(y - 1, math.nan) for _, y in points])
        chart = line_chart([line] * 5, title="t", x="x", y="y", log_x=log_x)
        assert (np.asarray(chart) == (0, 114, 178)).all(2).sum() > 50
    for bad in ([], [(1, math.nan)]):
        with pytest.raises(ValueError, match="at least one point"):
            line_chart([Series("a", bad)], title="t", x="x", y="y")
    with pytest.raises(ValueError, match="positive"):
        line_chart([Series("a", [(0, 1)])], title="t", x="x", y="y", log_x=True)


def test_dashed_lines_have_gaps_and_reach_both_ends():
    whole, dashed = (
        (np.asarray(line_chart([Series("a", [(0, 0), (1, 1)], dashed=d)], title="t", x="x", y="y")) == (0, 114, 178))
        for d in (False, True)
    )
    assert 0.4 < dashed.all(2).sum() / whole.all(2).sum() < 0.8
    pieces = _dashes((0, 0), (30, 40))
    assert pieces[0][:2] == (0, 0)
    assert pieces[-1][2:] == pytest.approx((30, 40))
    # Two points in one place.
    assert all(piece == (5, 5, 5, 5) for piece in _dashes((5, 5), (5, 5)))


def test_command(photographs, tmp_path, capsys):
    from lift_fast.cli import main

    folder = tmp_path / "pictures"
    folder.mkdir()
    for path in photographs[:2]:
        path.rename(folder / path.name)
    options = ["eval", "cka", "--root", str(folder), "--quiet", "--device", "cpu", "--grid", "5"]
    model = ["--model", "vit_tiny_patch16_224", "--random-weights", "--random-lift"]
    files = ["--out", str(tmp_path / "cka.json"), "--chart", str(tmp_path / "cka.png")]
    (folder / "broken.png").write_bytes(b"no image")
    assert main([*options, *model, *files, "--json", "--sizes", "32", "48", "--reference", "64"]) == 1
    shown = capsys.readouterr()
    figures = json.loads(shown.out)
    assert "broken.png" in shown.err
    assert list(figures["curves"]) == ["backbone", "bilinear", "lift"]
    assert 0 < figures["curves"]["lift"]["48"]["cka"][0] <= 1
    assert json.loads((tmp_path / "cka.json").read_text())["curves"] == figures["curves"]
    assert Image.open(tmp_path / "cka.png").width == 1000
    assert main([*options, *model, "--chart", str(tmp_path / "none" / "a.png")]) == 2
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "kind"), [("c.png", "PNG"), ("c.jpg", "JPEG"), ("c.JPEG", "JPEG"), ("c.chart", "PNG")]
)
def test_charts_are_written_as_their_name_says(name, kind, tmp_path):
    from lift_fast.cli.eval_options import save_image

    save_image(tmp_path / name, Image.new("RGB", (4, 3)))
    with Image.open(tmp_path / name) as image:
        assert image.format == kind
