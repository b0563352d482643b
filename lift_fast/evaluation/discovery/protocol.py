"""One box for each image by TokenCut, and whether it is correct: by the published rules or the exact ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F
from PIL import Image

from lift_fast.backbones import FrozenViT
from lift_fast.evaluation.methods import Batch, Features
from lift_fast.evaluation.rules import RULES, check_rule
from lift_fast.evaluation.tokencut import EPS, TokenCut, tokencut
from lift_fast.images import resize, to_tensor

from .dataset import Box, Sample


@dataclass(frozen=True)
class Discovery:
    """Result of :func:`discover`."""

    cut: TokenCut
    box: Box
    """(x0, y0, x1, y1) in the image's pixels."""
    covered: tuple[float, float, float, float]
    """(top, left, height, width) over which the grid lies, padding included, as shares of the image's sides."""


@dataclass(frozen=True)
class Prediction:
    """The box of one image, and whether it is correct."""

    name: str
    box: Box
    """(x0, y0, x1, y1) in pixels of the file."""
    iou: float
    """The largest with a ground-truth box."""
    found: bool
    """IoU >= 0.5 with any ground-truth box."""
    degenerate: bool
    """The graph did not determine the cut (:class:`lift_fast.evaluation.tokencut.TokenCut`)."""


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes in continuous pixels; 0 for empty boxes."""
    inter, union = _areas(a, b)
    return inter / union if union > 0 else 0.0


def overlaps(a: Box, b: Box) -> bool:
    """Whether the intersection over union is at least 0.5, exactly so for whole pixels."""
    inter, union = _areas(a, b)
    return union > 0 and 2 * inter >= union


def _published_overlap(found: Box, truth: Box) -> bool:
    """:func:`overlaps` in the arithmetic of the LiFT paper's evaluation, for ``truth`` in whole pixels.

    Areas are float32 there and the intersection float64; a term against division by zero excludes equality.
    """
    eps = 1e-7
    inter, _ = _areas(found, truth)
    area = np.float32((found[2] - found[0]) * (found[3] - found[1] + eps))
    other = np.float32(truth[2] - truth[0]) * (np.float32(truth[3] - truth[1]) + np.float32(eps))
    return bool(inter / (float(area + other) - inter + eps) >= 0.5)


def _areas(a: Box, b: Box) -> tuple[float, float]:
    wide, tall = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inter = max(wide, 0.0) * max(tall, 0.0)
    return inter, (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter


@dataclass(frozen=True)
class Prepared:
    """An image in the form that features take."""

    batch: Batch
    size: tuple[int, int]
    """(height, width) without the padding."""
    stretch: bool = False
    """The grid lies over the whole image, whatever its cells cover."""


def prepare(
    image: Image.Image, backbone: FrozenViT, resolution: int | None = None, rule: str = "published"
) -> Prepared:
    """An image, normalised and then padded with zeros at the right and at the bottom to whole patches.

    Args:
        image: RGB.
        backbone: gives the patch size, the normalisation and the device.
        resolution: None keeps the image's own size (TokenCut's published evaluation); S resizes it to S x S.
        rule: for such resizing. ``published``, as in the LiFT paper's evaluation: bilinear and not padded, the grid
            stretched over the square. ``exact``: Lanczos and padded.

    Raises:
        ValueError: for an unknown rule.
    """
    check_rule("rule", rule, RULES)
    stretch = resolution is not None and rule == "published"
    if resolution is not None:
        how = Image.Resampling.BILINEAR if stretch else Image.Resampling.LANCZOS
        image = resize(image, (resolution, resolution), how)
    tensor = to_tensor(image, backbone.mean, backbone.std)
    tall, wide = tensor.shape[2:]
    if not stretch:
        tensor = F.pad(tensor, (0, -wide % backbone.patch_size, 0, -tall % backbone.patch_size))
    return Prepared(Batch(tensor.to(backbone.device, backbone.dtype)), (tall, wide), stretch)


def discover(
    image: Image.Image, prepared: Prepared, features: Callable[[Batch], Features], *, tau: float, eps: float = EPS
) -> Discovery:
    """TokenCut's box in an image, in the image's pixels; padding is clipped off, a resized image scaled back.

    Args:
        features: a :class:`lift_fast.evaluation.methods.Method` or the like.
        tau, eps: as :func:`lift_fast.evaluation.tokencut.tokencut`.

    Raises:
        NotFiniteError: for features that are not finite.
        ValueError: for features of another shape.
    """
    maps, covered = features(prepared.batch)
    if prepared.stretch:
        covered = (0, 0, *prepared.size)
    if maps.ndim != 4 or maps.shape[0] != 1:
        raise ValueError(f"features must give a map [1, C, h, w] for an image, got {list(maps.shape)}")
    cut = tokencut(maps[0].flatten(1).T, (maps.shape[2], maps.shape[3]), tau=tau, eps=eps)
    (width, height), (tall, wide) = image.size, prepared.size
    x0, y0, x1, y1 = cut.box((tall, wide), covered)
    box = (x0 * width / wide, y0 * height / tall, x1 * width / wide, y1 * height / tall)
    return Discovery(cut, box, (covered[0] / tall, covered[1] / wide, covered[2] / tall, covered[3] / wide))


def score_box(
    sample: Sample, box: Box, degenerate: bool, square: tuple[tuple[int, int], int] | None = None
) -> Prediction:
    """Compare the box of an image with its ground truth.

    Args:
        box: in the image's pixels.
        degenerate: of the cut.
        square: the image's (width, height) and S, to compare in the pixels of the image at S x S as the LiFT paper's
            evaluation does: true boxes are scaled and cut to whole pixels (towards zero), and an IoU of exactly 0.5 is
            not enough, because a term against division by zero makes it smaller.
    """
    truths, seen = sample.boxes, box
    enough: Callable[[Box, Box], bool] = overlaps
    if square is not None:
        (width, height), side = square
        x, y = side / width, side / height
        seen = (box[0] * x, box[1] * y, box[2] * x, box[3] * y)
        truths = tuple((_whole(a * x), _whole(b * y), _whole(c * x), _whole(d * y)) for a, b, c, d in truths)
        enough = _published_overlap
    found = any(enough(seen, truth) for truth in truths)
    return Prediction(sample.name, box, max(iou(seen, truth) for truth in truths), found, degenerate)


def _whole(value: float) -> float:
    return float(int(value))
