"""verify_pairs: the matrix of synthetic pairs, and pairs that carry none."""

import builtins

import numpy as np
import pytest
import torch

from lift_fast.geometry import KINDS, guessed_camera, verify_pairs

HOMOGRAPHY = np.array([[1.1, 0.2, -20.0], [-0.15, 0.9, 35.0], [2e-4, -1e-4, 1.0]])
CAMERAS = np.stack([guessed_camera((480, 640)), [[700.0, 0, 300], [0, 710, 250], [0, 0, 1]]])
TURN = np.array([[0.0, -0.1, 0.2], [0.1, 0.0, -0.05], [-0.2, 0.05, 0.0]])
ROTATION = np.linalg.inv(np.eye(3) - TURN) @ (np.eye(3) + TURN)
SHIFT = np.array([1.0, 0.2, 0.1])

pytest.importorskip("cv2")


def planar(random, count, wrong, noise=0.5):
    """Pairs of which the first ``count - wrong`` follow the homography."""
    a = random.uniform(0, 400, (count, 2))
    b = np.c_[a, np.ones(count)] @ HOMOGRAPHY.T
    b = b[:, :2] / b[:, 2:] + random.normal(0, noise, (count, 2))
    b[count - wrong :] = random.uniform(0, 400, (wrong, 2))
    return a, b


def solid(random, count, wrong, noise=0.3):
    """Projections of points in space into two cameras, and the fundamental matrix."""
    points = np.c_[random.uniform(-3, 3, (count, 2)), random.uniform(4, 12, count)]
    a = points @ CAMERAS[0].T
    b = (points @ ROTATION.T + SHIFT) @ CAMERAS[1].T
    a, b = a[:, :2] / a[:, 2:], b[:, :2] / b[:, 2:] + random.normal(0, noise, (count, 2))
    b[count - wrong :] = random.uniform(0, 600, (wrong, 2))
    x, y, z = SHIFT
    essential = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]]) @ ROTATION
    return a, b, essential


def corner_error(found, size=400):
    corners = np.array([[0, 0, 1], [size, 0, 1], [size, size, 1], [0, size, 1.0]]).T
    places = [matrix @ corners for matrix in (found, HOMOGRAPHY)]
    return float(np.linalg.norm(places[0][:2] / places[0][2] - places[1][:2] / places[1][2], axis=0).max())


@pytest.mark.parametrize("wrong", [0, 400, 900])
def test_homography_is_found_among_wrong_pairs(wrong):
    random = np.random.default_rng(wrong)
    a, b = planar(random, 1000, wrong)
    found = verify_pairs(a, torch.from_numpy(b), threshold=3)
    assert found.verified
    assert found.verdict.startswith("verified: ")
    assert corner_error(found.matrix) < 3
    assert found.matrix.dtype == np.float64
    assert (found.points, found.threshold, found.kind) == (1000, 3.0, "homography")
    right = 1000 - wrong
    assert right * 0.98 <= found.inliers <= right + 15
    assert found.share == found.inliers / 1000
    # The mask is the distance of the projection, whatever OpenCV calls an inlier.
    there = np.c_[a, np.ones(1000)] @ found.matrix.T
    distance = np.linalg.norm(there[:, :2] / there[:, 2:] - b, axis=1)
    assert np.allclose(found.distances(a, b), distance)
    assert (found.agrees(a, b) == (distance <= 3)).all()
    assert found.agrees(a, b).sum() == found.inliers


@pytest.mark.parametrize("kind", ["fundamental", "essential"])
def test_epipolar_geometry_is_found(kind):
    random = np.random.default_rng(2)
    a, b, essential = solid(random, 600, 200)
    found = verify_pairs(a, b, kind, threshold=2, camera=CAMERAS)
    assert found.verified
    clean_a, clean_b, _ = solid(random, 200, 0, noise=0)
    assert np.median(found.distances(clean_a, clean_b)) < 1
    assert found.agrees(a, b)[:400].mean() > 0.95
    assert found.inliers == found.agrees(a, b).sum()
    if kind == "essential":
        matrix, truth = (value / np.linalg.norm(value) for value in (found.matrix, essential))
        assert min(np.abs(matrix - truth).max(), np.abs(matrix + truth).max()) < 0.05
    else:
        assert (found.matrix == found.pixel_matrix).all()


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_result(kind):
    a, b, _ = solid(np.random.default_rng(3), 300, 200)
    results = [verify_pairs(a, b, kind, threshold=4, seed=seed, camera=CAMERAS[0]) for seed in (5, 5, 6)]
    assert results[0].verified
    assert (results[0].matrix == results[1].matrix).all()
    assert results[0].inliers == results[1].inliers


