"""The drawn matches: right sizes at any aspect ratio, and pixels that show what they say."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from lift_fast import match_images
from lift_fast.drawing import MatchView, confidence_colours, draw_matches, position_colours, wrap

CAT = Path(__file__).resolve().parents[1] / "examples" / "photographs" / "cat.jpg"
INLIER, OUTLIER, WARNING = (0, 229, 255), (255, 84, 20), (176, 32, 32)


def make_view(size_a=(60, 80), size_b=(50, 40), grid=(15, 20), valid=True, seed=0, **options):
    random = np.random.default_rng(seed)
    ys, xs = (np.linspace(0, n - 1, g).astype(int) for n, g in zip(size_a, grid, strict=True))
    matches = np.stack([random.integers(size_b[1], size=grid), random.integers(size_b[0], size=grid)], axis=-1)
    valid = np.broadcast_to(valid, grid)
    return MatchView(
        image_a=random.integers(255, size=(*size_a, 3), dtype=np.uint8),
        image_b=random.integers(255, size=(*size_b, 3), dtype=np.uint8),
        points=np.stack(np.meshgrid(xs, ys), axis=-1),
        matches=np.where(valid[..., None], matches, -1),
        confidence=np.where(valid, random.random(grid), 0),
        valid=valid,
        **{"caption": "a caption", **options},
    )


def matched_with_itself(image, step):
    """Every ``step``-th pixel of an image, matched with the same place."""
    ys, xs = (np.arange((n - 1) % step // 2, n, step) for n in image.shape[:2])
    points = np.stack(np.meshgrid(xs, ys), axis=-1)
    every = np.ones(points.shape[:2], bool)
    return MatchView(image, image, points, points, every.astype(float), every, "")


def panels(sheet, view):
    """The three panels of a sheet of images that are neither tall nor wide, as arrays."""
    width = (sheet.width - 2 * 24 - 2 * 20) // 3
    height = round(width * view.image_a.shape[0] / view.image_a.shape[1])
    bottom = sheet.height - 24 - 19 - 2 * 8
    return [
        np.asarray(sheet.crop((left, bottom - height, left + width, bottom))).astype(int)
        for left in (24 + n * (width + 20) for n in range(3))
    ]


def written(monkeypatch, view, **options):
    """The texts of a sheet, in the order of drawing, with their font sizes."""
    texts, write = [], ImageDraw.ImageDraw.text

    def record(self, xy, text, *rest, font, **more):
        texts.append((text, font.size))
        write(self, xy, text, *rest, font=font, **more)

    with monkeypatch.context() as patched:
        patched.setattr(ImageDraw.ImageDraw, "text", record)
        draw_matches(view, **options)
    return texts


def count(sheet, colour, near=0):
    return int((np.abs(np.asarray(sheet).astype(int) - colour).max(-1) <= near).sum())


def is_pale(pixels):
    """Grey, a little blue, and light."""
    return (np.ptp(pixels, axis=-1) <= 9) & (pixels.min(-1) >= 140)


@pytest.mark.parametrize(
    ("size_a", "size_b", "grid"),
    [
        ((60, 80), (50, 40), (4, 5)),
        ((8, 400), (400, 8), (2, 100)),
        ((400, 8), (8, 400), (100, 2)),
        ((100, 900), (120, 800), (7, 31)),
        ((900, 100), (800, 120), (31, 7)),
        ((1, 1), (2, 3), (1, 1)),
        ((1, 300), (300, 1), (1, 75)),
        ((1200, 900), (16, 16), (41, 37)),
    ],
)
def test_every_aspect_ratio_is_drawn(size_a, size_b, grid):
    view = make_view(size_a, size_b, grid, warning="a warning " * 30, inliers=np.ones(grid, bool))
    sheet = draw_matches(view)
    assert sheet.mode == "RGB"
    assert 1000 < sheet.width <= 1600
    assert 300 < sheet.height < 2400
    # Nothing is cut off at the margins, below the banner.
    pixels = np.asarray(sheet)
    top = int((pixels[:, 2] == WARNING).all(-1).sum())
    assert (pixels[:top, -24:] == WARNING).all()
    for margin in (pixels[top:, :14], pixels[top:, -14:], pixels[-20:]):
        assert (margin == 255).all()


def test_no_match_is_pale_and_without_lines():
    view = make_view(valid=False)
    without, one = (draw_matches(view, lines=n) for n in (40, 1))
    assert np.array_equal(without, one)
    assert draw_matches(make_view(), lines=0).width == without.width
    with pytest.raises(ValueError, match="lines must be at least 0, got -1"):
        draw_matches(view, lines=-1)
    warped, coloured, confidence = panels(without, view)
    assert is_pale(warped).all()
    assert np.array_equal(warped, coloured)
    assert (confidence == confidence_colours(np.array(0.0))).all()


def test_one_line_and_many():
    image = np.asarray(Image.open(CAT).convert("RGB"))
    view = matched_with_itself(image, 4)
    view = replace(view, confidence=np.random.default_rng(5).random(view.valid.shape))
    none, one, many = (
        np.asarray(draw_matches(each, lines=n)).astype(int)
        for each, n in ((replace(view, valid=np.zeros_like(view.valid)), 1), (view, 1), (view, 500))
    )
    half = none[100 : 100 + 500, 24:770]
    changed = [(np.abs(each[100 : 100 + 500, 24:770] - half).max(-1) > 8).mean() for each in (one, many)]
    assert 0.0005 < changed[0] < 0.02
    # 500 lines leave most of the image visible.
    assert 0.1 < changed[1] < 0.6


def test_lines_end_where_the_matches_are():
    # One match, from the centre of A's pixel (20, 10) to the centre of B's pixel (70, 50).
    view = make_view((60, 80), (60, 80), (60, 80), valid=False)
    black, valid = np.zeros((60, 80, 3), np.uint8), np.zeros((60, 80), bool)
    matches = view.matches.copy()
    valid[10, 20], matches[10, 20] = True, (70, 50)
    view = replace(view, image_a=black, image_b=black, valid=valid, matches=matches)
    pixels = np.asarray(draw_matches(view)).astype(int)[110:]
    none = np.asarray(draw_matches(replace(view, valid=~valid & False))).astype(int)[110:]
    rows, columns = np.nonzero(np.abs(pixels - none)[:560].max(-1) > 60)
    scale = (1552 - 20 - 20) / 2 / 80
    # The top of A is unknown here, the distances within the line are not: dots reach 6.5 pixels beyond its ends.
    assert abs(columns.min() + 6 - (24 + 20.5 * scale)) < 2
    assert abs(columns.max() - 6 - (24 + 80 * scale + 20 + 10 + 70.5 * scale)) < 2
    assert abs(np.ptp(rows) - 12 - 40 * scale) < 3


def test_warning_is_a_banner_and_wraps():
    plain, warned, long = (draw_matches(make_view(warning=text)) for text in ("", "random weights", "do not " * 60))
    assert warned.height > plain.height + 30
    assert long.height > warned.height + 50
    assert warned.getpixel((2, 2)) == long.getpixel((2, 2)) == WARNING
    assert plain.getpixel((2, 2)) == (255, 255, 255)
    assert count(warned, WARNING) > 0.8 * warned.width * 40


def test_captions_wrap():
    plain = draw_matches(make_view())
    for caption in ("word " * 200, "word" * 200):
        assert draw_matches(make_view(caption=caption)).height > plain.height + 40
    assert draw_matches(make_view(caption="")).height < plain.height


@pytest.mark.parametrize("width", [1, 30, 111, 5000])
def test_wrapped_lines_keep_the_text_and_the_width(width):
    font = ImageFont.load_default(size=19)
    text = "some words and " + "averylongword" * 20 + "\nagain"
    lines = wrap(text, font, width)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "").replace("\n", "")
    assert all(font.getlength(line) <= width or len(line) == 1 for line in lines)


@pytest.mark.parametrize("step", [1, 4, 7])
def test_an_image_warped_into_itself_is_smooth(step):
    image = np.asarray(Image.open(CAT).convert("RGB").resize((336, 224)))
    view = matched_with_itself(image, step)
    shown = panels(draw_matches(view), view)[0]
    size = shown.shape[1], shown.shape[0]
    exact = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)).astype(int)
    inside = np.s_[4 * step : -4 * step, 4 * step : -4 * step]
    # Were each match a block of pixels of one colour, the error would be five times as large at 7 pixels.
    assert np.abs(shown - exact)[inside].mean() < 0.6


def test_the_unmatched_part_is_pale():
    image = np.zeros((60, 80, 3), np.uint8)
    image[..., 1] = 200
    view = replace(matched_with_itself(image, 4), image_b=np.full((60, 80, 3), (255, 0, 0), np.uint8))
    half = view.valid.copy()
    half[:, half.shape[1] // 2 :] = False
    warped, coloured, confidence = panels(draw_matches(replace(view, valid=half)), view)
    middle, step = warped.shape[1] // 2, warped.shape[1] // 20 + 1
    assert (warped[:, : middle - step] == (255, 0, 0)).all()
    assert is_pale(warped[:, middle + step :]).all()
    assert np.array_equal(warped[:, middle + step :], coloured[:, middle + step :])
    # Position colours are near grey at B's centre only.
    assert is_pale(coloured[:, : middle - step]).mean() < 0.1
    # The confidence is shown for every match, valid or not.
    assert (confidence == confidence_colours(np.array(1.0))).all()


def test_a_single_match_stays_visible():
    view = matched_with_itself(np.full((60, 80, 3), 90, np.uint8), 4)
    view = replace(view, image_b=np.full((60, 80, 3), (255, 0, 0), np.uint8))
    single = np.zeros_like(view.valid)
    single[7, 9] = True
    warped = panels(draw_matches(replace(view, valid=single)), view)[0]
    assert (warped[..., 0] - warped[..., 1]).max() > 120
    # And is no larger than the square of its neighbours.
    assert (~is_pale(warped)).mean() < 1.3 * 4 / single.size


def test_panel_colours_are_positions_in_b():
    view = matched_with_itself(np.full((60, 80, 3), 90, np.uint8), 1)
    # B is A turned by half a turn.
    view = replace(view, matches=view.matches[::-1, ::-1])
    coloured = panels(draw_matches(view), view)[1]
    for at, corner in (((0, 0), (79, 59)), ((-1, -1), (0, 0)), ((0, -1), (0, 59)), ((-1, 0), (79, 0))):
        colour = position_colours(np.array(corner), (60, 80)).astype(int)
        others = [position_colours(np.array(each), (60, 80)) for each in ((0, 0), (79, 0), (0, 59), (79, 59))]
        # The grey of A is mixed in; what a channel has more than another remains.
        hues = [(each - each.mean()) / np.ptp(each) for each in (coloured[at], *others)]
        distances = [np.abs(hues[0] - hue).sum() for hue in hues[1:]]
        nearest = others[int(np.argmin(distances))].astype(int)
        assert (nearest == colour).all()


def test_the_frame_of_b_is_the_key_of_its_colours():
    view = make_view((60, 80), (60, 80), valid=False)
    pixels = np.asarray(draw_matches(view))
    size = 60, 80
    # The frame's right edge is that of the sheet's content; the pair is 1512 pixels wide without it.
    column = pixels[:, -25]
    first = int(np.argmax((column != 255).any(-1)))
    tall = round(1512 / 2 * 60 / 80) + 20
    left = pixels.shape[1] - 24 - 756 - 20
    assert (pixels[first - 1, left:-24] == 255).all()
    for at, corner in (
        ((first, left), (0, 0)),
        ((first, -25), (79, 0)),
        ((first + tall - 1, left), (0, 59)),
        ((first + tall - 1, -25), (79, 59)),
    ):
        colour = position_colours(np.array(corner), size).astype(int)
        # Of the 8 x 8 fields those at the right top and left bottom are dark.
        light = 1 if corner in ((0, 0), (79, 59)) else 0.75
        assert np.abs(pixels[at] - light * colour).max() <= 1


def test_inliers_have_their_colour():
    view = make_view((60, 80), (60, 80))
    inliers = np.zeros((15, 20), bool)
    inliers[:, :10] = True
    plain, half, all_of_them = (
        draw_matches(replace(view, inliers=each)) for each in (None, inliers, np.ones_like(inliers))
    )
    assert count(plain, INLIER, 3) + count(plain, OUTLIER, 3) < 600
    assert count(half, INLIER, 3) > 2_000
    assert count(half, OUTLIER, 3) > 1_000
    # Only the legend's dot is left.
    assert count(all_of_them, OUTLIER, 3) < 600 < 2_000 < count(all_of_them, INLIER, 3)


def test_lines_are_confident_where_any_match_is(monkeypatch):
    view = make_view((60, 80), (60, 80))
    confidence = np.full(view.valid.shape, 0.3)
    confidence[::3, ::4] = np.linspace(0.5, 1, 25).reshape(5, 5)
    view = replace(view, confidence=confidence, inliers=confidence >= 0.5)
    sheet = draw_matches(view)
    assert count(sheet, OUTLIER, 3) < 600 < 1_000 < count(sheet, INLIER, 3)
    texts = [text for text, _ in written(monkeypatch, view)]
    assert "25 of 300 valid matches: confidence of at least 0.5, spread over A." in texts
    assert {"Of the 25 lines:", "25 inliers", "0 outliers"} <= set(texts)
    # Where none is confident, the best are drawn and the title says what they are.
    doubtful = replace(view, confidence=np.where(view.inliers, 0.3, np.nextafter(0.5, 0)))
    sheet = draw_matches(doubtful)
    assert count(sheet, INLIER, 3) < 600 < 1_000 < count(sheet, OUTLIER, 3)
    texts = [text for text, _ in written(monkeypatch, doubtful)]
    assert "40 of 300 valid matches: the most confident, spread over A; none reaches 0.5." in texts
    # A confident match that is not valid is none.
    invalid = replace(doubtful, valid=~view.inliers, confidence=np.where(view.inliers, 0.9, 0.3))
    assert any("none reaches 0.5" in text for text, _ in written(monkeypatch, invalid))


def test_counts_of_one_are_singular(monkeypatch):
    view = make_view((60, 80), (60, 80), (1, 1), inliers=np.ones((1, 1), bool))
    texts = [text for text, _ in written(monkeypatch, replace(view, confidence=np.ones((1, 1))))]
    assert {"Of the 1 line:", "1 inlier", "0 outliers"} <= set(texts)
    assert "1 of 1 valid match: confidence of at least 0.5, spread over A." in texts
    assert "1 valid match." in [text for text, _ in written(monkeypatch, view, lines=0)]


def test_the_verdict_stands_above_the_title_of_the_lines(monkeypatch):
    view = make_view((60, 80), (60, 80), inliers=np.ones((15, 20), bool))
    texts = written(monkeypatch, replace(view, verdict="not verified: 9 of 300 agree"))
    above = texts.index(("a caption", 19))
    assert texts[above + 1] == ("Not verified: 9 of 300 agree", 22)
    assert "300 valid matches" in texts[above + 2][0]
    plain, short, long = (draw_matches(replace(view, verdict=text)) for text in ("", "verified", "verified " * 60))
    assert plain.height < short.height < long.height


def test_verified_matches_are_drawn_as_inliers():
    pytest.importorskip("cv2")
    found = match_images(CAT, CAT, size=96, step=4, normalize="pixel", verify="homography")
    assert count(found.draw(), INLIER, 3) > 1_000
    assert count(replace(found, inliers=~found.inliers).draw(), OUTLIER, 3) > 1_000
    assert count(replace(found, inliers=None).draw(), INLIER, 3) < 600
    # The verdict has a line of its own.
    assert found.draw().height > replace(found, verification=None).draw().height + 20


def test_position_colours_are_bright_distinct_and_smooth():
    ys, xs = np.mgrid[:40, :50]
    colours = position_colours(np.stack([xs, ys], axis=-1), (40, 50)).astype(int)
    corners = colours[[0, 0, -1, -1], [0, -1, 0, -1]]
    differences = np.abs(corners[:, None] - corners[None]).sum(-1)
    assert (differences[~np.eye(4, dtype=bool)] > 150).all()
    assert (colours.max(-1) == 255).all()
    assert max(np.abs(np.diff(colours, axis=axis)).max() for axis in (0, 1)) < 25


def test_confidence_colours_are_monotone_and_bounded():
    grey = confidence_colours(np.linspace(0, 1, 20)) @ np.array([0.3, 0.6, 0.1])
    assert (np.diff(grey) > 0).all()
    odd = confidence_colours(np.array([-np.inf, np.nan, np.inf, 7.0]))
    assert np.array_equal(odd, confidence_colours(np.array([0.0, 0.0, 1.0, 1.0])))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("points", np.zeros((3, 4, 2), int), "points must be"),
        ("confidence", np.zeros(7), "confidence must be"),
        ("valid", np.zeros(7, bool), "for valid"),
        ("inliers", np.zeros((3, 3), bool), "inliers must be"),
        ("image_a", np.zeros((4, 4), np.uint8), "image_a must be"),
        ("image_b", np.zeros((4, 4, 3)), "uint8, got"),
    ],
)
def test_arrays_that_do_not_fit_are_named(field, value, message):
    with pytest.raises(ValueError, match=message):
        draw_matches(replace(make_view(), **{field: value}))


def test_sheet_can_be_saved(tmp_path):
    sheet = draw_matches(make_view())
    sheet.save(tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as again:
        assert np.array_equal(again, sheet)
