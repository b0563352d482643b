"""Malformed images by the hundred: valid files, changed at random, with what each must come to.

``python tests/malformed_images.py 500`` reads, matches and extracts so many and prints the figures.
"""

from __future__ import annotations

import contextlib
import io
import random
import resource
import struct
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from lift_fast.cli import main
from lift_fast.images import as_image, read_image

# Of the processor, since others may be using it too; and on the clock, for what waits.
SECONDS, WAITED = 5.0, 60.0
KINDS = (
    *("png", "png16", "rgba", "palette", "jpg", "jpg exif", "cmyk", "webp", "tif", "tif lzw", "gif", "bmp"),
    "animation",
)
NETWORK = ["--model", "vit_tiny_patch16_224", "--random-weights", "--no-lift", "--quiet"]
# Both sides: a strip that is sound otherwise keeps the network busy for as long as it is.
SQUARE = [*NETWORK, "--size", "32x32"]


def photograph(random: random.Random, mode: str = "RGB") -> Image.Image:
    """Smooth enough to compress, different at each call."""
    width, height = random.randint(20, 90), random.randint(20, 90)
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [np.sin(rows / random.uniform(3, 20) + columns / random.uniform(3, 20)) * 120 + 127 for _ in range(4)]
    rgba = Image.fromarray(np.stack(waves, -1).astype(np.uint8), "RGBA")
    if mode == "I;16":
        return Image.fromarray((waves[0] * 257).astype(np.uint16))
    return rgba.convert(mode)


def encoded(random: random.Random) -> tuple[str, bytes]:
    """A valid file: suffix and bytes."""
    out = io.BytesIO()
    kind = random.choice(KINDS)
    if kind == "png16":
        photograph(random, "I;16").save(out, "PNG")
    elif kind in ("rgba", "palette"):
        photograph(random, {"rgba": "RGBA", "palette": "P"}[kind]).save(out, "PNG")
    elif kind == "jpg exif":
        exif = Image.Exif()
        exif[0x0112] = random.choice([1, 2, 3, 4, 5, 6, 7, 8, 0, 9, 65535])
        exif[0x010E] = "nonsense" * random.randint(0, 20)
        photograph(random).save(out, "JPEG", exif=exif)
    elif kind == "cmyk":
        photograph(random, "RGB").convert("CMYK").save(out, "JPEG")
    elif kind == "animation":
        frames = [photograph(random).resize((40, 40)) for _ in range(3)]
        how = random.choice(["GIF", "WEBP", "PNG", "TIFF"])
        frames[0].save(out, how, save_all=True, append_images=frames[1:])
        return {"GIF": ".gif", "WEBP": ".webp", "PNG": ".png", "TIFF": ".tif"}[how], out.getvalue()
    elif kind.startswith("tif"):
        photograph(random).save(out, "TIFF", compression="tiff_lzw" if "lzw" in kind else None)
    else:
        photograph(random).save(out, {"png": "PNG", "jpg": "JPEG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP"}[kind])
    suffix = {"png16": "png", "rgba": "png", "palette": "png", "jpg exif": "jpg", "tif lzw": "tif", "cmyk": "jpg"}
    return "." + suffix.get(kind, kind), out.getvalue()


def cut(random: random.Random, content: bytes) -> bytes:
    return content[: random.randint(0, len(content) - 1)]


