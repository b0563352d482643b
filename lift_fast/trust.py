"""What the matches of two images are worth: confidence, geometric verification, and a summary that warns."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from . import geometry
from .alignment import align, mean_cosine
from .confidence import LocalMaps
from .geometry import Verification

THRESHOLD = 0.75
"""Largest distance of an inlier in cells of B's map, unless it is given in pixels."""

# Seeds of the estimate of a homography, of which the best is kept.
_TRIES = 2
# Only cells whose match lies within so many cells of a homography are aligned, chosen anew in each round.
_NEAR, _ROUNDS = 2.0, 2


Grids = tuple[tuple[int, int], tuple[int, int]]
"""(h, w) cells of A's map and of B's."""


@dataclass(frozen=True)
class Trust:
    """Summary of a pair's matches."""

    valid_share: float
    """Share of the matched pixels of A that are ``valid``."""
    way_back: float
    """Share of the matched pixels of A whose match leads back to within a cell."""
    agreement: float
    """How well the matches of neighbouring cells agree where they agree best: the value that a tenth of A's cells
    exceed, 0 to 1. Below :func:`least_agreement` the images may be unrelated; a third is very good."""
    inlier_share: float | None
    """Share of the points that agree with the matrix of the verification; None without one."""
    warning: str
    """One sentence if the matches should not be believed, else ""."""


def least_agreement(grids: Grids) -> float:
    """Matches whose :attr:`Trust.agreement` is lower come with a warning, unless a verification tells more.

    Smaller maps agree better by chance. The curve follows unrelated photographs at three sizes, see docs/matching.md.
    """
    return 0.0235 * float((56 / _side(grids)) ** 0.6)


