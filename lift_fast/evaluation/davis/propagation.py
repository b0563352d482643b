"""Masks of a video from that of its first frame, by label propagation between features of its frames.

The rule of DINO's evaluation on DAVIS 2017: soft labels of the first frame and of the last few travel along the most
similar features nearby. docs/evaluation_davis.md says where published code differs.
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
from lift_fast.evaluation.methods import Batch, Features

from .dataset import DavisError, Mask

# Of a batch of frames, such as a lift_fast.evaluation.methods.Method.
FeatureMaps = Callable[[Batch], Features]
# (top, left, height, width) pixels of the S x S frame over which a map's cells lie side by side.
Covered = tuple[int, int, int, int]


@dataclass(frozen=True)
class Network:
    """What the pictures of a video go through.

    Attributes:
        methods: give features; all see the same batches, in which they share what they have in common.
        mean, std: that pictures are normalised with.
        device, dtype: of the pictures.
    """

    methods: Sequence[FeatureMaps]
    mean: Sequence[float]
    std: Sequence[float]
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class PropagationOptions:
    """Numbers of the protocol; the defaults are the published ones.

    Attributes:
        size: side S in pixels of the square that frames are resized to (bicubic).
        queue: last frames that serve as context, beside the first one.
        radius: of the neighbourhood in cells of the feature grid; None for the whole frame.
        topk: keys whose labels are averaged, of all context frames together.
        temperature: of the weights exp(cosine / temperature).
        batch_size: frames whose features are computed at one time.
    """

    size: int = 448
    queue: int = 7
    radius: int | None = 12
    topk: int = 5
    temperature: float = 0.1
    batch_size: int = 4

    def __post_init__(self) -> None:
        for name, least in (("size", 1), ("queue", 0), ("radius", 0), ("topk", 1), ("batch_size", 1)):
            value = getattr(self, name)
            if name == "radius" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be a positive number, got {self.temperature!r}")


class LabelPropagation:
    """The state of one video: features and soft labels of the first frame and of a queue of the last ones.

    Args:
        features: of the first frame, ``[C, h, w]``.
        labels: of its cells, ``[L, h, w]``.
        options: numbers of the protocol.
    """

    def __init__(self, features: Tensor, labels: Tensor, options: PropagationOptions) -> None:
        self.grid = (features.shape[1], features.shape[2])
        self.options = options
        self._first = (_rows(features), _rows(labels))
        self._queue: deque[tuple[Tensor, Tensor]] = deque(maxlen=options.queue)

    def step(self, features: Tensor) -> Tensor:
        """Soft labels ``[L, h, w]`` of the next frame, whose features and labels join the queue."""
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
        maps: Tensor = labels.T.unflatten(1, self.grid)
        return maps


def _rows(maps: Tensor) -> Tensor:
    """``[C, h, w]`` to ``[h * w, C]``, a copy: a view would keep its whole batch of frames alive."""
    return maps.flatten(1).T.clone(memory_format=torch.contiguous_format)


def cell_labels(
    mask: Mask, grid: tuple[int, int], size: int, covered: Covered, device: torch.device | str = "cpu"
) -> Tensor:
    """A mask of objects 1 to n, nearest-resized to the grid: one-hot ``[n + 1, h, w]`` float32, background first.

    Args:
        mask: of any size; it stands for ``size x size`` pixels.
        grid: (h, w).
        size, covered: the grid lies over these of the pixels, all of them in most cases.
        device: of the result.
    """
    top, left, height, width = covered
    y, x = mask.shape[0] / size, mask.shape[1] / size
    box = (left * x, top * y, min((left + width) * x, mask.shape[1]), min((top + height) * y, mask.shape[0]))
    small = np.asarray(Image.fromarray(mask).resize((grid[1], grid[0]), Image.Resampling.NEAREST, box=box))
    classes = torch.from_numpy(small.astype(np.int64)).to(device)
    return F.one_hot(classes, int(mask.max()) + 1).permute(2, 0, 1).float()


def hard_mask(labels: Tensor, size: int, covered: Covered, output: tuple[int, ...]) -> Mask:
    """Object numbers ``[H, W]`` from soft labels ``[L, h, w]``.

    The labels are bilinearly enlarged to the pixels that they cover of ``size x size``, the outermost repeated beyond;
    each channel is normalised there (:func:`normalize_channels`), the largest wins (the first of equals), and the
    result is resized to ``output`` (H, W) by nearest neighbours.
    """
    top, left, height, width = covered
    enlarged = F.interpolate(labels[None], size=(height, width), mode="bilinear", align_corners=False)
    beyond = (left, size - left - width, top, size - top - height)
    if any(beyond):
        enlarged = F.pad(enlarged, beyond, mode="replicate")
    winner = normalize_channels(enlarged[0]).argmax(0).to(torch.uint8).cpu().numpy()
    return np.asarray(Image.fromarray(winner).resize((output[1], output[0]), Image.Resampling.NEAREST))


def normalize_channels(labels: Tensor) -> Tensor:
    """Each channel of ``[L, H, W]`` from its minimum and maximum to 0 and 1; a channel without positive values stays.

    A constant positive channel becomes infinite: published code divides 0 by 0 there, and its maximum takes the NaN.
    """
    low, high = labels.amin((1, 2), keepdim=True), labels.amax((1, 2), keepdim=True)
    span = high - low
    scaled = torch.where(span > 0, (labels - low) / span, torch.inf)
    return torch.where(high > 0, scaled, labels)


def predict(frames: Sequence[Path], mask: Mask, network: Network, options: PropagationOptions) -> Iterator[list[Mask]]:
    """For each frame of a video, in order, the mask ``[H, W]`` by each method; those of the first are the given one.

    Holds pictures and features of a batch of frames and the features of the context frames, whatever the video's
    length.

    Args:
        frames: files of the video.
        mask: object numbers of the first frame.
        network: pictures to features.
        options: numbers of the protocol.

    Raises:
        DavisError: naming the frame, if it cannot be read or has another size than the mask.
    """
    yield [mask] * len(network.methods)
    videos: list[LabelPropagation] = []
    for batch in _batches(frames, mask.shape, network, options):
        with torch.inference_mode():
            found = [method(batch) for method in network.methods]
        for i in range(len(batch.imgs)):
            if not videos:
                videos = [_begin(features, mask, options) for features in found]
                continue
            yield [
                hard_mask(video.step(features.map[i]), options.size, features.covered, mask.shape)
                for video, features in zip(videos, found, strict=True)
            ]


def _begin(features: Features, mask: Mask, options: PropagationOptions) -> LabelPropagation:
    first = features.map[0]
    grid = first.shape[1], first.shape[2]
    return LabelPropagation(first, cell_labels(mask, grid, options.size, features.covered, first.device), options)


def _batches(
    frames: Sequence[Path], size: tuple[int, ...], network: Network, options: PropagationOptions
) -> Iterator[Batch]:
    """The frames, in order. The next batch is read while this one is used."""

    def read(path: Path) -> Tensor:
        return images.to_tensor(read_frame(path, size, options.size), network.mean, network.std)

    batches = [frames[i : i + options.batch_size] for i in range(0, len(frames), options.batch_size)]
    with ThreadPoolExecutor(max_workers=min(4, options.batch_size)) as pool:
        ahead = [pool.submit(read, path) for path in batches[0]]
        for following in [*batches[1:], ()]:
            pictures = torch.cat([future.result() for future in ahead])
            ahead = [pool.submit(read, path) for path in following]
            yield Batch(pictures.to(network.device, network.dtype))


def read_frame(path: Path, size: tuple[int, ...], side: int) -> Image.Image:
    """A frame, bicubically resized to ``side x side``.

    Raises:
        DavisError: if it cannot be read or is not of ``size`` (H, W).
    """
    try:
        picture = images.read_image(path)
    except (ValueError, OSError) as error:
        raise DavisError(str(error)) from error
    if (picture.height, picture.width) != tuple(size):
        raise DavisError(
            f"{path} has {picture.width} x {picture.height} pixels, the mask of the first frame {size[1]} x {size[0]}; "
            "they must be equal"
        )
    return picture.resize((side, side), Image.Resampling.BICUBIC)
