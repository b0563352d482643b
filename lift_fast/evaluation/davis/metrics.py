"""The measures of DAVIS 2017's semi-supervised track: region similarity J, boundary accuracy F, their statistics.

Definitions of Perazzi et al. (CVPR 2016) and Pont-Tuset et al. (2017) as published evaluation code computes them.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Bools = npt.NDArray[np.bool_]

# How far apart boundaries may be, as a share of the image's diagonal.
TOLERANCE = 0.008
# A frame counts for recall above this.
RECALL_THRESHOLD = 0.5


class Statistics(NamedTuple):
    """Of one object's values over the frames."""

    mean: float
    recall: float
    decay: float


def jaccard(annotation: Bools, segmentation: Bools, void: Bools | None = None) -> float:
    """Region similarity J of two masks ``[H, W]``: intersection over union; 1 where both are empty.

    Args:
        annotation, segmentation: bool.
        void: pixels that do not count; None in the protocol.

    Raises:
        ValueError: for masks of different sizes.
    """
    annotation, segmentation = _pair(annotation, segmentation, void)
    union = int(np.count_nonzero(annotation | segmentation))
    return int(np.count_nonzero(annotation & segmentation)) / union if union else 1.0


def boundary_f(
    annotation: Bools, segmentation: Bools, void: Bools | None = None, *, tolerance: float = TOLERANCE
) -> float:
    """Boundary accuracy F of two masks ``[H, W]``: the harmonic mean of precision and recall.

    Precision is the share of the segmentation's boundary pixels that have one of the annotation within a disk; recall
    is the reverse. The disk has a radius of ``ceil(tolerance * diagonal)`` pixels of the image: ``x^2 + y^2 <=
    radius^2``. Two empty boundaries give 1, one empty boundary gives 0.

    Args:
        annotation, segmentation, void: as :func:`jaccard`.
        tolerance: share of the diagonal; from 1 on, pixels.

    Raises:
        ValueError: for masks of different sizes.
    """
    annotation, segmentation = _pair(annotation, segmentation, void)
    radius = int(tolerance if tolerance >= 1 else math.ceil(tolerance * math.hypot(*annotation.shape)))
    rows, columns = _occupied(annotation | segmentation)
    # Boundaries reach at most a pixel beyond the masks; the image's last row and column are kept as the last.
    crop = (slice(max(rows[0] - 1, 0), rows[1] + 1), slice(max(columns[0] - 1, 0), columns[1] + 1))
    # A crop that ends inside the image ends in background, where the rule for the last row finds no edge either.
    truth, found = boundary(annotation[crop]), boundary(segmentation[crop])
    truth_count, found_count = int(np.count_nonzero(truth)), int(np.count_nonzero(found))
    if not truth_count or not found_count:
        return 1.0 if truth_count == found_count else 0.0
    precision = _matched(found, truth, radius) / found_count
    recall = _matched(truth, found, radius) / truth_count
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def boundary(mask: Bools) -> Bools:
    """One pixel wide boundary ``[H, W]``: pixels that differ from their right, lower or lower right neighbour.

    In the last row only the right neighbour counts, in the last column only the lower one; the last pixel has none.
    """
    edge = np.zeros_like(mask)
    edge[:, :-1] = mask[:, :-1] ^ mask[:, 1:]
    below = mask[:-1] ^ mask[1:]
    edge[:-1] |= below
    edge[:-1, :-1] |= mask[:-1, :-1] ^ mask[1:, 1:]
    return edge


def statistics(values: npt.ArrayLike) -> Statistics:
    """Mean, recall (share of frames above 0.5) and decay (mean of the first quarter less mean of the last) of frames.

    The four quarters share their border frames: with n frames they end at ``round(1 + i (n - 1) / 4)``, i = 1 to 4.
    Means leave out NaN.

    Raises:
        ValueError: for no values.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not values.size:
        raise ValueError(f"expected the values of at least one frame, got shape {list(values.shape)}")
    # The published code counts from 1 and rounds halves up by a small addition.
    ends = (np.round(np.linspace(1, len(values), 5) + 1e-10) - 1).astype(np.int64)
    first, last = values[ends[0] : ends[1] + 1], values[ends[3] : ends[4] + 1]
    return Statistics(_mean(values), float(np.mean(values > RECALL_THRESHOLD)), _mean(first) - _mean(last))


def _mean(values: npt.NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else math.nan


def _pair(annotation: Any, segmentation: Any, void: Any) -> tuple[Bools, Bools]:
    annotation, segmentation = np.asarray(annotation, dtype=bool), np.asarray(segmentation, dtype=bool)
    if annotation.ndim != 2 or annotation.shape != segmentation.shape:
        raise ValueError(
            f"expected two masks [H, W] of one size, got {list(annotation.shape)} and {list(segmentation.shape)}"
        )
    if void is None:
        return annotation, segmentation
    void = np.asarray(void, dtype=bool)
    if void.shape != annotation.shape:
        raise ValueError(f"void pixels {list(void.shape)} do not fit masks {list(annotation.shape)}")
    return annotation & ~void, segmentation & ~void


def _occupied(mask: Bools) -> tuple[tuple[int, int], tuple[int, int]]:
    """Half-open ranges of rows and of columns that hold all of a mask; (0, 0) for an empty one."""
    ranges = []
    for axis in (1, 0):
        hits = np.flatnonzero(mask.any(axis=axis))
        ranges.append((int(hits[0]), int(hits[-1]) + 1) if hits.size else (0, 0))
    return ranges[0], ranges[1]


@lru_cache(maxsize=8)
def _disk(radius: int, width: int) -> npt.NDArray[np.int64]:
    """Offsets of a disk's pixels in a row-major array of that width."""
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    inside = x * x + y * y <= radius * radius
    return (y[inside] * width + x[inside]).astype(np.int64)


def _matched(pixels: Bools, others: Bools, radius: int) -> int:
    """How many of ``pixels`` have one of ``others`` within the disk.

    The disk is stamped at each of ``others``, which are few compared with the pixels of an image.
    """
    height, width = others.shape
    stride = width + 2 * radius
    near = np.zeros((height + 2 * radius) * stride, dtype=bool)
    y, x = np.nonzero(others)
    at = (y + radius) * stride + x + radius
    near[(at[:, None] + _disk(radius, stride)).ravel()] = True
    inner = near.reshape(-1, stride)[radius : radius + height, radius : radius + width]
    return int(np.count_nonzero(pixels & inner))
