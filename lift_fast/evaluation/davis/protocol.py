"""Masks of a video from the mask of its first frame, by label propagation between features of its frames.

The rule of DINO's evaluation on DAVIS 2017: soft labels of the first frame and of the last few frames follow the most
similar features nearby. docs/evaluation_davis.md describes where published code differs, and how the frames of the LiFT
paper and of DINO differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lift_fast import images
from lift_fast.checks import check_whole
from lift_fast.evaluation.methods import Batch, Features
from lift_fast.evaluation.rules import PLACEMENTS, PROTOCOLS, check_rule
from lift_fast.tracking.labels import (
    Covered,
    LabelPropagation,
    Mask,
    cell_labels,
    check_propagation,
    enlarge,
    enlarge_covered,
    hard_mask,
)

from .frames import frame_size, read_frame

# Of a batch of frames, such as a lift_fast.evaluation.methods.Method.
FeatureMaps = Callable[[Batch], Features]


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
        for name in ("size", "batch_size"):
            check_whole(name, getattr(self, name), 1)
        check_propagation(self)
        check_rule("protocol", self.protocol, PROTOCOLS)
        check_rule("placement", self.placement, PLACEMENTS)
        frame_size((self.size, self.size), self.size, self.protocol)


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
