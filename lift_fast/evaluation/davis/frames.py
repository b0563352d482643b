"""Frames of a video as the two published protocols read them.

``lift``: S x S pixels, bicubic (the LiFT paper's). ``dino``: the shorter side S, the longer one in proportion and cut
to a multiple of 64, by OpenCV's bilinear resizing of bytes (DINO's own ``eval_video_segmentation``).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from lift_fast import images

from .dataset import DavisError

SIZES = {"lift": 448, "dino": 480}
"""S by default."""
DINO_MEAN, DINO_STD = (0.485, 0.456, 0.406), (0.228, 0.224, 0.225)
"""Normalisation of frames in DINO's protocol: red's 0.228 is ImageNet's 0.229 elsewhere."""
_MULTIPLE = 64
# Weights are whole multiples of 1 / _STEPS, as in OpenCV.
_STEPS = 2048


def frame_size(size: tuple[int, ...], side: int, protocol: str) -> tuple[int, int]:
    """(height, width) to which frames of ``size`` (height, width) are resized.

    Raises:
        ValueError: if the longer side is below 64 pixels with ``dino``.
    """
    if protocol == "lift":
        return side, side
    height, width = size[:2]
    # A square frame is cut in width, as in the published code.
    longer = int(side * max(height, width) / min(height, width) // _MULTIPLE * _MULTIPLE)
    if longer == 0:
        raise ValueError(f"size must be at least {_MULTIPLE} pixels for multiples of {_MULTIPLE}, got {side}")
    return (longer, side) if height > width else (side, longer)


def read_frame(path: Path, size: tuple[int, ...], side: int, protocol: str = "lift") -> Image.Image:
    """A frame, resized; raises ``DavisError`` if it cannot be read or is not of ``size`` (height, width)."""
    try:
        image = images.read_image(path)
    except (ValueError, OSError) as error:
        raise DavisError(str(error)) from error
    if (image.height, image.width) != tuple(size):
        raise DavisError(
            f"{path} has {image.width} x {image.height} pixels, the mask of the first frame {size[1]} x {size[0]}; "
            "they must be equal"
        )
    wanted = frame_size(size, side, protocol)
    try:
        images.check_size((wanted[1], wanted[0]), image.size)
    except ValueError as error:
        raise DavisError(f"{path}: {error}") from error
    if protocol == "lift":
        return image.resize((wanted[1], wanted[0]), Image.Resampling.BICUBIC)
    return Image.fromarray(resize_bytes(np.asarray(image), wanted))


def resize_bytes(pixels: npt.NDArray[np.uint8], size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """``[H, W, C]`` to ``size`` (height, width): bilinear between pixel centres, not antialiased, in whole numbers.

    OpenCV's arithmetic on bytes, which Pillow and PyTorch do not have: bit for bit equal where frames become smaller,
    at most one step of 255 apart in 0.3 % of the values where they become larger.
    """
    upper, lower, above, below = _neighbours(pixels.shape[0], size[0])
    left, right, before, after = _neighbours(pixels.shape[1], size[1])
    whole = pixels.astype(np.int64)
    rows = (whole[:, left] * before[:, None] + whole[:, right] * after[:, None]) >> 4
    mixed = ((above[:, None, None] * rows[upper]) >> 16) + ((below[:, None, None] * rows[lower]) >> 16)
    return np.clip((mixed + 2) >> 2, 0, 255).astype(np.uint8)


def _neighbours(
    old: int, new: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """For each of ``new`` pixels the two of ``old`` next to it, and their weights in steps."""
    place = ((np.arange(new) + 0.5) * (old / new) - 0.5).astype(np.float32)
    first = np.floor(place).astype(np.int64)
    part = place - first.astype(np.float32)
    part[(first < 0) | (first >= old - 1)] = 0
    first = first.clip(0, old - 1)
    weights = [np.rint(share * np.float32(_STEPS)).astype(np.int64) for share in (1 - part, part)]
    return first, (first + 1).clip(max=old - 1), weights[0], weights[1]
