"""Videos of known motion from photographs: a camera over a photograph, and an object pasted onto another one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image

PHOTOGRAPHS = Path(__file__).parents[1] / "examples/photographs"


def photograph(name="cat.jpg", size=None):
    image = Image.open(PHOTOGRAPHS / name).convert("RGB")
    return image if size is None else image.resize((size[1], size[0]), Image.Resampling.LANCZOS)


def camera(frames, size, zoom=0.02, turn=0.02, shift=(3.0, -2.0), name="cat.jpg"):
    """Frames ``size`` (height, width) of a camera that zooms, turns and moves over a photograph, and for each the
    3 x 3 matrix from its pixels (whole numbers at their centres) to the photograph's."""
    height, width = size
    image = photograph(name, (2 * height, 2 * width))
    made, matrices = [], []
    for t in range(frames):
        scale, angle = (1 + zoom) ** t, turn * t
        a, b = scale * np.cos(angle), scale * np.sin(angle)
        x = width + shift[0] * t - a * width / 2 + b * height / 2
        y = height + shift[1] * t - b * width / 2 - a * height / 2
        made.append(image.transform((width, height), Image.Transform.AFFINE, (a, -b, x, b, a, y), Image.BICUBIC))
        # Pillow's pixel centres lie at halves.
        half = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
        matrices.append(np.linalg.inv(half) @ np.array([[a, -b, x], [b, a, y], [0, 0, 1]]) @ half)
    return made, matrices


def carried(points, matrices, t):
    """Where ``points [P, 2]`` of the first frame lie in frame ``t``."""
    ends = np.c_[points, np.ones(len(points))] @ (np.linalg.inv(matrices[t]) @ matrices[0]).T
    return ends[:, :2] / ends[:, 2:]


def pasted(frames, size, seed=0, objects=1, steps=(4, 2)):
    """Frames of a photograph over which round pieces of another one move, and their masks (1 to ``objects``)."""
    rng = np.random.default_rng(seed)
    height, width = size
    ground = np.asarray(photograph("cat_second_view.jpg", size))
    source = np.asarray(Image.fromarray(skimage.data.coffee()).resize((width, height)))
    radius = min(size) // 5
    y, x = np.mgrid[:height, :width]
    begin = [(height * (k + 1) // (objects + 1), radius + 2 + 3 * int(rng.integers(3))) for k in range(objects)]
    images, masks = [], []
    for t in range(frames):
        image, mask = ground.copy(), np.zeros(size, dtype=np.uint8)
        for number, (top, left) in enumerate(begin, 1):
            cy, cx = top + steps[1] * t * (-1) ** number, left + steps[0] * t
            inside = (y - cy) ** 2 + (x - cx) ** 2 <= radius**2
            fy, fx = (y - cy + height // 2) % height, (x - cx + number * width // (objects + 1)) % width
            image[inside] = source[fy[inside], fx[inside]]
            mask[inside] = number
        images.append(Image.fromarray(image))
        masks.append(mask)
    return images, masks
