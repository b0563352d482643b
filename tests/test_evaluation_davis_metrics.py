"""The measures of DAVIS 2017 against their definitions in plain loops, and cases worked out by hand."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lift_fast.evaluation.davis.metrics import boundary, boundary_f, jaccard, statistics


def boundary_by_loops(mask):
    """A pixel is on the boundary if its right, lower or lower right neighbour differs, as far as they exist.

    On the last row and column only the neighbour along them counts.
    """
    height, width = mask.shape
    edge = np.zeros_like(mask)
    for y in range(height):
        for x in range(width):
            right, below = x + 1 < width, y + 1 < height
            edge[y, x] = (
                (right and mask[y, x] != mask[y, x + 1])
                or (below and mask[y, x] != mask[y + 1, x])
                or (right and below and mask[y, x] != mask[y + 1, x + 1])
            )
    return edge


def f_by_loops(truth, guess, radius):
    """Every boundary pixel is compared with every other."""
    points = [np.argwhere(boundary_by_loops(mask)) for mask in (guess, truth)]
    if not len(points[0]) or not len(points[1]):
        return float(len(points[0]) == len(points[1]))
    shares = []
    for a, b in (points, points[::-1]):
        hits = sum(any((p[0] - q[0]) ** 2 + (p[1] - q[1]) ** 2 <= radius**2 for q in b) for p in a)
        shares.append(hits / len(a))
    return 2 * shares[0] * shares[1] / sum(shares) if sum(shares) else 0.0


def j_by_loops(truth, guess):
    both = either = 0
    for a, b in zip(truth.ravel(), guess.ravel(), strict=True):
        both += int(a and b)
        either += int(a or b)
    return both / either if either else 1.0


def statistics_by_loops(values):
    """Bins from the published rule: five marks from 1 to n, rounded; each bin holds both of its marks."""
    n = len(values)
    marks = []
    for i in range(5):
        exact = 1 + (n - 1) * i / 4 + 1e-10
        # To the nearest, halves to the even one: after the addition there are none.
        marks.append(math.floor(exact + 0.5) - 1)
    bins = [values[marks[i] : marks[i + 1] + 1] for i in range(4)]
    mean = sum(values) / n
    return mean, sum(v > 0.5 for v in values) / n, sum(bins[0]) / len(bins[0]) - sum(bins[3]) / len(bins[3])


def blob(random, height, width):
    """Boxes, single pixels, nothing or everything."""
    mask = np.zeros((height, width), dtype=bool)
    for _ in range(random.integers(0, 4)):
        y, x = random.integers(0, height), random.integers(0, width)
        mask[y : y + random.integers(1, height + 1), x : x + random.integers(1, width + 1)] ^= True
    return mask


@settings(max_examples=150, deadline=None)
@given(height=st.integers(1, 14), width=st.integers(1, 17), radius=st.integers(1, 5), seed=st.integers(0, 1 << 30))
def test_j_and_f_against_loops(height, width, radius, seed):
    random = np.random.default_rng(seed)
    truth, guess = blob(random, height, width), blob(random, height, width)
    assert np.array_equal(boundary(truth), boundary_by_loops(truth))
    assert jaccard(truth, guess) == j_by_loops(truth, guess)
    assert boundary_f(truth, guess, tolerance=radius) == pytest.approx(f_by_loops(truth, guess, radius), abs=1e-15)
    # Precision and recall change places.
    assert boundary_f(guess, truth, tolerance=radius) == pytest.approx(boundary_f(truth, guess, tolerance=radius))
    void = random.random((height, width)) < 0.2
    assert jaccard(truth, guess, void) == j_by_loops(truth & ~void, guess & ~void)
    assert boundary_f(truth, guess, void, tolerance=radius) == boundary_f(
        truth & ~void, guess & ~void, tolerance=radius
    )


@settings(max_examples=150, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=130))
def test_statistics_against_loops(values):
    assert statistics(values) == pytest.approx(statistics_by_loops(values), abs=1e-12)


def test_the_disk_has_the_published_radius():
    # 480 x 854: the diagonal is 979.67 pixels, 0.008 of it 7.84, so 8 pixels and no more.
    for shift, expected in ((8, 1.0), (9, 0.0)):
        truth, guess = np.zeros((480, 854), bool), np.zeros((480, 854), bool)
        truth[:, 100:] = True
        guess[:, 100 + shift :] = True
        assert boundary_f(truth, guess) == expected
    # Diagonally (5, 6) is nearer than 8, (6, 6) is not: 36 + 36 > 64.
    for dy, dx, expected in ((5, 6, 1.0), (6, 6, 0.0)):
        truth, guess = np.zeros((480, 854), bool), np.zeros((480, 854), bool)
        truth[200, 300], guess[200 + dy, 300 + dx] = True, True
        found = boundary_f(truth, guess)
        assert found == 1.0 if expected else found < 1.0


def test_f_by_hand():
    # One pixel has four boundary pixels: itself, and those left, above and above left of it.
    truth = np.zeros((6, 8), bool)
    truth[2, 3] = True
    assert sorted(map(tuple, np.argwhere(boundary(truth)))) == [(1, 2), (1, 3), (2, 2), (2, 3)]
    # 0.008 of the diagonal of 10 is less than a pixel; it is rounded up to 1. A pixel moved by two columns: the
    # boundary columns 2 and 3 face 4 and 5; with radius 1 the nearer column of each matches, half of them.
    guess = np.zeros((6, 8), bool)
    guess[2, 5] = True
    assert boundary_f(truth, guess) == 0.5
    assert boundary_f(truth, guess, tolerance=2) == 1.0
    assert jaccard(truth, guess) == 0.0


def test_masks_that_are_empty_or_full():
    nothing, everything = np.zeros((5, 7), bool), np.ones((5, 7), bool)
    some = nothing.copy()
    some[2, 2] = True
    assert jaccard(nothing, nothing) == boundary_f(nothing, nothing) == 1.0
    assert jaccard(some, nothing) == boundary_f(some, nothing) == boundary_f(nothing, some) == 0.0
    # A mask without an edge inside the image has no boundary.
    assert boundary_f(everything, everything) == boundary_f(everything, nothing) == 1.0
    assert boundary_f(everything, some) == 0.0
    assert jaccard(everything, nothing) == 0.0
    # Where all is void, nothing disagrees.
    assert jaccard(some, nothing, everything) == boundary_f(some, nothing, everything) == 1.0


def test_statistics_by_hand():
    # 9 frames: marks 1, 3, 5, 7, 9; the first bin holds frames 1 to 3, the last 7 to 9.
    values = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]
    mean, recall, decay = statistics(values)
    assert mean == pytest.approx(0.6)
    assert recall == pytest.approx(5 / 9)  # 0.5 itself is not above the threshold
    assert decay == pytest.approx(0.9 - 0.3)
    # 3 frames: marks 1, 1.5, 2, 2.5, 3; halves go up, so the first bin holds frames 1 and 2, the last frame 3.
    assert statistics([0.9, 0.5, 0.1]).decay == pytest.approx(0.7 - 0.1)
    assert statistics([0.7]) == pytest.approx((0.7, 1.0, 0.0))
    # More frames than a byte can number.
    assert statistics(np.r_[np.ones(200), np.zeros(200)]).decay == pytest.approx(1.0)


def test_nan_is_no_frame():
    mean, recall, decay = statistics([1.0, math.nan, 0.0, 0.0])
    assert (mean, recall) == pytest.approx((1 / 3, 1 / 4))
    assert decay == pytest.approx(1.0)
    assert all(math.isnan(value) for value in statistics([math.nan])[::2])


def test_bad_input_is_named():
    mask = np.zeros((3, 4), bool)
    for measure in (jaccard, boundary_f):
        with pytest.raises(ValueError, match=r"one size, got \[3, 4\] and \[4, 3\]"):
            measure(mask, mask.T)
        with pytest.raises(ValueError, match=r"void pixels \[4, 3\] do not fit masks \[3, 4\]"):
            measure(mask, mask, mask.T)
    with pytest.raises(ValueError, match="at least one frame"):
        statistics([])
