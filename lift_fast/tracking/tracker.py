"""Objects and points of a first frame through the frames that follow it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from lift_fast import images
from lift_fast.checks import check_whole
from lift_fast.demonstration import BACKBONE, LIFT
from lift_fast.extractor import ViTLiFTExtractor
from lift_fast.images import AnyImage, LoadSize

from .frames import FrameError, open_video, read_ahead
from .labels import LabelPropagation, Mask, cell_labels, check_propagation, object_mask
from .masks import read_objects
from .points import PointMatcher, PointTracks, as_points


@dataclass(frozen=True)
class TrackedFrame:
    """What is known of one frame."""

    index: int
    """0 for the first frame."""
    image: Image.Image
    """8-bit RGB, upright, in the frame's own size."""
    mask: Mask | None
    """[H, W] uint8: numbers of the objects, 0 for background; None without a mask to follow."""
    points: PointTracks | None
    """None without points to follow."""


class Tracker:
    """Follows the objects of a mask, points, or both, frame by frame, in memory that does not grow with the video.

    Masks follow the rule of DINO's evaluation on DAVIS 2017 (docs/evaluation_davis.md), whose numbers are the defaults.

    Args:
        first: the first frame, in any form that :func:`lift_fast.images.as_image` takes.
        mask: its objects: ``[H, W]`` whole numbers of 0 (background) to 255 or bool, in the frame's own size; or a
            file (:func:`read_objects`).
        points: ``[P, 2]`` (x, y) in pixels of the first frame.
        extractor: where descriptors come from; None is the demonstration pair on the CPU or, if there is one, a GPU.
        size: pixels to which frames are resized: of the shorter side, or (height, width), both rounded to whole
            patches. (448, 448) is the LiFT paper's.
        max_side: pixels of the longer side, see :func:`lift_fast.images.bounded_size`.
        lift_iter: applications of LiFT.
        queue: last frames whose labels are the context of the next one, in addition to the first frame's.
        radius: of the neighbourhood in cells of the descriptor map in which labels are looked for; None for the whole
            frame. Also of the neighbourhood of a point's last position.
        topk: most similar cells whose labels are averaged.
        temperature: of their weights, exp(cosine / temperature).

    Attributes:
        first: the first frame, as :meth:`step` returns the others.
        objects: numbers of the objects.
        lost: those of them that the descriptor map is too coarse for.

    Raises:
        TypeError, ValueError: for a first frame, mask, points or numbers that cannot be used.
    """

    def __init__(
        self,
        first: AnyImage,
        mask: str | os.PathLike[str] | npt.ArrayLike | Tensor | None = None,
        points: npt.ArrayLike | Tensor | None = None,
        *,
        extractor: ViTLiFTExtractor | None = None,
        size: LoadSize = 448,
        max_side: int | None = None,
        lift_iter: int = 1,
        queue: int = 7,
        radius: int | None = 12,
        topk: int = 5,
        temperature: float = 0.1,
    ) -> None:
        if mask is None and points is None:
            raise ValueError("there is nothing to follow; give a mask, points, or both")
        if extractor is not None and not isinstance(extractor, ViTLiFTExtractor):
            raise TypeError(f"extractor must be a ViTLiFTExtractor or None, got {type(extractor).__name__}")
        self.queue, self.radius, self.topk, self.temperature = queue, radius, topk, temperature
        check_propagation(self)
        self.lift_iter = check_whole("lift_iter", lift_iter, 0)
        image = images.as_image(first, "first")
        self.image_size = (image.height, image.width)
        numbers = None if mask is None else _as_mask(mask, self.image_size)
        xy = None if points is None else as_points(points, self.image_size)
        self.extractor = extractor = _default_extractor() if extractor is None else extractor
        width, height = images.bounded_size(image.size, size, max_side, extractor.patch)
        height, width = (images.whole_patches(side, extractor.patch, extractor.stride) for side in (height, width))
        images.check_size((width, height), image.size)
        extractor.check_size(height, width, self.lift_iter)
        self.frame_size = (height, width)
        self.covered = extractor.covered(height, width)
        features = self._features(image)
        self.index = 0
        self.objects: list[int] = []
        self.lost: list[int] = []
        self._labels = None if numbers is None else self._follow(numbers, features)
        self._points = None
        tracks = None
        if xy is not None:
            # Cells of a backbone's patch.
            spacing = max(1, round(features.shape[2] / extractor.backbone.grid(height, width)[1]))
            self._points = PointMatcher(features, self._to_cells(xy, features), self.radius, spacing)
            tracks = self._to_pixels(self._points.tracks(), features)
        self.first = TrackedFrame(0, image, numbers, tracks)

    def step(self, image: AnyImage) -> TrackedFrame:
        """Objects and points in the next frame.

        Raises:
            FrameError: if it has another size than the first frame; it is as if it had not been given.
            TypeError, ValueError: as :func:`lift_fast.images.as_image`.
        """
        frame = images.as_image(image)
        if (frame.height, frame.width) != self.image_size:
            raise FrameError(
                f"it has {frame.width} x {frame.height} pixels, the first frame {self.image_size[1]} x "
                f"{self.image_size[0]}; they must be equal"
            )
        features = self._features(frame)
        self.index += 1
        mask = tracks = None
        if self._labels is not None:
            soft = self._labels.step(features)
            found = object_mask(soft, self.frame_size, self.covered, self.image_size)
            mask = np.array([0, *self.objects], dtype=np.uint8)[found]
        if self._points is not None:
            tracks = self._to_pixels(self._points.step(features), features)
        return TrackedFrame(self.index, frame, mask, tracks)

    def state(self) -> dict[str, Tensor]:
        """All that the next frames depend on, apart from the first frame: tensors on the CPU."""
        found = {"index": torch.tensor(self.index)}
        for name, part in (("labels", self._labels), ("points", self._points)):
            if part is not None:
                found.update({f"{name}.{key}": value for key, value in part.state().items()})
        return found

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on where the tracker of the same first frame was whose :meth:`state` this is.

        Raises:
            ValueError: if it does not fit.
        """
        self.index = int(state["index"])
        for name, part in (("labels", self._labels), ("points", self._points)):
            if part is not None:
                start = f"{name}."
                part.restore({key[len(start) :]: value for key, value in state.items() if key.startswith(start)})

    def _features(self, image: Image.Image) -> Tensor:
        """``[C, h, w]``"""
        # The filter of DAVIS's protocol.
        resized = images.resize(image, self.frame_size, Image.Resampling.BICUBIC)
        with torch.inference_mode():
            batch = images.to_tensor(resized, self.extractor.mean, self.extractor.std)
            return self.extractor.matching_map(batch, self.lift_iter)[0]

    def _follow(self, numbers: Mask, features: Tensor) -> LabelPropagation:
        found = np.unique(numbers)
        self.objects = [int(number) for number in found if number]
        # Without unused numbers in between, which would be channels of zeros.
        compact = np.searchsorted([0, *self.objects], numbers).astype(np.uint8)
        grid = (features.shape[1], features.shape[2])
        labels = cell_labels(compact, grid, features.device, frame=self.frame_size, covered=self.covered)
        # The background's channel is the first.
        for channel, number in enumerate(self.objects, 1):
            if not labels[channel].any():
                self._claim_cell(labels, channel, numbers == number)
        self.lost = [number for channel, number in enumerate(self.objects, 1) if not labels[channel].any()]
        return LabelPropagation(features, labels, self)

    def _claim_cell(self, labels: Tensor, channel: int, pixels: npt.NDArray[np.bool_]) -> None:
        """Give an object that lies between the sampled pixels the cell of the pixel nearest to its centre, unless that
        is the only one of another object."""
        places = np.argwhere(pixels)
        row, column = places[np.square(places - places.mean(0)).sum(1).argmin()]
        at = self._to_cells(torch.tensor([[float(column), float(row)]]), labels).round().to(torch.int64)[0]
        x, y = int(at[0].clamp(0, labels.shape[2] - 1)), int(at[1].clamp(0, labels.shape[1] - 1))
        owner = int(labels[:, y, x].argmax())
        if not owner or labels[owner].sum() > 1:
            labels[:, y, x] = 0
            labels[channel, y, x] = 1

    def _to_cells(self, xy: Tensor, maps: Tensor) -> Tensor:
        """Pixels of the file to cells of ``maps [C, h, w]``; whole numbers are centres in both."""
        scale, offset = self._scale(maps)
        return (xy.to(maps.device, torch.float32) + 0.5 - offset) / scale - 0.5

    def _to_pixels(self, tracks: PointTracks, maps: Tensor) -> PointTracks:
        scale, offset = self._scale(maps)
        xy = (torch.from_numpy(tracks.xy).to(maps.device) + 0.5) * scale + offset - 0.5
        return PointTracks(xy.cpu().numpy(), tracks.confidence, tracks.visible)

    def _scale(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels (x, y) of the file that a cell is wide and high, and the place of the first cell's corner."""
        top, left, height, width = self.covered
        x, y = self.image_size[1] / self.frame_size[1], self.image_size[0] / self.frame_size[0]
        scale = torch.tensor([width * x / maps.shape[2], height * y / maps.shape[1]], device=maps.device)
        return scale, torch.tensor([left * x, top * y], device=maps.device)


