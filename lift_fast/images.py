"""Read pictures from disk and bring them into the form that backbones expect."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch import Tensor

from lift_fast._files import natural_key

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})

LoadSize = int | tuple[int, int] | None
Picture = str | os.PathLike[str] | Image.Image | npt.NDArray[Any] | Tensor


def read_image(path: str | os.PathLike[str], at_least: int | None = None) -> Image.Image:
    """Read a picture as 8-bit RGB, upright.

    The EXIF orientation is applied. Transparent pixels are laid on white. 16-bit pictures are scaled to 8 bits,
    floating point pictures must lie in 0 to 1. Of several frames the first is taken.

    Args:
        path: the file.
        at_least: a JPEG file may be decoded at a half, quarter or eighth of its size, several times faster, as long
            as both sides keep so many pixels; None decodes it whole.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, if it is no picture, is truncated, or has more pixels than Pillow's limit.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no picture at {path}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; expected a picture")
    try:
        with Image.open(path) as image:
            if at_least is not None:
                image.draft(None, (at_least, at_least))
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{path} is too large: {error}. If you trust the file, raise PIL.Image.MAX_IMAGE_PIXELS"
        ) from error
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error


def as_image(picture: Picture, name: str = "picture") -> Image.Image:
    """A picture in any usual form as 8-bit RGB, upright.

    Args:
        picture: file (:func:`read_image`); Pillow picture (its EXIF orientation is applied); NumPy array ``[H, W, 3]``,
            ``[H, W, 1]`` or ``[H, W]``, or tensor ``[3, H, W]``, ``[1, H, W]`` or ``[H, W]`` on any device. Arrays and
            tensors are RGB or grey, uint8, or floating point from 0 to 1 (rounded to 8 bits).
        name: of the argument, for errors.

    Raises:
        FileNotFoundError: if there is no such file.
        TypeError: for anything else.
        ValueError: for a file or Pillow picture that cannot be read, for other shapes, dtypes or values.
    """
    if isinstance(picture, (str, os.PathLike)):
        return read_image(picture)
    if isinstance(picture, Image.Image):
        try:
            return to_rgb(ImageOps.exif_transpose(picture))
        except Exception as error:
            raise ValueError(f"{name} cannot be read as a picture: {error}") from error
    if isinstance(picture, Tensor):
        values, layout = picture.detach().cpu(), "[3, H, W], [1, H, W] or [H, W]"
        array = (values.float() if values.is_floating_point() else values).numpy()
        array = np.moveaxis(array, 0, 2) if array.ndim == 3 else array
    elif isinstance(picture, np.ndarray):
        array, layout = picture, "[H, W, 3], [H, W, 1] or [H, W]"
    else:
        raise TypeError(f"{name} must be a path, a PIL.Image, a NumPy array or a tensor, got {type(picture).__name__}")
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3)) or 0 in array.shape:
        raise ValueError(f"{name} must be {layout}, got {list(picture.shape)}")
    if np.issubdtype(array.dtype, np.floating):
        low, high = float(array.min()), float(array.max())
        # Written so that NaN fails too.
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"{name}: floating point pictures must lie in 0 to 1, got {low:g} to {high:g}; do not normalise them "
                "before, and divide 0 to 255 by 255"
            )
        array = np.rint(array * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise ValueError(f"{name} must be uint8 or floating point from 0 to 1, got {picture.dtype}")
    if array.ndim == 2 or array.shape[2] == 1:
        array = np.broadcast_to(array.reshape(*array.shape[:2], 1), (*array.shape[:2], 3))
    return Image.fromarray(np.ascontiguousarray(array))


def list_images(path: str | os.PathLike[str]) -> list[Path]:
    """Pictures in a folder and its subfolders, in natural order (2.jpg before 10.jpg); a file is returned as it is.

    Known suffixes (:data:`SUFFIXES`, any case); names that begin with a dot are skipped. Links to folders are followed,
    unless they lead back to a folder that they lie in.

    Raises:
        FileNotFoundError: if ``path`` does not exist.
        ValueError: if the folder holds no picture.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no file or folder at {path}")
    if path.is_file():
        return [path]
    found = _pictures_below(path, frozenset())
    if not found:
        raise ValueError(f"no pictures in {path} (suffixes {', '.join(sorted(SUFFIXES))})")
    return sorted(found, key=natural_key)


def _pictures_below(folder: Path, above: frozenset[str]) -> list[Path]:
    """The files of :func:`list_images`; ``above`` are the folders that ``folder`` was reached through."""
    where = os.path.realpath(folder)
    if where in above:
        return []
    found: list[Path] = []
    try:
        entries = list(os.scandir(folder))
    except PermissionError:
        if above:
            # What belongs to somebody else, such as lost+found, is no obstacle.
            return []
        raise
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            found += _pictures_below(folder / entry.name, above | {where})
        elif Path(entry.name).suffix.lower() in SUFFIXES and entry.is_file():
            found.append(folder / entry.name)
    return found


def resize(
    image: Image.Image, load_size: LoadSize, resample: Image.Resampling = Image.Resampling.LANCZOS
) -> Image.Image:
    """Resize with antialiasing, by Lanczos unless told otherwise.

    Args:
        image: picture of any mode that Pillow can filter.
        load_size: an integer is the length of the shorter side, the other follows (rounded down, as torchvision's
            ``Resize``); ``(height, width)`` exactly; None keeps the size.
        resample: Pillow's filter.

    Raises:
        ValueError: for a size that is not positive, or not one of these forms.
    """
    new = resized_size(image.size, load_size)
    return image if new == image.size else image.resize(new, resample)


def resized_size(size: tuple[int, int], load_size: LoadSize) -> tuple[int, int]:
    """The ``(width, height)`` that :func:`resize` gives a picture of ``size`` (width, height).

    Raises:
        ValueError: as :func:`resize`.
    """
    width, height = size
    if load_size is None:
        return size
    if isinstance(load_size, (tuple, list)):
        if len(load_size) != 2 or not all(_positive(v) for v in load_size):
            raise ValueError(f"load_size must be (height, width) in pixels, both at least 1, got {load_size!r}")
        return int(load_size[1]), int(load_size[0])
    if not _positive(load_size):
        raise ValueError(f"load_size must be pixels (at least 1), (height, width) or None, got {load_size!r}")
    short, length = min(width, height), int(load_size)
    return (length, length * height // short) if width <= height else (length * width // short, length)


def to_tensor(image: Image.Image, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """``[1, 3, H, W]`` float32: pixels scaled to 0 to 1, minus ``mean``, over ``std`` (three values each)."""
    if len(mean) != 3 or len(std) != 3:
        raise ValueError(f"mean and std must be three values each, got {mean!r} and {std!r}")
    array = np.array(image if image.mode == "RGB" else to_rgb(image))
    pixels = torch.from_numpy(array).permute(2, 0, 1).float().div(255)
    shift, scale = (torch.tensor(three, dtype=torch.float32, device="cpu").view(3, 1, 1) for three in (mean, std))
    return ((pixels - shift) / scale).unsqueeze(0).contiguous()


def preprocess(image: Image.Image, load_size: LoadSize, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Resize (:func:`resize`) and normalise (:func:`to_tensor`): picture to ``[1, 3, H, W]`` float32.

    The order and filter are those of Amir et al.'s extractor, which published LiFT weights were trained behind.
    """
    return to_tensor(resize(image, load_size), mean, std)


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB as :func:`read_image` makes it: transparency laid on white, more than 8 bits scaled."""
    if image.mode.startswith("I") or image.mode == "F":
        return _from_numbers(image)
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _from_numbers(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit integer (Pillow's form of some 16-bit files) and floating point grey pictures."""
    values = np.asarray(image, dtype=np.float64)
    if image.mode == "F":
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise ValueError(
                f"floating point pictures must lie in 0 to 1, got {values.min():g} to {values.max():g} (NaN included)"
            )
        scaled = values * 255
    else:
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"pixels must lie in 0 to 65535, got {values.min():g} to {values.max():g}")
        scaled = values / 257
    return Image.fromarray(np.rint(scaled).astype(np.uint8)).convert("RGB")


def _positive(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and int(value) >= 1
