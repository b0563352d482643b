"""``match_images``: two images in, matches in their own pixels out."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from ._text import quoted
from .checks import check_flag, check_whole
from .demonstration import BACKBONE, LIFT
from .extractor import Rectangle, ViTLiFTExtractor, check_lift_iter
from .images import AnyImage, LoadSize, as_image, check_size, resized_size, whole_patches
from .matching import dense_match

STAGES = ("decode", "backbone", "lift", "match")


@dataclass(frozen=True, eq=False)
class ImageMatches:
    """Result of :func:`match_images`; tensors are on the extractor's device.

    Leading dimensions ``[...]`` are ``[H, W]``, the dense layout, or ``[P]`` for given points. Positions are (x, y) in
    pixels of the original images, upright, with integers at pixel centres. The valid pairs are
    ``xy_a[valid], xy_b[valid]``.
    """

    xy_a: Tensor
    """[..., 2] float32: centres of the matched pixels of A."""
    xy_b: Tensor
    """[..., 2] float32: their matches in B; (-1, -1) without a match."""
    similarity: Tensor
    """[...] float32, as :func:`lift_fast.dense_match`; -inf without a match."""
    distance: Tensor
    """[...] float32: forward-backward distance in cells of A's map, see :func:`match_images`; inf without a match."""
    confidence: Tensor
    """[...] float32 in 0 to 1, see :func:`match_images`; 0 without a match."""
    valid: Tensor
    """[...] bool: there is a match and, with ``mutual``, ``distance <= 1``."""
    size_a: tuple[int, int]
    """(height, width) of the original A, upright."""
    size_b: tuple[int, int]
    picture_a: Image.Image
    """A as loaded for the backbone."""
    picture_b: Image.Image
    covered_a: Rectangle
    """(top, left, height, width) of the loaded image that the descriptors cover: the pixels of the dense layout."""
    covered_b: Rectangle
    grid_a: tuple[int, int]
    """(h, w) cells of A's descriptor map."""
    grid_b: tuple[int, int]
    random_weights: bool
    """Backbone or LiFT have random weights: these matches are meaningless."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds of each of :data:`STAGES`, with ``timing``."""

    def numpy(self) -> dict[str, npt.NDArray[Any]]:
        """All fields but images and seconds as arrays, as ``lift-fast match`` writes them to its .npz file.

        ``xy_a, xy_b, similarity, distance, confidence, valid``, ``size_a, size_b``, ``covered_a, covered_b``,
        ``grid_a, grid_b`` and ``random_weights`` as above; ``loaded_size_a, loaded_size_b``: (height, width) of the
        loaded images.
        """
        tensors = ("xy_a", "xy_b", "similarity", "distance", "confidence", "valid")
        arrays = {name: getattr(self, name).cpu().numpy() for name in tensors}
        for name in ("size_a", "size_b", "covered_a", "covered_b", "grid_a", "grid_b", "random_weights"):
            arrays[name] = np.array(getattr(self, name))
        for side, image in (("a", self.picture_a), ("b", self.picture_b)):
            arrays[f"loaded_size_{side}"] = np.array((image.height, image.width))
        return arrays

    def draw(self, lines: int = 40, caption: str = "") -> Image.Image:
        """Draw the matches on one sheet, see :func:`lift_fast.drawing.draw_matches`.

        Raises:
            ValueError: for matches of given points, which have no dense layout.
        """
        from .drawing import MatchView, draw_matches

        if self.valid.dim() != 2:
            raise ValueError("draw() needs dense matches; leave points=None in match_images, with step=N for fewer")
        inliers = getattr(self, "inliers", None)
        frames, positions = [], []
        for image, (top, left, height, width), size, xy in (
            (self.picture_a, self.covered_a, self.size_a, self.xy_a),
            (self.picture_b, self.covered_b, self.size_b, self.xy_b),
        ):
            frames.append(np.asarray(image.crop((left, top, left + width, top + height))))
            scale = _pair(image.width / size[1], image.height / size[0], xy, xy.dtype)
            loaded = ((xy + 0.5) * scale - 0.5 - _pair(left, top, xy, xy.dtype)).round().long()
            positions.append(loaded.masked_fill((xy < -0.5).any(-1, keepdim=True), -1).cpu().numpy())
        return draw_matches(
            MatchView(
                image_a=frames[0],
                image_b=frames[1],
                points=positions[0],
                matches=positions[1],
                confidence=self.confidence.cpu().numpy(),
                valid=self.valid.cpu().numpy(),
                caption=caption,
                warning="random weights: these matches mean nothing" if self.random_weights else "",
                inliers=None if inliers is None else inliers.cpu().numpy(),
            ),
            lines=lines,
        )


