"""Masks of a video as files: the objects that an image marks, and indexed PNGs whose values number them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from lift_fast._files import atomic_path, require_regular_file
from lift_fast._text import quoted, said

from .frames import check_pixels
from .labels import Mask

# Values of an indexed PNG, 0 being background.
_MOST_OBJECTS = 255
# In an indexed mask, pixels that annotators left open.
_VOID = 255
# A grey mask of more values than this, up to 255, has soft edges.
_MOST_GREYS = 32
_LOSSY = ("JPEG", "MPO")


@dataclass(frozen=True)
class ObjectMask:
    """Objects of one frame."""

    numbers: Mask
    """[H, W] uint8: numbers of the objects, 0 for background."""
    palette: list[int]
    """768 values: the file's own colours, or the usual ones."""


def read_objects(path: str | os.PathLike[str], binary: bool = False) -> ObjectMask:
    """The objects that a mask in an image file marks.

    * Indexed: values number the objects, and the palette is kept. 255 is void and becomes background, unless it is the
      only value besides 0.
    * Grey or bilevel: values number the objects.
    * Colour: every colour but black is an object. They are numbered in ascending order of (red, green, blue) and
      become the palette. Pixels of less than half opacity are background.

    An only object of value 255 becomes object 1.

    Args:
        path: the file, turned upright by its EXIF orientation, as frames are.
        binary: all that is brighter than half of the brightest pixel is object 1; in an indexed image all but 0. For
            masks with soft edges and for JPEG files, which change values.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, if it is no image, marks no object or more than 255, or has soft edges.
    """
    path = Path(path)
    require_regular_file(path, "mask")
    try:
        with Image.open(path) as image:
            check_pixels(image.size)
            lossy = image.format in _LOSSY
            image.load()
            upright = ImageOps.exif_transpose(image)
    except Exception as error:
        raise ValueError(f"{quoted(path)} cannot be read as a mask: {said(error)}") from error
    try:
        found = _objects(upright, binary, lossy)
    except ValueError as error:
        raise ValueError(f"the mask {quoted(path)} {error}") from error
    if not found.numbers.any():
        raise ValueError(f"the mask {quoted(path)} marks no object: all of its pixels are background (0 or black)")
    return found


def _objects(image: Image.Image, binary: bool, lossy: bool) -> ObjectMask:
    palette = usual_palette()
    if image.mode == "P":
        numbers = np.array(image)
        own = image.getpalette() or []
        palette = own + palette[len(own) :]
        if binary:
            numbers = (numbers != 0).astype(np.uint8)
        elif set(np.unique(numbers)) - {0, _VOID}:
            numbers[numbers == _VOID] = 0
        return ObjectMask(_one_object(numbers), palette)
    pixels = np.array(image if image.mode in ("L", "1") or image.mode.startswith("I") else image.convert("RGBA"))
    if binary:
        bright = pixels if pixels.ndim == 2 else pixels[..., :3].max(-1) * (pixels[..., 3] >= 128)
        return ObjectMask((bright > bright.max() / 2).astype(np.uint8), palette)
    if lossy:
        raise ValueError("is a JPEG, which changes values; give a PNG, or --binary (binary=True) for a single object")
    if pixels.ndim == 3:
        return _coloured(pixels)
    values = np.unique(pixels)
    if values[-1] > _MOST_OBJECTS or values[0] < 0:
        raise ValueError(f"holds values of {values[0]} to {values[-1]}; expected numbers of objects, 0 to 255")
    if values[-1] == 255 and len(values) > _MOST_GREYS:
        raise ValueError(
            f"holds {len(values)} different greys, as soft edges do; give numbers of objects, or --binary "
            "(binary=True) for a single object"
        )
    return ObjectMask(_one_object(pixels.astype(np.uint8)), palette)


def _one_object(numbers: Mask) -> Mask:
    """The numbers, 1 in place of an only 255."""
    return numbers if set(np.unique(numbers)) - {0, 255} else (numbers != 0).astype(np.uint8)


def _coloured(pixels: npt.NDArray[np.uint8]) -> ObjectMask:
    """Objects of a mask ``[H, W, 4]`` (red, green, blue, opacity)."""
    red, green, blue = (pixels[..., channel].astype(np.int64) for channel in range(3))
    colour = ((red << 16) | (green << 8) | blue) * (pixels[..., 3] >= 128)
    colours, numbers = np.unique(np.append(0, colour), return_inverse=True)
    if len(colours) > _MOST_OBJECTS + 1:
        raise ValueError(
            f"holds {len(colours) - 1} colours, as soft edges or a photograph do; expected up to 255 objects, each in "
            "its own colour on black, or --binary (binary=True) for a single object"
        )
    own = [int(value) for value in np.stack([colours >> 16, (colours >> 8) & 255, colours & 255], axis=1).ravel()]
    palette = own + usual_palette()[len(own) :]
    return ObjectMask(numbers[1:].reshape(colour.shape).astype(np.uint8), palette)


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
