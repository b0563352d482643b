"""``lift-fast match --verify``: one geometric transform that many matches agree with."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING, Any

from .errors import UsageError

if TYPE_CHECKING:
    from lift_fast.geometry import Verification

OPTIONS = ("verify", "threshold", "focal")
"""The options that change a result, besides the seed."""


def add_verify_options(parser: argparse.ArgumentParser) -> None:
    """``--verify`` and its companions."""
    group = parser.add_argument_group("geometric verification (needs OpenCV: pip install 'lift_fast[geometry]')")
    group.add_argument(
        "--verify",
        # Those of lift_fast.geometry, which imports PyTorch.
        choices=("homography", "fundamental", "essential"),
        help="find the matrix that most matches agree with: the homography of a plane or of a camera that only turns, "
        "the fundamental matrix of a rigid scene, or the essential matrix for a known focal length. Adds inliers and "
        "transform to the numbers; --seed seeds it",
    )
    group.add_argument(
        "--threshold",
        type=float,
        metavar="PIXELS",
        help="largest distance of an inlier in pixels of B (three quarters of a cell of its map)",
    )
    group.add_argument(
        "--focal",
        type=float,
        metavar="PIXELS",
        help="of --verify essential: focal length of both cameras in pixels of the files (1.2 times the longer side)",
    )


def check_verify_options(arguments: argparse.Namespace) -> None:
    """Check them before the networks are loaded; raise ``UsageError``."""
    if arguments.verify is None and arguments.threshold is not None:
        raise UsageError("--threshold belongs to --verify; give --verify KIND or leave it out")
    if arguments.verify != "essential" and arguments.focal is not None:
        raise UsageError("--focal belongs to --verify essential; leave it out")
    for name in ("threshold", "focal"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value < math.inf:
            raise UsageError(f"--{name} must be a number of pixels above 0, got {value:g}")
    if arguments.verify is not None:
        from lift_fast.geometry import opencv

        try:
            opencv()
        except ImportError as error:
            raise UsageError(f"--verify: {error}") from error


def record(verification: Verification | None) -> dict[str, Any] | None:
    """A verification for ``--json``."""
    if verification is None:
        return None
    names = ("kind", "threshold", "points", "inliers", "share", "verified", "verdict")
    matrix = verification.matrix
    return {
        **{name: getattr(verification, name) for name in names},
        "matrix": None if matrix is None else matrix.tolist(),
    }
