"""Images for training: read, resized and jittered, in an order that depends only on seed and epoch."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from lift_fast._text import quoted
from lift_fast.images import max_pixels, read_image, resize, set_max_pixels

# Further images to try in place of one that cannot be read.
MOST_UNREADABLE = 50
# Separate streams of random numbers from one seed.
_ORDER, _JITTER, _INSTEAD = 0, 1, 2
# From Linux's <sys/prctl.h>.
_PR_SET_PDEATHSIG = 1


class Sample(NamedTuple):
    """One image."""

    pixels: Tensor
    """[3, S, S] uint8; [B, 3, S, S] in a batch. NHWC memory."""
    unreadable: list[str]
    """Errors of the unreadable files that this image replaces."""
    failed: bool = False
    """Too many files in a row could not be read; the pixels are black."""


class TrainingImages(Dataset[Sample]):
    """Square uint8 images by ``(epoch, index)``, independent of the process and order of reading.

    An unreadable file is replaced by another one, drawn from (seed, epoch, index): batches keep their size, so that the
    processes of a distributed run stay in step.
    """

    def __init__(self, paths: Sequence[Path], size: int, fit: str, jitter: float, seed: int) -> None:
        self.paths = [str(path) for path in paths]
        self.size, self.fit, self.jitter, self.seed = size, fit, jitter, seed

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        unreadable: list[str] = []
        for chosen in self._candidates(epoch, index):
            try:
                image = fit_square(self.paths[chosen], self.size, self.fit)
            except (ValueError, OSError) as error:
                unreadable.append(str(error))
                continue
            if self.jitter:
                image = color_jitter(image, self.jitter, np.random.default_rng([self.seed, _JITTER, epoch, index]))
            return Sample(torch.from_numpy(np.array(image)).permute(2, 0, 1), unreadable)
        # The loader would wrap an error of a worker in its traceback.
        black = torch.zeros(3, self.size, self.size, dtype=torch.uint8, device="cpu")
        return Sample(black, unreadable, failed=True)

    def _candidates(self, epoch: int, index: int) -> Iterator[int]:
        yield index
        others = np.random.default_rng([self.seed, _INSTEAD, epoch, index])
        for _ in range(MOST_UNREADABLE):
            yield int(others.integers(len(self.paths)))


def fit_square(path: str | os.PathLike[str], size: int, fit: str) -> Image.Image:
    """Read an image as ``size x size`` pixels, 8-bit RGB.

    ``"squash"`` resizes both sides, as the published training does; ``"crop"`` resizes the shorter side and crops the
    centred square. Bilinear with antialiasing. A large JPEG file is decoded at a half, quarter or eighth of its size,
    never below ``size``.

    Raises:
        FileNotFoundError, ValueError: as :func:`lift_fast.images.read_image`; ValueError for a strip so narrow that it
            would be resized to more pixels than :func:`lift_fast.images.max_pixels`.
    """
    image = read_image(path, at_least=size)
    if fit == "squash":
        return resize(image, (size, size), Image.Resampling.BILINEAR)
    try:
        image = resize(image, size, Image.Resampling.BILINEAR)
    except ValueError as error:
        raise ValueError(f"{quoted(path)}: {error}") from error
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def color_jitter(image: Image.Image, strength: float, random: np.random.Generator) -> Image.Image:
    """Scale brightness, contrast and saturation by 1 - s to 1 + s and turn hue by -s to s of a circle, in random order.

    Equivalent to torchvision's ``ColorJitter(s, s, s, s)`` on a Pillow image.
    """
    factors = random.uniform(1 - strength, 1 + strength, 3)
    turn = int(random.uniform(-strength, strength) * 255) % 256
    for step in random.permutation(4):
        if step < 3:
            kind = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[step]
            image = kind(image).enhance(float(factors[step]))
        else:
            hue, saturation, value = image.convert("HSV").split()
            hue = hue.point([(level + turn) % 256 for level in range(256)])
            image = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    return image


class GlobalBatches(Sampler[list[tuple[int, int]]]):
    """One process's share of each batch of a common permutation, from batch ``start`` of ``epoch``.

    The permutation depends only on (seed, epoch). Only whole batches: up to ``batch_size - 1`` images, others in each
    epoch, are left out.
    """

    def __init__(self, count: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        share = batch_size // world_size
        self.share = slice(rank * share, (rank + 1) * share)
        self.epoch = self.start = 0

    @property
    def batches(self) -> int:
        """In a whole epoch."""
        return self.count // self.batch_size

    def __len__(self) -> int:
        return self.batches - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng([self.seed, _ORDER, self.epoch]).permutation(self.count)
        for batch in range(self.start, self.batches):
            members = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield [(self.epoch, int(index)) for index in members[self.share]]


def build_loader(images: TrainingImages, batches: GlobalBatches, workers: int, pin: bool) -> DataLoader[Sample]:
    """Batches of images, prefetched by processes that live as long as the loader."""
    return _Loader(
        images,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin,
        worker_init_fn=partial(_start_worker, max_pixels()),
        persistent_workers=workers > 0,
        prefetch_factor=2 if workers else None,
        # Otherwise each epoch would draw from the global generator.
        generator=torch.Generator(device="cpu"),
    )


class _Loader(DataLoader[Sample]):
    """PyTorch's loader draws a number on the default device at each start; this one on the CPU."""

    def __iter__(self) -> Any:
        with torch.device("cpu"):
            return super().__iter__()


def stop_workers(loader: DataLoader[Sample]) -> None:
    """Stop the workers now.

    They ignore SIGTERM, which Python sends at exit: if an error's traceback kept the loader alive until then, Python
    would wait for them forever.
    """
    iterator: Any = getattr(loader, "_iterator", None)
    if hasattr(iterator, "_shutdown_workers"):
        iterator._shutdown_workers()


def default_workers(cuda: bool, processes: int) -> int:
    """Workers for each of ``processes`` training processes on this machine.

    With a GPU all cores read; on the CPU the cores compute, and one worker is enough.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(16, cores // processes)) if cuda else 1


def _collate(samples: list[Sample]) -> Sample:
    unreadable = [message for sample in samples for message in sample.unreadable]
    failed = any(sample.failed for sample in samples)
    # Stacked in their memory layout, NHWC: no transposing, and channels_last on the device.
    pixels = torch.stack([sample.pixels.permute(1, 2, 0) for sample in samples]).permute(0, 3, 1, 2)
    return Sample(pixels, unreadable, failed)


def _start_worker(most_pixels: int, _: int) -> None:
    _end_with_parent()
    set_max_pixels(most_pixels)
    # The training process decides when to stop; it would fail if a worker died of the same signal.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)


def _end_with_parent() -> None:
    """Let Linux kill this worker when the training process is killed; it would otherwise wait for ever."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        # It ended before prctl.
        os._exit(1)
