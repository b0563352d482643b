"""Read images from disk and bring them into the form that backbones expect."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ._files import natural_key, require_regular_file
from ._text import quoted, said
from .checks import as_whole

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})

LoadSize = int | tuple[int, int] | None
Picture = str | os.PathLike[str] | Image.Image | npt.NDArray[Any] | Tensor


# 8192 x 4096. A photograph of 4096 x 4096 is half of it; at 4 bytes a value the network's input takes 400 MB.
_DEFAULT_PIXELS = 1 << 25
_most_pixels = _DEFAULT_PIXELS
# Files are often larger than what is made of them: 16384 x 8192, a whole sphere in 16K, by default.
_FILE = 4
# A token for each 8 x 8 pixels: what the smallest usual patch makes of the largest image.
_PIXELS_OF_A_TOKEN = 64
_STRIP_PIXELS = 1 << 22
_ORIENTATION = 0x0112


def max_pixels() -> int:
    """Most pixels of an image as it is loaded for a backbone, 2^25 (8192 x 4096) unless :func:`set_max_pixels`.

    The one limit that the others follow from: a file may hold four times as many pixels, and a map (the tokens of a
    backbone, LiFT's cells) one cell for each 64.
    """
    return _most_pixels


def set_max_pixels(count: int | None) -> None:
    """Change :func:`max_pixels`, for this process and the reading processes of a training; None takes the default.

    Pillow's own limit, ``PIL.Image.MAX_IMAGE_PIXELS``, is raised with it where it would be the smaller one.

    Raises:
        ValueError: unless it is an integer >= 1.
    """
    global _most_pixels
    if count is not None and not _positive(count):
        raise ValueError(f"max_pixels must be an integer of at least 1 or None, got {count!r}")
    _most_pixels = _DEFAULT_PIXELS if count is None else int(count)
    # Pillow refuses at twice its limit.
    if Image.MAX_IMAGE_PIXELS is not None:
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, _FILE * _most_pixels // 2)


@contextmanager
def pixel_limit(count: int | None) -> Iterator[None]:
    """:func:`set_max_pixels` while the context lasts; None changes nothing."""
    before = _most_pixels, Image.MAX_IMAGE_PIXELS
    try:
        if count is not None:
            set_max_pixels(count)
        yield
    finally:
        set_max_pixels(before[0])
        Image.MAX_IMAGE_PIXELS = before[1]


def check_size(size: tuple[int, int], came: tuple[int, int] | None = None) -> None:
    """Refuse an image that would be loaded at ``size`` (width, height).

    Args:
        size: of the image as it would be loaded.
        came: as it came, where that is another size.

    Raises:
        ValueError: for more pixels than :func:`max_pixels`.
    """
    width, height = size
    if width * height > _most_pixels:
        origin = "" if came is None or came == size else f"an image of {came[0]} x {came[1]} pixels "
        raise ValueError(
            f"{origin}would be loaded at {width} x {height}, more than the {_most_pixels} pixels that are allowed; "
            "give a smaller size, crop it, or raise the limit (--max-pixels N, lift_fast.images.set_max_pixels)"
        )


def check_cells(height: int, width: int, what: str) -> None:
    """Refuse a map of ``height x width`` cells for one image, called ``what``.

    Raises:
        ValueError: for more cells than one for each 64 of :func:`max_pixels`.
    """
    most = max(1, _most_pixels // _PIXELS_OF_A_TOKEN)
    if height * width > most:
        raise ValueError(
            f"{what} {width} x {height}, more than the {most} that are allowed for an image; give a smaller size or a "
            "larger stride, or raise the limit (--max-pixels N, lift_fast.images.set_max_pixels: a cell for each 64)"
        )


def read_image(path: str | os.PathLike[str], at_least: int | None = None, *, upright: bool = True) -> Image.Image:
    """Read an image as 8-bit RGB, upright.

    Transparent pixels are laid on white. 16-bit images are scaled to 8 bits,
    floating point images must lie in 0 to 1. Of several frames the first is taken.

    Args:
        path: the file.
        at_least: a JPEG file may be decoded at a half, quarter or eighth of its size, several times faster, as long
            as both sides keep so many pixels; None decodes it whole.
        upright: apply the EXIF orientation. False keeps the pixels that annotations count, as they are stored.

    Raises:
        FileNotFoundError: if there is no such file.
        TypeError: if ``path`` is no path.
        ValueError: naming the file, if it is no image, is truncated, is no regular file (a pipe or device is never
            opened), or has more than four times :func:`max_pixels` pixels, or more than Pillow's limit.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be a string or a path, got {type(path).__name__}")
    path = Path(path)
    require_regular_file(path, "image")
    try:
        with Image.open(path) as image:
            width, height = image.size
            if width * height > _FILE * _most_pixels:
                raise Image.DecompressionBombError(
                    f"{width} x {height} pixels, and {_FILE * _most_pixels} (four times --max-pixels {_most_pixels}) "
                    "are allowed in a file"
                )
            if at_least is not None:
                image.draft(None, (at_least, at_least))
            image.load()
            return to_rgb(_upright(image) if upright else image)
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{quoted(path)} is too large: {said(error).rstrip('.')}. If you trust the file, raise the limit "
            "(--max-pixels N, lift_fast.images.set_max_pixels)"
        ) from error
    except Exception as error:
        raise ValueError(f"{quoted(path)} cannot be read as an image: {said(error)}") from error


