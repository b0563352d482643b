"""``match_images``: two images in, matches in their own pixels out."""

from __future__ import annotations

import io
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from . import memory
from ._text import quoted
from ._threads import side_by_side
from .checks import check_flag, check_rule, check_whole
from .extractor import Rectangle, ViTLiFTExtractor, check_lift_iter, demonstration_extractor
from .geometry import SEEDS, Verification, as_cameras, as_focal, check_kind, check_threshold, guessed_camera, opencv
from .images import (
    AnyImage,
    LoadSize,
    bounded_size,
    check_size,
    file_name,
    oriented_image,
    resize,
    whole_patches,
)
from .map_cache import MapCache
from .ops.dense_match.bilinear import vector
from .ops.dense_match.op import match_pixels
from .trust import Field, Trust, local_maps, summarise, verify_field

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
    """Seconds of each of :data:`STAGES`, with ``timing``; and of "verify", with ``verify``."""
    inliers: Tensor | None = None
    """[...] bool, with ``verify``: valid and within the threshold of ``transform``; nowhere if it found none."""
    transform: npt.NDArray[np.float64] | None = None
    """[3, 3] float64, with ``verify``: the homography from pixels of A to pixels of B, or the fundamental or essential
    matrix; None if it found none."""
    verification: Verification | None = None
    """The record of ``verify``: its verdict in words, number and share of inliers."""
    trust: Trust | None = None
    """Summary of what these matches are worth, with a warning if they should not be believed."""
    files: tuple[str | None, str | None] = (None, None)
    """A and B as given, where they were paths."""
    orientations: tuple[int, int] = (1, 1)
    """EXIF orientations of A and B as given, 1 to 8."""

    def __repr__(self) -> str:
        (height_a, width_a), (height_b, width_b) = self.size_a, self.size_b
        count, valid = self.valid.numel(), int(self.valid.sum())
        share = f" ({valid / count:.0%})" if count else ""
        verdict = getattr(getattr(self, "verification", None), "verdict", "")
        warning = getattr(getattr(self, "trust", None), "warning", "")
        notes = ["" if verdict in warning else verdict, warning, "random weights" if self.random_weights else ""]
        return (
            f"ImageMatches(A {width_a} x {height_a}, B {width_b} x {height_b} pixels: {valid} of {count} matches valid"
            f"{share}{''.join(f'; {note}' for note in notes if note)})"
        )

    def _repr_png_(self) -> bytes | None:
        """The sheet of :meth:`draw`, which notebooks show; None for matches of given points, which have none."""
        if self.valid.dim() != 2:
            return None
        out = io.BytesIO()
        self.draw().save(out, format="PNG")
        return out.getvalue()

    def numpy(self) -> dict[str, npt.NDArray[Any]]:
        """All fields but images and seconds as arrays, as ``lift-fast match`` writes them to its .npz file.

        ``xy_a, xy_b, similarity, distance, confidence, valid``, ``size_a, size_b``, ``covered_a, covered_b``,
        ``grid_a, grid_b`` and ``random_weights`` as above; ``loaded_size_a, loaded_size_b``: (height, width) of the
        loaded images. With ``verify``: ``inliers``, and ``transform``, NaN if there is none.
        """
        tensors = ("xy_a", "xy_b", "similarity", "distance", "confidence", "valid")
        arrays = {name: getattr(self, name).cpu().numpy() for name in tensors}
        for name in ("size_a", "size_b", "covered_a", "covered_b", "grid_a", "grid_b", "random_weights"):
            arrays[name] = np.array(getattr(self, name))
        for side, image in (("a", self.picture_a), ("b", self.picture_b)):
            arrays[f"loaded_size_{side}"] = np.array((image.height, image.width))
        if self.inliers is not None:
            arrays["inliers"] = self.inliers.cpu().numpy()
            arrays["transform"] = np.full((3, 3), np.nan) if self.transform is None else self.transform
        return arrays

    @property
    def warning(self) -> str:
        """Why these matches should not be believed, or ""."""
        if self.random_weights:
            return "random weights: these matches mean nothing"
        return "" if self.trust is None else self.trust.warning

    def draw(self, lines: int = 40, caption: str = "") -> Image.Image:
        """Draw the matches on one sheet, see :func:`lift_fast.drawing.draw_matches`.

        Raises:
            ValueError: for matches of given points, which have no dense layout.
        """
        from .drawing import MatchView, draw_matches

        if self.valid.dim() != 2:
            raise ValueError("draw() needs dense matches; leave points=None in match_images, with step=N for fewer")
        verdict = "" if self.verification is None else self.verification.verdict
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
                warning=self.warning,
                inliers=None if self.inliers is None else self.inliers.cpu().numpy(),
                verdict="" if verdict in self.warning else verdict,
            ),
            lines=lines,
        )

    def export(
        self,
        path: str | os.PathLike[str],
        *,
        names: tuple[str, str] | None = None,
        orientations: tuple[int, int] | None = None,
        cell: int = 1,
    ) -> int:
        """Write the valid matches (inliers, if verified) for COLMAP (.txt), hloc (.h5) or as optical flow (.flo).

        See :func:`lift_fast.match_files.export_matches`, which also takes many pairs.

        Args:
            path: its ending chooses the format.
            names: of the images' files, relative to the folder of all; None is those of :attr:`files`, relative to the
                folder that holds both. Not needed for .flo.
            orientations: EXIF orientation of these files, which COLMAP and hloc disregard; None is
                :attr:`orientations`.
            cell: positions within a cell of that many loaded pixels become one key point.

        Returns:
            The number of matches written; 0 if ``verify`` found no transform.

        Raises:
            ValueError: without ``names`` if an image was not given as a path, and as ``export_matches``.
        """
        from .match_files import MatchedPair, export_matches, names_of

        pair = names_of(path, self.files) if names is None else names
        return sum(export_matches(path, [MatchedPair(pair, self.numpy, orientations or self.orientations)], cell))


