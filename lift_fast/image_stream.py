"""``extract_images``: descriptors of many images; threads read ahead, and images of one size go together."""

from __future__ import annotations

import itertools
import math
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from . import memory
from ._text import quoted, shown
from .checks import check_whole
from .extractor import ViTLiFTExtractor, check_lift_iter, demonstration_extractor
from .images import (
    AnyImage,
    LoadSize,
    as_image,
    bounded_size,
    check_size,
    file_name,
    list_images,
    normaliser,
    resize,
    stored_size,
)

# Of images that threads decode, and of images and descriptors from the oldest that still waits for others of its size.
_AHEAD_BYTES, _WINDOW_BYTES = 256 << 20, 256 << 20
# On the CPU batches gain up to an eighth below this many pixels, and hardly anything above. On a GPU an image
# takes less time than its launches; a batch takes no more than this much of the window.
_CPU_PIXELS = 448 * 448
_GPU_BATCH, _BATCH_BYTES = 16, 128 << 20
_HEADERS_AHEAD = 32
# Pillow holds four bytes for a pixel, twice while it turns an image.
_BYTES_OF_A_PIXEL = 8
_MOST_THREADS = 8

OnError = Callable[[AnyImage, str], None]


class ImageDescriptors(NamedTuple):
    """Descriptors of one image, see :func:`extract_images`."""

    position: int
    """The image's place among those given, from 0."""
    descriptors: Tensor
    """``[h, w, C]`` on the CPU; a part of its batch's memory."""
    image_size: tuple[int, int]
    """(height, width) of the image as loaded for the backbone."""
    file_size: tuple[int, int]
    """(height, width) of the original image, upright."""
    file: str | None = None
    """The image as given or found in the folder, where it was a path."""

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.descriptors.shape))
        loaded, original = (f"{width} x {height}" for height, width in (self.image_size, self.file_size))
        return (
            f"ImageDescriptors({self.position}{'' if self.file is None else f', {quoted(self.file)}'}: {shape} "
            f"{str(self.descriptors.dtype).removeprefix('torch.')}, loaded at {loaded} of {original} pixels)"
        )


class _Loaded(NamedTuple):
    position: int
    pixels: npt.NDArray[np.uint8]
    grid: tuple[int, int]
    file_size: tuple[int, int]
    file: str | None


def extract_images(
    images: str | os.PathLike[str] | Iterable[AnyImage],
    *,
    extractor: ViTLiFTExtractor | None = None,
    size: LoadSize = 448,
    max_side: int | None = None,
    lift_iter: int = 1,
    batch_size: int | None = None,
    dtype: torch.dtype | None = None,
    on_error: OnError | None = None,
) -> Generator[ImageDescriptors, None, None]:
    """Descriptors of many images, one after the other in the order given; ``lift-fast extract`` is a loop over them.

    Threads decode the next images while the networks compute, and on a GPU results are copied back meanwhile. Images of
    one loaded size go through the networks together, also where others stand between them: which ones depends on the
    images alone, not on the time that anything takes. Memory is bounded: about 256 MiB of images that are being
    decoded, and as much of images and descriptors that wait for their turn (always at least one image).

    Args:
        images: a folder or file (:func:`lift_fast.images.list_images`), or images in any form that
            :func:`lift_fast.match_images` takes; they are asked for 32 ahead.
        extractor: backbone and optional LiFT, which must not change meanwhile; None is the demonstration pair, as for
            :func:`lift_fast.match_images`.
        size, max_side: as :func:`lift_fast.match_images`, but not rounded to whole patches.
        lift_iter: applications of LiFT; 0 is the backbone alone.
        batch_size: most images of one size at once. None is as many as have 448 x 448 pixels together on the CPU, where
            more hardly gain, and 16 on a GPU, fewer where images are large.
        dtype: of the descriptors; None is the extractor's.
        on_error: called with an image and the message if it cannot be read or loaded; it is then left out. None raises.

    Returns:
        An iterator. Its threads end with it: read it to its end, or ``close()`` it. On a GPU descriptors lie in pinned
        memory; clone what is kept for long.

    Raises:
        FileNotFoundError, TypeError, ValueError: at once for a folder without images and options out of range; while
            iterating, without ``on_error``, as :func:`lift_fast.images.as_image` and for sizes that
            :meth:`ViTLiFTExtractor.check_size` refuses.
    """
    if extractor is not None and not isinstance(extractor, ViTLiFTExtractor):
        raise TypeError(f"extractor must be a ViTLiFTExtractor or None, got {type(extractor).__name__}")
    lift_iter = check_lift_iter(lift_iter)
    # Of any image: the form of both, and whether they contradict each other.
    bounded_size((1, 1), size, max_side)
    if batch_size is not None:
        check_whole("batch_size", batch_size, 1, math.inf)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype must be a floating point dtype or None, got {dtype!r}")
    if on_error is not None and not callable(on_error):
        raise TypeError(f"on_error must be a function or None, got {shown(on_error)}")
    if isinstance(images, (str, os.PathLike)):
        images = list_images(images)
    elif _is_one(images):
        raise TypeError(
            f"images must be a folder, a file or several images, got one {type(images).__name__}; put it in a list"
        )
    extractor = demonstration_extractor() if extractor is None else extractor
    dtype = extractor.dtype if dtype is None else dtype
    work = _Work(extractor, size, max_side, lift_iter, batch_size, dtype)
    return _stream(images, work, on_error)


