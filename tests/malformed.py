"""Malformed files by seeded mutation of sound ones, and what must come of them.

Each file is one of a LiFT, a backbone or a training's ``last.pth``, changed in its bytes (flips, cuts, garbage), in its
pickle or header (checksums made right again), or in its content (types, shapes, dtypes, layouts, names, other things).
It must be refused in one line that names it, or load as what an independent reading of it says: nothing else, within
seconds, without a gigabyte of memory. Run as a program for a larger budget than the tests': ``python tests/malformed.py
--count 500``.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import io
import json
import pickle
import random
import re
import resource
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save
from torch import Tensor

from lift_fast import LiFT, load_backbone, load_lift
from lift_fast.cli import main as command_line
from lift_fast.demonstration import BACKBONE, backbone_file
from lift_fast.testing import randomize

# Seconds of the processor: others may keep it busy.
SECONDS, MEGABYTES, LONGEST = 5.0, 1024, 2500
STEPS = 3
TINY = [
    *("--model", "vit_tiny_patch16_224", "--random-weights", "--layer", "0", "--size", "64", "--batch-size", "2"),
    *("--device", "cpu", "--precision", "float32", "--threads", "1", "--no-image", "--workers", "0", "--quiet"),
]
OURS = (ValueError, TypeError, FileNotFoundError)


class Wrong(AssertionError):
    """What a malformed file must not do."""


# Values that stand in the place of others.


def _tensors(draw: random.Random, value: Tensor) -> Tensor:
    """Another tensor made of ``value``."""
    flat = value.detach().reshape(-1)
    shape = list(value.shape)
    number = flat.float() if not flat.is_complex() else flat.real
    makers: list[Callable[[], Tensor]] = [
        lambda: number.to_sparse(),
        lambda: torch.eye(3).to_sparse_csr(),
        lambda: torch.nested.nested_tensor([number[:2], number[:1]]),
        lambda: torch.nested.nested_tensor([number[:2], number[:1]], layout=torch.jagged),
        lambda: torch.quantize_per_tensor(number, 0.1, 0, torch.qint8),
        lambda: value.to("meta"),
        lambda: number.to(torch.float8_e4m3fn).reshape(shape),
        lambda: (number > 0).reshape(shape),
        lambda: (
            number.nan_to_num().clamp(-100, 100).to(draw.choice([torch.int8, torch.int32, torch.int64])).reshape(shape)
        ),
        lambda: torch.complex(number, number).reshape(shape),
        lambda: torch.complex(number, number).reshape(shape).conj(),
        lambda: number.to(draw.choice([torch.float16, torch.bfloat16, torch.float64])).reshape(shape),
        lambda: number.new_ones(1).expand(shape or [4]),
        lambda: number.new_ones(()).expand(draw.choice([10**6, 10**12]), draw.choice([1, 10**3])),
        lambda: torch.arange(20.0).as_strided((10, 10), (1, 1)),
        lambda: torch.zeros(draw.choice([0, 10**9, 10**15]), 0),
        lambda: torch.zeros(()),
        lambda: torch.zeros([1] * draw.choice([5, 60])),
        lambda: number[: draw.randrange(flat.numel() + 1)],
        lambda: value.transpose(0, -1) if value.dim() > 1 else value.flip(0) if value.dim() else value,
        lambda: value.to(memory_format=torch.channels_last) if value.dim() == 4 else value.clone(),
        lambda: number.reshape(shape) * draw.choice([float("nan"), float("inf"), -1.0, 0.0]),
        lambda: (number * draw.choice([1e30, -1e38])).double().reshape(shape) * 1e10,
        lambda: torch.nn.Parameter(number.reshape(shape)),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return draw.choice(makers)()
        except (RuntimeError, ValueError, IndexError):
            return torch.zeros(3)


def _scalars(draw: random.Random) -> Any:
    return draw.choice(
        [
            *(None, True, 0, -1, 3, 10**18, -(10**18), 10**70, 0.5, -1e300, float("nan"), float("inf"), 1j),
            *("", "x" * 5000, "\x1b[31m\n", b"bytes", [], [1, 2], (), {}, {"a": 1}, {1: torch.zeros(2)}, set()),
            *(
                [[[[[[]]]]]],
                torch.zeros(2),
                torch.float32,
                torch.Size([2]),
                bytearray(10),
                collections.OrderedDict(a=1),
            ),
        ]
    )


def _other_things(draw: random.Random, sound: Any) -> Any:
    """A whole content that is something else, or the same in another wrapping."""
    prefix = draw.choice(["module.", "_orig_mod.", "module._orig_mod.", "teacher.backbone.", "x.", "\n"])
    return draw.choice(
        [
            *([], [sound], (sound,), None, 3, "text", torch.zeros(3), {}, {"state_dict": sound}, {"model": sound}),
            *({"teacher": sound, "student": 3}, {"a": {"b": {"c": sound}}}, {5: sound}, torch.nn.Linear(1, 1)),
            {prefix + k: v for k, v in sound.items()},
            {(prefix + k if draw.random() < 0.5 else k): v for k, v in sound.items()},
            {**sound, **{prefix + k: v for k, v in sound.items()}},
            {**sound, **{f"{i}" * draw.choice([1, 300]): torch.zeros(1) for i in range(500)}},
            {**sound, **{f"blocks.{i}.0.x": torch.zeros(1) for i in range(500)}},
            {**sound, **{f"image_convs_1.{i}.running_mean": torch.zeros(1) for i in range(500)}},
            dict(list(sound.items())[: draw.randrange(len(sound))]),
            {**sound, "args": argparse.Namespace(a=1)},
        ]
    )


def _names(draw: random.Random, name: Any) -> Any:
    return draw.choice(
        [
            0,
            None,
            (1, 2),
            2.5,
            True,
            "",
            ".",
            "x" * 9000,
            "a\nb\x1b[0m",
            f"module.{name}",
            f"_orig_mod.{name}",
            f"{name}.",
        ]
    )


def mutate_content(draw: random.Random, sound: dict[Any, Any]) -> Any:
    """Change one to three things anywhere in a copy of ``sound``."""
    if draw.random() < 0.15:
        return _other_things(draw, sound)
    content = copy.copy(sound)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        holder: Any = content
        # Go down into copies, so that the sound content stays as it is.
        while holder:
            keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            key = draw.choice(keys)
            inner = holder[key]
            if isinstance(inner, (dict, list)) and inner and draw.random() < 0.85:
                holder[key] = copy.copy(inner)
                holder = holder[key]
                continue
            change = draw.random()
            if isinstance(inner, Tensor) and change < 0.6:
                holder[key] = _tensors(draw, inner)
            elif change < 0.8:
                holder[key] = _scalars(draw)
            elif change < 0.88 or not isinstance(holder, dict):
                del holder[key]
            elif change < 0.94:
                holder[_names(draw, key)] = holder.pop(key)
            elif change < 0.98:
                other = draw.choice(keys)
                holder[key], holder[other] = holder[other], holder[key]
            else:
                holder[key] = content
            break
    return content


# Bytes.


def mutate_bytes(draw: random.Random, data: bytes) -> bytes:
    """Flip, cut, insert, overwrite; near the ends as often as in the middle."""
    out = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 5])):
        size = max(len(out), 1)
        at = draw.choice(
            [draw.randrange(size), draw.randrange(min(size, 300)), size - 1 - draw.randrange(min(size, 300))]
        )
        kind = draw.randrange(7)
        if kind <= 1:
            out[at : at + 1] = bytes([draw.randrange(256)])
        elif kind == 2:
            out[at : at + 1] = bytes([(out[at] if out else 0) ^ (1 << draw.randrange(8))])
        elif kind == 3:
            del out[at:]
        elif kind == 4:
            out[at:at] = draw.randbytes(draw.choice([1, 8, 300]))
        elif kind == 5:
            length = draw.choice([1, 8, 64, 4096])
            out[at : at + length] = bytes(min(length, len(out) - at))
        else:
            out[at : at + 8] = struct.pack("<Q", draw.choice([0, 2**31, 2**40, 2**63 - 1, 2**64 - 1]))
    return bytes(out)


def mutate_archive(draw: random.Random, data: bytes) -> bytes:
    """Change records inside PyTorch's archive, its checksums made right again."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source:
        records = [(info.filename, source.read(info)) for info in source.infolist()]
    chosen = draw.choice([name for name, _ in records if draw.random() < 0.3 or name.endswith("data.pkl")])
    kind = zipfile.ZIP_DEFLATED if draw.random() < 0.1 else zipfile.ZIP_STORED
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w", kind) as target:
        warnings.simplefilter("ignore")
        for name, content in records:
            if name == chosen:
                change = draw.random()
                if change < 0.1:
                    continue
                if change < 0.15:
                    target.writestr(name, content)
                content = mutate_bytes(draw, content)
            target.writestr(name, content)
    return out.getvalue()


