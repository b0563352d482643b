"""Confidence: local affine maps against one plain weighted least-squares fit per cell, and what it must never be."""

import math

import numpy as np
import pytest
import torch

from lift_fast.confidence import LocalMaps

RADIUS, SCALES, RIDGE = 6, [8 * 0.05 ** (fit / 7) for fit in range(8)], 1.0


def layout(height, width, random):
    """Pixels close to the centres of cells."""
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    return np.stack([columns, rows], -1) + random.uniform(0.4, 0.6, (height, width, 2))


def affine(at, noise, random, wrong=0.0, size=40):
    """Matches by an affine map, a share of them anywhere."""
    to = at @ np.array([[1.1, 0.2], [-0.1, 0.9]]) + [3.0, 2.0] + random.normal(0, noise, at.shape)
    lost = random.random(at.shape[:2]) < wrong
    to[lost] = random.uniform(0, size, (int(lost.sum()), 2))
    return to, lost


def plain(at, to, start):
    """Confidence of every cell by a loop over cells, windows and fits."""
    height, width = start.shape
    weight, found = start.copy(), np.zeros((height, width))
    windows = [
        (slice(max(0, y - RADIUS), y + RADIUS + 1), slice(max(0, x - RADIUS), x + RADIUS + 1))
        for y in range(height)
        for x in range(width)
    ]
    for scale in SCALES:
        squared = np.zeros((height, width))
        for cell, window in enumerate(windows):
            y, x = divmod(cell, width)
            w, a, moved = weight[window].ravel(), at[window].reshape(-1, 2), (to - at)[window].reshape(-1, 2)
            total = max(w.sum(), 1e-12)
            mean_a, mean_moved = (w @ a) / total, (w @ moved) / total
            away = a - mean_a
            covariance = (away * w[:, None]).T @ away / total + RIDGE * np.eye(2)
            slopes = np.linalg.solve(covariance, (away * w[:, None]).T @ (moved - mean_moved) / total)
            predicted = at[y, x] + mean_moved + (at[y, x] - mean_a) @ slopes
            squared[y, x] = ((predicted - to[y, x]) ** 2).sum()
        weight = start * np.exp(-squared / (2 * scale**2))
    for cell, window in enumerate(windows):
        y, x = divmod(cell, width)
        support = weight[window].mean()
        found[y, x] = 1 / (1 + (squared[y, x] / 0.17) ** 2) * support**2 / (support**2 + 0.05**2)
    return found


@pytest.mark.parametrize(("height", "width"), [(9, 17), (16, 5), (1, 23), (7, 1)])
def test_equals_a_loop_of_least_squares(height, width):
    random = np.random.default_rng(height)
    at = layout(height, width, random)
    to, _ = affine(at, 0.2, random, wrong=0.4)
    start = random.uniform(0, 1, (height, width)) * (random.random((height, width)) < 0.8)
    given = [torch.from_numpy(value) for value in (at, to)]
    maps = LocalMaps(*given, torch.from_numpy(start))
    expected = plain(at, to, start)
    assert np.abs(maps.confidence(*given).numpy() - expected).max() < 1e-4
    assert expected.max() > 0.3


def test_right_matches_come_before_wrong_ones():
    random = np.random.default_rng(1)
    at = layout(30, 30, random)
    to, lost = affine(at, 0.1, random, wrong=0.7)
    given = [torch.from_numpy(value).float() for value in (at, to)]
    confidence = LocalMaps(*given, torch.ones(30, 30)).confidence(*given).numpy()
    assert np.median(confidence[~lost]) > 0.8
    assert np.median(confidence[lost]) < 1e-3
    order = np.argsort(-confidence.ravel())[: int((~lost).sum() * 0.9)]
    assert lost.ravel()[order].mean() < 0.05
    # Matches at random have no maps to agree with.
    to = random.uniform(0, 30, (30, 30, 2))
    given[1] = torch.from_numpy(to).float()
    assert float(LocalMaps(*given, torch.ones(30, 30)).confidence(*given).mean()) < 0.05


def test_any_pixel_is_judged_by_the_map_of_its_cell():
    random = np.random.default_rng(2)
    at = layout(20, 24, random)
    to, _ = affine(at, 0, random)
    maps = LocalMaps(torch.from_numpy(at), torch.from_numpy(to), torch.ones(20, 24))
    points = random.uniform(0, [24, 20], (500, 2))
    there, _ = affine(points[None], 0, random)
    points, there = torch.from_numpy(points).float(), torch.from_numpy(there[0]).float()
    assert maps.confidence(points, there).min() > 0.9
    half = math.sqrt(0.17)
    moved = maps.confidence(points, there + torch.tensor([half, 0.0]))
    # The ridge flattens slopes, most at the border.
    assert (moved / maps.confidence(points, there) - 0.5).abs().median() < 0.05
    assert maps.confidence(points[0], there[0]).shape == ()


def test_without_matches_it_is_zero_and_never_nan():
    at = torch.rand(5, 7, 2) + torch.stack(torch.meshgrid(torch.arange(7), torch.arange(5), indexing="xy"), -1)
    nothing = LocalMaps(at, torch.full((5, 7, 2), -0.1), torch.zeros(5, 7))
    assert (nothing.confidence(at, at) == 0).all()
    assert (nothing.support == 0).all()
    weight = torch.zeros(5, 7)
    weight[2, 3] = 1
    for start in (weight, torch.full((5, 7), 1e-30)):
        confidence = LocalMaps(at, at * 1e6, start).confidence(at, at * 1e6)
        assert confidence.isfinite().all()
        assert ((confidence >= 0) & (confidence <= 1)).all()
