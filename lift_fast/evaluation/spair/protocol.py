r"""PCK on SPair-71k, exactly as in the LiFT paper's evaluation and that of the data set's authors.

1. An image of w x h pixels is resized by s = S / max(w, h) so that it fits a square of S x S (Lanczos; the shorter
   side becomes round(S * short / long), halves to even) and laid centred on black, at an offset rounded down. Key
   points are multiplied by s and moved by the offset.
2. Descriptors are normalised on their own grid, interpolated bilinearly to S x S (align_corners=False) and not
   normalised again.
3. A source key point takes the descriptor of the pixel (floor x, floor y). Its match is the target pixel with the
   largest dot product.
4. It is right at alpha if its distance from the target key point is below alpha * max(w, h of the target's box) * s
   (LiFT paper), or at most that (authors of the data set). All this is float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from lift_fast.evaluation.methods import Features
from lift_fast.evaluation.rules import PLACEMENTS, check_rule
from lift_fast.images import check_size
from lift_fast.matching import dense_match

from .dataset import Array

ALPHAS = (0.1, 0.05, 0.01)


@dataclass(frozen=True)
class Protocol:
    """The options of the protocol; a ``ValueError`` for options out of range.

    Attributes:
        alphas: of PCK.
        placement: ``stretch`` lays each map over the whole square, as published evaluations do; ``cover`` over the
            pixels that its cells cover, which differs where the patch does not divide S and for overlapping patches.
    """

    alphas: tuple[float, ...] = ALPHAS
    placement: str = "stretch"

    def __post_init__(self) -> None:
        if not self.alphas or not all(0 < alpha <= 1 for alpha in self.alphas):
            raise ValueError(f"alphas must lie in 0 to 1, got {self.alphas}")
        if len(set(self.alphas)) < len(self.alphas):
            raise ValueError(f"each alpha once, got {self.alphas}")
        check_rule("placement", self.placement, PLACEMENTS)


class Frame(NamedTuple):
    """Where an image lies in its square, in pixels of the square."""

    scale: float
    """Pixels of the square to one of the image."""
    left: int
    top: int
    width: int
    height: int

    def place(self, points: Array) -> Array:
        """Points ``[N, 2]`` (x, y) of the image in the square."""
        return points * self.scale + np.array([self.left, self.top], dtype=np.float64)


def fit(size: tuple[int, int], side: int) -> Frame:
    """Where an image of ``size`` (width, height) lies in a square of ``side`` pixels."""
    width, height = size
    if height <= width:
        new_width, new_height = side, max(1, round(side * height / width))
    else:
        new_width, new_height = max(1, round(side * width / height)), side
    return Frame(side / max(size), (side - new_width) // 2, (side - new_height) // 2, new_width, new_height)


def square(image: Image.Image, side: int) -> Image.Image:
    """An RGB image in its square, on black."""
    check_size((side, side))
    frame = fit(image.size, side)
    canvas = Image.new("RGB", (side, side))
    canvas.paste(image.resize((frame.width, frame.height), Image.Resampling.LANCZOS), (frame.left, frame.top))
    return canvas


def match_points(
    source: Features, target: Features, points: Sequence[Array], side: int, placement: str = "stretch"
) -> list[Array]:
    """The match of each key point.

    Args:
        source, target: of B pairs.
        points: of each pair ``[N, 2]`` (x, y) in pixels of the source's square; points outside take the nearest pixel.
        side: S.
        placement: see :class:`Protocol`.

    Returns:
        Of each pair ``[N, 2]`` (x, y) whole pixels of the target's square; infinity without a match, because
        descriptors are not finite.
    """
    whole = (0, 0, side, side)
    there, here = (whole if placement == "stretch" else features.covered for features in (source, target))
    count = max(len(each) for each in points)
    # Pairs have different numbers of points: the last point is repeated.
    padded = np.stack([np.concatenate([each, each[-1:].repeat(count - len(each), 0)]) for each in points])
    pixels = np.floor(padded).clip(0, side - 1)
    pixels = (pixels - [there[1], there[0]]).clip(0, [there[3] - 1, there[2] - 1])
    start = torch.from_numpy(pixels.astype(np.int64)).to(source.map.device)
    found = dense_match(source.map, target.map, there[2:], here[2:], points=start, normalize="grid")
    xy = found.xy.cpu().numpy() + np.array([here[1], here[0]], dtype=np.float64)
    xy[~found.valid.cpu().numpy()] = np.inf
    return [row[: len(each)] for row, each in zip(xy, points, strict=True)]


def is_right(
    matches: Array, truth: Array, box: Sequence[float], scale: float, alphas: Sequence[float]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Which of ``matches [N, 2]`` are right, compared with ``truth [N, 2]``, both (x, y) in the target's square.

    ``box`` (left, top, right, bottom) is of the object in the target image, ``scale`` of that image.

    Returns:
        Two arrays ``[N, len(alphas)]``: with ``<``, the LiFT paper's, and with ``<=``, the data set authors'.
    """
    distance = np.sqrt(np.square(matches - truth).sum(1))[:, None]
    limit = np.array([alpha * (max(box[2] - box[0], box[3] - box[1]) * scale) for alpha in alphas])
    return distance < limit, distance <= limit
