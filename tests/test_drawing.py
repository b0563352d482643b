"""The drawn matches: right sizes at any aspect ratio, and pixels that show what they say."""

import numpy as np
import pytest
from PIL import Image

from lift_fast.drawing import MatchView, confidence_colours, draw_matches, even_sample, position_colours


def make_view(size_a=(60, 80), size_b=(50, 40), grid=(15, 20), valid=None, **options):
    random = np.random.default_rng(0)
    ys, xs = (np.linspace(0, n - 1, g).astype(int) for n, g in zip(size_a, grid, strict=True))
    matches = np.stack([random.integers(size_b[1], size=grid), random.integers(size_b[0], size=grid)], axis=-1)
    valid = np.ones(grid, bool) if valid is None else np.full(grid, valid)
    return MatchView(
        image_a=random.integers(255, size=(*size_a, 3), dtype=np.uint8),
        image_b=random.integers(255, size=(*size_b, 3), dtype=np.uint8),
        points=np.stack(np.meshgrid(xs, ys), axis=-1),
        matches=np.where(valid[..., None], matches, -1),
        similarity=np.where(valid, random.random(grid), -np.inf),
        confidence=np.where(valid, random.random(grid), 0),
        valid=valid,
        **{"caption": "a caption", **options},
    )


def hatched(sheet):
    """How many pixels have one of the two greys of the stripes."""
    pixels = np.asarray(sheet)
    return sum((pixels == grey).all(-1).sum() for grey in (150, 220))


@pytest.mark.parametrize(
    ("size_a", "size_b"), [((60, 80), (50, 40)), ((8, 400), (400, 8)), ((1, 1), (2, 3)), ((1200, 900), (16, 16))]
)
def test_every_aspect_ratio_is_drawn(size_a, size_b):
    sheet = draw_matches(make_view(size_a, size_b, grid=(1, 1) if size_a == (1, 1) else (4, 5)))
    assert sheet.mode == "RGB"
    assert sheet.width == 1600
    assert 200 < sheet.height < 2200


def test_no_match_at_all_is_drawn_without_lines():
    without = np.asarray(draw_matches(make_view(valid=False)))
    none = np.asarray(draw_matches(make_view(valid=False), lines=1))
    assert np.array_equal(without, none)
    # Four panels of the sheet, each 512 pixels wide and 384 high.
    assert hatched(without) > 0.99 * 4 * 512 * 384
    assert hatched(draw_matches(make_view())) < 1000


def test_lines_are_drawn():
    few, many = (np.asarray(draw_matches(make_view(), lines=n)) for n in (1, 60))
    assert (few != many).any(-1).sum() > 5_000


def test_warning_is_a_banner():
    plain = draw_matches(make_view())
    warned = draw_matches(make_view(warning="random weights"))
    assert warned.height > plain.height
    assert warned.getpixel((2, 2)) == (176, 32, 32)
    assert plain.getpixel((2, 2)) == (255, 255, 255)


def test_long_captions_wrap():
    assert draw_matches(make_view(caption="word " * 200)).height > draw_matches(make_view()).height + 40


def test_identity_warp_shows_the_image_itself():
    view = make_view(size_a=(64, 64), size_b=(64, 64), grid=(64, 64))
    image = np.zeros((64, 64, 3), np.uint8)
    image[:32] = (255, 0, 0)
    view = MatchView(**{**vars(view), "image_b": image, "matches": view.points})
    sheet = draw_matches(view)
    red = (np.asarray(sheet)[sheet.height // 3 :] == (255, 0, 0)).all(-1)
    # The upper half of one panel, 512 pixels wide and high; B itself is in the first row and tinted in the third.
    assert red.sum() > 0.9 * 512 * 256


def test_position_colours_are_distinct_and_monotone():
    corners = position_colours(np.array([[0, 0], [9, 0], [0, 9], [9, 9]]), (10, 10)).astype(int)
    differences = np.abs(corners[:, None] - corners[None]).sum(-1)
    assert (differences[~np.eye(4, dtype=bool)] > 100).all()
    grey = confidence_colours(np.linspace(0, 1, 20)) @ np.array([0.3, 0.6, 0.1])
    assert (np.diff(grey) > 0).all()


def test_matches_that_do_not_hold_are_hatched_only_there():
    half = np.zeros((15, 20), bool)
    half[:, :10] = True
    view = make_view()
    sheet = draw_matches(MatchView(**{**vars(view), "valid": half}))
    # Confidence and similarity are shown for all matches; the other two panels are half hatched.
    assert abs(hatched(sheet) / (512 * 384) - 1) < 0.02


def test_sample_is_even_and_blind_to_similarity():
    valid = np.ones((20, 20), bool)
    chosen = even_sample(valid, 25)
    assert chosen.shape == (25, 2)
    assert all(len(set(axis.tolist())) == 5 for axis in chosen.T)
    valid[tuple(chosen[:5].T)] = False
    again = even_sample(valid, 25)
    assert valid[tuple(again.T)].all()
    # Each field of 4 x 4 points still gives one, the next nearest to its centre.
    assert {tuple(field) for field in (again // 4).tolist()} == {(y, x) for y in range(5) for x in range(5)}
    assert np.array_equal(again[5:], chosen[5:])
    assert len(even_sample(np.ones((1, 1), bool), 40)) == 1
    assert len(even_sample(np.zeros((7, 5), bool), 40)) == 0
    for rows, columns, count in ((100, 2, 5), (2, 100, 5), (3, 7, 1)):
        assert 1 <= len(even_sample(np.ones((rows, columns), bool), count)) <= count


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("points", np.zeros((3, 4, 2), int), "points must be"),
        ("confidence", np.zeros(7), "confidence must be"),
        ("valid", np.zeros(7, bool), "for valid"),
        ("image_a", np.zeros((4, 4), np.uint8), "image_a must be"),
        ("image_b", np.zeros((4, 4, 3)), "uint8, got"),
    ],
)
def test_arrays_that_do_not_fit_are_named(field, value, message):
    with pytest.raises(ValueError, match=message):
        draw_matches(MatchView(**{**vars(make_view()), field: value}))


def test_sheet_can_be_saved(tmp_path):
    draw_matches(make_view()).save(tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as again:
        assert again.size[0] == 1600
