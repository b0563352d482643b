"""Geometric verification of point pairs: one homography, fundamental or essential matrix that many of them agree with.

By OpenCV's USAC with MAGSAC++ (Barath et al., 2020), the optional extra ``geometry``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .checks import check_whole

KINDS = ("homography", "fundamental", "essential")
Array = npt.NDArray[np.float64]
Points = Tensor | npt.ArrayLike

LEAST = 8
"""Fewest pairs that are verified, and fewest inliers that verify."""
# OpenCV's random numbers are seeded with 32 bits.
SEEDS = 2**31
_CONFIDENCE, _ITERATIONS = 0.999, 5000
# Points whose spread across a line is below this share of that along it are collinear.
_LINE = 0.03
# A point so many times as far from the middle as half of the points are is no part of their spread.
_FAR = 20.0


@dataclass(frozen=True, eq=False)
class Verification:
    """Result of :func:`verify_pairs`."""

    kind: str
    """One of :data:`KINDS`."""
    threshold: float
    """Largest distance of an inlier in pixels of B: from its place for a homography, else from its epipolar line."""
    points: int
    """Number of pairs that the estimate is made from; those that are not finite are left out."""
    inliers: int
    """Number of these within the threshold; 0 without a matrix."""
    verdict: str
    """In words: "verified: ..." or "not verified: ..." with the reason."""
    matrix: Array | None = None
    """[3, 3] float64: a homography takes (x, y, 1) of A to B; b' F a = 0 for a fundamental matrix, pixels of both; and
    for an essential matrix the same with coordinates of the cameras. None if not verified."""
    pixel_matrix: Array | None = None
    """``matrix`` for pixels: for an essential matrix the fundamental matrix that it gives with the cameras."""

    @property
    def verified(self) -> bool:
        """There is a matrix."""
        return self.matrix is not None

    @property
    def share(self) -> float:
        """Share of the points that are inliers, 0 to 1."""
        return self.inliers / self.points if self.points else 0.0

    def distances(self, xy_a: Points, xy_b: Points) -> Array:
        """``[...]`` float64: how far pairs ``[..., 2]`` are from the matrix, in pixels of B; inf where not defined."""
        a, b = (_as_array(points, name) for points, name in ((xy_a, "xy_a"), (xy_b, "xy_b")))
        if self.pixel_matrix is None:
            return np.full(a.shape[:-1], math.inf)
        return _distances(self.kind, self.pixel_matrix, a, b)

    def agrees(self, xy_a: Points, xy_b: Points) -> npt.NDArray[np.bool_]:
        """``[...]`` bool: which of the pairs ``[..., 2]`` are within the threshold."""
        agrees: npt.NDArray[np.bool_] = self.distances(xy_a, xy_b) <= self.threshold
        return agrees


def verify_pairs(
    xy_a: Points,
    xy_b: Points,
    kind: str = "homography",
    *,
    threshold: float = 3.0,
    seed: int = 0,
    camera: npt.ArrayLike | None = None,
    least: int = LEAST,
    what: str = "matches",
) -> Verification:
    """Find the matrix that most point pairs agree with. The same pairs and seed give the same result.

    Args:
        xy_a, xy_b: ``[P, 2]`` (x, y) in pixels of A and of B, tensors or arrays. Those of ``match_images`` are
            ``found.xy_a[found.valid], found.xy_b[found.valid]``.
        kind: ``"homography"`` (a plane, or a camera that only turns), ``"fundamental"`` (a rigid scene from two
            places) or ``"essential"`` (the same with known cameras).
        threshold: largest distance of an inlier in pixels of B.
        seed: of the random samples, 0 to 2^31 - 1.
        camera: for ``"essential"``: ``[3, 3]`` intrinsic matrix in pixels, or ``[2, 3, 3]`` for A and B.
        least: fewest inliers that verify, at least 8. ``match_images`` asks for more than chance gives.
        what: what the verdict calls the pairs.

    Returns:
        :class:`Verification`. Fewer than 8 pairs, pairs on a line, and pairs that no matrix fits are not verified; they
        are no error.

    Raises:
        ImportError: naming the extra to install, without OpenCV.
        TypeError, ValueError: for shapes and options that do not fit.
    """
    check_kind(kind)
    threshold, seed = check_threshold(threshold), check_whole("seed", seed, 0, SEEDS - 1)
    least = check_whole("least", least, LEAST, math.inf)
    cameras = as_cameras(camera) if kind == "essential" else None
    cv2 = opencv()
    a, b = (_as_array(points, name) for points, name in ((xy_a, "xy_a"), (xy_b, "xy_b")))
    if a.ndim != 2 or a.shape != b.shape:
        raise ValueError(f"xy_a and xy_b must both be [P, 2], got {list(a.shape)} and {list(b.shape)}")
    finite = (np.isfinite(a) & np.isfinite(b)).all(1)
    a, b = a[finite], b[finite]

    def failed(reason: str) -> Verification:
        return Verification(kind, threshold, len(a), 0, f"not verified: {reason}")

    if len(a) < LEAST:
        return failed(f"{len(a)} matches, and {LEAST} are needed")
    for points, name in ((a, "A"), (b, "B")):
        if reason := _degenerate(points):
            return failed(f"the matches {reason} in {name}")
    try:
        matrix = _estimate(cv2, kind, a, b, threshold, seed, cameras)
    except cv2.error:
        matrix = None
    if matrix is None:
        return failed(f"no {described(kind)} fits them")
    return judge(kind, matrix, a, b, threshold, cameras, least, what)


def judge(
    kind: str,
    matrix: Array,
    a: Array,
    b: Array,
    threshold: float,
    cameras: tuple[Array, Array] | None = None,
    least: int = LEAST,
    what: str = "matches",
) -> Verification:
    """The verdict on a matrix, from the pairs ``a, b [P, 2]``, which it calls ``what``."""
    if kind == "homography" and np.median(a @ matrix[2, :2] + matrix[2, 2]) < 0:
        # Its sign is free; the points lie before the horizon.
        matrix = -matrix
    pixels = matrix
    if cameras is not None:
        pixels = np.linalg.inv(cameras[1]).T @ matrix @ np.linalg.inv(cameras[0])
    inside = _distances(kind, pixels, a, b) <= threshold
    count = int(inside.sum())
    agree = f"{count} of {len(a)} {what} ({count / len(a):.0%}) agree with one {described(kind)} within "
    agree += f"{threshold:.3g} px"
    reason = ""
    if count < least:
        reason = f"{agree}, and {least} are needed"
    elif lines := [found for points in (a[inside], b[inside]) if (found := _degenerate(points))]:
        reason = f"{agree}, but they {lines[0]}"
    if reason:
        return Verification(kind, threshold, len(a), count, f"not verified: {reason}")
    return Verification(kind, threshold, len(a), count, f"verified: {agree}", matrix, pixels)


def described(kind: str) -> str:
    """The kind in words."""
    return kind if kind == "homography" else f"{kind} matrix"


def check_kind(kind: object) -> None:
    """Raise ``ValueError`` unless ``kind`` is one of :data:`KINDS`."""
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"verify must be one of {', '.join(KINDS)}, got {kind!r}")


def check_threshold(threshold: float) -> float:
    """Check a distance in pixels."""
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 < threshold < math.inf:
        raise ValueError(f"threshold must be a number of pixels above 0, got {threshold!r}")
    return float(threshold)


def opencv() -> Any:
    """The module ``cv2``."""
    try:
        import cv2
    except ImportError as error:
        raise ImportError(
            f'geometric verification needs OpenCV 4.8 or newer: pip install "lift_fast[geometry]" ({error})'
        ) from error
    if not hasattr(cv2, "UsacParams"):
        raise ImportError(
            f'geometric verification needs OpenCV 4.8 or newer, this is {cv2.__version__}: pip install -U "lift_fast'
            '[geometry]"'
        )
    return cv2


def guessed_camera(size: tuple[int, int], focal: float | None = None) -> Array:
    """``[3, 3]`` intrinsic matrix of an image of ``size`` (height, width) whose camera is not known.

    The focal length in pixels, unless given, is 1.2 times the longer side, as COLMAP assumes it (a field of view of 45
    degrees); the principal point is the centre.
    """
    height, width = size
    focal = 1.2 * max(size) if focal is None else focal
    return np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1.0]])


def _estimate(
    cv2: Any, kind: str, a: Array, b: Array, threshold: float, seed: int, cameras: tuple[Array, Array] | None
) -> Array | None:
    params = cv2.UsacParams()
    params.threshold, params.confidence, params.maxIterations = threshold, _CONFIDENCE, _ITERATIONS
    params.score, params.sampler, params.loMethod = (
        cv2.SCORE_METHOD_MAGSAC,
        cv2.SAMPLING_UNIFORM,
        cv2.LOCAL_OPTIM_SIGMA,
    )
    # Threads would make the result depend on chance.
    params.randomGeneratorState, params.isParallel = seed, False
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    if kind == "homography":
        matrix, _ = cv2.findHomography(a, b, params)
    elif kind == "fundamental":
        matrix, _ = cv2.findFundamentalMat(a, b, params)
    else:
        assert cameras is not None
        straight = np.zeros(4)
        matrix, _ = cv2.findEssentialMat(a, b, cameras[0], cameras[1], straight, straight, params)
    if matrix is None or matrix.shape != (3, 3) or not np.isfinite(matrix).all():
        return None
    rank = int(np.linalg.matrix_rank(matrix / np.abs(matrix).max(), tol=1e-14)) if matrix.any() else 0
    return np.asarray(matrix, np.float64) if rank >= (3 if kind == "homography" else 2) else None


def _distances(kind: str, matrix: Array, a: Array, b: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        there = a @ matrix[:, :2].T + matrix[:, 2]
        if kind == "homography":
            found = np.linalg.norm(there[..., :2] / there[..., 2:] - b, axis=-1)
            # Beyond the horizon nothing is mapped.
            found = np.where(there[..., 2] > 0, found, math.inf)
        else:
            found = np.abs((there[..., :2] * b).sum(-1) + there[..., 2]) / np.hypot(there[..., 0], there[..., 1])
    return np.where(np.isfinite(found), found, math.inf)


def _degenerate(points: Array) -> str:
    """Why points ``[P, 2]`` cannot carry a matrix, "" if they can."""
    if len(np.unique(points, axis=0)) < LEAST:
        return f"are fewer than {LEAST} different points"
    # A single wild point would make a line of all others.
    away = np.abs(points - np.median(points, axis=0)).max(1)
    points = points[away <= _FAR * max(np.median(away), np.finfo(np.float64).tiny)]
    spread = np.linalg.svd(points - points.mean(0), compute_uv=False)
    return "lie on a line" if spread[1] <= _LINE * spread[0] else ""


def _as_array(points: Points, name: str) -> Array:
    try:
        # NumPy has no bfloat16.
        array = points.detach().cpu() if isinstance(points, Tensor) else points
        array = np.asarray(array.float() if isinstance(array, Tensor) and array.dtype == torch.bfloat16 else array)
        found = array.astype(np.float64) if array.dtype.kind in "iuf" else None
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be [..., 2] real numbers (x, y): {error}") from error
    if found is None or found.ndim < 1 or found.shape[-1] != 2:
        raise ValueError(f"{name} must be [..., 2] real numbers (x, y), got {array.dtype} {list(array.shape)}")
    return found


def as_focal(camera: npt.ArrayLike | None) -> float | None:
    """``camera`` if it is one number, a focal length in pixels; else None."""
    if not isinstance(camera, (int, float, np.integer, np.floating)):
        return None
    if isinstance(camera, bool) or not 0 < camera < math.inf:
        raise ValueError(f"camera must be a focal length above 0 pixels or intrinsic matrices, got {camera!r}")
    return float(camera)


def as_cameras(camera: npt.ArrayLike | None) -> tuple[Array, Array]:
    """Check the intrinsic matrices of A and B, each ``[3, 3]``."""
    if camera is None:
        raise ValueError('"essential" needs camera, the intrinsic matrix [3, 3] in pixels, or [2, 3, 3] for A and B')
    try:
        matrices = np.asarray(camera, np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"camera must be [3, 3] or [2, 3, 3] numbers: {error}") from error
    if matrices.shape not in ((3, 3), (2, 3, 3)):
        raise ValueError(f"camera must be [3, 3] or [2, 3, 3], got {list(matrices.shape)}")
    if not np.isfinite(matrices).all() or not (np.abs(np.linalg.det(matrices)) > 0).all():
        raise ValueError("camera must be an intrinsic matrix that can be inverted, with finite numbers")
    a, b = np.broadcast_to(matrices, (2, 3, 3))
    return a, b