def mutate_header(draw: random.Random, data: bytes) -> bytes:
    """Change the header of a ``.safetensors`` file, its length made right again unless that is the change."""
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    for _ in range(draw.choice([1, 1, 2])):
        name = draw.choice(list(header))
        change = draw.randrange(9)
        if change == 0:
            header[name] = draw.choice([None, 3, [], {}, "x", {"dtype": "F32"}])
        elif change == 1:
            header[name]["dtype"] = draw.choice(
                ["F64", "F16", "BF16", "I64", "BOOL", "F8_E4M3", "F4", "C64", "X", 3, None]
            )
        elif change == 2:
            header[name]["shape"] = draw.choice([[], [-1], [2**40, 2**40], [0, 2**60], ["a"], None, [1.5], [1] * 2000])
        elif change == 3:
            header[name]["data_offsets"] = draw.choice([[0, 0], [5, 3], [0, 2**62], [-4, 0], [0], None, [0, len(rest)]])
        elif change == 4:
            header[draw.choice(["", "x" * 90000, "module." + name, "\n", "__metadata__"])] = header.pop(name)
        elif change == 5:
            del header[name]
        elif change == 6:
            header["__metadata__"] = draw.choice([{"a": "b"}, {"a": 1}, [], 3])
        elif change == 7:
            size = header[name]["data_offsets"][1] - header[name]["data_offsets"][0]
            header[name]["shape"] = [size // 4]
        else:
            text = mutate_bytes(draw, json.dumps(header).encode())
            return struct.pack("<Q", len(text)) + text + rest
        if not all(
            isinstance(entry, dict) and "shape" in entry and "data_offsets" in entry for entry in header.values()
        ):
            break
    text = json.dumps(header).encode()
    claimed = len(text) if draw.random() < 0.9 else draw.choice([0, 7, 2**20, 10**8, 2**63, 2**64 - 1, len(text) + 1])
    return struct.pack("<Q", claimed) + text + rest


def _elsewhere(draw: random.Random) -> bytes:
    """A file of another kind."""
    image, archive = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "png")
    with zipfile.ZipFile(archive, "w") as target:
        target.writestr("a.txt", "text")
    kinds = [
        *(
            b"",
            b"PK\x03\x04",
            b"\x80\x02.",
            b"hello",
            b"\x00" * 1000,
            b"\x93NUMPY",
            image.getvalue(),
            archive.getvalue(),
        ),
        *(pickle.dumps({"outc.weight": np.zeros(3)}), pickle.dumps([1, 2]), pickle.dumps(time.sleep), b"[" * 10000),
        *(b"(" * 100_000 + b".", b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", b"\x80\x02(lp0\nh\x00a."),
        # Long strings and lists that are announced and not there.
        *(
            b"\x80\x04\x8d" + struct.pack("<Q", 2**62),
            b"\x80\x02X\xff\xff\xff\x7f",
            struct.pack("<Q", 99_999_999) + b"{",
        ),
        draw.randbytes(3000),
    ]
    return draw.choice(kinds)


def serialized(content: Any, suffix: str, legacy: bool = False) -> bytes:
    """``content`` as a file; what ``.safetensors`` cannot hold is left out of it."""
    if suffix == ".safetensors":
        plain = {}
        for name, value in content.items() if isinstance(content, dict) else ():
            # An expanded tensor of gigabytes would become a sound file of gigabytes.
            small = isinstance(value, Tensor) and value.numel() < 1 << 24
            if small and value.layout == torch.strided and value.device.type == "cpu":
                with contextlib.suppress(Exception):
                    plain[str(name)] = value.detach().clone().contiguous()
                    save({"a": plain[str(name)]})
                    continue
                plain.pop(str(name), None)
        return save(plain)
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def malformed(draw: random.Random, sound: dict[Any, Any], suffixes: list[str]) -> tuple[str, str, bytes]:
    """How it was made, suffix, bytes."""
    suffix, way = draw.choice(suffixes), draw.random()
    legacy = suffix == ".pth" and draw.random() < 0.2
    if way < 0.03:
        return "elsewhere", suffix, _elsewhere(draw)
    if way < 0.55:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(20):
                with contextlib.suppress(Exception):
                    return "content", suffix, serialized(mutate_content(draw, sound), suffix, legacy)
    data = serialized(sound, suffix, legacy)
    if way < 0.75 or legacy:
        return "bytes", suffix, mutate_bytes(draw, data)
    if suffix == ".safetensors":
        return "header", suffix, mutate_header(draw, data)
    return "archive", suffix, mutate_archive(draw, data)


# What must come of them.


def _read_anyhow(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def flat(path: Path) -> dict[str, Tensor]:
    """An independent reading: every tensor of the file under its name without wrappers, inner dictionaries included."""
    with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        content = _read_anyhow(path)
    found: dict[str, Tensor] = {}

    def collect(mapping: Any, depth: int) -> None:
        for name, value in mapping.items():
            if isinstance(value, Tensor):
                short = re.sub(r"(?:^|(?<=\.))_orig_mod\.", "", str(name))
                short = re.sub(r"^(?:module\.|teacher\.|student\.|backbone\.|x\.|\n)+", "", short)
                found.setdefault(re.sub(r"blocks\.\d+\.(\d+)\.", r"blocks.\1.", short), value)
            elif isinstance(value, dict) and depth:
                collect(value, depth - 1)

    collect(content, 2)
    return found


def same_values(loaded: dict[str, Tensor], path: Path) -> None:
    """Raise unless each loaded tensor is the file's, in float32, and finite."""
    wanted = flat(path)
    for name, value in loaded.items():
        if name.endswith("num_batches_tracked"):
            continue
        if name not in wanted or not torch.equal(value, wanted[name].detach().to(value.dtype)):
            raise Wrong(f"{name} is not what the file holds")
        if not bool(torch.isfinite(value).all()):
            raise Wrong(f"{name} is not finite")


def try_lift(path: Path) -> None:
    same_values(dict(load_lift(path, patch_size=16).state_dict()), path)


def try_backbone(path: Path) -> None:
    same_values(dict(load_backbone(BACKBONE, weights=path).model.state_dict()), path)


class Kind:
    """One kind of file: a sound content, a loader that checks, a command that reads it."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.image = folder / "image.png"
        Image.new("RGB", (32, 32), (90, 10, 200)).save(self.image)
        self.suffixes = [".pth"] if name == "last" else [".pth", ".safetensors"]
        self.sound: dict[Any, Any]
        if name == "lift":
            self.sound = dict(randomize(LiFT(192, 16, image_channels=8), seed=0).state_dict())
        elif name == "backbone":
            self.sound = load_file(backbone_file())
        else:
            images = folder / "images"
            images.mkdir()
            for number in range(4):
                Image.new("RGB", (64, 64), (60 * number, 99, 7)).save(images / f"{number}.png")
            self.train = ["train", str(images), *TINY]
            out = folder / "sound"
            if command_line([*self.train, "--out", str(out), "--max-steps", str(STEPS)]):
                raise Wrong("the sound training failed")
            self.sound = torch.load(out / "last.pth", weights_only=True)

    def command(self, path: Path) -> list[str]:
        if self.name == "last":
            return [*self.train, "--out", str(path.parent), "--resume", "--max-steps", str(STEPS)]
        read = ["--lift", str(path)] if self.name == "lift" else ["--weights", str(path), "--no-lift"]
        common = ("--size", "32", "--device", "cpu", "--quiet", "--threads", "1")
        return ["extract", str(self.image), "--out", str(path.parent / "out"), *read, *common]

    def check(self, path: Path) -> str:
        """``"refused"`` or ``"loaded"``.

        Raises:
            Wrong: for anything else.
        """
        began = time.process_time()
        outcome = "loaded"
        if self.name != "last":
            try:
                {"lift": try_lift, "backbone": try_backbone}[self.name](path)
            except OURS as error:
                outcome = "refused"
                _check_message(str(error), path)
        status, said = run_command(self.command(path))
        if status not in (0, 2):
            raise Wrong(f"status {status}: {said[-500:]}")
        if self.name == "last":
            outcome = "loaded" if status == 0 else "refused"
            if status == 0:
                self.check_resumed(path)
        if (status == 0) != (outcome == "loaded"):
            raise Wrong(f"{outcome}, but status {status}: {said}")
        if status == 2:
            _check_message(said.rstrip("\n"), path)
        elif said:
            raise Wrong(f"said {said[:300]!r}")
        seconds = time.process_time() - began
        if seconds > SECONDS:
            raise Wrong(f"took {seconds:.1f} s")
        return outcome

    def check_resumed(self, path: Path) -> None:
        """Go on for a step: what was accepted must be of use."""
        more = self.command(path)
        more[-1] = str(STEPS + 1)
        status, said = run_command(more)
        if status:
            raise Wrong(f"accepted, but cannot go on: {said[-500:]}")


def run_command(arguments: list[str]) -> tuple[int, str]:
    """Exit status and what went to standard error; an exception is what a traceback would show."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            status = command_line(arguments)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            raise Wrong(f"traceback: {''.join(traceback.format_exception(error))[-3000:]}") from error
    return status, said.getvalue()


def _check_message(text: str, path: Path) -> None:
    if str(path) not in text and str(path.parent) not in text:
        raise Wrong(f"does not name the file: {text[:300]!r}")
    if not text.isprintable() or len(text) > LONGEST:
        raise Wrong(f"{len(text)} characters, {text.count(chr(10))} line ends: {text[:300]!r}")
    if "weights_only" in text:
        raise Wrong(f"repeats PyTorch's advice: {text[:300]!r}")


def run(kind: Kind, first: int, count: int) -> dict[str, int]:
    """Check ``count`` malformed files of seeds from ``first`` on; how many of each outcome.

    Raises:
        Wrong: for the first that does what it must not; says its seed.
    """
    outcomes: dict[str, int] = collections.Counter()
    for seed in range(first, first + count):
        draw = random.Random(f"{kind.name} {seed}")
        way, suffix, data = malformed(draw, kind.sound, kind.suffixes)
        with tempfile.TemporaryDirectory(dir=kind.folder) as folder:
            path = Path(folder) / ("last.pth" if kind.name == "last" else f"file{suffix}")
            path.write_bytes(data)
            try:
                outcome = kind.check(path)
            except Exception as error:
                kept = kind.folder / f"wrong-{seed}{suffix}"
                kept.write_bytes(data)
                raise Wrong(f"{kind.name} {seed} ({way}): {type(error).__name__}: {error}") from error
        outcomes[f"{way} {outcome}"] += 1
    return outcomes


def peak_megabytes() -> float:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", default=["lift", "backbone", "last"])
    parser.add_argument("--folder", type=Path, help="keep files that do wrong here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    failed = 0
    for name in arguments.kinds:
        with tempfile.TemporaryDirectory() as temporary:
            folder = temporary if arguments.folder is None else arguments.folder / name
            Path(folder).mkdir(parents=True, exist_ok=True)
            kind = Kind(name, Path(folder))
            path = kind.folder / "sound" / "last.pth" if name == "last" else kind.folder / "sound.pth"
            if name != "last":
                path.write_bytes(serialized(kind.sound, ".pth"))
            kind.check(path)
            before, began = peak_megabytes(), time.process_time()
            outcomes: dict[str, int] = collections.Counter()
            slowest = 0.0
            for seed in range(arguments.first, arguments.first + arguments.count):
                start = time.process_time()
                try:
                    outcomes.update(run(kind, seed, 1))
                except Wrong as error:
                    failed += 1
                    print(f"WRONG {error}", flush=True)
                slowest = max(slowest, time.process_time() - start)
            print(
                f"{name}: {arguments.count} files in {time.process_time() - began:.0f} s, the slowest {slowest:.1f} s, "
                f"{peak_megabytes() - before:.0f} MB above the sound run; {dict(sorted(outcomes.items()))}",
                flush=True,
            )
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