def match_images(
    a: AnyImage,
    b: AnyImage,
    *,
    extractor: ViTLiFTExtractor | None = None,
    size: LoadSize = 448,
    mutual: bool = True,
    points: Tensor | npt.ArrayLike | None = None,
    step: int = 1,
    normalize: str = "pixel",
    lift_iter: int = 1,
    timing: bool = False,
    verify: str | None = None,
    threshold: float | None = None,
    seed: int = 0,
    camera: npt.ArrayLike | float | None = None,
    max_side: int | None = None,
    cache: MapCache | None = None,
) -> ImageMatches:
    """Match the pixels of image A to those of image B: decode, backbone, LiFT, exact dense matching.

    The images are loaded at ``size``, rounded to whole patches, so that the cells of a descriptor map cover the pixels
    exactly. Positions are converted to pixels of the original images. Matching is :func:`lift_fast.dense_match` in
    both directions.

    **Distance.** The match of a pixel p of A is q in B, and the match of q is p' in A: ``distance`` is the length of
    p' - p, x and y measured in cells of A's descriptor map (h x w cells over the loaded image).

    **Confidence** says how well a match agrees with the matches around it (:mod:`lift_fast.confidence`). It is about
    the share of matches that are right to within three eighths of a cell, as measured with the demonstration pair on
    photographs under known homographies (docs/matching.md); with other backbones it still orders the matches. For
    ``points``, and for steps above a cell, one pixel of each cell of A is matched besides to find it.

    **Verification** (``verify``) draws points from the dense matches, the most confident one of each quarter of a cell,
    and finds the matrix that most of them agree with, see :func:`lift_fast.geometry.verify_pairs`. A homography is then
    refined by aligning the two descriptor maps. The result's ``verification`` says in words whether it succeeded.

    Args:
        a, b: files (EXIF orientation applied), bytes of files or binary file objects, Pillow images, uint8 or 0-to-1
            floating point arrays ``[H, W, 3]`` or tensors ``[3, H, W]``; see :func:`lift_fast.images.as_image`.
        extractor: backbone and optional LiFT; None is the demonstration pair that ships with the package
            (:mod:`lift_fast.demonstration`), on CUDA if available, with ``dtype="auto"``, and cached for further calls.
        size: pixels of the shorter side, (height, width), or None for the size of each image.
        mutual: ``valid`` requires ``distance <= 1``. (``mutual`` of :func:`lift_fast.dense_match` is
            ``distance == 0``; few pixels of a dense layout pass that, since matches gather at the centres of cells.)
        points: ``[P, 2]`` (x, y) in pixels of the original A, 0 <= x < W and 0 <= y < H; each is moved to the nearest
            pixel centre of the loaded image. None is all pixels of the loaded image: the dense layout.
        step: without points, every step-th pixel of each row and column.
        normalize: ``"pixel"``, true cosines, or ``"grid"``, as in the SPair-71k protocol; see
            :func:`lift_fast.dense_match`.
        lift_iter: applications of LiFT; 0 is the backbone alone.
        timing: fill in ``seconds``; waits for the GPU after each stage.
        verify: ``"homography"`` (a plane, or a camera that only turns), ``"fundamental"`` (a rigid scene),
            ``"essential"`` (the same with known cameras), or None. Needs OpenCV, the extra ``geometry``.
        threshold: of ``verify``: largest distance of an inlier in pixels of B; None is three quarters of a cell of B.
        seed: of ``verify``, 0 to 2^31 - 1.
        camera: of ``verify="essential"``: ``[3, 3]`` intrinsic matrix in pixels of the original images, ``[2, 3, 3]``
            for A and B, or the focal length of both, with the principal point in the middle; None guesses that it is
            1.2 times the longer side (:func:`lift_fast.geometry.guessed_camera`).
        max_side: pixels of the longer side, before rounding: an image that would be longer is loaded at this length;
            see :func:`lift_fast.images.bounded_size`. None is 1792, or four times ``size`` if that is more; there is no
            bound by default unless ``size`` is an integer.
        cache: for many pairs of few images: an image that it holds does not go through the networks again.

    Raises:
        FileNotFoundError: for a missing file.
        TypeError: for images or an extractor of another type.
        ValueError: for images that cannot be read or are smaller than a patch, for more pixels or cells than
            :func:`lift_fast.images.max_pixels` allows, and options out of range.
    """
    check_rule(normalize)
    step, lift_iter = check_whole("step", step, 1, math.inf), check_lift_iter(lift_iter)
    if max_side is not None:
        max_side = check_whole("max_side", max_side, 1, math.inf)
    for name, value in (("mutual", mutual), ("timing", timing)):
        check_flag(name, value)
    if verify is not None:
        check_kind(verify)
        opencv()
        threshold = None if threshold is None else check_threshold(threshold)
        seed = check_whole("seed", seed, 0, SEEDS - 1)
        focal = as_focal(camera)
        camera = None if camera is None or focal is not None else np.stack(as_cameras(camera))
    if points is not None and step != 1:
        raise ValueError(f"step={step} thins out the dense layout and does not apply to points; leave it out")
    if cache is not None and not isinstance(cache, MapCache):
        raise TypeError(f"cache must be a lift_fast.map_cache.MapCache or None, got {type(cache).__name__}")
    if extractor is not None and not isinstance(extractor, ViTLiFTExtractor):
        raise TypeError(f"extractor must be a ViTLiFTExtractor or None, got {type(extractor).__name__}")
    if extractor is not None and extractor.device.type == "meta":
        raise ValueError("extractor is on the meta device, where nothing is computed; move it to cpu or cuda")

    clock = _Clock()
    decode = (partial(oriented_image, a, "a"), partial(oriented_image, b, "b"))
    # Other objects than files by name may share what they read from.
    apart = all(isinstance(image, (str, os.PathLike, bytes)) for image in (a, b))
    (image_a, orientation_a), (image_b, orientation_b) = side_by_side(*decode) if apart else (f() for f in decode)
    images, orientations = [image_a, image_b], (orientation_a, orientation_b)
    sizes = [(image.height, image.width) for image in images]
    # Loading the weights is not part of any stage.
    paused = time.perf_counter()
    extractor = demonstration_extractor() if extractor is None else extractor
    clock.start += time.perf_counter() - paused
    clock.device = extractor.device if timing else None
    sides = []
    for given, image, name in zip((a, b), images, "ab", strict=True):
        try:
            height, width = _whole_patches(image, size, max_side, extractor)
            # Both before the first is resized.
            check_size((width, height), image.size)
            extractor.check_size(height, width, lift_iter)
        except ValueError as error:
            raise ValueError(f"{quoted(given) if isinstance(given, (str, os.PathLike)) else name}: {error}") from error
        sides.append((height, width))
    pictures = side_by_side(*(partial(resize, image, side) for image, side in zip(images, sides, strict=True)))
    batches = _as_batches(extractor, pictures, sides)
    pixels = None if points is None else _as_points(points, sizes[0])
    clock.lap("decode")
    maps = _descriptor_maps(extractor, batches, lift_iter, clock, cache)
    del batches
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
    frames = [
        _Frame(original, side, rectangle, (m.shape[-2], m.shape[-1]))
        for original, side, rectangle, m in zip(sizes, sides, covered, maps, strict=True)
    ]

    def matched(at: Tensor) -> tuple[Field, tuple[Tensor, ...]]:
        found = match_pixels(maps, (height, width), frame_b, at, normalize, mutual)
        return Field(frames[0].to_cells(at), frames[1].to_cells(found[0]), found[2]), found

    layout, (xy, similarity, distance, valid) = matched(at)
    field, (rows, columns) = layout, frames[0].grid
    if pixels is not None or step > min(height / rows, width / columns):
        field, _ = matched(frames[0].centres(at.device))
    local = local_maps(field, frames[0].grid)
    confidence = local.confidence(layout.at, layout.to).masked_fill(distance.isinf(), 0.0)
    clock.lap("match")
    xy_a = frames[0].to_original(at)
    xy_b = frames[1].to_original(xy).masked_fill_((xy < 0).any(-1, keepdim=True), -1.0)
    verification = inliers = None
    if verify is not None:
        verification = verify_field(
            field,
            confidence if field is layout else local.confidence(field.at, field.to),
            (maps[0], maps[1]),
            verify,
            (frames[0].matrix(), frames[1].matrix()),
            threshold=threshold,
            seed=seed,
            camera=np.stack([guessed_camera(size, focal) for size in sizes]) if camera is None else camera,
        )
        inliers = valid & torch.from_numpy(verification.agrees(xy_a, xy_b)).to(valid.device)
        clock.lap("verify")
    return ImageMatches(
        xy_a=xy_a,
        xy_b=xy_b,
        similarity=similarity,
        distance=distance,
        confidence=confidence,
        valid=valid,
        size_a=sizes[0],
        size_b=sizes[1],
        picture_a=pictures[0],
        picture_b=pictures[1],
        covered_a=covered[0],
        covered_b=covered[1],
        grid_a=(maps[0].shape[2], maps[0].shape[3]),
        grid_b=(maps[1].shape[2], maps[1].shape[3]),
        random_weights=extractor.random_weights,
        seconds=clock.laps if timing else {},
        inliers=inliers,
        transform=None if verification is None else verification.matrix,
        verification=verification,
        trust=summarise(valid, field, local, (frames[0].grid, frames[1].grid), verification),
        files=(file_name(a), file_name(b)),
        orientations=orientations,
    )


