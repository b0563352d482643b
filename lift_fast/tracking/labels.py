"""Label propagation through one video: the rule of DINO's evaluation on DAVIS 2017, and the steps from a mask to the
soft labels of cells and back."""

from __future__ import annotations

import math
from collections import deque
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lift_fast.checks import check_whole
from lift_fast.propagation import propagate_labels

Mask = npt.NDArray[np.uint8]
# (top, left, height, width) pixels of the resized frame over which a map's cells lie side by side.
Covered = tuple[int, int, int, int]
_AT_ONCE = 16


class PropagationRule(Protocol):
    """Numbers of the rule, see :func:`lift_fast.propagate_labels`.

    ``queue`` is the number of last frames in the context, in addition to the first one; ``radius`` (cells) may be None
    for the whole frame.
    """

    @property
    def queue(self) -> int: ...
    @property
    def radius(self) -> int | None: ...
    @property
    def topk(self) -> int: ...
    @property
    def temperature(self) -> float: ...


def check_propagation(rule: PropagationRule) -> None:
    """Raise ValueError for numbers out of range."""
    for name, least in (("queue", 0), ("radius", 0), ("topk", 1)):
        if not (name == "radius" and rule.radius is None):
            check_whole(name, getattr(rule, name), least)
    temperature: Any = rule.temperature
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)) or not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be a positive number, got {temperature!r}")


class LabelPropagation:
    """The state of one video: features and soft labels of the first frame and of a queue of the last ones.

    It begins with the first frame's ``features [C, h, w]`` and the ``labels [L, h, w]`` of its cells.
    """

    def __init__(self, features: Tensor, labels: Tensor, options: PropagationRule) -> None:
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

    def state(self) -> dict[str, Tensor]:
        """The queue: ``features [n, h * w, C]`` and ``labels [n, h * w, L]``, on the CPU; nothing if it is empty."""
        if not self._queue:
            return {}
        features, labels = zip(*self._queue, strict=True)
        return {"features": torch.stack(features).cpu(), "labels": torch.stack(labels).cpu()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take over the queue of a :meth:`state` of the same video; raises ``ValueError`` if it does not fit."""
        self._queue.clear()
        if not state:
            return
        kept = [state[name].to(mine) for name, mine in zip(("features", "labels"), self._first, strict=True)]
        for found, mine in zip(kept, self._first, strict=True):
            if found.shape[1:] != mine.shape or len(found) > self.options.queue:
                raise ValueError(f"a state of {list(found.shape)} does not fit frames of {list(mine.shape)}")
        self._queue.extend((features.clone(), labels.clone()) for features, labels in zip(*kept, strict=True))


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
    return _resized(normalize_channels(enlarged).argmax(0), output)


def _resized(winner: Tensor, output: tuple[int, ...]) -> Mask:
    numbers = Image.fromarray(winner.to(torch.uint8).cpu().numpy())
    return np.asarray(numbers.resize((output[1], output[0]), Image.Resampling.NEAREST))


def object_mask(labels: Tensor, frame: tuple[int, int], covered: Covered, output: tuple[int, ...]) -> Mask:
    """:func:`hard_mask` of soft labels ``[L, h, w]`` that lie over ``covered`` pixels of ``frame``, for many objects: a
    few of them are enlarged at a time."""
    best, winner = torch.tensor(-torch.inf), torch.tensor(0)
    for start in range(0, len(labels), _AT_ONCE):
        scaled = normalize_channels(enlarge_covered(labels[start : start + _AT_ONCE], frame, covered))
        first = scaled.argmax(0)
        value = scaled.gather(0, first[None])[0]
        best, winner = best.to(value), winner.to(first)
        # A later channel must be larger: the first of equals wins.
        winner = torch.where(value > best, first + start, winner)
        best = torch.maximum(best, value)
    return _resized(winner, output)


def normalize_channels(labels: Tensor) -> Tensor:
    """Scale each channel of ``[L, H, W]`` to 0 to 1; a channel without positive values stays.

    A constant positive channel becomes infinite: published code divides 0 by 0 there, and its argmax picks the NaN.
    """
    low, high = labels.amin((1, 2), keepdim=True), labels.amax((1, 2), keepdim=True)
    span = high - low
    scaled = torch.where(span > 0, (labels - low) / span, torch.inf)
    return torch.where(high > 0, scaled, labels)
