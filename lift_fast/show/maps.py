"""Images with their features by method, similarity to a point, principal components as colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lift_fast.backbones import FrozenViT
from lift_fast.drawing import Pixels
from lift_fast.evaluation.methods import Batch, Features, Method
from lift_fast.images import LoadSize, bounded_size, check_size, resize, to_tensor, whole_patches


@dataclass(frozen=True)
class Shown:
    """An image and its features by method."""

    name: str
    image: Image.Image
    """RGB, as stored."""
    size: tuple[int, int]
    """(height, width) of the loaded image, whole patches."""
    features: Mapping[str, Features]
    """By method; maps ``[1, C, h, w]``."""

    def covered(self, method: str) -> tuple[float, float, float, float]:
        """(top, left, height, width) that a method's cells cover, as fractions of the image."""
        top, left, height, width = self.features[method].covered
        return top / self.size[0], left / self.size[1], height / self.size[0], width / self.size[1]


def load(
    name: str,
    image: Image.Image,
    size: LoadSize,
    backbone: FrozenViT,
    methods: Sequence[Method],
    max_side: int | None = None,
) -> Shown:
    """Features of an image by every method.

    Args:
        name: its label on the sheet.
        image: RGB.
        size: its shorter side, or (height, width), in pixels; rounded to whole patches.
        backbone: source of patch size, normalisation, device and dtype.
        methods: of :func:`lift_fast.evaluation.methods.build_methods`.
        max_side: see :func:`lift_fast.images.bounded_size`.

    Raises:
        ValueError: for a size out of range or beyond :func:`lift_fast.images.max_pixels`, or a method whose map has
            another shape or is not finite.
    """
    patch = backbone.patch_size
    try:
        wanted = bounded_size(image.size, size, max_side, patch)
        check_size(wanted, image.size)
        wide, tall = (whole_patches(side, patch, patch) for side in wanted)
        resized = resize(image, (tall, wide))
        backbone.check_size(tall, wide)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    batch = Batch(to_tensor(resized, backbone.mean, backbone.std).to(backbone.device, backbone.dtype))
    features = {}
    for method in methods:
        found = method(batch)
        if found.map.ndim != 4 or found.map.shape[0] != 1:
            raise ValueError(f"{method.name} must give a map [1, C, h, w] for an image, got {list(found.map.shape)}")
        if not bool(torch.isfinite(found.map).all()):
            raise ValueError(f"{method.name}: its features of {name} are not finite")
        features[method.name] = Features(found.map.float(), found.covered)
    return Shown(name, image, (tall, wide), features)


def cell_position(features: Features, point: tuple[float, float]) -> tuple[float, float]:
    """Convert (x, y) in pixels of the loaded image to (x, y) in cells of the map, whole at cell centres.

    Clamped to the outermost centres, as in bilinear interpolation with ``align_corners=False``.
    """
    top, left, height, width = features.covered
    h, w = features.map.shape[2:]
    x, y = (point[0] - left) * w / width - 0.5, (point[1] - top) * h / height - 0.5
    return min(max(x, 0.0), w - 1.0), min(max(y, 0.0), h - 1.0)


def similarity_map(source: Features, target: Features, point: tuple[float, float]) -> npt.NDArray[np.float32]:
    """Similarity of a point of one image to every cell of the same or another image.

    The descriptor is interpolated bilinearly and scaled to unit length, the cells are scaled: a cosine, as in
    ``lift-fast match`` (``normalize="pixel"`` of :func:`lift_fast.dense_match`).

    Args:
        source, target: of one method, maps ``[1, C, h, w]`` and ``[1, C, h', w']``.
        point: (x, y) in pixels of the loaded source image; continuous, pixel centres at halves.

    Returns:
        ``[h', w']`` float32.
    """
    x, y = cell_position(source, point)
    cells = source.map[0]
    column, row = int(x), int(y)
    right, below = min(column + 1, cells.shape[2] - 1), min(row + 1, cells.shape[1] - 1)
    top = torch.lerp(cells[:, row, column], cells[:, row, right], x - column)
    bottom = torch.lerp(cells[:, below, column], cells[:, below, right], x - column)
    descriptor = F.normalize(torch.lerp(top, bottom, y - row), dim=0)
    found: npt.NDArray[np.float32] = (
        torch.einsum("c,chw->hw", descriptor, F.normalize(target.map[0], dim=0)).cpu().numpy()
    )
    return found


def pca_colours(maps: Sequence[Tensor]) -> list[Pixels]:
    """The three strongest principal components of descriptors as red, green and blue, one basis for all maps.

    Descriptors ``[C, h, w]`` of one method are normalised and centred; each component runs from its 1st to its 99th
    percentile. Its sign makes the third moment positive, so that an image always gets the same colours.

    Returns:
        ``[h, w, 3]`` each; missing components (fewer than four different descriptors) are mid grey.
    """
    rows = [F.normalize(each.double().cpu(), dim=0).flatten(1).T for each in maps]
    every = torch.cat(rows)
    mean = every.mean(0)
    centred = every - mean
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    count = min(3, vectors.shape[1])
    basis = vectors.flip(1)[:, :count]
    projected = centred @ basis
    projected = projected * torch.where((projected**3).sum(0) < 0, -1.0, 1.0)
    low, high = torch.quantile(_sample(projected), torch.tensor([0.01, 0.99], dtype=torch.float64, device="cpu"), dim=0)
    # Components of rounding errors would fill the image with noise.
    real = values.flip(0)[:count] > 1e-9 * len(every)
    colours = torch.full((len(every), 3), 0.5, dtype=torch.float64, device="cpu")
    scaled = ((projected - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    colours[:, :count] = torch.where(real, scaled, 0.5)
    pixels = (colours * 255).round().to(torch.uint8).numpy()
    parts = np.split(pixels, np.cumsum([len(each) for each in rows])[:-1])
    return [part.reshape(*each.shape[1:], 3) for part, each in zip(parts, maps, strict=True)]


def _sample(rows: Tensor, most: int = 1_000_000) -> Tensor:
    # torch.quantile accepts at most 16 million values.
    return rows[:: -(-len(rows) // most)]
