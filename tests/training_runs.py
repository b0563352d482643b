"""The smallest trainings that tests run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from lift_fast.training import TrainingSettings

# Two blocks of a small backbone; a quarter of 64 pixels is one patch.
TINY = {
    "model": "vit_tiny_patch16_224",
    "random_weights": True,
    "layer": 1,
    "image_size": 64,
    "batch_size": 4,
    "workers": 0,
    "device": "cpu",
    "precision": "float32",
}


def settings(folder, out, **changes):
    return TrainingSettings(data=folder, out=out, **{**TINY, **changes})


def write_images(root: Path, count: int, nested: bool = False) -> Path:
    """Smooth images: of one size, or of different shapes and kinds in nested folders."""
    random = np.random.default_rng(0)
    if nested:
        (root / "deep").mkdir()
    for number in range(count):
        small = Image.fromarray(random.integers(0, 256, (5, 7, 3), dtype=np.uint8))
        size = (int(random.integers(60, 100)), int(random.integers(60, 100))) if nested else (70, 80)
        name = f"{number:02d}.{'jpg' if nested and number % 2 else 'png'}"
        small.resize(size, Image.Resampling.BICUBIC).save(root / ("deep" if nested and number % 3 else "") / name)
    return root