def flip(random: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    # Headers, where a byte matters most, as often as the rest.
    reach = random.choice([64, len(changed)])
    for _ in range(random.randint(1, 20)):
        changed[random.randrange(min(reach, len(changed)))] = random.randrange(256)
    return bytes(changed)


def splice(random: random.Random, content: bytes) -> bytes:
    start, end = sorted(random.randrange(len(content)) for _ in range(2))
    piece = content[start:end]
    return random.choice([content[:start] + content[end:], content[:end] + piece * 3 + content[end:], content + piece])


def declare(random: random.Random, content: bytes) -> bytes:
    """Another size in the header, with the checksum that belongs to it."""
    size = random.choice([0, 1, 2, 255, 30000, 65500, 100_000, 1 << 24, (1 << 31) - 1, (1 << 32) - 1])
    other = random.choice([1, 20, 3000, size])
    changed = bytearray(content)
    if content.startswith(b"\x89PNG"):
        changed[16:24] = struct.pack(">II", size, other)
        changed[29:33] = struct.pack(">I", zlib.crc32(bytes(changed[12:29])))
    elif content.startswith(b"GIF"):
        changed[6:10] = struct.pack("<HH", size & 0xFFFF, other & 0xFFFF)
    elif content.startswith(b"BM"):
        changed[18:26] = struct.pack("<II", size, other)
    elif content.startswith(b"\xff\xd8"):
        at = next((n for n in range(2, len(content) - 9) if content[n] == 0xFF and content[n + 1] in (0xC0, 0xC2)), 2)
        changed[at + 5 : at + 9] = struct.pack(">HH", size & 0xFFFF, other & 0xFFFF)
    elif content[:2] == b"II":
        at = struct.unpack("<I", content[4:8])[0]
        for n in range(struct.unpack("<H", content[at : at + 2])[0]):
            entry = at + 2 + 12 * n
            if struct.unpack("<H", content[entry : entry + 2])[0] == random.choice([256, 257, 258, 259, 277, 278]):
                changed[entry + 8 : entry + 12] = struct.pack("<I", size)
    elif content.startswith(b"RIFF"):
        changed[24:30] = struct.pack("<I", size)[:3] + struct.pack("<I", other)[:3]
    return bytes(changed)


def metadata(random: random.Random, content: bytes) -> bytes:
    """EXIF and text that say nothing sensible, around sound pixels."""
    out = io.BytesIO()
    junk = bytes(random.randrange(256) for _ in range(random.randint(0, 300)))
    exif = random.choice([junk, b"Exif\0\0" + junk, b"Exif\0\0II*\0\x08\0\0\0" + junk, b"II*\0\xff\xff\xff\xff" + junk])
    text = PngImagePlugin.PngInfo()
    text.add(b"eXIf", exif)
    text.add_text("comment", "x" * random.choice([0, 10, 100_000]), zip=True)
    photo = photograph(random)
    if random.random() < 0.5:
        photo.save(out, "PNG", pnginfo=text)
    else:
        photo.save(out, "JPEG", exif=exif)
    return out.getvalue()


def bomb(random: random.Random, content: bytes) -> bytes:
    """A small file that is a large image indeed, below and above what is allowed."""
    side = random.choice([9000, 11_000, 12_000, 20_000])
    colour, channels = random.choice([(0, 1), (2, 3), (6, 4), (4, 2)])
    row = zlib.compressobj(1)
    data = b"".join(row.compress(bytes(1 + side * channels)) for _ in range(side)) + row.flush()

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", side, side, 8, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def noise(random: random.Random, content: bytes) -> bytes:
    return content[: random.choice([0, 2, 8, 12])] + bytes(random.randrange(256) for _ in range(random.randint(0, 500)))


MUTATIONS: list[Callable[[random.Random, bytes], bytes]] = [cut, flip, flip, splice, declare, declare, metadata, noise]


def malformed(seed: int) -> tuple[str, bytes]:
    """File name and bytes of one; every 25th is a bomb, whatever its name says."""
    source = random.Random(seed)
    suffix, content = encoded(source)
    mutate = bomb if seed % 25 == 24 else source.choice(MUTATIONS)
    changed = mutate(source, content)
    if source.random() < 0.1:
        suffix = source.choice([".png", ".jpg", ".tif", ".gif", ".bmp", ".webp"])
    return f"{seed:05} {mutate.__name__}{suffix}", changed


def expected(path: Path) -> np.ndarray | None:
    """RGB in float64, from Pillow's own values, by another way than the package's; None where Pillow gives none."""
    try:
        with Image.open(path) as image:
            image.load()
            turn = image.getexif().get(0x0112)
            if "transparency" in image.info or image.mode in ("LA", "PA", "La", "RGBa"):
                pixels = np.asarray(image.convert("RGBA"), dtype=np.float64)
            elif image.mode.startswith("I") or image.mode == "F":
                pixels = np.asarray(image, dtype=np.float64) * (255 if image.mode == "F" else 1 / 257)
            else:
                pixels = np.asarray(image if image.mode in ("RGB", "RGBA") else image.convert("RGB"), dtype=np.float64)
    except Exception:
        return None
    if pixels.ndim == 3 and pixels.shape[2] == 4:
        alpha = pixels[..., 3:] / 255
        pixels = pixels[..., :3] * alpha + 255 * (1 - alpha)
    pixels = np.repeat(pixels[..., None], 3, 2) if pixels.ndim == 2 else pixels
    swapped = pixels.swapaxes(0, 1)
    return {
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: swapped,
        6: swapped[:, ::-1],
        7: swapped[::-1, ::-1],
        8: swapped[::-1],
    }.get(turn, pixels)


def one_line(text: str, path: Path) -> bool:
    lines = text.strip().split("\n")
    return len(lines) == 1 and path.name in lines[0] and lines[0].isprintable() and "Traceback" not in text


def read(path: Path) -> str:
    """How :func:`read_image` took it: "read" or "refused".

    Raises:
        AssertionError: if it took it otherwise than it should.
    """
    image, said = None, ""
    with in_time(path.name):
        try:
            image = read_image(path)
        except (ValueError, OSError) as error:
            said = str(error)
    # A large one once, and as one of the two others.
    same_in_memory(path, image, twice=path.stat().st_size < 1 << 20)
    if image is None:
        assert one_line(said, path), f"{path.name}: {said}"
        return "refused"
    assert image.mode == "RGB", f"{path.name}: {image.mode}"
    # A large one is compared where it is small enough to be held in float64.
    if image.width * image.height < 1 << 20:
        wanted = expected(path)
        assert wanted is not None, f"{path.name}: read, but not by Pillow"
        found = np.asarray(image, dtype=np.float64)
        assert found.shape == wanted.shape, f"{path.name}: {found.shape} for {wanted.shape}"
        assert np.abs(found - wanted).max() <= 1.01, f"{path.name}: pixels differ"
    return "read"


def same_in_memory(path: Path, image: Image.Image | None, twice: bool) -> None:
    """The same from the file's bytes and from a file object, with its name in the message instead of a path."""
    content = path.read_bytes()
    for source in (content, io.BytesIO(content))[: 1 + twice]:
        found, said = None, ""
        with in_time(path.name):
            try:
                found = as_image(source, "photo")
            except ValueError as error:
                said = str(error)
        assert (found is None) == (image is None), f"{path.name}: {said}"
        if image is None or found is None:
            assert said.startswith("photo "), f"{path.name}: {said}"
            assert said.isprintable(), path.name
        else:
            assert found.size == image.size, path.name
            assert found.tobytes() == image.tobytes(), path.name


@contextlib.contextmanager
def in_time(what: str) -> Iterator[None]:
    used, begun = time.process_time(), time.perf_counter()
    yield
    used, begun = time.process_time() - used, time.perf_counter() - begun
    assert max(used / SECONDS, begun / WAITED) < 1, f"{what} took {used:.1f} s of the processor, {begun:.1f} s in all"


def command(*arguments: object) -> tuple[int, str]:
    """Exit status, and what was said on stderr."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        status = main([str(argument) for argument in arguments])
    return status, said.getvalue()


def check(folder: Path, seeds: range, match: bool = True) -> Counter[str]:
    """Read, match and extract the malformed images of ``seeds``, written to the new folder ``folder``.

    Raises:
        AssertionError: at the first that is taken otherwise than it should.
    """
    results: Counter[str] = Counter()
    inputs = folder / "images"
    inputs.mkdir(parents=True)
    sound = folder / "sound.png"
    photograph(random.Random(0)).save(sound)
    for seed in seeds:
        name, content = malformed(seed)
        path = inputs / name
        path.write_bytes(content)
        result = read(path)
        results[result] += 1
        if match:
            with in_time(name):
                status, said = command("match", path, sound, "--out", folder / "m.png", "--step", "8", *SQUARE)
            if result == "read":
                assert (status, said) == (0, ""), f"{name}: {status} {said}"
            else:
                assert status == 2, f"{name}: {status}"
                assert one_line(said, path), f"{name}: {said}"
            results["matched"] += status == 0
    status, said = command("extract", inputs, "--out", folder / "features", *NETWORK, "--size", "32")
    written, skipped = len(list((folder / "features").iterdir())), said.splitlines()
    assert status == (1 if skipped else 0)
    assert all(line.startswith("skipped: ") and line.isprintable() for line in skipped), said
    assert written + len(skipped) == len(seeds), f"{written} written, {len(skipped)} skipped of {len(seeds)}"
    results["extracted"] += written
    return results


if __name__ == "__main__":
    count = int(sys.argv[1])
    first = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    with tempfile.TemporaryDirectory() as place:
        sound = Path(place, "clean.png")
        photograph(random.Random(1)).save(sound)
        assert command("match", sound, sound, "--out", Path(place, "m.png"), *SQUARE)[0] == 0
        clean = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        begun = time.perf_counter()
        print(dict(check(Path(place, "run"), range(first, first + count))))
        more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - clean) / 1024
        print(f"{count} files in {time.perf_counter() - begun:.0f} s, {more:.0f} MiB above the clean run")
