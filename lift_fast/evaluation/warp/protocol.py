r"""Matching under known warps: how well descriptors find a point again in a second view of the same photograph.

The protocol:

1. A photograph's largest centred square is the base; positions are measured in it from 0 to 1. The first view is the
   base at S x S pixels. The second view is a homography of it (:func:`random_homography`), drawn from the seed and the
   photograph's name alone, so that all methods and sizes see the same warps. Both are rendered from the file's own
   resolution with antialiasing; the area beyond the photograph is black.
2. The second view's colours are changed (:func:`change_colours`) unless that is switched off.
3. N points are drawn uniformly from the pixels of the first view whose true place lies in the second view, at least
   :data:`MARGIN` of its side inside the border. The draw is of positions from 0 to 1, so that sizes share them too.
4. Each method's maps are matched by :func:`lift_fast.dense_match` with ``normalize="grid"``, the conventions of
   SPair-71k's evaluation: descriptors normalised on their grid, interpolated to S x S, not normalised again; the match
   is the best of all S * S pixels.
5. PCK@alpha is the share of points whose match lies less than alpha * S pixels from the true place; the error is that
   distance. Both are averaged over a photograph's points, then over seeds, then over photographs; the confidence
   intervals are a bootstrap over photographs.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from lift_fast.evaluation.methods import Batch, Features, Method
from lift_fast.images import check_size, read_image, resize, to_tensor
from lift_fast.matching import dense_match
from lift_fast.training.data import color_jitter

Array = npt.NDArray[np.floating[Any]]

ALPHAS = (0.1, 0.05, 0.01)
MARGIN = 1 / 32
COLOUR_CHANGE = 0.2
_ANGLE, _SCALE, _SHIFT, _CORNER, _BLUR = 30.0, 1.4, 0.1, 0.08, 0.004
# Positions drawn at one time, and the number of times, before a photograph is given up.
_DRAWN, _DRAWS = 4096, 16
# The finest rendering of a view before it is resized.
_FINEST = 4096


class View(NamedTuple):
    """Both views of one photograph at one size."""

    first: Image.Image
    second: Image.Image
    points: npt.NDArray[np.int64]
    """[N, 2] (x, y) pixels of the first view."""
    truth: Array
    """[N, 2] their true (x, y) in the second, in pixels, integers at pixel centres."""


class Score(NamedTuple):
    """One method on one photograph."""

    pck: tuple[float, ...]
    """Shares of right points, from 0 to 1, at each of the alphas."""
    error: float
    """Mean distance from the true place in pixels."""
    median: float
    """Median of that distance."""


@dataclass(frozen=True)
class WarpProtocol:
    """The options of the protocol; a ``ValueError`` for options out of range."""

    points: int = 100
    alphas: tuple[float, ...] = ALPHAS
    photometric: bool = True

    def __post_init__(self) -> None:
        if self.points < 1:
            raise ValueError(f"points must be at least 1, got {self.points}")
        if not self.alphas or not all(0 < alpha <= 1 for alpha in self.alphas):
            raise ValueError(f"alphas must lie in 0 to 1, got {self.alphas}")


def name_seed(name: str, seed: int, stream: int) -> np.random.Generator:
    """Random numbers that depend on a photograph's name, the seed and their purpose."""
    return np.random.default_rng([seed, zlib.crc32(name.encode()), stream])


def random_homography(random: np.random.Generator, strength: float = 1.0) -> Array:
    """3x3, from positions in the second view to positions in the first, both from 0 to 1.

    About the centre: a turn by -30 to 30 degrees, a scale from 1 / 1.4 to 1.4 (log-uniform), a shift by up to a tenth
    of the side along each axis, each uniform; and each of the four corners moved by up to 8 % of the side along each
    axis (a perspective change). ``strength`` multiplies all of these, the scale's logarithm too; the protocol's is 1.
    """
    angle = math.radians(random.uniform(-_ANGLE, _ANGLE)) * strength
    scale = math.exp(random.uniform(-math.log(_SCALE), math.log(_SCALE)) * strength)
    shift = random.uniform(-_SHIFT, _SHIFT, 2) * strength
    corners = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    moved = corners + random.uniform(-_CORNER, _CORNER, (4, 2)) * strength - 0.5
    turn = scale * np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return homography_through(corners, moved @ turn.T + 0.5 + shift)


