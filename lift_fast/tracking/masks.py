"""Masks of a video as files: indexed PNGs whose values number the objects."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from lift_fast._files import atomic_path

from .labels import Mask


def write_mask(path: Path, mask: Mask, palette: list[int]) -> None:
    """Write an indexed PNG, as a whole or not at all."""
    image = Image.fromarray(np.ascontiguousarray(mask, dtype=np.uint8))
    image.putpalette(palette)
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG")


def usual_palette() -> list[int]:
    """768 numbers: the colours of PASCAL VOC, which DAVIS uses too. The bits of an object's number, three at a time,
    are the high bits of red, green and blue."""
    numbers = np.arange(256)[:, None] >> np.arange(0, 24, 3)
    colours = [(((numbers >> channel) & 1) << np.arange(7, -1, -1)).sum(1) for channel in range(3)]
    return [int(value) for value in np.stack(colours, axis=1).ravel()]