def least_inliers(kind: str, grids: Grids) -> int:
    """Fewest inliers that verify: more than unrelated photographs reach, see docs/matching.md.

    For a homography these are one patch of matches whatever the size of the maps; for an epipolar geometry they lie
    along lines. At most an eighth of the quarter cells from which points are drawn, so that tiny maps can be verified.
    """
    bound = 75 if kind == "homography" else math.ceil(6.72 * _side(grids))
    return max(geometry.LEAST, min(bound, grids[0][0] * grids[0][1] // 2))


def _side(grids: Grids) -> float:
    """Cells along the side of a square map, the mean of both."""
    return float(math.prod(grids[0]) * math.prod(grids[1])) ** 0.25


class Field(NamedTuple):
    """Matches of a regular layout, in cells of the two maps: the first cell's centre is (0.5, 0.5)."""

    at: Tensor
    """[rows, columns, 2] (x, y) in A"""
    to: Tensor
    """[rows, columns, 2] in B; anything without a match"""
    distance: Tensor
    """[rows, columns] forward-backward distance in cells; inf without a match"""


def local_maps(field: Field, grid: tuple[int, int]) -> LocalMaps:
    """The local maps of ``grid`` (h, w) cells of A, from the matches closest to the cells' centres."""
    rows, columns = _rows_and_columns(field, grid)
    at, to, distance = (value[rows][:, columns] for value in field)
    return LocalMaps(at, to, torch.exp2(-distance))


def _rows_and_columns(field: Field, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Indices of the rows and columns of a field that are closest to the centres of ``grid`` (h, w) cells."""
    return _closest(field.at[:, 0, 1], grid[0]), _closest(field.at[0, :, 0], grid[1])


def _closest(line: Tensor, count: int) -> Tensor:
    """``[count]`` indices of the positions of an ascending ``line`` that are closest to the centres of cells."""
    centres = torch.arange(count, dtype=line.dtype, device=line.device) + 0.5
    after = torch.searchsorted(line.contiguous(), centres).clamp(1, max(1, len(line) - 1)).clamp_max(len(line) - 1)
    before = (after - 1).clamp_min(0)
    return torch.where(centres - line[before] <= line[after] - centres, before, after)


def spread_points(field: Field, confidence: Tensor) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """``[P, 2]`` positions in A and their matches, in cells: the most confident match of each quarter of a cell (half
    as wide and high), of those that lead back to within a cell; the first in row-major order among equals."""
    valid = field.distance <= 1
    at, to = field.at[valid].double().cpu().numpy(), field.to[valid].double().cpu().numpy()
    quarter = np.floor(at * 2).astype(np.int64)
    # The third key is the order in the field, which lexsort keeps.
    order = np.lexsort((-confidence[valid].double().cpu().numpy(), quarter[:, 0], quarter[:, 1]))
    quarter = quarter[order]
    first = np.ones(len(order), bool)
    first[1:] = (quarter[1:] != quarter[:-1]).any(1)
    # Sampling is spatially even whatever their order, but the same field must give the same order.
    chosen = np.sort(order[first])
    return at[chosen], to[chosen]


def verify_field(
    field: Field,
    confidence: Tensor,
    maps: tuple[Tensor, Tensor],
    kind: str,
    pixels: tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]],
    *,
    threshold: float | None = None,
    seed: int = 0,
    camera: npt.ArrayLike | None = None,
) -> Verification:
    """Verify dense matches: draw points, estimate, and for a homography align the descriptor maps.

    Args:
        field: matches, at least about one for each cell.
        confidence: ``[rows, columns]`` of them.
        maps: ``[1, C, h, w]`` descriptors of A and of B.
        kind, seed, camera: as :func:`lift_fast.geometry.verify_pairs`.
        pixels: ``[3, 3]`` for A and B, from (x, y, 1) in cells to pixels of the original image.
        threshold: pixels of B; None is :data:`THRESHOLD` cells.
    """
    to_a, to_b = pixels
    if threshold is None:
        threshold = THRESHOLD * float(to_b[0, 0] + to_b[1, 1]) / 2
    at, to = spread_points(field, confidence)
    a, b = at @ to_a[:2, :2].T + to_a[:2, 2], to @ to_b[:2, :2].T + to_b[:2, 2]
    least = least_inliers(kind, (_grid(maps[0]), _grid(maps[1])))
    if kind != "homography":
        return geometry.verify_pairs(a, b, kind, threshold=threshold, seed=seed, camera=camera, least=least)
    tries = [
        geometry.verify_pairs(a, b, kind, threshold=threshold, seed=(seed + n) % geometry.SEEDS) for n in range(_TRIES)
    ]
    in_cells = [np.linalg.inv(to_b) @ found.matrix @ to_a for found in tries if found.matrix is not None]
    if not in_cells:
        return tries[0]
    # The descriptors say which estimate is better: the number of inliers prefers small regions of many matches.
    best = max(in_cells, key=lambda matrix: mean_cosine(*maps, matrix))
    rows, columns = _rows_and_columns(field, _grid(maps[0]))
    start, end, distance = (value[rows][:, columns] for value in field)
    for _ in range(_ROUNDS):
        near = torch.from_numpy(Verification(kind, _NEAR, 0, 0, "", best, best).agrees(start, end)).to(start.device)
        best = align(*maps, best, near & distance.isfinite())
    matrix = to_b @ best @ np.linalg.inv(to_a)
    return geometry.judge(kind, matrix / matrix[2, 2], a, b, threshold, least=least)


def _grid(descriptors: Tensor) -> tuple[int, int]:
    return descriptors.shape[-2], descriptors.shape[-1]


def summarise(valid: Tensor, field: Field, maps: LocalMaps, grids: Grids, verification: Verification | None) -> Trust:
    """The summary of a pair; ``valid [...]`` of its result."""
    way_back = float((field.distance <= 1).float().mean())
    agreement = float(maps.support.flatten().kthvalue(math.ceil(0.9 * maps.support.numel())).values)
    least = least_agreement(grids)
    warning = ""
    if verification is not None:
        if not verification.verified:
            warning = f"do not trust these matches: {verification.verdict}"
    elif agreement < least:
        warning = (
            f"do not trust these matches: neighbours hardly agree ({agreement:.3f}, and unrelated images reach "
            f"{least:.3f}); {way_back:.0%} lead back to within a cell"
        )
    return Trust(
        valid_share=float(valid.float().mean()) if valid.numel() else 0.0,
        way_back=way_back,
        agreement=agreement,
        inlier_share=None if verification is None else verification.share,
        warning=warning,
    )