def homography_through(start: Array, end: Array) -> Array:
    """The 3x3 homography that takes four points ``start [4, 2]`` to ``end [4, 2]``."""
    rows, right = [], []
    for (x, y), (u, v) in zip(start, end, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        right += [u, v]
    return np.append(np.linalg.solve(np.array(rows), np.array(right)), 1.0).reshape(3, 3)


def project(homography: Array, points: Array) -> Array:
    """``[N, 2]`` points through a 3x3 homography; NaN beyond the horizon."""
    out = np.concatenate([points, np.ones_like(points[:, :1])], 1) @ homography.T
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(out[:, 2:] > 0, out[:, :2] / out[:, 2:], np.nan)


def render(photograph: Image.Image, homography: Array, size: int) -> Image.Image:
    """The ``size x size`` view of a photograph whose position (u, v) shows position ``homography (u, v)`` of its base.

    Sampled as finely as the photograph (bicubic), then resized (Lanczos).
    """
    check_size((size, size))
    width, height = photograph.size
    base = min(width, height)
    # The number of the base's pixels that the view's side spans where it looks closest.
    corners = project(homography, np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]))
    span = base * np.linalg.norm(np.diff(corners, axis=0, append=corners[:1]), axis=1).max()
    fine = size * max(1, min(math.ceil(span / size), max(1, _FINEST // size)))
    to_pixels = np.array([[base, 0, (width - base) / 2], [0, base, (height - base) / 2], [0, 0, 1.0]])
    matrix = to_pixels @ homography @ np.diag([1 / fine, 1 / fine, 1.0])
    matrix /= matrix[2, 2]
    view = photograph.transform(
        (fine, fine), Image.Transform.PERSPECTIVE, tuple(matrix.flatten()[:8]), Image.Resampling.BICUBIC
    )
    return resize(view, (size, size))


def change_colours(view: Image.Image, random: np.random.Generator) -> Image.Image:
    """Colour jitter of 0.2 (:func:`lift_fast.training.data.color_jitter`), a Gaussian blur with a radius of up to
    0.4 % of the side."""
    view = color_jitter(view, COLOUR_CHANGE, random)
    return view.filter(ImageFilter.GaussianBlur(random.uniform(0, _BLUR) * view.width))


def make_view(photograph: Image.Image, name: str, size: int, seed: int, protocol: WarpProtocol) -> View:
    """Both views of a photograph and their points; raises ``ValueError`` if they overlap too little for the points."""
    homography = random_homography(name_seed(name, seed, 0))
    first = render(photograph, np.eye(3), size)
    second = render(photograph, homography, size)
    if protocol.photometric:
        second = change_colours(second, name_seed(name, seed, 1))
    points, truth = _draw_points(homography, size, protocol.points, name_seed(name, seed, 2))
    if len(points) < protocol.points:
        raise ValueError(f"{name}: the views overlap too little for {protocol.points} points")
    return View(first, second, points, truth)


def _draw_points(
    homography: Array, size: int, count: int, random: np.random.Generator
) -> tuple[npt.NDArray[np.int64], Array]:
    points, truth = np.empty((0, 2), np.int64), np.empty((0, 2))
    back = np.linalg.inv(homography)
    for _ in range(_DRAWS):
        pixels = np.floor(random.random((_DRAWN, 2)) * size).astype(np.int64)
        places = project(back, (pixels + 0.5) / size)
        # In this form NaN is left out.
        inside = ((places >= MARGIN) & (places <= 1 - MARGIN)).all(1)
        points = np.concatenate([points, pixels[inside]])
        truth = np.concatenate([truth, places[inside] * size - 0.5])
        if len(points) >= count:
            break
    return points[:count], truth[:count]


def score(features: Sequence[Features], views: Sequence[View], size: int, alphas: Sequence[float]) -> list[Score]:
    """Match the points of each pair of views; ``features`` are of the first views and of the second views."""
    points = torch.from_numpy(np.stack([view.points for view in views]))
    there = matches(features, points.to(features[0].map.device), size)
    distance = np.linalg.norm(there.cpu().numpy() - np.stack([view.truth for view in views]), axis=-1)
    return [
        Score(tuple(float((row < alpha * size).mean()) for alpha in alphas), float(row.mean()), float(np.median(row)))
        for row in distance
    ]


def matches(features: Sequence[Features], points: Tensor, size: int) -> Tensor:
    """``[B, N, 2]`` int64 (x, y): the match of each of ``points [B, N, 2]``, pixels of the first views.

    A map stands for the pixels that it covers; points beyond them are matched from the nearest covered pixel.
    """
    (first, there), (second, here) = features
    frames = [frame[2:] for frame in (there, here)]
    start = points - points.new_tensor([there[1], there[0]])
    start = start.clamp(points.new_tensor(0), points.new_tensor([there[3], there[2]]) - 1)
    found = dense_match(first, second, *frames, points=start, normalize="grid")
    return found.xy + found.xy.new_tensor([here[1], here[0]])


def evaluate_batch(
    methods: Sequence[Method],
    views: Sequence[View],
    size: int,
    normalise: Callable[[Image.Image], Tensor],
    protocol: WarpProtocol,
) -> dict[str, list[Score]]:
    """Scores of each method on a batch of pairs; ``normalise`` turns a view into ``[1, 3, S, S]``."""
    batches = [Batch(torch.cat([normalise(getattr(view, side)) for view in views])) for side in ("first", "second")]
    return {method.name: score([method(b) for b in batches], views, size, protocol.alphas) for method in methods}


def read_views(
    paths: Sequence[Path], root: Path, size: int, seed: int, protocol: WarpProtocol
) -> Iterator[tuple[str, View | str]]:
    """Name and views of each photograph, or why it cannot be used."""
    for path in paths:
        name = image_name(path, root)
        try:
            yield name, make_view(read_image(path), name, size, seed, protocol)
        except (ValueError, OSError) as error:
            yield name, str(error)


def image_name(path: Path, root: str | os.PathLike[str]) -> str:
    """A photograph's name in seeds and results: its path in the folder."""
    return path.relative_to(root).as_posix()


def normaliser(
    mean: Sequence[float], std: Sequence[float], device: torch.device, dtype: torch.dtype
) -> Callable[[Image.Image], Tensor]:
    """Makes the input of a backbone from a view."""
    return lambda image: to_tensor(image, mean, std).to(device, dtype)