class _Frame(NamedTuple):
    """One image's coordinates: pixels that its map covers, cells of the map, pixels of the original image."""

    original: tuple[int, int]
    loaded: tuple[int, int]
    covered: Rectangle
    grid: tuple[int, int]

    def to_cells(self, at: Tensor) -> Tensor:
        """``[..., 2]`` float32 (x, y) in cells: the centre of the first one is (0.5, 0.5)."""
        cells = _pair(self.grid[1] / self.covered[3], self.grid[0] / self.covered[2], at)
        return ((at + 0.5) * cells).to(torch.float32)

    def to_original(self, at: Tensor) -> Tensor:
        """``[..., 2]`` float32 (x, y) in pixels of the original image."""
        top, left = self.covered[:2]
        scale = _pair(self.original[1] / self.loaded[1], self.original[0] / self.loaded[0], at)
        # In place: a dense layout at 896 x 896 takes 13 MB in float64.
        return (at + _pair(left + 0.5, top + 0.5, at)).mul_(scale).sub_(0.5).to(torch.float32)

    def matrix(self) -> npt.NDArray[np.float64]:
        """``[3, 3]``: from (x, y, 1) in cells to pixels of the original image."""
        (top, left, height, width), (h, w) = self.covered, self.grid
        x, y = self.original[1] / self.loaded[1], self.original[0] / self.loaded[0]
        return np.array([[width / w * x, 0, left * x - 0.5], [0, height / h * y, top * y - 0.5], [0, 0, 1.0]])

    def centres(self, device: torch.device) -> Tensor:
        """``[h, w, 2]`` int64 (x, y): the covered pixel at the centre of each cell."""
        height, width = self.covered[2:]
        ys, xs = (
            ((torch.arange(n, dtype=torch.float64, device=device) + 0.5) * (side / n)).floor().to(torch.int64)
            for n, side in zip(self.grid, (height, width), strict=True)
        )
        return torch.stack(torch.meshgrid(xs, ys, indexing="xy"), dim=-1)


