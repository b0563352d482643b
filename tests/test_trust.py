"""What matches are worth: verification and summary of match_images, and the alignment of descriptor maps."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from lift_fast import match_images
from lift_fast.alignment import align, mean_cosine
from lift_fast.confidence import LocalMaps
from lift_fast.geometry import KINDS, Verification, guessed_camera
from lift_fast.trust import Field, least_agreement, least_inliers, local_maps, spread_points, summarise

pytestmark = pytest.mark.usefixtures("one_thread")
FOLDER = Path(__file__).resolve().parents[1] / "examples/photographs"
CAT = FOLDER / "cat.jpg"


@pytest.fixture(scope="module")
def cat():
    return Image.open(CAT).convert("RGB").resize((320, 240))


def warped(image, homography):
    """A view whose pixels (x, y) show the image at ``homography^-1 (x, y)``."""
    back = np.linalg.inv(homography)
    # Pillow counts from pixels' corners.
    shift = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1.0]])
    back = shift @ back @ np.linalg.inv(shift)
    back /= back[2, 2]
    coefficients = tuple(back.flatten()[:8])
    return image.transform(image.size, Image.Transform.PERSPECTIVE, coefficients, Image.Resampling.BICUBIC)


def corner_error(found, truth, size):
    corners = np.array([[0, 0, 1], [size[0], 0, 1], [size[0], size[1], 1], [0, size[1], 1.0]]).T
    a, b = found @ corners, truth @ corners
    return float(np.linalg.norm(a[:2] / a[2] - b[:2] / b[2], axis=0).max())


def test_homography_of_a_known_warp(cat):
    pytest.importorskip("cv2")
    truth = np.array([[1.05, 0.12, -12.0], [-0.1, 1.0, 14.0], [1e-4, -2e-4, 1.0]])
    b = warped(cat, truth)
    found = match_images(cat, b, size=224, step=2, normalize="pixel", verify="homography")
    assert found.verification.verified
    assert found.verification.verdict.startswith("verified: ")
    assert corner_error(found.transform, truth, cat.size) < 8
    assert found.transform is found.verification.matrix
    assert found.verification.kind == "homography"
    # Three quarters of a cell: 8 loaded pixels of 224 / 240.
    assert math.isclose(found.verification.threshold, 0.75 * 8 * 240 / 224, rel_tol=0.01)
    assert found.warning == found.trust.warning == ""
    assert found.trust.inlier_share == found.verification.share > 0.3
    # The mask is that of the transform, for all valid pixels.
    there = (
        torch.cat([found.xy_a.double(), torch.ones_like(found.xy_a[..., :1])], -1) @ torch.from_numpy(found.transform).T
    )
    distance = (there[..., :2] / there[..., 2:] - found.xy_b).norm(dim=-1)
    assert torch.equal(found.inliers, found.valid & (distance <= found.verification.threshold))
    arrays = found.numpy()
    assert (arrays["inliers"] == found.inliers.numpy()).all()
    assert (arrays["transform"] == found.transform).all()
    again = match_images(cat, b, size=224, step=2, normalize="pixel", verify="homography", seed=0)
    assert (again.transform == found.transform).all()
    # Pixels of B, whatever the size at which they are matched.
    large = match_images(cat, b.resize((640, 480)), size=224, step=2, normalize="pixel", verify="homography")
    double = np.array([[2, 0, 0.5], [0, 2, 0.5], [0, 0, 1.0]])
    assert corner_error(large.transform, double @ truth, cat.size) < 16


@pytest.mark.parametrize("kind", KINDS)
def test_unrelated_images_are_not_verified(cat, kind):
    pytest.importorskip("cv2")
    skimage = pytest.importorskip("skimage.data")
    found = match_images(cat, Image.fromarray(skimage.coffee()), size=448, step=4, normalize="pixel", verify=kind)
    assert not found.verification.verified
    assert found.transform is None
    assert not found.inliers.any()
    assert found.warning.startswith("do not trust these matches: not verified: ")
    assert np.isnan(found.numpy()["transform"]).all()
    plain = match_images(cat, Image.fromarray(skimage.coffee()), size=448, step=4, normalize="pixel")
    assert plain.inliers is None
    assert plain.verification is None
    assert "neighbours hardly agree" in plain.warning
    assert plain.trust.agreement < least_agreement((plain.grid_a, plain.grid_b))
    assert plain.trust.inlier_share is None
    assert not {"inliers", "transform"} & set(plain.numpy())


@pytest.mark.parametrize("kind", ["fundamental", "essential"])
def test_epipolar_kinds(cat, kind):
    pytest.importorskip("cv2")
    b = warped(cat, np.array([[1.0, 0.1, -8.0], [-0.1, 1.0, 10.0], [0, 0, 1.0]]))
    found = match_images(cat, b, size=224, step=4, normalize="pixel", verify=kind, threshold=4)
    assert found.verification.verified
    assert found.verification.threshold == 4
    assert found.inliers.sum() > 0.3 * found.valid.sum()
    a, b = (xy[found.inliers].double().numpy() for xy in (found.xy_a, found.xy_b))
    matrix = found.transform
    if kind == "essential":
        camera = np.linalg.inv(guessed_camera((240, 320)))
        matrix = camera.T @ matrix @ camera
    lines = np.c_[a, np.ones(len(a))] @ matrix.T
    distance = np.abs((lines * np.c_[b, np.ones(len(b))]).sum(1)) / np.hypot(lines[:, 0], lines[:, 1])
    assert distance.max() <= 4.001


def test_confidence_of_points_is_that_of_the_dense_layout(cat):
    b = warped(cat, np.array([[1.0, 0.1, -8.0], [-0.1, 1.0, 10.0], [0, 0, 1.0]]))
    dense = match_images(cat, b, size=224, normalize="pixel")
    assert (dense.confidence > 0.5).float().mean() > 0.2
    random = torch.Generator().manual_seed(0)
    rows, columns = (torch.randint(0, n, (60,), generator=random) for n in dense.valid.shape)
    points = match_images(cat, b, size=224, normalize="pixel", points=dense.xy_a[rows, columns].clamp_min(0))
    same = (points.xy_b - dense.xy_b[rows, columns]).abs().amax(1) < 0.1
    assert same.float().mean() > 0.8
    away = (points.confidence - dense.confidence[rows, columns]).abs()[same]
    assert away.median() < 0.02
    assert away.quantile(0.9) < 0.15
    wide = match_images(cat, b, size=224, normalize="pixel", step=20)
    top, left = ((n - 1) % 20 // 2 for n in dense.valid.shape)
    away = (wide.confidence - dense.confidence[top::20, left::20]).abs()
    assert away.median() < 0.02


def test_spread_points_are_the_best_of_each_quarter_cell():
    random = torch.Generator().manual_seed(0)
    columns, rows = torch.meshgrid(torch.arange(23), torch.arange(17), indexing="xy")
    field = Field(
        (torch.stack([columns, rows], -1) + 0.5) / 6,
        torch.rand(17, 23, 2, generator=random),
        torch.rand(17, 23, generator=random) * 1.5,
    )
    confidence = torch.randint(0, 5, (17, 23), generator=random) / 4
    best = {}
    for y in range(17):
        for x in range(23):
            if field.distance[y, x] <= 1:
                quarter = (int(field.at[y, x, 0] * 2), int(field.at[y, x, 1] * 2))
                if quarter not in best or confidence[y, x] > confidence[best[quarter]]:
                    best[quarter] = (y, x)
    chosen = sorted(best.values())
    at, to = spread_points(field, confidence)
    assert np.allclose(at, np.stack([field.at[place].numpy() for place in chosen]))
    assert np.allclose(to, np.stack([field.to[place].numpy() for place in chosen]))
    at, to = spread_points(field._replace(distance=torch.full((17, 23), torch.inf)), confidence)
    assert at.shape == to.shape == (0, 2)


@pytest.mark.parametrize("size", [(12, 16), (1, 1), (1, 9), (5, 1)])
@pytest.mark.parametrize("step", [1, 3, 8])
def test_local_maps_take_the_pixels_closest_to_the_centres(size, step):
    ys, xs = (torch.arange((n * 8 - 1) % step // 2, n * 8, step) for n in size)
    at = (torch.stack(torch.meshgrid(xs, ys, indexing="xy"), -1) + 0.5) / 8
    maps = local_maps(Field(at, at + 1, torch.zeros(at.shape[:2])), size)
    assert maps.support.shape == size
    assert (maps.confidence(at, at + 1) > 0.9).all()
    trust = summarise(
        torch.zeros(0, dtype=torch.bool), Field(at, at + 1, torch.zeros(at.shape[:2])), maps, (size, size), None
    )
    assert trust.valid_share == 0
    assert trust.way_back == 1
    assert trust.agreement > 0.9
    assert trust.warning == ""


def smooth_map(h, w, channels=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, channels, h // 4 + 2, w // 4 + 2, generator=generator)
    return F.interpolate(coarse, size=(h, w), mode="bicubic")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_alignment_finds_a_shift_of_the_maps(dtype):
    wide = smooth_map(40, 48)
    a, b = wide[..., 4:36, 6:42].to(dtype), wide[..., 3:37, 4:44].to(dtype)
    truth = np.array([[1, 0, 2.0], [0, 1, 1.0], [0, 0, 1]])
    start = np.array([[1.03, 0.02, 1.4], [-0.02, 0.98, 1.7], [3e-4, -3e-4, 1]])
    everywhere = torch.ones(32, 36, dtype=torch.bool)
    found = align(a, b, start, everywhere)
    found = found / found[2, 2]
    assert corner_error(found, truth, (36, 32)) < 0.1 < 0.5 < corner_error(start, truth, (36, 32))
    assert mean_cosine(a, b, found) > 0.99 > mean_cosine(a, b, start)
    # Another scale of the same homography, and its sign.
    assert np.allclose(mean_cosine(a, b, -3 * found), mean_cosine(a, b, found), atol=1e-6)


def test_alignment_leaves_what_it_cannot_improve():
    a, b = smooth_map(20, 20), smooth_map(20, 20, seed=1)
    start = np.eye(3)
    assert align(a, b, start, torch.zeros(20, 20, dtype=torch.bool)) is start
    away = np.array([[1, 0, 500.0], [0, 1, 0], [0, 0, 1]])
    assert align(a, b, away, torch.ones(20, 20, dtype=torch.bool)) is away
    assert mean_cosine(a, b, away) == -1
    for broken in (a * math.nan, a * 0):
        assert np.isfinite(align(a, broken, start, torch.ones(20, 20, dtype=torch.bool))).all()
        assert np.isfinite(align(broken, b, start, torch.ones(20, 20, dtype=torch.bool))).all()


def test_warning_follows_the_verification():
    at = torch.zeros(4, 4, 2)
    field = Field(at, at, torch.full((4, 4), torch.inf))
    maps = LocalMaps(at, at, torch.zeros(4, 4))
    grids = (4, 4), (4, 4)
    failed = Verification("homography", 3.0, 100, 4, "not verified: because")
    verified = Verification("homography", 3.0, 100, 60, "verified: yes", np.eye(3), np.eye(3))
    assert summarise(torch.zeros(4, 4), field, maps, grids, failed).warning.endswith("not verified: because")
    assert summarise(torch.zeros(4, 4), field, maps, grids, verified).warning == ""
    assert "hardly agree (0.000" in summarise(torch.zeros(4, 4), field, maps, grids, None).warning


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"verify": "affine"}, "homography, fundamental, essential"),
        ({"verify": "homography", "threshold": -1}, "threshold"),
        ({"verify": "homography", "seed": 1.5}, "seed"),
        ({"verify": "essential", "camera": [1, 2]}, "camera"),
    ],
)
def test_options_are_checked_before_the_images(options, text):
    pytest.importorskip("cv2")
    with pytest.raises((ValueError, TypeError), match=text):
        match_images("missing.jpg", "missing.jpg", **options)


def test_flat_and_tiny_images_raise_nothing():
    pytest.importorskip("cv2")
    flat = Image.new("RGB", (64, 48), (120, 130, 140))
    tiny = Image.new("RGB", (16, 16))
    for a, b in ((flat, flat), (tiny, flat), (flat, tiny), (tiny, tiny)):
        for kind in KINDS:
            for points in (None, [[3, 4]]):
                found = match_images(a, b, size=None, points=points, normalize="pixel", verify=kind)
                assert found.confidence.isfinite().all()
                assert found.verification.verified == (found.transform is not None)


def test_bounds_follow_the_size_of_the_maps():
    small, usual, large = (((n, n), (n, n)) for n in (28, 56, 84))
    assert least_agreement(small) > least_agreement(usual) == 0.0235 > least_agreement(large)
    assert [least_inliers("homography", grids) for grids in (small, usual, large)] == [75] * 3
    assert [least_inliers("essential", grids) for grids in (small, usual)] == [189, 377]
    assert least_inliers("fundamental", ((1, 1), (1, 1))) == least_inliers("homography", ((2, 2), (9, 9))) == 8
    assert least_inliers("homography", ((8, 8), (8, 8))) == 32
