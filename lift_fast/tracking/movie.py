"""A film from images: MP4 with PyAV, animated WebP and GIF with Pillow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

from PIL import Image

from lift_fast._files import atomic_path
from lift_fast._text import quoted

from .frames import VIDEO_EXTRA

# Pillow keeps all frames of a GIF or WebP in memory: 200 MB, and a size for web pages.
_MOST_PIXELS, _LONGEST, _SHORTEST = 1 << 26, 640, 64


def write_movie(path: Path, images: Sequence[Path], rate: float) -> None:
    """Join images of one size, read one after the other, to a film of ``rate`` frames per second.

    The suffix decides: ``.mp4`` (H.264, sides cut to even numbers), ``.webp`` or ``.gif``, which become smaller: at
    most 640 pixels along a side, less for long films.

    Raises:
        ValueError: for another suffix, ``.mp4`` without PyAV, no images, or too many for a WebP or GIF.
        OSError: if it cannot be written.
    """
    suffix = path.suffix.lower()
    if not images:
        raise ValueError("a film needs at least one image")
    with Image.open(images[0]) as first:
        size = first.size
    if suffix == ".mp4":
        _write_mp4(path, images, size, rate)
        return
    if suffix not in (".webp", ".gif"):
        raise ValueError(f"{quoted(path)} must end in .mp4, .webp or .gif")
    scale = min(1.0, _LONGEST / max(size), (_MOST_PIXELS / len(images) / (size[0] * size[1])) ** 0.5)
    small = max(1, int(size[0] * scale)), max(1, int(size[1] * scale))
    if scale < 1 and max(small) < _SHORTEST:
        raise ValueError(f"{len(images)} frames are too many for {suffix}; give a film that ends in .mp4")
    frames = [image.resize(small, Image.Resampling.BOX) for image in _read(images)]
    with atomic_path(path) as temporary:
        frames[0].save(
            temporary,
            format=suffix[1:].upper(),
            save_all=True,
            append_images=frames[1:],
            duration=max(1, round(1000 / rate)),
            loop=0,
        )


def _read(images: Sequence[Path]) -> Iterator[Image.Image]:
    for path in images:
        with Image.open(path) as image:
            yield image.convert("RGB")


def _write_mp4(path: Path, images: Sequence[Path], size: tuple[int, int], rate: float) -> None:
    try:
        import av
    except ImportError as error:
        raise ValueError(f"{quoted(path)} needs PyAV ({error}): {VIDEO_EXTRA}; or give a .webp or .gif") from error
    # H.264 in the form that every player reads halves both sides for colour.
    width, height = (max(2, side // 2 * 2) for side in size)
    try:
        with atomic_path(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=Fraction(rate).limit_denominator(1001))
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for image in _read(images):
                frame = av.VideoFrame.from_image(image.crop((0, 0, width, height)))
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    except av.FFmpegError as error:
        raise ValueError(f"{quoted(path)} cannot be written: {error}") from error
