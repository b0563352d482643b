"""Descriptors of a category's images; those that fit into memory are kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lift_fast.backbones import FrozenViT
from lift_fast.evaluation.methods import Batch, Features, Method
from lift_fast.images import read_image, to_tensor

from .protocol import square

CACHE_BYTES = 1 << 30


@dataclass
class ImageFeatures:
    """Descriptors of the images of one category at one size."""

    methods: Sequence[Method]
    backbone: FrozenViT
    side: int
    batch_size: int
    budget: int
    sizes: dict[Path, tuple[int, int]] = field(default_factory=dict)
    """(width, height) of each image that could be read."""
    problems: dict[Path, str] = field(default_factory=dict)
    features: dict[Path, dict[str, Features]] = field(default_factory=dict)

    def load(self, paths: Iterable[Path]) -> None:
        """Compute those of ``paths`` that are missing, without regard to the budget."""
        missing = [path for path in paths if path not in self.features and path not in self.problems]
        with ThreadPoolExecutor(torch.get_num_threads()) as readers:
            for start in range(0, len(missing), self.batch_size):
                group = missing[start : start + self.batch_size]
                tensors: dict[Path, Tensor] = {}
                for path, found in zip(group, readers.map(self._read, group), strict=True):
                    if isinstance(found, str):
                        self.problems[path] = found
                    else:
                        self.sizes[path], tensors[path] = found
                if tensors:
                    self._compute(tensors)

    def look(self, path: Path) -> tuple[int, int] | str:
        """(width, height) of an image that has been loaded, or why it cannot be used."""
        return self.problems.get(path) or self.sizes[path]

    def keep(self, paths: Iterable[Path]) -> None:
        """Drop all others."""
        wanted = set(paths)
        self.features = {path: found for path, found in self.features.items() if path in wanted}

    def capacity(self) -> int:
        """Number of images whose descriptors fit the budget; needs one that has been loaded."""
        if not self.features:
            return 2
        each = next(iter(self.features.values()))
        return max(2, self.budget // sum(size_of(features) for features in each.values()))

    def _read(self, path: Path) -> tuple[tuple[int, int], Tensor] | str:
        try:
            image = read_image(path)
            return image.size, to_tensor(square(image, self.side), self.backbone.mean, self.backbone.std)
        except (OSError, ValueError) as error:
            return str(error)

    def _compute(self, tensors: dict[Path, Tensor]) -> None:
        batch = Batch(torch.cat(list(tensors.values())).to(self.backbone.device, self.backbone.dtype))
        for path in tensors:
            self.features[path] = {}
        for method in self.methods:
            found = method(batch)
            for path, one in zip(tensors, found.map, strict=True):
                # A copy: a view would keep the whole batch in memory when other images of it are dropped.
                self.features[path][method.name] = Features(one.contiguous().clone(), found.covered)


def size_of(features: Features) -> int:
    return features.map.numel() * features.map.element_size()