def track(
    frames: str | os.PathLike[str] | Iterable[AnyImage],
    mask: str | os.PathLike[str] | npt.ArrayLike | Tensor | None = None,
    points: npt.ArrayLike | Tensor | None = None,
    **options: Any,
) -> Iterator[TrackedFrame]:
    """Follow the objects of a mask, points, or both from the first frame through a video.

    Yields a result for each frame, the first one included, while the next frame is read; memory does not grow with the
    video.

    Args:
        frames: folder, animated image or video file (:func:`open_video`), or the frames themselves, in any form that
            :func:`lift_fast.images.as_image` takes.
        mask, points: of the first frame, as :class:`Tracker`.
        options: ``extractor``, ``size``, ``max_side``, ``lift_iter``, ``queue``, ``radius``, ``topk``,
            ``temperature``, as :class:`Tracker`.

    Raises:
        FrameError: naming the frame, if one cannot be read or has another size. Use :class:`Tracker` to leave it out.
        FileNotFoundError, TypeError, ValueError: as :func:`open_video` and :class:`Tracker`.
    """
    given: Iterable[AnyImage | FrameError]
    if isinstance(frames, (str, os.PathLike)):
        own = [Path(mask)] if isinstance(mask, (str, os.PathLike)) else []
        given = (frame.image for frame in read_ahead(open_video(frames, own).frames()))
    else:
        given = frames
    tracker = None
    for number, image in enumerate(given):
        if isinstance(image, FrameError):
            raise image
        try:
            if tracker is None:
                tracker = Tracker(image, mask, points, **options)
                found = tracker.first
            else:
                found = tracker.step(image)
        except FrameError as error:
            raise FrameError(f"frame {number}: {error}") from error
        yield found


