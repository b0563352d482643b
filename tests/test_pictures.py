"""The drawn matches: right sizes at any aspect ratio, and pixels that show what they say."""

import numpy as np
import pytest
from PIL import Image

from lift_fast.pictures import MatchView, confidence_colours, draw_matches, even_sample, position_colours


def make_view(size_a=(60, 80), size_b=(50, 40), grid=(15, 20), valid=None, **options):
    random = np.random.default_rng(0)
    count = grid[0] * grid[1]
    ys, xs = (np.linspace(0, n - 1, g).astype(int) for n, g in zip(size_a, grid, strict=True))
    points = np.stack(np.meshgrid(xs, ys), axis=-1).reshape(-1, 2)
    matches = np.stack([random.integers(size_b[1], size=count), random.integers(size_b[0], size=count)], axis=1)
    valid = np.ones(count, bool) if valid is None else np.full(count, valid)
    return MatchView(
        picture_a=random.integers(255, size=(*size_a, 3), dtype=np.uint8),
        picture_b=random.integers(255, size=(*size_b, 3), dtype=np.uint8),
        points=points,
        matches=np.where(valid[:, None], matches, -1),
        similarity=np.where(valid, random.random(count), -np.inf),
        valid=valid,
        grid=grid,
        **{"caption": "a caption", **options},
    )


@pytest.mark.parametrize(
    ("size_a", "size_b"), [((60, 80), (50, 40)), ((8, 400), (400, 8)), ((1, 1), (2, 3)), ((1200, 900), (16, 16))]
)
def test_every_aspect_ratio_is_drawn(size_a, size_b):
    sheet = draw_matches(make_view(size_a, size_b, grid=(1, 1) if size_a == (1, 1) else (4, 5)))
    assert sheet.mode == "RGB"
    assert sheet.width == 1600
    assert 200 < sheet.height < 2000


def test_no_match_at_all_is_drawn_without_lines():
    without = np.asarray(draw_matches(make_view(valid=False)))
    none = np.asarray(draw_matches(make_view(valid=False), lines=1))
    assert np.array_equal(without, none)
    assert (without == (90, 90, 90)).all(-1).sum() > 10_000


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


def test_identity_warp_shows_the_picture_itself():
    view = make_view(size_a=(64, 64), size_b=(64, 64), grid=(64, 64))
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[:32] = (255, 0, 0)
    view = MatchView(**{**vars(view), "picture_b": picture, "matches": view.points})
    sheet = draw_matches(view)
    red = (np.asarray(sheet)[sheet.height // 2 :] == (255, 0, 0)).all(-1)
    # Half of one panel of the lower row, 380 pixels wide.
    assert red.sum() > 300 * 150


def test_position_colours_are_distinct_and_monotone():
    corners = position_colours(np.array([[0, 0], [9, 0], [0, 9], [9, 9]]), (10, 10)).astype(int)
    differences = np.abs(corners[:, None] - corners[None]).sum(-1)
    assert (differences[~np.eye(4, dtype=bool)] > 100).all()
    grey = confidence_colours(np.linspace(0, 1, 20)) @ np.array([0.3, 0.6, 0.1])
    assert (np.diff(grey) > 0).all()


def test_sample_is_even_and_blind_to_similarity():
    valid = np.ones(400, bool)
    chosen = even_sample((20, 20), valid, 25)
    assert len(chosen) == 25
    assert len(set((chosen // 20).tolist())) == len(set((chosen % 20).tolist())) == 5
    valid[chosen[:5]] = False
    assert set(even_sample((20, 20), valid, 25)) == set(chosen[5:])
    assert len(even_sample((1, 1), np.ones(1, bool), 40)) == 1


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("points", np.zeros((3, 2), int), "points must be"),
        ("valid", np.zeros(7, bool), "valid must be"),
        ("picture_a", np.zeros((4, 4), np.uint8), "picture_a must be"),
        ("picture_b", np.zeros((4, 4, 3)), "uint8, got"),
    ],
)
def test_arrays_that_do_not_fit_are_named(field, value, message):
    with pytest.raises(ValueError, match=message):
        draw_matches(MatchView(**{**vars(make_view()), field: value}))


def test_sheet_can_be_saved(tmp_path):
    draw_matches(make_view()).save(tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as again:
        assert again.size[0] == 1600