@pytest.mark.parametrize("kind", KINDS)
def test_what_carries_no_matrix_is_not_verified(kind):
    random = np.random.default_rng(4)
    a, b = planar(random, 40, 0)
    line = np.c_[np.arange(40.0), np.round(np.arange(40) * 0.3)]
    cases = {
        "0 matches": (a[:0], b[:0]),
        "7 matches": (a[:7], b[:7]),
        "lie on a line in A": (line, b),
        "lie on a line in B": (a, line * 7),
        "fewer than 8 different points in A": (np.repeat(a[:5], 8, 0), b),
        "fewer than 8 different points in B": (a, np.broadcast_to(b[:1], b.shape)),
        "5 matches": (np.where(np.arange(40)[:, None] < 5, a, np.nan), b),
        "4 matches": (a, np.where(np.arange(40)[:, None] < 4, b, np.inf)),
    }
    for reason, pair in cases.items():
        found = verify_pairs(*pair, kind, camera=CAMERAS)
        assert not found.verified, reason
        assert found.verdict.startswith("not verified: ")
        assert reason in found.verdict
        assert found.matrix is None
        assert (found.inliers, found.share) == (0, 0.0)
        assert not found.agrees(a, b).any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1e-300, 1e-6, 1.0, 1e8, 1e200])
def test_no_coordinates_raise(kind, scale):
    random = np.random.default_rng(5)
    for count in (8, 9, 31):
        for a, b in (
            (random.normal(0, scale, (count, 2)), random.normal(0, scale, (count, 2))),
            (random.integers(0, 3, (count, 2)) * scale, random.integers(0, 3, (count, 2)) * scale),
        ):
            found = verify_pairs(a, b, kind, camera=CAMERAS)
            assert found.verified == (found.matrix is not None)
            assert 0 <= found.inliers <= found.points <= count


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("far", [1e5, 1e150])
def test_one_wild_point_makes_no_line_of_the_others(kind, far):
    a, b, _ = (
        solid(np.random.default_rng(7), 100, 0)
        if kind != "homography"
        else (*planar(np.random.default_rng(7), 100, 0), 0)
    )
    found = verify_pairs(np.r_[a, [[far, -far]]], np.r_[b, [[-far, far / 2]]], kind, camera=CAMERAS)
    assert "line" not in found.verdict
    if far < 1e6:
        assert found.verified
        assert found.inliers >= 95


def test_every_floating_point_dtype():
    a, b = (torch.from_numpy(points) for points in planar(np.random.default_rng(8), 100, 0))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        found = verify_pairs(a.to(dtype), b.to(dtype))
        assert found.agrees(a.to(dtype), b.to(dtype)).sum() == found.inliers


def test_few_agreeing_pairs_are_not_verified():
    random = np.random.default_rng(6)
    a, b = random.uniform(0, 4000, (30, 2)), random.uniform(0, 4000, (30, 2))
    found = verify_pairs(a, b)
    assert not found.verified
    assert "agree with one homography within 3 px" in found.verdict


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"kind": "affine"}, "homography, fundamental, essential"),
        ({"kind": None}, "homography"),
        ({"threshold": 0}, "above 0"),
        ({"threshold": float("nan")}, "above 0"),
        ({"threshold": True}, "above 0"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**31}, "seed"),
        ({"kind": "essential"}, "camera"),
        ({"kind": "essential", "camera": np.eye(2)}, r"\[2, 2\]"),
        ({"kind": "essential", "camera": np.zeros((3, 3))}, "inverted"),
        ({"xy_a": np.zeros((4, 3))}, "xy_a"),
        ({"xy_b": np.zeros((9, 2))}, "both"),
        ({"xy_b": [["a", "b"]]}, "xy_b"),
        ({"xy_a": np.zeros((10, 2), complex)}, "xy_a"),
    ],
)
def test_errors_say_what_to_give(change, text):
    given = {"xy_a": np.zeros((10, 2)), "xy_b": np.zeros((10, 2)), **change}
    with pytest.raises(ValueError, match=text):
        verify_pairs(given.pop("xy_a"), given.pop("xy_b"), given.pop("kind", "homography"), **given)


def test_missing_opencv_names_the_extra(monkeypatch):
    found = builtins.__import__

    def blocked(name, *rest, **more):
        if name == "cv2":
            raise ImportError("No module named 'cv2'")
        return found(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", blocked)
    with pytest.raises(ImportError, match=r'pip install "lift_fast\[geometry\]"'):
        verify_pairs(np.zeros((9, 2)), np.zeros((9, 2)))