def _as_batches(
    extractor: ViTLiFTExtractor, images: Sequence[Image.Image], sides: Sequence[tuple[int, int]]
) -> list[Tensor]:
    """Two images of one size as one batch ``[2, 3, H, W]``, others as two of one image, in the extractor's dtype."""
    counts = [2] if sides[0] == sides[1] else [1, 1]
    batches = [
        memory.empty((count, 3, *side), dtype=extractor.dtype, device="cpu")
        for count, side in zip(counts, sides, strict=False)
    ]
    for image, place in zip(images, _one_by_one(batches), strict=True):
        extractor.preprocess(image, out=place)
    return batches


def _one_by_one(batches: Sequence[Tensor]) -> list[Tensor]:
    """Views ``[1, ...]`` of every image."""
    return [one for batch in batches for one in batch.split(1)]


def _descriptor_maps(
    extractor: ViTLiFTExtractor, batches: Sequence[Tensor], lift_iter: int, clock: _Clock, cache: MapCache | None
) -> list[Tensor]:
    """Two maps ``[1, c, h, w]``; without a cache, images of one batch go through the networks together."""

    def compute(inputs: Sequence[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            seen = [extractor._backbone_tokens(batch, lift_iter) for batch in inputs]
            clock.lap("backbone")
            maps = [extractor.lift_map(batch, tokens, lift_iter) for batch, tokens in seen]
            clock.lap("lift")
        return maps

    if cache is not None:
        return cache.maps(extractor, lift_iter, _one_by_one(batches), compute)
    return _one_by_one(compute(batches))


def _whole_patches(
    image: Image.Image, size: LoadSize, max_side: int | None, extractor: ViTLiFTExtractor
) -> tuple[int, int]:
    """The (height, width) at which to load, without pixels beyond the last whole patch."""
    p, s = extractor.patch, extractor.stride
    width, height = bounded_size(image.size, size, max_side, p)
    # The backbone refuses images smaller than a patch.
    height, width = (side if side < p else whole_patches(side, p, s) for side in (height, width))
    return height, width


def _pair(x: float, y: float, like: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """``[2]`` of x and y, on the device of ``like``."""
    return vector(x, y, dtype, like.device)


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