def _as_mask(mask: Any, size: tuple[int, int]) -> Mask:
    """``[H, W]`` uint8, checked."""
    if isinstance(mask, (str, os.PathLike)):
        numbers: npt.NDArray[Any] = read_objects(mask).numbers
    else:
        numbers = np.asarray(mask.detach().cpu() if isinstance(mask, Tensor) else mask)
    if numbers.dtype.kind not in "biu" or numbers.ndim != 2:
        raise ValueError(f"mask must be [H, W] whole numbers or bool, got {list(numbers.shape)} {numbers.dtype}")
    if numbers.shape != size:
        raise ValueError(
            f"the mask has {numbers.shape[1]} x {numbers.shape[0]} pixels, the first frame {size[1]} x {size[0]}; they "
            "must be equal (resize the mask by nearest neighbours)"
        )
    if numbers.size and not 0 <= int(numbers.min()) <= int(numbers.max()) <= 255:
        raise ValueError(f"mask must hold 0 to 255, got {numbers.min()} to {numbers.max()}")
    if not numbers.any():
        raise ValueError("the mask marks no object: all of its pixels are background")
    return numbers.astype(np.uint8)


@lru_cache(maxsize=1)
def _default_extractor() -> ViTLiFTExtractor:
    return ViTLiFTExtractor(BACKBONE, LIFT, device=None, silent=True)
