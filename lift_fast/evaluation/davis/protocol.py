"""Masks of a video from the mask of its first frame, by label propagation between features of its frames.

The rule of DINO's evaluation on DAVIS 2017: soft labels of the first frame and of the last few frames follow the most
similar features nearby. docs/evaluation_davis.md describes where published code differs, and how the frames of the LiFT
paper and of DINO differ.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lift_fast import images, propagate_labels
from lift_fast.checks import check_whole
from lift_fast.evaluation.methods import Batch, Features
from lift_fast.evaluation.rules import PLACEMENTS, PROTOCOLS, check_rule

from .dataset import Mask
from .frames import frame_size, read_frame

# Of a batch of frames, such as a lift_fast.evaluation.methods.Method.
FeatureMaps = Callable[[Batch], Features]
# (top, left, height, width) pixels of the resized frame over which a map's cells lie side by side.
Covered = tuple[int, int, int, int]


@dataclass(frozen=True)
class Network:
    """The network and its input.

    Attributes:
        methods: give features; all of them see the same batches and share what they have in common.
        mean, std: normalisation of images.
        patch_size: pixels of the backbone's patch, the factor by which ``placement="stretch"`` enlarges labels.
        device, dtype: of the images.
    """

    methods: Sequence[FeatureMaps]
    mean: Sequence[float]
    std: Sequence[float]
    patch_size: int
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class PropagationOptions:
    """Numbers of the protocol; the defaults are the published ones.

    Attributes:
        size: S, to which the sides of frames are resized; see ``protocol``.
        queue: number of last frames in the context, in addition to the first one.
        radius: of the neighbourhood in cells of the feature grid; None for the whole frame.
        topk: number of keys whose labels are averaged, from all context frames together.
        temperature: of the weights exp(cosine / temperature).
        batch_size: frames whose features are computed at one time.
        protocol: ``lift``: frames of S x S, as in the LiFT paper. ``dino``: S is the shorter side, as in DINO's own
            evaluation, whose S is 480 (:mod:`lift_fast.evaluation.davis.frames`); its features are the backbone's facet
            ``final``, its normalisation is ``frames.DINO_MEAN`` and ``frames.DINO_STD``.
        placement: ``stretch`` lays each map over the whole frame and enlarges labels by the patch size, whatever size
            that gives, before they are resized to the file's pixels, as both published evaluations do. ``cover`` lays
            it over the pixels that its cells cover and enlarges labels to the resized frame. They differ for LiFT and
            every other finer grid, for patches that do not divide the frame, and for overlapping patches.
    """

    size: int = 448
    queue: int = 7
    radius: int | None = 12
    topk: int = 5
    temperature: float = 0.1
    batch_size: int = 4
    protocol: str = "lift"
    placement: str = "stretch"

    def __post_init__(self) -> None:
        for name, least in (("size", 1), ("queue", 0), ("radius", 0), ("topk", 1), ("batch_size", 1)):
            if not (name == "radius" and self.radius is None):
                check_whole(name, getattr(self, name), least)
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be a positive number, got {self.temperature!r}")
        check_rule("protocol", self.protocol, PROTOCOLS)
        check_rule("placement", self.placement, PLACEMENTS)
        frame_size((self.size, self.size), self.size, self.protocol)


class LabelPropagation:
    """The state of one video: features and soft labels of the first frame and of a queue of the last ones.

    It begins with the first frame's ``features [C, h, w]`` and the ``labels [L, h, w]`` of its cells.
    """

    def __init__(self, features: Tensor, labels: Tensor, options: PropagationOptions) -> None:
        self.grid = (features.shape[1], features.shape[2])
        self.options = options
        self._first = (_rows(features), _rows(labels))
        self._queue: deque[tuple[Tensor, Tensor]] = deque(maxlen=options.queue)

    def step(self, features: Tensor) -> Tensor:
        """Soft labels ``[L, h, w]`` of the next frame; its features and labels join the queue."""
        if tuple(features.shape[1:]) != self.grid:
            raise ValueError(f"expected features on a grid of {self.grid}, got {list(features.shape)}")
        query = _rows(features)
        context = [self._first, *self._queue]
        labels = propagate_labels(
            query,
            torch.cat([keys for keys, _ in context]),
            torch.cat([labels for _, labels in context]),
            grid=self.grid,
            radius=self.options.radius,
            k=self.options.topk,
            temperature=self.options.temperature,
        )
        self._queue.append((query, labels))
        return labels.T.unflatten(1, self.grid)


def _rows(maps: Tensor) -> Tensor:
    """``[C, h, w]`` to ``[h * w, C]``, a copy: a view would keep its whole batch of frames alive."""
    return maps.flatten(1).T.clone(memory_format=torch.contiguous_format)


def cell_labels(
    mask: Mask,
    grid: tuple[int, ...],
    device: torch.device | str = "cpu",
    *,
    frame: tuple[int, int] | None = None,
    covered: Covered | None = None,
) -> Tensor:
    """A mask of objects 1 to n, nearest-resized to the grid: one-hot ``[n + 1, h, w]`` float32, background first.

    With ``frame`` and ``covered`` the mask stands for ``frame`` (H, W) pixels, and the grid lies over ``covered`` of
    them; otherwise it lies over the whole mask.
    """
    box = None
    if frame is not None and covered is not None:
        top, left, height, width = covered
        y, x = mask.shape[0] / frame[0], mask.shape[1] / frame[1]
        box = (left * x, top * y, min((left + width) * x, mask.shape[1]), min((top + height) * y, mask.shape[0]))
    small = np.asarray(Image.fromarray(mask).resize((grid[1], grid[0]), Image.Resampling.NEAREST, box=box))
    classes = torch.from_numpy(small.astype(np.int64)).to(device)
    return F.one_hot(classes, int(mask.max()) + 1).permute(2, 0, 1).to(torch.float32)


def enlarge(labels: Tensor, patch_size: int) -> Tensor:
    """Soft labels ``[L, h, w]`` enlarged bilinearly by the patch size: the published rule, whatever size that gives."""
    size = (labels.shape[1] * patch_size, labels.shape[2] * patch_size)
    return F.interpolate(labels[None], size=size, mode="bilinear", align_corners=False)[0]


def enlarge_covered(labels: Tensor, frame: tuple[int, int], covered: Covered) -> Tensor:
    """Soft labels ``[L, h, w]`` bilinearly to the pixels of ``frame`` that they cover; the outermost are repeated."""
    top, left, height, width = covered
    enlarged = F.interpolate(labels[None], size=(height, width), mode="bilinear", align_corners=False)
    beyond = (left, frame[1] - left - width, top, frame[0] - top - height)
    return (F.pad(enlarged, beyond, mode="replicate") if any(beyond) else enlarged)[0]


def hard_mask(enlarged: Tensor, output: tuple[int, ...]) -> Mask:
    """Object numbers ``[H, W]`` from enlarged soft labels ``[L, h, w]``.

    Each channel is normalised (:func:`normalize_channels`), the largest wins (the first of equals), and the result is
    resized to ``output`` (H, W) by nearest neighbours.
    """
    winner = normalize_channels(enlarged).argmax(0).to(torch.uint8).cpu().numpy()
    return np.asarray(Image.fromarray(winner).resize((output[1], output[0]), Image.Resampling.NEAREST))


def normalize_channels(labels: Tensor) -> Tensor:
    """Scale each channel of ``[L, H, W]`` to 0 to 1; a channel without positive values stays.

    A constant positive channel becomes infinite: published code divides 0 by 0 there, and its argmax picks the NaN.
    """
    low, high = labels.amin((1, 2), keepdim=True), labels.amax((1, 2), keepdim=True)
    span = high - low
    scaled = torch.where(span > 0, (labels - low) / span, torch.inf)
    return torch.where(high > 0, scaled, labels)


def predict(frames: Sequence[Path], mask: Mask, network: Network, options: PropagationOptions) -> Iterator[list[Mask]]:
    """For each frame of a video, in order, the mask ``[H, W]`` by each method; the first frame keeps the given mask.

    Memory holds images and features of a batch of frames and the features of the context frames, whatever the video's
    length.

    Raises:
        DavisError: naming the frame, if it cannot be read or differs from the mask in size.
    """
    yield [mask] * len(network.methods)
    frame = frame_size(mask.shape, options.size, options.protocol)
    videos: list[LabelPropagation] = []
    places: list[Covered | None] = []
    for batch in _batches(frames, mask.shape, network, options):
        with torch.inference_mode():
            found = [method(batch) for method in network.methods]
        for i in range(len(batch.imgs)):
            if not videos:
                places = [None if options.placement == "stretch" else features.covered for features in found]
                labels = [
                    cell_labels(mask, one.map.shape[2:], one.map.device, frame=frame, covered=place)
                    for one, place in zip(found, places, strict=True)
                ]
                firsts = zip(found, labels, strict=True)
                videos = [LabelPropagation(one.map[0], of_cells, options) for one, of_cells in firsts]
                continue
            masks = []
            for video, features, place in zip(videos, found, places, strict=True):
                soft = video.step(features.map[i])
                soft = enlarge(soft, network.patch_size) if place is None else enlarge_covered(soft, frame, place)
                masks.append(hard_mask(soft, mask.shape))
            yield masks


def _batches(
    frames: Sequence[Path], size: tuple[int, ...], network: Network, options: PropagationOptions
) -> Iterator[Batch]:
    """The frames, in order. The next batch is read while this one is used."""

    def read(path: Path) -> Tensor:
        frame = read_frame(path, size, options.size, options.protocol)
        return images.to_tensor(frame, network.mean, network.std)

    batches = [frames[i : i + options.batch_size] for i in range(0, len(frames), options.batch_size)]
    with ThreadPoolExecutor(max_workers=min(4, options.batch_size)) as pool:
        ahead = [pool.submit(read, path) for path in batches[0]]
        for following in [*batches[1:], ()]:
            imgs = torch.cat([future.result() for future in ahead])
            ahead = [pool.submit(read, path) for path in following]
            yield Batch(imgs.to(network.device, network.dtype))
