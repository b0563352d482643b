"""A sample of matches: confident and spread. The field between its points: interpolated, never across a jump."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lift_fast.match_field import between_points, enlarge, grid_positions, interpolate, spread_sample


def test_the_most_confident_come_first():
    random = np.random.default_rng(0)
    valid, confidence = random.random((61, 83)) < 0.6, random.random((61, 83))
    chosen = spread_sample(valid, confidence, 40)
    values = confidence[tuple(chosen.T)]
    assert chosen.shape == (40, 2)
    assert valid[tuple(chosen.T)].all()
    assert values[0] == confidence[valid].max()
    assert (np.diff(values) <= 0).all()
    # Each is far better than its surroundings: an even sample that ignores confidence has a mean of 0.5.
    assert values.mean() > 0.97
    assert np.array_equal(chosen, spread_sample(valid, confidence, 40))


@pytest.mark.parametrize("grid", [(40, 40), (13, 101), (101, 13)])
def test_the_sample_is_spread_although_one_corner_is_best(grid):
    random = np.random.default_rng(1)
    # All of the best are in one corner.
    rows, columns = np.indices(grid)
    confidence = random.random(grid) * 0.1 + 0.9 * ((rows < grid[0] // 4) & (columns < grid[1] // 4))
    count = 36
    chosen = spread_sample(np.ones(grid, bool), confidence, count)
    apart = np.sqrt(np.square(chosen[:, None] - chosen[None]).sum(-1)) + 1e9 * np.eye(count)
    spacing = np.sqrt(rows.size / count)
    assert apart.min() > 0.45 * spacing
    # No place of the grid is far from a chosen one.
    every = np.stack([rows.ravel(), columns.ravel()], axis=-1)
    far = np.sqrt(np.square(every[:, None] - chosen[None]).sum(-1)).min(1).max()
    assert far < 2.0 * spacing


@pytest.mark.parametrize("count", [1, 7, 40, 500])
@pytest.mark.parametrize("grid", [(1, 1), (1, 53), (37, 2), (19, 23)])
def test_as_many_as_there_are(grid, count):
    random = np.random.default_rng(count)
    valid = random.random(grid) < 0.4
    chosen = spread_sample(valid, random.random(grid), count)
    assert len(chosen) == len(np.unique(chosen, axis=0)) <= count
    assert valid[tuple(chosen.T)].all()
    assert len(chosen) == min(count, valid.sum())
    assert len(spread_sample(np.zeros(grid, bool), random.random(grid), count)) == 0


@pytest.mark.parametrize("count", [1001, 5000, 100_000])
def test_thousands_of_points_are_spread_too(count):
    random = np.random.default_rng(count)
    valid, confidence = random.random((190, 210)) < 0.5, random.random((190, 210)).astype(np.float32)
    chosen = spread_sample(valid, confidence, count)
    assert len(np.unique(chosen, axis=0)) == len(chosen) == min(count, valid.sum())
    assert valid[tuple(chosen.T)].all()
    assert (np.diff(confidence[tuple(chosen.T)]) <= 0).all()
    # Each of 5 x 5 parts has its share.
    parts = np.histogram2d(*chosen.T, bins=5, range=((0, 190), (0, 210)))[0]
    assert parts.min() > 0.7 * len(chosen) / 25


def test_no_lines():
    assert spread_sample(np.ones((3, 4), bool), np.ones((3, 4)), 0).shape == (0, 2)


def test_a_small_valid_part_still_gives_the_count():
    valid = np.zeros((100, 120), bool)
    valid[30:42, 50:64] = True
    assert len(spread_sample(valid, np.ones((100, 120)), 40)) == 40


@pytest.mark.parametrize("grid", [(2, 2), (7, 5), (1, 6), (5, 1), (1, 1), (11, 13)])
def test_an_affine_field_is_met_exactly(grid):
    random = np.random.default_rng(sum(grid))
    rows, columns = random.uniform(0, grid[0] - 1, 23), random.uniform(0, grid[1] - 1, 17)
    matrix, shift = random.integers(-3, 4, (2, 2)), random.integers(0, 50, 2)
    ys, xs = np.indices(grid)
    matches = np.stack([xs, ys], axis=-1) @ matrix + shift
    xy, covered = between_points(matches, np.ones(grid, bool), columns, rows, reach=7.0)
    places = np.stack(np.meshgrid(columns, rows), axis=-1)
    assert np.abs(xy - (places @ matrix + shift)).max() < 1e-4
    assert np.abs(covered - 1).max() < 1e-6


def test_nothing_is_invented_across_a_jump():
    random = np.random.default_rng(2)
    ys, xs = np.indices((20, 30))
    # Two surfaces, the right one 100 pixels away in B; the border between them is ragged.
    right = xs > 12 + random.integers(0, 4, (20, 1))
    matches = np.stack([xs + 100 * right, ys], axis=-1)
    columns, rows = np.linspace(0, 29, 211), np.linspace(0, 19, 97)
    xy, _ = between_points(matches, np.ones((20, 30), bool), columns, rows, reach=3.0)
    on_left, on_right = xy[..., 0] <= 16, xy[..., 0] >= 112
    assert (on_left | on_right).all()
    assert on_left.any()
    assert on_right.any()
    # Away from the border each pixel has its own surface's match.
    clear = (columns < 11) | (columns > 17)
    expected = columns + 100 * (columns > 14)
    assert np.abs(xy[:, clear, 0] - expected[clear]).max() < 1e-4


def test_invalid_points_take_no_part():
    random = np.random.default_rng(3)
    valid = random.random((15, 14)) < 0.5
    ys, xs = np.indices(valid.shape)
    matches = np.where(valid[..., None], np.stack([xs, ys], axis=-1) * 2 + 40, random.integers(-9, 200, (15, 14, 2)))
    columns, rows = random.uniform(0, 13, 40), random.uniform(0, 14, 50)
    xy, covered = between_points(matches, valid, columns, rows, reach=8.0)
    assert np.array_equal(covered == 0, (xy == -1).all(-1))
    for i, y in enumerate(rows):
        for j, x in enumerate(columns):
            around = valid[int(y) : int(y) + 2, int(x) : int(x) + 2]
            assert (covered[i, j] > 0) == around.any()
            if around.any():
                # Within the square of the four points.
                assert np.abs(xy[i, j] - 40 - 2 * np.array([x, y])).max() <= 2.0001


def test_places_on_the_grid_have_weight_one():
    valid = np.zeros((4, 5), bool)
    valid[2, 3] = True
    matches = np.full((4, 5, 2), 9)
    xy, covered = between_points(matches, valid, np.arange(5.0), np.arange(4.0), reach=1.0)
    assert np.array_equal(covered > 0, valid)
    assert covered[2, 3] == 1
    assert xy[2, 3].tolist() == [9, 9]


def test_positions_are_clamped_to_the_grid():
    assert grid_positions(np.array([2, 6, 10]), np.array([-5.0, 2, 5, 10, 99])).tolist() == [0, 0, 0.75, 2, 2]
    assert grid_positions(np.array([7]), np.array([-5.0, 7, 99])).tolist() == [0, 0, 0]


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (8, 1), (7, 11)])
def test_bilinear_as_pytorch(size):
    random = np.random.default_rng(size[0])
    image = random.integers(0, 256, (*size, 3), dtype=np.uint8)
    columns, rows = random.uniform(0, size[1] - 1, 19), random.uniform(0, size[0] - 1, 23)
    xy = np.stack(np.meshgrid(columns, rows), axis=-1)
    place = torch.from_numpy((xy + 0.5) / (size[1], size[0]) * 2 - 1)[None]
    expected = F.grid_sample(
        torch.from_numpy(image).double().permute(2, 0, 1)[None], place, padding_mode="border", align_corners=False
    )[0]
    found = interpolate(image, xy)
    assert np.abs(found - expected.permute(1, 2, 0).numpy()).max() < 1e-3
    assert np.abs(enlarge(image[..., 1].astype(float), columns, rows) - expected[1].numpy()).max() < 1e-3
    # Beyond the border the border counts.
    outside = interpolate(image, np.array([[[-9.0, -9.0], [99.0, 99.0]]]))
    assert np.array_equal(outside[0], image[[0, -1], [0, -1]])