def _is_one(images: Any) -> bool:
    """Whether this is one image, or something else that holds none; an array or tensor of four dimensions is a
    batch."""
    if isinstance(images, (np.ndarray, Tensor)):
        return images.ndim < 4
    if isinstance(images, (bytes, bytearray, memoryview)) or hasattr(images, "read"):
        return True
    return not hasattr(images, "__iter__") and not hasattr(images, "__getitem__")


class _Work(NamedTuple):
    extractor: ViTLiFTExtractor
    size: LoadSize
    max_side: int | None
    lift_iter: int
    batch_size: int | None
    dtype: torch.dtype

    def footprint(self, image: AnyImage) -> int:
        """Bytes that decoding an image takes at most; 0 for one that cannot be decoded, and all that there are for a
        stream, whose header can be read only once."""
        stored = stored_size(image)
        if stored is None:
            return _AHEAD_BYTES if hasattr(image, "read") else 0
        try:
            width, height = bounded_size(stored, self.size, self.max_side, self.extractor.patch)
        except ValueError:
            width = height = 0
        return _BYTES_OF_A_PIXEL * (stored[0] * stored[1] + width * height)

    def load(self, index: int, image: AnyImage) -> _Loaded:
        """Decode and resize; errors name the image."""
        name = quoted(image) if isinstance(image, (str, os.PathLike)) else f"images[{index}]"
        rgb = as_image(image, name)
        try:
            width, height = bounded_size(rgb.size, self.size, self.max_side, self.extractor.patch)
            check_size((width, height), rgb.size)
            grid = self.extractor.check_size(height, width, self.lift_iter)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        return _Loaded(index, np.array(resize(rgb, (height, width))), grid, (rgb.height, rgb.width), file_name(image))

    def held(self, image: _Loaded) -> int:
        """Bytes of an image and its descriptors."""
        cells = image.grid[0] * image.grid[1]
        return image.pixels.nbytes + cells * self.extractor.channel * self.dtype.itemsize

    def most(self, image: _Loaded) -> int:
        """Images of this size in a batch."""
        if self.batch_size is not None:
            return self.batch_size
        if self.extractor.device.type != "cuda":
            return max(1, _CPU_PIXELS // (image.pixels.shape[0] * image.pixels.shape[1]))
        return max(1, min(_GPU_BATCH, _BATCH_BYTES // self.held(image)))


def _stream(
    images: Iterable[AnyImage], work: _Work, on_error: OnError | None
) -> Generator[ImageDescriptors, None, None]:
    computed = _on_gpu if work.extractor.device.type == "cuda" else _on_cpu
    with _Reader(images, work) as reader:
        turns = itertools.count()
        taken = ((next(turns), image) for image in _usable(reader, on_error))
        turn, waiting = 0, dict[int, ImageDescriptors]()
        for batch, found in computed(_batches(taken, work), work):
            for (place, image), descriptors in zip(batch, found, strict=True):
                height, width = image.pixels.shape[:2]
                waiting[place] = ImageDescriptors(
                    image.position, descriptors, (height, width), image.file_size, image.file
                )
            # Else this batch would be held while the next is computed.
            del batch, found, image, descriptors
            while turn in waiting:
                yield waiting.pop(turn)
                turn += 1


class _Reader:
    """Images in order, decoded by threads that are ahead; waiting is left to the one who reads, so no thread hangs."""

    def __init__(self, images: Iterable[AnyImage], work: _Work) -> None:
        self._given = enumerate(images)
        self._work = work
        threads = max(1, min(_MOST_THREADS, torch.get_num_threads() if work.extractor.device.type == "cpu" else 8))
        self._most = 4 * threads + 2 * (work.batch_size or _GPU_BATCH)
        self._pool = ThreadPoolExecutor(threads, "lift_fast reader")
        self._headers: deque[tuple[int, AnyImage, Future[int]]] = deque()
        self._images: deque[tuple[AnyImage, int, Future[_Loaded]]] = deque()
        self._bytes = 0

    def __enter__(self) -> _Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def __iter__(self) -> Iterator[tuple[AnyImage, Future[_Loaded]]]:
        while True:
            self._start()
            if not self._images:
                return
            image, cost, loaded = self._images.popleft()
            self._bytes -= cost
            yield image, loaded

    def _start(self) -> None:
        """Start as many images as memory allows, always one."""
        for index, image in itertools.islice(self._given, _HEADERS_AHEAD - len(self._headers)):
            self._headers.append((index, image, self._pool.submit(self._work.footprint, image)))
        while self._headers and len(self._images) < self._most:
            index, image, footprint = self._headers[0]
            if self._images and not (footprint.done() and self._bytes + footprint.result() <= _AHEAD_BYTES):
                return
            self._headers.popleft()
            self._bytes += footprint.result()
            loaded = self._pool.submit(self._work.load, index, image)
            self._images.append((image, footprint.result(), loaded))


def _usable(reader: _Reader, on_error: OnError | None) -> Iterator[_Loaded]:
    """Waits for each image; those that cannot be used go to ``on_error``."""
    for image, loaded in reader:
        try:
            found = loaded.result()
        except (TypeError, ValueError, OSError) as error:
            if on_error is None:
                raise
            on_error(image, str(error))
        else:
            yield found


_Turn = tuple[int, _Loaded]


def _batches(images: Iterator[_Turn], work: _Work) -> Iterator[list[_Turn]]:
    """Images of one size; a batch is not waited for beyond so many bytes of other images and their descriptors."""
    taken = 0
    # The one that holds the oldest image is first. With the bytes taken before that image.
    groups: dict[tuple[int, ...], tuple[int, list[_Turn]]] = {}
    for turn, image in images:
        shape = image.pixels.shape
        members = groups.setdefault(shape, (taken, []))[1]
        members.append((turn, image))
        taken += work.held(image)
        if len(members) >= work.most(image):
            yield groups.pop(shape)[1]
        while groups and taken - next(iter(groups.values()))[0] > _WINDOW_BYTES:
            yield groups.pop(next(iter(groups)))[1]
    for _, members in groups.values():
        yield members


_Computed = Iterator[tuple[list[_Turn], Tensor]]


def _on_cpu(batches: Iterator[list[_Turn]], work: _Work) -> _Computed:
    """``[B, h, w, C]`` of each batch."""
    normalise = normaliser(work.extractor.mean, work.extractor.std)
    for batch in batches:
        pixels = torch.stack([torch.from_numpy(image.pixels) for _, image in batch])
        yield batch, _compute(normalise(pixels), batch, work)


def _on_gpu(batches: Iterator[list[_Turn]], work: _Work) -> _Computed:
    """The same; the host waits for a batch only when the next is queued, and copies back run beside the networks."""
    device = work.extractor.device
    normalise = normaliser(work.extractor.mean, work.extractor.std, device)
    back = torch.cuda.Stream(device)
    queued: deque[tuple[list[_Turn], Tensor, torch.cuda.Event]] = deque()
    pinned = partial(memory.empty, device="cpu", pin_memory=True)
    for batch in batches:
        with torch.cuda.device(device):
            pixels = pinned((len(batch), *batch[0][1].pixels.shape), dtype=torch.uint8)
            torch.stack([torch.from_numpy(image.pixels) for _, image in batch], out=pixels)
            found = _compute(normalise(pixels.to(device, non_blocking=True)), batch, work)
            back.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(back):
                host = pinned(found.shape, dtype=found.dtype).copy_(found, non_blocking=True)
                # Its memory must not be given to the next batch before it is copied.
                found.record_stream(back)
                queued.append((batch, host, back.record_event()))
        if len(queued) > 1:
            yield _arrived(*queued.popleft())
    while queued:
        yield _arrived(*queued.popleft())


def _arrived(batch: list[_Turn], host: Tensor, event: torch.cuda.Event) -> tuple[list[_Turn], Tensor]:
    event.synchronize()
    return batch, host


@torch.no_grad()
def _compute(pixels: Tensor, batch: list[_Turn], work: _Work) -> Tensor:
    tokens = work.extractor.extract_descriptors_iterative_lift(pixels, work.lift_iter)
    return tokens.unflatten(1, batch[0][1].grid).to(work.dtype)
