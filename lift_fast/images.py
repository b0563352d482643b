"""Read images from disk and bring them into the form that backbones expect."""

from __future__ import annotations

import io
import math
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from . import memory
from ._files import natural_key, require_regular_file
from ._text import quoted, said
from .checks import as_whole

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})

LoadSize = int | tuple[int, int] | None
ImageFile = str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes]
AnyImage = ImageFile | Image.Image | npt.NDArray[Any] | Tensor


# 8192 x 4096, twice a photograph of 4096 x 4096; in float32 the network's input takes 400 MB.
_DEFAULT_PIXELS = 1 << 25
_most_pixels = _DEFAULT_PIXELS
# Files are often larger than the loaded image: 16384 x 8192, a 16K panorama, by default.
_FILE = 4
# No format takes more for a pixel than four channels of 16 bits; and a stream may have no end.
_BYTES_OF_A_PIXEL, _BYTES_BESIDE = 8, 1 << 24
_CHUNK = 1 << 20
# One token for each 8 x 8 pixels, the smallest usual patch.
_PIXELS_OF_A_TOKEN = 64
_STRIP_PIXELS = 1 << 22
# Panoramas of 4 : 1 keep their size; a small size costs little at any shape.
_LONGEST, _LONGEST_AT_LEAST = 4, 1792
_ORIENTATION = 0x0112


def max_pixels() -> int:
    """Most pixels of an image as loaded for a backbone; 2^25 (8192 x 4096) by default, see :func:`set_max_pixels`.

    The other limits follow from it: a file may hold four times as many pixels, and a map (a backbone's tokens or LiFT's
    cells) one cell for each 64.
    """
    return _most_pixels


def set_max_pixels(count: int | None) -> None:
    """Change :func:`max_pixels` for this process and a training's data loading workers; None restores the default.

    Pillow's own limit, ``PIL.Image.MAX_IMAGE_PIXELS``, is raised where it is smaller.

    Raises:
        ValueError: unless ``count`` is None or an integer >= 1.
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
    """:func:`set_max_pixels` inside the context; None changes nothing."""
    before = _most_pixels, Image.MAX_IMAGE_PIXELS
    try:
        if count is not None:
            set_max_pixels(count)
        yield
    finally:
        set_max_pixels(before[0])
        Image.MAX_IMAGE_PIXELS = before[1]


def check_size(size: tuple[int, int], original: tuple[int, int] | None = None) -> None:
    """Check that an image may be loaded at ``size``; both sizes are (width, height).

    Raises:
        ValueError: for more pixels than :func:`max_pixels`; names the ``original`` size if it differs.
    """
    width, height = size
    if width * height > _most_pixels:
        origin = "" if original is None or original == size else f"an image of {original[0]} x {original[1]} pixels "
        raise ValueError(
            f"{origin}would be loaded at {width} x {height}, more than the {_most_pixels} pixels allowed; "
            "give a smaller size, crop it, or raise the limit (--max-pixels N, lift_fast.images.set_max_pixels)"
        )


def check_cells(height: int, width: int, what: str) -> None:
    """Check the size of one image's map of ``height x width`` cells; ``what`` begins the message.

    Raises:
        ValueError: for more than one cell for each 64 of :func:`max_pixels`.
    """
    most = max(1, _most_pixels // _PIXELS_OF_A_TOKEN)
    if height * width > most:
        raise ValueError(
            f"{what} {width} x {height}, more than the {most} allowed for an image; give a smaller size or a larger "
            "stride, or raise the limit (--max-pixels N, lift_fast.images.set_max_pixels: one cell for each 64)"
        )


def read_image(
    path: ImageFile, at_least: int | None = None, *, upright: bool = True, name: str = "image"
) -> Image.Image:
    """Read an image as 8-bit RGB, upright.

    Transparent pixels become white. 16-bit images are scaled to 8 bits. Floating point images must lie in 0 to 1. Only
    the first of several frames is read.

    Args:
        path: the file; or what is in one: bytes, or a binary file object, which is read from its start (from where it
            is if it cannot go back) and not closed. Nothing is downloaded, but what
            ``urllib.request.urlopen(url)`` gives is such an object.
        at_least: a JPEG file may be decoded at a half, quarter or eighth of its size, several times faster, if both
            sides keep this many pixels; None decodes it at full size.
        upright: apply the EXIF orientation. False keeps the pixels as stored, which annotations refer to.
        name: of what is read, for errors about bytes and file objects.

    Raises:
        FileNotFoundError: if the file does not exist.
        TypeError: if ``path`` is none of these, or a file object that gives text.
        ValueError: naming the file, if it is not an image, is truncated, is not a regular file (pipes and devices are
            never opened), or has more than four times :func:`max_pixels` pixels or more than Pillow's limit.
    """
    return _read(path, at_least, upright, name)[0]


def _read(path: ImageFile, at_least: int | None, upright: bool, name: str) -> tuple[Image.Image, int]:
    """:func:`read_image`, and the file's EXIF orientation, 1 to 8."""
    source: Path | io.BytesIO
    if isinstance(path, (str, os.PathLike)):
        require_regular_file(path, "image")
        source, name = Path(path), quoted(Path(path))
    elif isinstance(path, (bytes, bytearray, memoryview)) or hasattr(path, "read"):
        source = io.BytesIO(_content(path, name))
    else:
        raise TypeError(
            f"{'path' if name == 'image' else name} must be a path, the bytes of a file or a binary file object, got "
            f"{type(path).__name__}"
        )
    try:
        with Image.open(source) as image:
            width, height = image.size
            if width * height > _FILE * _most_pixels:
                raise Image.DecompressionBombError(
                    f"{width} x {height} pixels, but a file may hold {_FILE * _most_pixels} (four times --max-pixels "
                    f"{_most_pixels})"
                )
            if at_least is not None:
                image.draft(None, (at_least, at_least))
            image.load()
            return to_rgb(_upright(image) if upright else image), _orientation(image)
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{name} is too large: {said(error).rstrip('.')}. If you trust the file, raise the limit "
            "(--max-pixels N, lift_fast.images.set_max_pixels)"
        ) from error
    except Exception as error:
        # Pillow's message for bytes ends with the address of an object.
        reason = "its format is not known" if isinstance(error, UnidentifiedImageError) else said(error)
        raise ValueError(f"{name} cannot be read as an image: {reason}") from error