def match_images(
    a: AnyImage,
    b: AnyImage,
    *,
    extractor: ViTLiFTExtractor | None = None,
    size: LoadSize = 448,
    mutual: bool = True,
    points: Tensor | npt.ArrayLike | None = None,
    step: int = 1,
    normalize: str = "grid",
    lift_iter: int = 1,
    timing: bool = False,
) -> ImageMatches:
    """Match the pixels of image A to those of image B: decode, backbone, LiFT, exact dense matching.

    The images are loaded at ``size``, rounded to whole patches, so that the cells of a descriptor map cover the pixels
    exactly. Positions are converted to pixels of the original images. Matching is :func:`lift_fast.dense_match` in
    both directions.

    **Distance.** The match of a pixel p of A is q in B, and the match of q is p' in A: ``distance`` is the length of
    p' - p, x and y measured in cells of A's descriptor map (h x w cells over the loaded image).

    **Confidence** is ``min(max(similarity, 0), 1) * 2 ** -distance``: it halves with each cell of distance. It orders
    the matches of one pair. It is not a calibrated probability, and not comparable between backbones or values of
    ``normalize``.

    Args:
        a, b: files (EXIF orientation applied), Pillow images, uint8 or 0-to-1 floating point arrays ``[H, W, 3]``
            or tensors ``[3, H, W]``; see :func:`lift_fast.images.as_image`.
        extractor: backbone and optional LiFT; None is the demonstration pair that ships with the package
            (:mod:`lift_fast.demonstration`), on CUDA if available, and cached for further calls.
        size: pixels of the shorter side, (height, width), or None for the size of each image.
        mutual: ``valid`` requires ``distance <= 1``. (``mutual`` of :func:`lift_fast.dense_match` is
            ``distance == 0``; few pixels of a dense layout pass that, since matches gather at the centres of cells.)
        points: ``[P, 2]`` (x, y) in pixels of the original A, 0 <= x < W and 0 <= y < H; each is moved to the nearest
            pixel centre of the loaded image. None is all pixels of the loaded image: the dense layout.
        step: without points, every step-th pixel of each row and column.
        normalize: ``"grid"`` or ``"pixel"``, see :func:`lift_fast.dense_match`.
        lift_iter: applications of LiFT; 0 is the backbone alone.
        timing: fill in ``seconds``; waits for the GPU after each stage.

    Raises:
        FileNotFoundError: for a missing file.
        TypeError: for images or an extractor of another type.
        ValueError: for images that cannot be read or are smaller than a patch, for more pixels or cells than
            :func:`lift_fast.images.max_pixels` allows, and options out of range.
    """
    if normalize not in ("grid", "pixel"):
        raise ValueError(f'normalize must be "grid" or "pixel", got {normalize!r}; these maps are not unit length')
    step, lift_iter = check_whole("step", step, 1, math.inf), check_lift_iter(lift_iter)
    for name, value in (("mutual", mutual), ("timing", timing)):
        check_flag(name, value)
    if points is not None and step != 1:
        raise ValueError(f"step={step} thins out the dense layout and does not apply to points; leave it out")
    if extractor is not None and not isinstance(extractor, ViTLiFTExtractor):
        raise TypeError(f"extractor must be a ViTLiFTExtractor or None, got {type(extractor).__name__}")
    if extractor is not None and extractor.device.type == "meta":
        raise ValueError("extractor is on the meta device, where nothing is computed; move it to cpu or cuda")

    clock = _Clock()
    images = [as_image(a, "a"), as_image(b, "b")]
    sizes = [(image.height, image.width) for image in images]
    # Loading the weights is not part of any stage.
    paused = time.perf_counter()
    extractor = _default_extractor() if extractor is None else extractor
    clock.start += time.perf_counter() - paused
    clock.device = extractor.device if timing else None
    sides = []
    for given, image, name in zip((a, b), images, "ab", strict=True):
        height, width = _whole_patches(image, size, extractor)
        try:
            # Both before the first is resized.
            check_size((width, height), image.size)
            extractor.check_size(height, width, lift_iter)
        except ValueError as error:
            raise ValueError(f"{quoted(given) if isinstance(given, (str, os.PathLike)) else name}: {error}") from error
        sides.append((height, width))
    loaded = [extractor.preprocess(image, side) for image, side in zip(images, sides, strict=True)]
    pixels = None if points is None else _as_points(points, sizes[0])
    clock.lap("decode")
    maps = _descriptor_maps(extractor, [batch for batch, _ in loaded], lift_iter, clock)
    covered = [extractor.covered(*side) for side in sides]
    (top, left, height, width), frame_b = covered[0], covered[1][2:]
    if pixels is None:
        ys, xs = (
            # A larger step than the image's side is cut to it.
            torch.arange((n - 1) % step // 2, n, min(step, n), dtype=torch.int64, device=maps[0].device)
            for n in (height, width)
        )
        at = torch.stack(torch.meshgrid(xs, ys, indexing="xy"), dim=-1)
    else:
        scale = _pair(sides[0][1] / sizes[0][1], sides[0][0] / sizes[0][0], pixels)
        at = ((pixels + 0.5) * scale).floor().to(torch.int64) - _pair(left, top, pixels, torch.int64)
        at = torch.minimum(at.clamp_min(0), _pair(width - 1, height - 1, pixels, torch.int64)).to(maps[0].device)
    xy, similarity, distance, confidence, valid = _match_both_ways(
        maps, (height, width), frame_b, at, normalize, mutual
    )
    clock.lap("match")

    def original(at: Tensor, side: int) -> Tensor:
        (top, left, _, _), (height, width) = covered[side], sizes[side]
        scale = _pair(width / sides[side][1], height / sides[side][0], at)
        return ((at + _pair(left + 0.5, top + 0.5, at)) * scale - 0.5).to(torch.float32)

    return ImageMatches(
        xy_a=original(at, 0),
        xy_b=original(xy, 1).masked_fill((xy < 0).any(-1, keepdim=True), -1.0),
        similarity=similarity,
        distance=distance,
        confidence=confidence,
        valid=valid,
        size_a=sizes[0],
        size_b=sizes[1],
        picture_a=loaded[0][1],
        picture_b=loaded[1][1],
        covered_a=covered[0],
        covered_b=covered[1],
        grid_a=(maps[0].shape[2], maps[0].shape[3]),
        grid_b=(maps[1].shape[2], maps[1].shape[3]),
        random_weights=extractor.random_weights,
        seconds=clock.laps if timing else {},
    )


def _descriptor_maps(
    extractor: ViTLiFTExtractor, batches: Sequence[Tensor], lift_iter: int, clock: _Clock
) -> list[Tensor]:
    """Two maps ``[1, c, h, w]``; images of one size go through the networks together."""
    together = batches[0].shape == batches[1].shape
    with torch.no_grad():
        inputs = [torch.cat(list(batches))] if together else batches
        seen = [extractor._backbone_tokens(batch, lift_iter) for batch in inputs]
        clock.lap("backbone")
        maps = [extractor.lift_map(batch, tokens, lift_iter) for batch, tokens in seen]
        clock.lap("lift")
    return list(maps[0].split(1)) if together else maps


def _match_both_ways(
    maps: Sequence[Tensor], size_a: tuple[int, int], size_b: tuple[int, int], at: Tensor, normalize: str, mutual: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Match the pixels ``at [..., 2]``: xy ``[..., 2]``, similarity, distance, confidence and valid ``[...]``."""
    start = at.reshape(1, -1, 2)
    points = None if start.shape[1] == size_a[0] * size_a[1] and at.dim() == 3 else start
    there = dense_match(maps[0], maps[1], size_a, size_b, points=points, normalize=normalize)
    back = dense_match(maps[1], maps[0], size_b, size_a, points=there.xy.clamp_min(0), normalize=normalize)
    cells = _pair(maps[0].shape[3] / size_a[1], maps[0].shape[2] / size_a[0], start, torch.float32)
    distance = torch.linalg.vector_norm((back.xy - start) * cells, dim=-1)
    distance = distance.masked_fill(~(there.valid & back.valid), torch.inf)
    similarity = there.similarity.to(torch.float32)
    confidence = (similarity.clamp(0, 1) * torch.exp2(-distance)).masked_fill(~there.valid, 0.0)
    valid = there.valid & (distance <= 1) if mutual else there.valid
    shape = at.shape[:-1]
    return (
        there.xy.view(*shape, 2),
        similarity.view(shape),
        distance.view(shape),
        confidence.view(shape),
        valid.view(shape),
    )


def _whole_patches(image: Image.Image, size: LoadSize, extractor: ViTLiFTExtractor) -> tuple[int, int]:
    """The (height, width) at which to load, without pixels beyond the last whole patch."""
    width, height = resized_size(image.size, size)
    p, s = extractor.patch, extractor.stride
    # The backbone refuses images smaller than a patch.
    height, width = (side if side < p else whole_patches(side, p, s) for side in (height, width))
    return height, width


def _pair(x: float, y: float, like: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """``[2]`` of x and y, on the device of ``like``."""
    return torch.tensor([x, y], dtype=dtype, device=like.device)


def _as_points(points: Tensor | npt.ArrayLike, size: tuple[int, int]) -> Tensor:
    """Check ``points``: ``[P, 2]`` float64 on the CPU."""
    if isinstance(points, Tensor):
        if points.layout is not torch.strided or points.is_nested or points.is_quantized or points.is_meta:
            raise ValueError("points must be a dense tensor that holds its values: [P, 2] numbers (x, y) or None")
        given = points.detach().cpu()
    else:
        try:
            array = np.asarray(points)
            given = torch.from_numpy(array if array.dtype.kind not in "iuf" else array.astype(np.float64))
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"points must be [P, 2] numbers (x, y) or None: {error}") from error
    if given.dtype is torch.bool or given.is_complex():
        raise ValueError(f"points must be [P, 2] real numbers (x, y) or None, got {given.dtype}")
    pixels = given.to(torch.float64)
    if pixels.dim() != 2 or pixels.shape[1] != 2:
        raise ValueError(f"points must be [P, 2], (x, y) pixels of A, got {list(pixels.shape)}")
    # Written so that NaN fails too.
    outside = ~((pixels >= 0) & (pixels < _pair(size[1], size[0], pixels))).all(-1)
    if bool(outside.any()):
        raise ValueError(
            f"points must lie inside A, {size[1]} x {size[0]} pixels wide and high: 0 <= x < {size[1]} and 0 <= y < "
            f"{size[0]}; {int(outside.sum())} of {outside.numel()} do not, the first is {pixels[outside][0].tolist()}"
        )
    return pixels


@lru_cache(maxsize=1)
def _default_extractor() -> ViTLiFTExtractor:
    return ViTLiFTExtractor(BACKBONE, LIFT, device=None, silent=True)


class _Clock:
    """Seconds of each stage; waits for ``device`` if it is a GPU."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self.start = time.perf_counter()
        self.device: torch.device | None = None

    def lap(self, name: str) -> None:
        if self.device is not None and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.laps[name] = now - self.start
        self.start = now
