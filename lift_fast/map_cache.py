"""Descriptor maps of the images seen last: an image that stands in many pairs goes through the networks once."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .checks import check_whole

if TYPE_CHECKING:
    from .extractor import ViTLiFTExtractor

_Key = tuple[int, tuple[int, ...], bytes]


class MapCache:
    """Maps for ``match_images(cache=...)``, found by the pixels of the loaded image; those used last are kept.

    Every image goes through the networks by itself, so that results do not depend on the order of the pairs. Where a
    batch of two changes the rounding, they differ by that from results without a cache. A cache serves one extractor,
    whose weights must not change meanwhile; another extractor empties it.

    Args:
        max_bytes: of all maps, 1 GiB by default: 56 x 75 cells of 193 channels take 3.2 MB. The maps of the latest pair
            are always kept.
    """

    def __init__(self, max_bytes: int = 1 << 30) -> None:
        self.max_bytes = check_whole("max_bytes", max_bytes, 0, 1 << 60)
        self._maps: OrderedDict[_Key, Tensor] = OrderedDict()
        self._bytes = 0
        self._extractor: ViTLiFTExtractor | None = None

    def maps(
        self,
        extractor: ViTLiFTExtractor,
        lift_iter: int,
        batches: Sequence[Tensor],
        compute: Callable[[Sequence[Tensor]], Sequence[Tensor]],
    ) -> list[Tensor]:
        """The maps of ``batches``, each one loaded image; ``compute`` gives those that are not kept."""
        if self._extractor is not extractor:
            self._maps.clear()
            self._extractor, self._bytes = extractor, 0
        keys = [_key(batch, lift_iter) for batch in batches]
        missing = {key: batch for key, batch in zip(keys, batches, strict=True) if key not in self._maps}
        for key, found in zip(missing, compute(list(missing.values())), strict=True):
            self._maps[key] = found
            self._bytes += found.nbytes
        for key in keys:
            self._maps.move_to_end(key)
        while self._bytes > self.max_bytes and len(self._maps) > len(set(keys)):
            _, dropped = self._maps.popitem(last=False)
            self._bytes -= dropped.nbytes
        return [self._maps[key] for key in keys]


def _key(batch: Tensor, lift_iter: int) -> _Key:
    # As bytes: NumPy has no bfloat16.
    pixels = batch.detach().cpu().contiguous().view(torch.uint8).numpy()
    return lift_iter, tuple(batch.shape), hashlib.blake2b(pixels.data, digest_size=20).digest()
