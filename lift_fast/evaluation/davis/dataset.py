"""DAVIS 2017 in its original layout: sequences of frames and indexed masks, checked when they are read."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from lift_fast._files import natural_key
from lift_fast._text import one_line
from lift_fast.evaluation.annotations import read_names
from lift_fast.tracking.labels import Mask
from lift_fast.tracking.masks import usual_palette

# Pixels that annotators left open; the semi-supervised evaluation treats them as background.
VOID = 255
# 64 Mi: a mask that claims to be larger than any video is not decoded.
_MOST_PIXELS = 1 << 26


class DavisError(ValueError):
    """A sequence or data set that cannot be used; the message names the path."""


@dataclass(frozen=True)
class Video:
    """One video: its frames, in order, and the folder of its annotations.

    With ``binary_masks`` every value but 0 is object 1.
    """

    name: str
    frames: tuple[Path, ...]
    annotations: Path
    binary_masks: bool = False

    def annotation(self, frame: Path) -> Path:
        """Where the annotation of a frame lies, whether or not it exists."""
        return self.annotations / f"{frame.stem}.png"


class Davis:
    """Reader of ``JPEGImages/480p/<sequence>/*.jpg``, ``Annotations/480p/<sequence>/*.png`` and
    ``ImageSets/2017/val.txt``.

    Args:
        root: folder of the data set.
        subset: name of the list of sequences, ``val`` for ``val.txt``.
        resolution: name of the folders below ``JPEGImages`` and ``Annotations``.
        year: folder below ``ImageSets``.
        binary_masks: every value of a mask but 0 is the one object, as in DAVIS 2016, whose masks are 0 and 255;
            otherwise values number objects and 255 is void.

    Raises:
        DavisError: if a folder or the list is missing, or the list is empty or not a list of folder names.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        subset: str = "val",
        resolution: str = "480p",
        year: str = "2017",
        *,
        binary_masks: bool = False,
    ) -> None:
        self.root, self.subset, self.resolution, self.binary_masks = Path(root), subset, resolution, binary_masks
        self.frames_folder = self.root / "JPEGImages" / resolution
        self.annotations_folder = self.root / "Annotations" / resolution
        self.list_path = self.root / "ImageSets" / year / f"{subset}.txt"
        for folder in (self.frames_folder, self.annotations_folder):
            if not folder.is_dir():
                raise DavisError(
                    f"no folder {folder}; expected the layout of DAVIS 2017, {resolution}: JPEGImages, Annotations "
                    "and ImageSets below the root"
                )
        try:
            # Names become folders of results.
            self.names = tuple(read_names(self.list_path, "sequence", "the name of a folder"))
        except (OSError, ValueError) as error:
            raise DavisError(str(error)) from error

    @cached_property
    def palette(self) -> list[int]:
        """The data set's own palette, from the first mask that has one; else the usual colours."""
        for name in self.names:
            for path in sorted((self.annotations_folder / name).glob("*.png"), key=natural_key)[:1]:
                try:
                    with Image.open(path) as image:
                        palette = image.getpalette() if image.mode == "P" else None
                except Exception:
                    # Not an image, or too large: reading its objects reports it.
                    continue
                if palette:
                    return palette
        return usual_palette()

    def sequence(self, name: str) -> Video:
        """The sequence of that name, 2.jpg before 10.jpg; raises ``DavisError`` if it has no frames."""
        folder = self.frames_folder / name
        frames = tuple(sorted(folder.glob("*.jpg"), key=natural_key))
        if not frames:
            raise DavisError(f"{name}: no *.jpg in {folder}")
        return Video(name, frames, self.annotations_folder / name, self.binary_masks)


def read_mask(path: Path, binary: bool = False) -> Mask:
    """Object numbers ``[H, W]`` of an indexed (or grey 8-bit) PNG. 255 stays; with ``binary`` all values but 0 are 1.

    Raises:
        DavisError: naming the file, if it is missing, does not decode or does not hold object numbers.
    """
    if not path.is_file():
        raise DavisError(f"no mask at {path}")
    try:
        with Image.open(path) as image:
            # Before decoding: a file of a few kilobytes can hold gigabytes.
            if image.mode not in ("P", "L", "1"):
                raise DavisError(
                    f"{path} is an image of mode {image.mode}; expected an indexed PNG whose values number the objects"
                )
            if image.width * image.height > _MOST_PIXELS:
                size = f"{image.width} x {image.height}"
                raise DavisError(f"{path} claims to have {size} pixels; expected at most {_MOST_PIXELS}")
            image.load()
            mask = np.array(image)
    except DavisError:
        raise
    except Exception as error:
        raise DavisError(f"{path} cannot be read as a mask: {one_line(error)}") from error
    return (mask != 0 if binary else mask).astype(np.uint8)


def read_annotation(path: Path, binary: bool = False) -> Mask:
    """:func:`read_mask` with void pixels as background, as in the semi-supervised evaluation."""
    mask = read_mask(path, binary)
    mask[mask == VOID] = 0
    return mask


def first_annotation(video: Video) -> Mask:
    """Mask of the first frame, with objects 1 to its largest number; raises ``DavisError`` if there is none."""
    path = video.annotation(video.frames[0])
    mask = read_annotation(path, video.binary_masks)
    if not mask.any():
        void = ""
        if not video.binary_masks and (read_mask(path) == VOID).any():
            void = (
                f": all values but 0 are {VOID}, which is void in DAVIS 2017; for masks of 0 and {VOID} (DAVIS 2016) "
                "give --binary-masks"
            )
        raise DavisError(f"{path} holds no object{void}")
    return mask
