"""Frames of a video, in order: images of a folder, an animated image, or a video file (with PyAV)."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image, ImageOps

from lift_fast import images
from lift_fast._files import natural_key, require_regular_file
from lift_fast._text import quoted, said

T = TypeVar("T")
_END: Any = object()
VIDEO_EXTRA = 'pip install "lift_fast[video]"'
_VIDEO_HINT = (
    f"video files need PyAV: {VIDEO_EXTRA}; or turn the file into images first: ffmpeg -i VIDEO FOLDER/%06d.png"
)


class FrameError(ValueError):
    """A frame that cannot be used; the message names it."""


@dataclass(frozen=True)
class Frame:
    """One frame of a video."""

    name: str
    """Differs from those of all other frames; results are called by it."""
    image: Image.Image | FrameError
    """8-bit RGB, upright, or why it cannot be read."""


@dataclass(frozen=True)
class Video:
    """The frames of a folder or file, read when they are asked for."""

    path: Path
    files: tuple[Path, ...] = ()
    """A folder's images, in natural order."""
    count: int | None = None
    """Number of frames; None where the file does not say."""
    rate: float | None = None
    """Frames per second, of a video file."""

    @property
    def names(self) -> list[str] | None:
        """Names of a folder's frames; None for a file, whose frames are numbered with at least six digits."""
        return _names(self.files) if self.files else None

    def frames(self, start: int = 0) -> Generator[Frame, None, None]:
        """The frames from number ``start`` on, in order."""
        if self.files:
            return _of_files(self.files, start)
        return _of_animation(self.path, start) if _is_image(self.path) else _of_video(self.path, start)


def open_video(path: str | os.PathLike[str], leave_out: Iterable[Path] = ()) -> Video:
    """The video at ``path``: a folder with an image for each frame (in natural order, 2.jpg before 10.jpg; subfolders
    and names that begin with a dot do not count), an animated GIF, WebP, PNG or TIFF, or a video file.

    Args:
        path: folder or file.
        leave_out: files that are no frames though they lie in the folder, such as a mask.

    Raises:
        FileNotFoundError: if there is nothing at ``path``.
        ValueError: for a folder without images, a file that is no video, or a video file without PyAV.
    """
    path = Path(path)
    if path.is_dir():
        others = {os.path.realpath(other) for other in leave_out}
        found = [
            path / entry.name
            for entry in os.scandir(path)
            if not entry.name.startswith(".") and _is_image(Path(entry.name)) and not entry.is_dir()
        ]
        files = tuple(sorted((one for one in found if os.path.realpath(one) not in others), key=natural_key))
        if not files:
            raise ValueError(f"no frames in {quoted(path)} (suffixes {', '.join(sorted(images.SUFFIXES))})")
        return Video(path, files, len(files))
    require_regular_file(path, "folder of frames or video")
    if _is_image(path):
        try:
            with Image.open(path) as image:
                return Video(path, count=getattr(image, "n_frames", 1))
        except Exception as error:
            raise ValueError(f"{quoted(path)} cannot be read as an image: {said(error)}") from error
    with _opened(path) as container:
        stream = container.streams.video[0]
        rate = stream.average_rate
        return Video(path, count=stream.frames or None, rate=float(rate) if rate else None)


def check_pixels(size: tuple[int, int]) -> None:
    """Refuse a file of more than four times ``images.max_pixels()`` pixels, before it is decoded."""
    most = 4 * images.max_pixels()
    if size[0] * size[1] > most:
        raise ValueError(
            f"it is too large: {size[0]} x {size[1]} pixels, but a file may hold {most} (four times --max-pixels)"
        )


def read_ahead(items: Iterable[T]) -> Iterator[T]:
    """The items; while one is used, a thread makes the next."""
    source = iter(items)
    with ThreadPoolExecutor(max_workers=1) as pool:
        following = pool.submit(next, source, _END)
        while (item := following.result()) is not _END:
            following = pool.submit(next, source, _END)
            yield item


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in images.SUFFIXES


def _names(files: tuple[Path, ...]) -> list[str]:
    counts = Counter(path.stem for path in files)
    return [path.name if counts[path.stem] > 1 else path.stem for path in files]


def _of_files(files: tuple[Path, ...], start: int) -> Generator[Frame, None, None]:
    for path, name in zip(files[start:], _names(files)[start:], strict=True):
        try:
            yield Frame(name, images.read_image(path))
        except (ValueError, OSError) as error:
            yield Frame(name, FrameError(str(error)))


def _of_animation(path: Path, start: int) -> Generator[Frame, None, None]:
    with Image.open(path) as image:
        for number in range(start, getattr(image, "n_frames", 1)):
            try:
                image.seek(number)
                check_pixels(image.size)
                yield _numbered(number, images.to_rgb(ImageOps.exif_transpose(image)))
            except Exception as error:
                yield _numbered(number, FrameError(f"{quoted(path)}, frame {number}, cannot be read: {said(error)}"))


def _numbered(number: int, image: Image.Image | FrameError) -> Frame:
    return Frame(f"{number:06d}", image)


def _opened(path: Path) -> Any:
    """The container of a video file that has a video stream of a size that is allowed."""
    try:
        import av
    except ImportError as error:
        raise ValueError(f"{quoted(path)} is no image; {_VIDEO_HINT} ({error})") from error
    container = None
    try:
        container = av.open(os.fspath(path))
        if not container.streams.video:
            raise ValueError("it has no video stream")
        check_pixels((container.streams.video[0].width, container.streams.video[0].height))
    except (av.FFmpegError, OSError, ValueError) as error:
        if container is not None:
            container.close()
        raise ValueError(f"{quoted(path)} cannot be read as a video: {said(error)}") from error
    return container


def _of_video(path: Path, start: int) -> Generator[Frame, None, None]:
    container = _opened(path)
    import av

    number, damaged = 0, False
    with container:
        stream = container.streams.video[0]
        packets = container.demux(stream)
        while True:
            packet = None
            try:
                packet = next(packets, None)
                if packet is None:
                    break
                for decoded in packet.decode():
                    check_pixels((decoded.width, decoded.height))
                    number += 1
                    # The frames before are only decoded.
                    if number > start:
                        turned = getattr(decoded, "rotation", 0)
                        yield _numbered(number - 1, decoded.to_image().rotate(turned, expand=True))
            except (av.FFmpegError, OSError, ValueError) as error:
                damaged = True
                number += 1
                if number > start:
                    problem = f"{quoted(path)}, frame {number - 1}, cannot be read: {said(error)}"
                    yield _numbered(number - 1, FrameError(problem))
                # A damaged packet is one frame; a damaged container ends the video.
                if packet is None:
                    break
        # Frames that refer to a damaged one may be missing without an error of their own.
        if damaged and max(number, start) < stream.frames:
            problem = f"{quoted(path)}: {stream.frames - number} of its {stream.frames} frames cannot be read"
            yield _numbered(number, FrameError(problem))
