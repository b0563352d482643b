"""Points of a first frame, found again in the frames that follow it.

A point is known by the descriptors of a 3 x 3 pattern around it in the first frame, one patch of the backbone apart. In
each frame it lies where that pattern fits best within the neighbourhood of its last place. There the pattern is laid
over the first frame a little larger, smaller and turned, and the best of these is the next frame's, so that it follows
a camera that zooms and turns. What is found is looked for in the whole first frame, and should lead back to where the
point started. docs/tracking.md has the figures of this and of other ways.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from lift_fast import memory

# What a fit loses by lying one patch from the last place; it grows with the square.
_MOTION = 0.004
# Factor and angle (radians) by which a pattern may grow and turn from frame to frame, and the most that it may grow.
_GROWTH, _TURN, _LARGEST = math.log(1.05), 0.05, math.log(4)
# Cells around the best one that decide where between cells a point lies, and temperature of their weights.
_NEAR, _TEMPERATURE = 2, 0.05
# Cells by which the way back may miss the start of a visible point.
_TOLERANCE = 1.5
# Confidence at which a hidden point is believed to be found elsewhere.
_SURE = 0.7
# Cells of all points' maps of fits in memory at a time.
_BLOCK = 1 << 22
_OUTSIDE = -4.0


@dataclass(frozen=True)
class PointTracks:
    """Points in one frame."""

    xy: npt.NDArray[np.float32]
    """[P, 2] (x, y) in pixels of the frame, whole numbers at their centres; the best place also of hidden points."""
    confidence: npt.NDArray[np.float32]
    """[P] 0 to 1: mean cosine to the first frame's pattern, halved with each cell by which the way back misses; not a
    probability."""
    visible: npt.NDArray[np.bool_]
    """[P] the way back misses the point's start by at most 1.5 cells of the descriptor map."""