def as_image(image: AnyImage, name: str = "image") -> Image.Image:
    """Convert an image in any usual form to 8-bit RGB, upright.

    Args:
        image: file, bytes of one or a binary file object (:func:`read_image`); Pillow image (its EXIF orientation is
            applied); NumPy array ``[H, W, 3]``, ``[H, W, 1]`` or ``[H, W]``, or tensor ``[3, H, W]``, ``[1, H, W]`` or
            ``[H, W]`` on any device. Arrays and tensors are RGB or grey, uint8, or floating point from 0 to 1 (rounded
            to 8 bits).
        name: of the argument, for errors.

    Raises:
        FileNotFoundError: if the file does not exist.
        TypeError: for any other type.
        ValueError: for a file, bytes or Pillow image that cannot be read, for other shapes, dtypes or values, and for a
            tensor that is sparse, nested, quantized or on the meta device.
    """
    return oriented_image(image, name)[0]


def oriented_image(image: AnyImage, name: str = "image") -> tuple[Image.Image, int]:
    """:func:`as_image`, and the EXIF orientation of what was given, 1 to 8; 1 is upright and stands for none."""
    if isinstance(image, (str, os.PathLike, bytes, bytearray, memoryview)) or hasattr(image, "read"):
        return _read(image, None, True, name)  # type: ignore[arg-type]  # mypy does not narrow by hasattr
    if isinstance(image, Image.Image):
        try:
            rgb = to_rgb(_upright(image))
            # A copy, so that later changes of the caller's image do not reach it.
            return rgb.copy() if rgb is image else rgb, _orientation(image)
        except Exception as error:
            raise ValueError(f"{name} cannot be read as an image: {said(error)}") from error
    if isinstance(image, Tensor):
        layout = "[3, H, W], [1, H, W] or [H, W]"
        if image.layout is not torch.strided or image.is_nested or image.is_quantized or image.is_meta:
            kind = "meta" if image.is_meta else "quantized" if image.is_quantized else str(image.layout)
            raise ValueError(f"{name} must be a dense tensor that holds its values, got a {kind} tensor")
        values = image.detach().cpu().resolve_conj().resolve_neg()
        array = (values.float() if values.is_floating_point() else values).numpy()
        array = np.moveaxis(array, 0, 2) if array.ndim == 3 else array
    elif isinstance(image, np.ndarray):
        array, layout = image, "[H, W, 3], [H, W, 1] or [H, W]"
    else:
        raise TypeError(
            f"{name} must be a path, bytes, a binary file object, a PIL.Image, a NumPy array or a tensor, got "
            f"{type(image).__name__}"
        )
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3)) or 0 in array.shape:
        moved = array.ndim == 3 and image.shape[0 if isinstance(image, np.ndarray) else 2] in (1, 3)
        hint = f"; move the channels {'last' if isinstance(image, np.ndarray) else 'first'}" if moved else ""
        raise ValueError(f"{name} must be {layout}, got {list(image.shape)}{hint}")
    if np.issubdtype(array.dtype, np.floating):
        low, high = float(array.min()), float(array.max())
        # Written so that NaN fails too.
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"{name}: floating point images must lie in 0 to 1, got {low:g} to {high:g}; do not normalise them, "
                "and divide 0 to 255 by 255"
            )
        array = np.rint(array * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise ValueError(f"{name} must be uint8 or floating point from 0 to 1, got {image.dtype}")
    if array.ndim == 2 or array.shape[2] == 1:
        array = np.broadcast_to(array.reshape(*array.shape[:2], 1), (*array.shape[:2], 3))
    return Image.fromarray(np.ascontiguousarray(array)), 1


def stored_size(image: AnyImage) -> tuple[int, int] | None:
    """(width, height) of an image as stored, without decoding it: from the header of a file or of a file's bytes.

    File objects stand afterwards where they stood. None for those that cannot go back, which are not touched, and for
    what :func:`as_image` refuses.
    """
    try:
        if isinstance(image, Image.Image):
            return image.size
        if isinstance(image, (np.ndarray, Tensor)):
            height, width = image.shape[:2] if isinstance(image, np.ndarray) else image.shape[-2:]
            return width, height
        if isinstance(image, (bytes, bytearray, memoryview)):
            with Image.open(io.BytesIO(image)) as file:
                return file.size
        if isinstance(image, (str, os.PathLike)):
            require_regular_file(image, "image")
            with Image.open(image) as file:
                return file.size
        if hasattr(image, "read") and image.seekable():
            place = image.tell()
            try:
                image.seek(0)
                with Image.open(image) as file:
                    return file.size
            finally:
                image.seek(place)
    except Exception:
        # Decoding will say what is wrong.
        return None
    return None


def file_name(image: AnyImage) -> str | None:
    """The path of an image that is given as one."""
    return os.fspath(image) if isinstance(image, (str, os.PathLike)) else None


def list_images(path: str | os.PathLike[str]) -> list[Path]:
    """List the images in a folder and its subfolders, in natural order (2.jpg before 10.jpg); a file lists itself.

    Images have a suffix of :data:`SUFFIXES`, in any case. Names that begin with a dot are skipped. Links to folders are
    followed unless they form a loop. Pipes, sockets and devices named like an image are listed, so that
    :func:`read_image` reports them.

    Raises:
        FileNotFoundError: if ``path`` does not exist.
        ValueError: if the folder holds no image, or ``path`` is neither a folder nor a regular file.
    """
    path = Path(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"no file or folder at {quoted(path)}")
    if not path.is_dir():
        require_regular_file(path, "image")
        return [path]
    found = _images_below(path, frozenset())
    if not found:
        raise ValueError(f"no images in {quoted(path)} (suffixes {', '.join(sorted(SUFFIXES))})")
    return sorted(found, key=natural_key)


def _images_below(folder: Path, above: frozenset[str]) -> list[Path]:
    """The files of :func:`list_images`; ``above`` are the folders on the way to ``folder``."""
    where = os.path.realpath(folder)
    if where in above:
        return []
    found: list[Path] = []
    try:
        entries = list(os.scandir(folder))
    except PermissionError:
        if above:
            # Skip subfolders of other users, such as lost+found.
            return []
        raise
    for entry in entries:
        if entry.name.startswith("."):
            continue
        try:
            is_folder = entry.is_dir()
        except OSError:
            # A link to itself, which is as broken as one to nothing.
            is_folder = False
        if is_folder:
            found += _images_below(folder / entry.name, above | {where})
        elif Path(entry.name).suffix.lower() in SUFFIXES and not _is_broken_link(entry):
            found.append(folder / entry.name)
    return found


def _is_broken_link(entry: os.DirEntry[str]) -> bool:
    try:
        return stat.S_ISLNK(entry.stat().st_mode)
    except OSError:
        return True


def resize(
    image: Image.Image, load_size: LoadSize, resample: Image.Resampling = Image.Resampling.LANCZOS
) -> Image.Image:
    """Resize with antialiasing.

    Args:
        image: image of any mode that Pillow can filter.
        load_size: an integer is the length of the shorter side, and the other follows (rounded down, as torchvision's
            ``Resize``); ``(height, width)`` is exact; None keeps the size.
        resample: Pillow's filter.

    Raises:
        ValueError: for a size that is not positive or has another form, an image without pixels, and a result without
            pixels or of more than :func:`max_pixels`.
    """
    new = resized_size(image.size, load_size)
    check_size(new, image.size)
    return image if new == image.size else image.resize(new, resample)


def resized_size(size: tuple[int, int], load_size: LoadSize) -> tuple[int, int]:
    """The ``(width, height)`` that :func:`resize` gives an image of ``size`` (width, height).

    Raises:
        ValueError: as :func:`resize`, but without the limit.
    """
    width, height = size
    if width < 1 or height < 1:
        raise ValueError(f"an image of {width} x {height} pixels is empty; give one with pixels")
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


def bounded_size(
    size: tuple[int, int], load_size: LoadSize, max_side: int | None = None, patch: int = 1
) -> tuple[int, int]:
    """:func:`resized_size` with a bound on the longer side, because the time of a long strip has no bound.

    Args:
        size: (width, height) of the image.
        load_size: as :func:`resize`. (height, width) is exact.
        max_side: pixels. An image whose longer side would exceed it is loaded with the longer side at ``max_side``,
            and the shorter follows (rounded down). None is 1792, or four times an integer ``load_size`` if that is
            more, and no bound for other forms.
        patch: the shorter side needs this many pixels if it is shortened.

    Raises:
        ValueError: as :func:`resized_size`; for a ``max_side`` that is not an integer >= 1, or shorter than a side of
            (height, width); for an image so long that its shorter side falls below ``patch``.
    """
    if max_side is not None and not _positive(max_side):
        raise ValueError(f"max_side must be pixels (an integer of at least 1) or None, got {max_side!r}")
    width, height = resized_size(size, load_size)
    if max_side is None:
        if load_size is None or isinstance(load_size, (tuple, list)):
            return width, height
        max_side = max(_LONGEST * int(load_size), _LONGEST_AT_LEAST)
    long, short = max(width, height), min(width, height)
    if long <= max_side:
        return width, height
    if isinstance(load_size, (tuple, list)):
        raise ValueError(f"a size of {height}x{width} is more than max_side, {max_side} pixels; leave one of them out")
    # From the image's own sides: those asked for are rounded.
    short = max_side * min(size) // max(size)
    if short < patch:
        raise ValueError(
            f"an image of {size[0]} x {size[1]} pixels is too long: with its longer side at {max_side} pixels "
            f"(--max-side, max_side) its shorter one would have {short}, and {patch} are needed; crop it, raise that "
            "bound, or give its size as height and width"
        )
    return (max_side, short) if width > height else (short, max_side)


def whole_patches(side: int, patch: int, stride: int) -> int:
    """The length nearest to ``side``, at least one patch, that leaves no pixel beyond the last whole patch."""
    return patch + (max(side - patch, 0) + stride // 2) // stride * stride


def to_tensor(image: Image.Image, mean: Sequence[float], std: Sequence[float], *, out: Tensor | None = None) -> Tensor:
    """``[1, 3, H, W]`` float32 on the CPU: pixels scaled to 0 to 1, minus ``mean``, over ``std`` (three values each).

    Args:
        image, mean, std: see above.
        out: ``[1, 3, H, W]``, floating point, on any device: a batch's place for this image, which is filled and
            returned. Values are rounded to its dtype once.

    Raises:
        TypeError: if ``image`` is not a Pillow image, or ``out`` not a tensor.
        ValueError: unless ``mean`` and ``std`` are three finite numbers each with ``std`` above 0; for an image without
            pixels or one that cannot be converted to RGB; for an ``out`` of another shape or of integers.
    """
    if not isinstance(image, Image.Image):
        raise TypeError(f"image must be a PIL.Image, got {type(image).__name__}")
    if out is not None and not isinstance(out, Tensor):
        raise TypeError(f"out must be a tensor or None, got {type(out).__name__}")
    shape = (1, 3, image.height, image.width)
    if out is not None and (tuple(out.shape) != shape or not out.is_floating_point()):
        raise ValueError(f"out must be {list(shape)} and floating point, got {list(out.shape)} {out.dtype}")
    normalise, pixels = normaliser(mean, std), torch.from_numpy(np.array(to_rgb(image))).unsqueeze(0)
    inside = out is not None and out.dtype == torch.float32 and out.device.type == "cpu" and out.is_contiguous()
    result = normalise(pixels, out if inside else None)
    return result if out is None or inside else out.copy_(result)


def normaliser(
    mean: Sequence[float], std: Sequence[float], device: torch.device | str = "cpu"
) -> Callable[..., Tensor]:
    """The arithmetic of :func:`to_tensor`: ``[B, H, W, 3]`` uint8 on ``device`` to ``[B, 3, H, W]`` float32.

    The function's second argument, if given, is where the result is written.

    Raises:
        ValueError: as :func:`to_tensor`, for ``mean`` and ``std``.
    """
    centre, spread = _three("mean", mean), _three("std", std)
    if bool((spread <= 0).any()):
        raise ValueError(f"std must be above 0, got {std!r}")
    # Moved once: a copy from ordinary memory waits for the device's queue.
    centre, spread = centre.to(device), spread.to(device)

    def normalise(pixels: Tensor, out: Tensor | None = None) -> Tensor:
        batch, height, width, channels = pixels.shape
        if out is None:
            out = memory.new_empty(pixels, (batch, channels, height, width), dtype=torch.float32)
        # In place, and only there: each temporary costs as much as all of this arithmetic.
        return out.copy_(pixels.permute(0, 3, 1, 2)).div_(255).sub_(centre).div_(spread)

    return normalise


def _three(name: str, values: Sequence[float]) -> Tensor:
    """``[3, 1, 1]`` float32 on the CPU."""
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError, OverflowError, RuntimeError):
        numbers = []
    if len(numbers) != 3 or not all(map(math.isfinite, numbers)):
        raise ValueError(f"mean and std must be three values each, all finite, got {name}={values!r}")
    return torch.tensor(numbers, dtype=torch.float32, device="cpu").view(3, 1, 1)


def preprocess(image: Image.Image, load_size: LoadSize, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """:func:`to_rgb`, :func:`resize` and :func:`to_tensor`: image to ``[1, 3, H, W]`` float32.

    Order and filter are those of Amir et al.'s extractor, with which published LiFT weights were trained.
    """
    return to_tensor(resize(to_rgb(image), load_size), mean, std)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert to 8-bit RGB as :func:`read_image` does: transparent pixels become white, more than 8 bits are scaled.

    Raises:
        ValueError: for an image without pixels, of a mode that Pillow cannot convert, or with values out of range.
    """
    if 0 in image.size:
        raise ValueError(f"it is empty, {image.width} x {image.height} pixels")
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    numbers = image.mode.startswith("I") or image.mode == "F"
    transparent = "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info
    try:
        if not numbers and not transparent:
            return image.convert("RGB")
        whole = Image.new("RGB", image.size)
        # In strips: with eight bytes and more per pixel, copies of a large image would take gigabytes.
        rows = max(1, _STRIP_PIXELS // image.width)
        for top in range(0, image.height, rows):
            strip = image.crop((0, top, image.width, min(image.height, top + rows)))
            whole.paste(_from_numbers(strip) if numbers else _on_white(strip), (0, top))
    except ValueError as error:
        raise ValueError(f"its mode {image.mode} cannot be converted to RGB: {said(error)}") from error
    return whole


def _on_white(image: Image.Image) -> Image.Image:
    # Pillow converts grey with premultiplied transparency (La) to LA only.
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
    """Apply the EXIF orientation; without one, return the image itself, which Pillow would copy."""
    return image if _orientation(image) == 1 else ImageOps.exif_transpose(image)


def _orientation(image: Image.Image) -> int:
    found: Any = image.getexif().get(_ORIENTATION)
    return int(found) if found in range(1, 9) else 1


def _content(file: bytes | bytearray | memoryview | IO[bytes], name: str) -> bytes:
    """What bytes or a binary file object hold: a bounded number of bytes, and not none."""
    most = _BYTES_OF_A_PIXEL * _FILE * _most_pixels + _BYTES_BESIDE
    content = bytearray()
    try:
        if isinstance(file, (bytes, bytearray, memoryview)):
            content = bytearray(file)
        else:
            with suppress(AttributeError, OSError):
                # A buffer that was just written stands at its end.
                file.seek(0)
            while len(content) <= most and (part := file.read(_CHUNK)):
                content += part
    except TypeError as error:
        raise TypeError(
            f"{name} must be a binary file object, whose read() gives bytes: {said(error)}; open it in mode 'rb'"
        ) from error
    except Exception as error:
        raise ValueError(f"{name} cannot be read: {said(error)}") from error
    if not content:
        raise ValueError(f"{name} holds no bytes; an answer of the network can be read only once")
    if len(content) > most:
        raise ValueError(
            f"{name} is too large: more than {most} bytes. If you trust it, raise the limit "
            "(lift_fast.images.set_max_pixels)"
        )
    return bytes(content)


def _positive(value: object) -> int:
    """``value`` as an int if it is a whole number of at least 1, else 0."""
    return max(as_whole(value) or 0, 0)
