"""Two images in memory to dense mutual matches: this package, and what one builds from the usual parts.

The usual parts compare every n-th pixel of each row and column, because the products of all pixels of 448 x 448 images
alone take a hundred times as long as everything else; this package compares every pixel with every pixel.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lift_fast import ImageMatches, ViTLiFTExtractor, match_images
from lift_fast.image_matching import STAGES

from . import keys
from .maps import PHOTOGRAPHS

# Points of a row and of a column at which the usual parts compare: of 12,544 descriptors with as many.
POINTS = 112
_CHUNK = 1024
ENGINES = {"OpenVINO": keys.openvino, "plain PyTorch": keys.plain}


class Found(NamedTuple):
    """Matches from A to B at the points ``at`` of A."""

    at: Tensor
    """[P, 2] int64 (x, y)."""
    similarity: Tensor
    """[P] float32."""
    seconds: dict[str, float]
    """Of each of STAGES."""


def photographs(size: int) -> tuple[Image.Image, Image.Image]:
    """Two views of a cat at ``size x size`` pixels."""
    a, b = (Image.open(PHOTOGRAPHS / name).convert("RGB") for name in ("cat.jpg", "cat_second_view.jpg"))
    return a.resize((size, size)), b.resize((size, size))


def ours(extractor: ViTLiFTExtractor) -> Callable[[Image.Image, Image.Image], ImageMatches]:
    """``match_images``, with the seconds of its stages."""
    return lambda a, b: match_images(a, b, extractor=extractor, size=min(a.size), timing=True)


class UsualParts:
    """Backbone by another engine, the published LiFT in plain PyTorch, mutual nearest neighbours by chunked products.

    Args:
        extractor: whose networks are computed, in its dtype.
        engine: of :data:`ENGINES`.
        size: pixels of each side of both images.
    """

    def __init__(self, extractor: ViTLiFTExtractor, engine: str, size: int) -> None:
        self.mean, self.std = (torch.tensor(v).view(1, 3, 1, 1) for v in (extractor.mean, extractor.std))
        self.dtype, self.size, self.grid = extractor.dtype, size, size // extractor.patch
        network = keys.Keys(extractor.backbone.model, (size, size)).float()
        self.backbone = ENGINES[engine](network, torch.zeros(2, 3, size, size, dtype=self.dtype))
        fresh = type(extractor.lift)(extractor.channel, extractor.patch)
        fresh.load_state_dict(extractor.lift.state_dict())
        fresh.fused = False
        self.lift = fresh.to(self.dtype, memory_format=torch.channels_last).eval().requires_grad_(False)
        line = torch.arange(POINTS) * (size // POINTS) + size // POINTS // 2
        self.at = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1)

    @torch.inference_mode()
    def __call__(self, a: Image.Image, b: Image.Image) -> Found:
        seconds = {}
        results: Any = (a, b)
        for stage, run in zip(STAGES, (self._decode, self._keys, self._maps, self._match), strict=True):
            start = time.perf_counter()
            results = run(*results)
            seconds[stage] = time.perf_counter() - start
        return Found(self.at.flatten(0, 1), results, seconds)

    def _decode(self, a: Image.Image, b: Image.Image) -> tuple[Tensor]:
        pixels = torch.from_numpy(np.stack([np.asarray(a), np.asarray(b)])).permute(0, 3, 1, 2)
        return (((pixels.float() / 255 - self.mean) / self.std).to(self.dtype),)

    def _keys(self, imgs: Tensor) -> tuple[Tensor, Tensor]:
        return imgs, self.backbone(imgs).to(self.dtype)

    def _maps(self, imgs: Tensor, tokens: Tensor) -> Tensor:
        """``[2, C, h, w]``."""
        found = self.lift(imgs.contiguous(memory_format=torch.channels_last), tokens)
        return found.transpose(1, 2).unflatten(2, (2 * self.grid, 2 * self.grid))

    def _match(self, *maps: Tensor) -> Tensor:
        # Pixel centres to grid_sample's range of -1 to 1.
        where = (2 * (self.at + 0.5) / self.size - 1).unsqueeze(0)
        query, key = (
            F.normalize(
                F.grid_sample(m[None].float(), where, padding_mode="border", align_corners=False)[0].flatten(1).T
            )
            for m in maps
        )
        query, key = query.to(self.dtype), key.to(self.dtype)
        return mutual_nearest(query, key)[0].float()


def mutual_nearest(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of ``[N, C]`` and ``[M, C]``: similarity and index ``[N]`` of the most similar, and whether it is mutual."""
    values, indices = [], []
    best, back = query.new_full((len(key),), -torch.inf), torch.zeros(len(key), dtype=torch.int64)
    for start in range(0, len(query), _CHUNK):
        products = query[start : start + _CHUNK] @ key.T
        value, index = products.max(dim=1)
        values.append(value)
        indices.append(index)
        value, index = products.max(dim=0)
        better = value > best
        best = torch.where(better, value, best)
        back = torch.where(better, index + start, back)
    found = torch.cat(indices)
    return torch.cat(values), found, back[found] == torch.arange(len(query))


def disagreement(matches: ImageMatches, found: Found) -> float:
    """How much more similar a match of the usual parts is at most: 0 up to rounding, as ours are the best of more."""
    similarity = matches.similarity[found.at[:, 1], found.at[:, 0]]
    return float((found.similarity - similarity).max())
