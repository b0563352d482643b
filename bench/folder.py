"""A folder of photographs to .npz files: ``lift-fast extract`` against the loop that one writes first."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

from lift_fast import ViTLiFTExtractor
from lift_fast.cli import extract, main
from lift_fast.testing import relative_error

from .maps import PHOTOGRAPHS


def photographs(folder: Path, count: int, longer: int = 2048) -> list[Path]:
    """Write ``count`` JPEG files of 4 : 3, upright and wide in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = sorted(PHOTOGRAPHS.glob("*.jpg"))
    paths = []
    for number in range(count):
        size = (longer, longer * 3 // 4)[:: 1 if number % 2 else -1]
        paths.append(folder / f"{number}.jpg")
        with Image.open(sources[number % len(sources)]) as image:
            image.convert("RGB").resize(size).save(paths[-1], quality=92)
    return paths


def by_command(folder: Path, out: Path, extractor: ViTLiFTExtractor, size: int) -> None:
    """The whole command, but with networks that are built."""
    with mock.patch.object(extract, "build_extractor", return_value=extractor):
        status = main(["extract", str(folder), "--out", str(out), "--size", str(size), "--overwrite", "--quiet"])
    if status != 0:
        raise RuntimeError(f"lift-fast extract ended with status {status}")


@torch.inference_mode()
def by_loop(paths: list[Path], out: Path, extractor: ViTLiFTExtractor, size: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for path in paths:
        batch, _ = extractor.preprocess(path, size)
        descriptors = extractor.extract_descriptors(batch).unflatten(1, extractor.grid(*batch.shape[2:]))
        with (out / f"{path.stem}.npz").open("wb") as file:
            np.savez(file, descriptors=descriptors[0].float().cpu().numpy(), image_size=np.array(batch.shape[2:]))


def difference(one: Path, other: Path) -> float:
    """Largest relative error between descriptors of the same name; inf if a file is missing."""
    names = {path.name for path in one.glob("*.npz")}
    if not names or names != {path.name for path in other.glob("*.npz")}:
        return float("inf")

    def read(path: Path) -> torch.Tensor:
        with np.load(path) as data:
            return torch.from_numpy(data["descriptors"])

    return max(relative_error(read(one / name), read(other / name)) for name in names)