def as_image(picture: Picture, name: str = "image") -> Image.Image:
    """An image in any usual form as 8-bit RGB, upright.

    Args:
        image: file (:func:`read_image`); Pillow image (its EXIF orientation is applied); NumPy array ``[H, W, 3]``,
            ``[H, W, 1]`` or ``[H, W]``, or tensor ``[3, H, W]``, ``[1, H, W]`` or ``[H, W]`` on any device. Arrays and
            tensors are RGB or grey, uint8, or floating point from 0 to 1 (rounded to 8 bits).
        name: of the argument, for errors.

    Raises:
        FileNotFoundError: if there is no such file.
        TypeError: for anything else.
        ValueError: for a file or Pillow image that cannot be read, for other shapes, dtypes or values, and for a
            tensor that is sparse, nested, quantized or on the meta device.
    """
    if isinstance(picture, (str, os.PathLike)):
        return read_image(picture)
    if isinstance(picture, Image.Image):
        try:
            image = to_rgb(_upright(picture))
            # An image of its own, whatever happens to the one that came.
            return image.copy() if image is picture else image
        except Exception as error:
            raise ValueError(f"{name} cannot be read as an image: {said(error)}") from error
    if isinstance(picture, Tensor):
        layout = "[3, H, W], [1, H, W] or [H, W]"
        if picture.layout is not torch.strided or picture.is_nested or picture.is_quantized or picture.is_meta:
            kind = "meta" if picture.is_meta else "quantized" if picture.is_quantized else str(picture.layout)
            raise ValueError(f"{name} must be a dense tensor that holds its values, got a {kind} one")
        values = picture.detach().cpu().resolve_conj().resolve_neg()
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
                f"{name}: floating point images must lie in 0 to 1, got {low:g} to {high:g}; do not normalise them "
                "before, and divide 0 to 255 by 255"
            )
        array = np.rint(array * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise ValueError(f"{name} must be uint8 or floating point from 0 to 1, got {picture.dtype}")
    if array.ndim == 2 or array.shape[2] == 1:
        array = np.broadcast_to(array.reshape(*array.shape[:2], 1), (*array.shape[:2], 3))
    return Image.fromarray(np.ascontiguousarray(array))


def list_images(path: str | os.PathLike[str]) -> list[Path]:
    """Images in a folder and its subfolders, in natural order (2.jpg before 10.jpg); a file is returned as it is.

    Known suffixes (:data:`SUFFIXES`, any case); names that begin with a dot are skipped. Links to folders are followed,
    unless they lead back to a folder that they lie in. A pipe, socket or device with the name of an image is listed,
    for :func:`read_image` to refuse it by name.

    Raises:
        FileNotFoundError: if ``path`` does not exist.
        ValueError: if the folder holds no image, or ``path`` is neither folder nor regular file.
    """
    path = Path(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"no file or folder at {quoted(path)}")
    if not path.is_dir():
        require_regular_file(path, "image")
        return [path]
    found = _pictures_below(path, frozenset())
    if not found:
        raise ValueError(f"no images in {quoted(path)} (suffixes {', '.join(sorted(SUFFIXES))})")
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
        elif Path(entry.name).suffix.lower() in SUFFIXES and _leads_somewhere(entry):
            found.append(folder / entry.name)
    return found


def _leads_somewhere(entry: os.DirEntry[str]) -> bool:
    """Whether it is more than a link to nothing."""
    try:
        return not stat.S_ISLNK(entry.stat().st_mode)
    except OSError:
        return False


def resize(
    image: Image.Image, load_size: LoadSize, resample: Image.Resampling = Image.Resampling.LANCZOS
) -> Image.Image:
    """Resize with antialiasing, by Lanczos unless told otherwise.

    Args:
        image: image of any mode that Pillow can filter.
        load_size: an integer is the length of the shorter side, the other follows (rounded down, as torchvision's
            ``Resize``); ``(height, width)`` exactly; None keeps the size.
        resample: Pillow's filter.

    Raises:
        ValueError: for a size that is not positive, or not one of these forms, an image without pixels, and a result
            of more pixels than :func:`max_pixels` or without any.
    """
    new = resized_size(image.size, load_size)
    check_size(new, image.size)
    return image if new == image.size else image.resize(new, resample)


def resized_size(size: tuple[int, int], load_size: LoadSize) -> tuple[int, int]:
    """The ``(width, height)`` that :func:`resize` gives an image of ``size`` (width, height).

    Raises:
        ValueError: as :func:`resize`, but for the limit.
    """
    width, height = size
    if width < 1 or height < 1:
        raise ValueError(f"an image of {width} x {height} pixels holds nothing; give one with pixels")
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


def whole_patches(side: int, patch: int, stride: int) -> int:
    """The length nearest to ``side``, of at least a patch, at which no pixel lies beyond the last whole patch."""
    return patch + (max(side - patch, 0) + stride // 2) // stride * stride


def to_tensor(image: Image.Image, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """``[1, 3, H, W]`` float32 on the CPU: pixels scaled to 0 to 1, minus ``mean``, over ``std`` (three values each).

    Raises:
        TypeError: if ``image`` is no Pillow image.
        ValueError: for ``mean`` and ``std`` that are not three finite numbers each, ``std`` above 0; for an image that
            has no pixels or cannot be made RGB.
    """
    if not isinstance(image, Image.Image):
        raise TypeError(f"image must be a PIL.Image, got {type(image).__name__}")
    centre, spread = _three("mean", mean), _three("std", std)
    if bool((spread <= 0).any()):
        raise ValueError(f"std must be above 0, got {std!r}")
    pixels = torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1).to(torch.float32).div(255)
    return ((pixels - centre) / spread).unsqueeze(0).contiguous()


def _three(name: str, values: Sequence[float]) -> Tensor:
    """``[3, 1, 1]`` float32 on the CPU."""
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError, OverflowError, RuntimeError):
        numbers = []
    if len(numbers) != 3 or not all(map(math.isfinite, numbers)):
        raise ValueError(f"mean and std must be three values each, finite numbers, got {name}={values!r}")
    return torch.tensor(numbers, dtype=torch.float32, device="cpu").view(3, 1, 1)


def preprocess(image: Image.Image, load_size: LoadSize, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """:func:`to_rgb`, :func:`resize` and :func:`to_tensor`: image to ``[1, 3, H, W]`` float32.

    The order and filter are those of Amir et al.'s extractor, which published LiFT weights were trained behind.
    """
    return to_tensor(resize(to_rgb(image), load_size), mean, std)


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB as :func:`read_image` makes it: transparency laid on white, more than 8 bits scaled.

    Raises:
        ValueError: for an image without pixels, of a mode that Pillow cannot convert, or with values out of range.
    """
    if 0 in image.size:
        raise ValueError(f"it holds nothing, {image.width} x {image.height} pixels")
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    numbers = image.mode.startswith("I") or image.mode == "F"
    veiled = "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info
    try:
        if not numbers and not veiled:
            return image.convert("RGB")
        whole = Image.new("RGB", image.size)
        # In strips: at eight bytes and more for a pixel, copies of a large image would take gigabytes.
        rows = max(1, _STRIP_PIXELS // image.width)
        for top in range(0, image.height, rows):
            strip = image.crop((0, top, image.width, min(image.height, top + rows)))
            whole.paste(_from_numbers(strip) if numbers else _on_white(strip), (0, top))
    except ValueError as error:
        raise ValueError(f"its mode {image.mode} cannot be made RGB: {said(error)}") from error
    return whole


def _on_white(image: Image.Image) -> Image.Image:
    # Grey with premultiplied transparency is converted to nothing else.
    rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, rgba).convert("RGB")


def _from_numbers(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit integer (Pillow's form of some 16-bit files) and floating point grey images."""
    values = np.asarray(image, dtype=np.float64)
    if image.mode == "F":
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise ValueError(
                f"floating point images must lie in 0 to 1, got {values.min():g} to {values.max():g} (NaN included)"
            )
        scaled = values * 255
    else:
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"pixels must lie in 0 to 65535, got {values.min():g} to {values.max():g}")
        scaled = values / 257
    return Image.fromarray(np.rint(scaled).astype(np.uint8)).convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    """With the EXIF orientation applied; the image itself where there is none, which Pillow would copy."""
    if image.getexif().get(_ORIENTATION) not in range(2, 9):
        return image
    return ImageOps.exif_transpose(image)


def _positive(value: object) -> int:
    """``value`` as an int if it is a whole number of at least 1, else 0."""
    return max(as_whole(value) or 0, 0)