class PointMatcher:
    """The state of the points of one video; places are in cells, whole numbers at their centres.

    Args:
        features: ``[C, h, w]`` of the first frame.
        places: ``[P, 2]`` (x, y).
        radius: of the neighbourhood of the last place, in cells; None for the whole frame.
        spacing: of the pattern, in cells.
    """

    def __init__(self, features: Tensor, places: Tensor, radius: int | None, spacing: int) -> None:
        self.radius, self.spacing = radius, spacing
        self._first = _unit(features)
        self._start = places
        self._places = places
        # Logarithm of the scale and the angle of each pattern in the first frame, when it was last seen.
        self._warps = torch.zeros_like(places)
        self._confidence = torch.ones_like(places[:, 0])
        self._visible = torch.ones_like(self._confidence, dtype=torch.bool)

    def tracks(self) -> PointTracks:
        """The points in the frame before the next one."""
        found = (self._places, self._confidence, self._visible)
        return PointTracks(*(one.cpu().numpy().copy() for one in found))

    def step(self, features: Tensor) -> PointTracks:
        """The points in the next frame, ``[C, h, w]``."""
        if tuple(features.shape) != tuple(self._first.shape):
            raise ValueError(f"expected features {list(self._first.shape)}, got {list(features.shape)}")
        maps = _unit(features)
        found = self._search(maps, torch.arange(len(self._places), device=maps.device), self.radius, _MOTION)
        hidden = (~found[-1]).nonzero()[:, 0]
        if len(hidden):
            # It may have come back far from where it was lost.
            again = self._search(maps, hidden, None, 0.0)
            sure = again[-1] & (again[-2] >= _SURE)
            for one, other in zip(found, again, strict=True):
                one[hidden[sure]] = other[sure]
        self._places, warps, self._confidence, self._visible = found
        self._warps = torch.where(self._visible[:, None], warps, self._warps)
        return self.tracks()

    def state(self) -> dict[str, Tensor]:
        """What the next frame depends on, on the CPU."""
        return {"places": self._places.cpu(), "warps": self._warps.cpu()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take over a :meth:`state` of the same points; raises ``ValueError`` if it does not fit."""
        if not state["places"].shape == state["warps"].shape == self._start.shape:
            raise ValueError(f"a state of {len(state['places'])} points does not fit {len(self._start)} points")
        self._places, self._warps = (state[name].to(self._start.device) for name in ("places", "warps"))

    def _search(self, maps: Tensor, rows: Tensor, radius: int | None, motion: float) -> list[Tensor]:
        """:meth:`_find` for any number of points."""
        block = max(1, _BLOCK // maps[0].numel())
        found = [self._find(maps, part, radius, motion) for part in rows.split(block)]
        return [torch.cat(each) for each in zip(*found, strict=True)]

    def _find(self, maps: Tensor, part: Tensor, radius: int | None, motion: float) -> tuple[Tensor, ...]:
        """Places, warps, confidence and visibility of the points of some numbers."""
        start, last, warps = self._start[part], self._places[part], self._warps[part]
        pattern, inside = self._patterns(self._first, start, warps)
        fits = self._fits(pattern, inside, maps)
        across, down = _distances(last.round(), maps)
        fits -= motion / self.spacing**2 * (across.square() + down.square())
        if radius is not None:
            fits.masked_fill_((across > radius) | (down > radius), _OUTSIDE)
        places = _peak(fits)
        warps, cosine = self._warped(maps, places, start, warps)
        pattern, inside = self._patterns(maps, places, -warps)
        miss = torch.linalg.vector_norm(_peak(self._fits(pattern, inside, self._first)) - start, dim=-1)
        return places, warps, cosine.clamp(0, 1) * torch.exp2(-miss), (miss <= _TOLERANCE) & (cosine > 0)

    def _warped(self, maps: Tensor, places: Tensor, start: Tensor, warps: Tensor) -> tuple[Tensor, Tensor]:
        """The warp that fits best at ``places``, among those next to each point's last one, and its mean cosine."""
        seen, there = self._patterns(maps, places, torch.zeros_like(warps))
        tried, cosines = [], []
        for growth in (0.0, -_GROWTH, _GROWTH):
            for turn in (0.0, -_TURN, _TURN):
                warp = warps + torch.tensor([growth, turn], dtype=warps.dtype, device=warps.device)
                warp[:, 0].clamp_(-_LARGEST, _LARGEST)
                pattern, inside = self._patterns(self._first, start, warp)
                both = (inside & there).to(torch.float32)
                cosines.append(((pattern * seen).sum(-1) * both).sum(-1) / both.sum(-1).clamp_min(1))
                tried.append(warp)
        cosine, best = torch.stack(cosines).max(0)
        return torch.stack(tried)[best, torch.arange(len(best), device=best.device)], cosine

    def _offsets(self) -> list[tuple[int, int]]:
        steps = [step * self.spacing for step in (-1, 0, 1)]
        return [(x, y) for y in steps for x in steps]

    def _patterns(self, maps: Tensor, places: Tensor, warps: Tensor) -> tuple[Tensor, Tensor]:
        """Unit descriptors ``[P, 9, C]`` of the warped pattern at each place, and which ``[P, 9]`` lie in the map."""
        h, w = maps.shape[1:]
        offsets = torch.tensor(self._offsets(), dtype=places.dtype, device=places.device)
        scale = torch.exp(warps[:, 0])
        x, y = scale * torch.cos(warps[:, 1]), scale * torch.sin(warps[:, 1])
        turn = torch.stack([torch.stack([x, y], dim=-1), torch.stack([-y, x], dim=-1)], dim=-2)
        at = places[:, None] + offsets @ turn
        size = torch.tensor([w, h], dtype=at.dtype, device=at.device)
        # To -1 and 1 at the outer edges of the map; beyond its outermost centres it is repeated.
        sampled = F.grid_sample(maps[None], ((at * 2 + 1) / size - 1)[None], "bilinear", "border", align_corners=False)
        inside = ((at >= -0.5) & (at <= size - 0.5)).all(-1)
        return F.normalize(sampled[0].permute(1, 2, 0), dim=-1), inside

    def _fits(self, pattern: Tensor, inside: Tensor, maps: Tensor) -> Tensor:
        """Mean cosine ``[P, h, w]`` of patterns laid around each cell, over what lies inside both images."""
        h, w = maps.shape[1:]
        fits = memory.zeros((len(pattern), h, w), device=maps.device)
        counts = memory.zeros((len(pattern), h, w), device=maps.device)
        flat = maps.flatten(1)
        for number, (x, y) in enumerate(self._offsets()):
            rows, columns = slice(max(0, -y), min(h, h - y)), slice(max(0, -x), min(w, w - x))
            if rows.start >= rows.stop or columns.start >= columns.stop:
                continue
            weight = inside[:, number, None, None].to(torch.float32)
            cosine = (pattern[:, number] @ flat).view(-1, h, w)
            moved = cosine[:, rows.start + y : rows.stop + y, columns.start + x : columns.stop + x]
            fits[:, rows, columns] += moved * weight
            counts[:, rows, columns] += weight
        return fits / counts.clamp_min(1)


def as_points(points: Any, size: tuple[int, int]) -> Tensor:
    """``[P, 2]`` float64 on the CPU: (x, y) inside a frame of ``size`` (height, width).

    Raises:
        ValueError: for anything else; names the first point that lies outside.
    """
    try:
        if isinstance(points, Tensor) and points.dtype is torch.bfloat16:
            points = points.float()
        given = np.asarray(points.detach().cpu() if isinstance(points, Tensor) else points)
        xy = given.astype(np.float64) if given.dtype.kind in "iuf" else None
    except (TypeError, ValueError, OverflowError, RuntimeError):
        xy = None
    if xy is None or xy.ndim != 2 or xy.shape[1] != 2 or not len(xy):
        raise ValueError("points must be one or more pairs (x, y) in pixels of the first frame, [P, 2] numbers")
    height, width = size
    # Written so that NaN is outside too.
    outside = ~((xy >= 0) & (xy < (width, height))).all(-1)
    if outside.any():
        raise ValueError(
            f"points must lie in the first frame, {width} x {height} pixels: 0 <= x < {width} and 0 <= y < {height}; "
            f"{int(outside.sum())} of {len(xy)} do not, the first is {xy[outside][0].tolist()}"
        )
    return torch.from_numpy(xy)


def _unit(features: Tensor) -> Tensor:
    """``[C, h, w]`` of float32 unit descriptors; one that is not finite becomes zero, which fits nothing."""
    maps = features.to(torch.float32)
    return F.normalize(torch.where(maps.isfinite().all(0), maps, 0.0), dim=0)


def _distances(places: Tensor, maps: Tensor) -> tuple[Tensor, Tensor]:
    """Cells along x ``[P, 1, w]`` and y ``[P, h, 1]`` from each place."""
    across = torch.arange(maps.shape[2], device=maps.device) - places[:, 0, None]
    down = torch.arange(maps.shape[1], device=maps.device) - places[:, 1, None]
    return across.abs()[:, None], down.abs()[:, :, None]


def _peak(fits: Tensor) -> Tensor:
    """``[P, 2]`` (x, y) of the best cell of ``[P, h, w]``, moved by the weights of the cells around it."""
    best = fits.flatten(1).argmax(1)
    places = torch.stack([best % fits.shape[2], best // fits.shape[2]], dim=-1)
    across, down = _distances(places, fits)
    near = fits.masked_fill((across > _NEAR) | (down > _NEAR), -torch.inf)
    weights = (near / _TEMPERATURE).flatten(1).softmax(1).view_as(near)
    x = torch.arange(fits.shape[2], device=fits.device, dtype=weights.dtype)
    y = torch.arange(fits.shape[1], device=fits.device, dtype=weights.dtype)
    return torch.stack([weights.sum(1) @ x, weights.sum(2) @ y], dim=-1)
