"""Every figure of the way from two images to matches, paired with others, in about four minutes.

python -m bench.paired                                # on a quiet machine
python -m bench.paired --before ../before             # and with another checkout of this package, built
python -m bench.paired --only keys --rounds 20
LIFT_FAST_XFEAT=../accelerated_features python -m bench.paired --only xfeat

Ours and the other run in turn; a ratio is the median of the pairs', in brackets its quartiles. Nothing is timed whose
results disagree. ViT-S/16 with the features of the demonstration pair (bench/wide.py), two threads.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import lift_fast
from lift_fast import load_backbone
from lift_fast.precision import cpu_computes
from lift_fast.testing import relative_error

from . import folder, keys, pair, wide
from .alternate import Paired, alternate, peak_memory

PARTS = ("keys", "pair", "large", "memory", "extract", "export", "xfeat")
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16")}
LIMITS = {"float32": 1e-4, "bfloat16": 2e-2}
SIZE, LARGE = 448, 896
_ROOT = Path(__file__).resolve().parents[1]


def _engine(name: str) -> dict[str, str]:
    """The option; checkouts from before there were engines have none."""
    return {"engine": name} if "engine" in inspect.signature(load_backbone).parameters else {}


@cache
def _imgs(name: str) -> Tensor:
    return torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)).to(DTYPES[name])


@cache
def _images(size: int) -> tuple[Any, Any]:
    return pair.photographs(size)


@cache
def _extractor(name: str) -> Any:
    return wide.vit_s(DTYPES[name])


@cache
def _backbone(engine: str, name: str) -> Any:
    return load_backbone("dino_vits16", random_weights=True, **_engine(engine)).to(DTYPES[name])


@cache
def own(what: str, name: str) -> Callable[[], Any]:
    """A call of this package, by name and dtype."""
    if what == "pair":
        return partial(pair.ours(_extractor(name)), *_images(SIZE))
    if what == "pair, large":
        return partial(pair.ours(_extractor(name)), *_images(LARGE))
    return torch.inference_mode()(partial(_backbone(what.removeprefix("keys, "), name), _imgs(name)))


class Before:
    """The same calls in a process that imports another checkout of this package."""

    def __init__(self, checkout: Path, threads: int) -> None:
        # The other package first, then these programs.
        code = (
            f"import sys; sys.path.insert(0, {str(checkout.resolve())!r}); import lift_fast; "
            f"sys.path.insert(0, {str(_ROOT)!r}); from bench import paired; paired.serve({threads})"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=checkout, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        print(f"before: {self._ask('')}")

    def call(self, what: str, name: str) -> None:
        self._ask(f"{what}|{name}")

    def _ask(self, line: str) -> str:
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline().strip()
        if not answer:
            raise SystemExit("the process of the other checkout has ended; its error is above")
        return answer

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def serve(threads: int) -> None:
    """Run calls by the names on standard input."""
    torch.set_num_threads(threads)
    for line in sys.stdin:
        if line.strip():
            own(*line.strip().split("|"))()
            print("done", flush=True)
        else:
            print(lift_fast.__file__, flush=True)


class Table:
    """Prints a line for each comparison."""

    def __init__(self, rounds: int, before: Before | None) -> None:
        self.rounds, self.before = rounds, before

    def compare(self, what: str, ours: Callable[[], Any], others: dict[str, Any], error: float, limit: float) -> Paired:
        """Time ours with each of ``others``; the last one's seconds."""
        if not error <= limit:
            raise SystemExit(f"{what}: results differ by {error:.2e}, more than {limit:.0e}: no figure is printed")
        for name, other in others.items():
            ours(), other()
            found = alternate(ours, other, "cpu", self.rounds)
            low, high = found.quartiles
            print(
                f"{what:52}{_ms(found.ours):>10} | {name:36}{_ms(found.plain):>10} | {found.speedup:5.2f}x "
                f"({low:.2f} to {high:.2f}) | error {error:.0e}",
                flush=True,
            )
        return found


def _ms(times: list[float]) -> str:
    return f"{1e3 * statistics.median(times):.1f} ms"


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _dtypes() -> Iterator[str]:
    for name, dtype in DTYPES.items():
        if cpu_computes(dtype):
            yield name


def _keys(table: Table) -> None:
    for name in _dtypes():
        network = keys.Keys(load_backbone("dino_vits16", random_weights=True).model, (SIZE, SIZE))
        imgs = _imgs(name)
        builders = {"plain PyTorch": keys.plain}
        if _installed("openvino"):
            builders["OpenVINO"] = keys.openvino
        if _installed("onnxruntime") and name == "float32":
            builders["ONNX Runtime"] = keys.onnxruntime
        engines = {other: build(network, imgs) for other, build in builders.items()}
        # Built before: weights made in inference mode have no version, and are compared as a whole at each call.
        for engine in ("auto", "torch"):
            _backbone(engine, name)
        with torch.inference_mode():
            expected = engines["plain PyTorch"](imgs).float()
            error = max(relative_error(engine(imgs).float(), expected) for engine in engines.values())
            for engine in ("auto", "torch"):
                ours = own(f"keys, {engine}", name)
                ours()
                used = getattr(_backbone(engine, name), "engine_used", "torch")
                if engine == "torch" and getattr(_backbone("auto", name), "engine_used", "torch") == "torch":
                    continue
                wrong = max(error, relative_error(ours().float(), expected))
                others: dict[str, Any] = {other: partial(run, imgs) for other, run in engines.items()}
                if table.before is not None:
                    others["before"] = partial(table.before.call, "keys, torch", name)
                table.compare(f"keys of ViT-S/16, {SIZE}, {name}, {engine} ({used})", ours, others, wrong, LIMITS[name])


def _pairs(table: Table) -> None:
    for name in _dtypes():
        _pair(table, "pair", SIZE, name)


def _large(table: Table) -> None:
    *_, name = _dtypes()
    _pair(table, "pair, large", LARGE, name)


def _pair(table: Table, what: str, size: int, name: str) -> None:
    ours, images = own(what, name), _images(size)
    engines = [engine for engine in pair.ENGINES if engine == "plain PyTorch" or _installed("openvino")]
    if size == LARGE:
        engines = engines[:1]
    laps: dict[str, list[dict[str, float]]] = {}

    def staged(label: str, run: Callable[[], Any]) -> Callable[[], Any]:
        def call() -> Any:
            found = run()
            laps.setdefault(label, []).append(found.seconds)
            return found

        return call

    usual = {
        f"{engine} + parts, {pair.POINTS} x {pair.POINTS}": pair.UsualParts(_extractor(name), engine, size)
        for engine in engines
    }
    matches = ours()
    error = max(pair.disagreement(matches, run(*images)) for run in usual.values())
    others: dict[str, Any] = {label: staged(label, partial(run, *images)) for label, run in usual.items()}
    if table.before is not None:
        others["before"] = partial(table.before.call, what, name)
    table.compare(f"pair to matches, {size}, {name}", staged("lift_fast", ours), others, error, LIMITS[name])
    for label, found in laps.items():
        stages = (f"{stage} {_ms([seconds[stage] for seconds in found])}" for stage in pair.STAGES)
        print(f"    {label:40}{', '.join(stages)}", flush=True)


def _memory(table: Table) -> None:
    for name in _dtypes():
        extractor, call = _extractor(name), own("pair, large", name)
        call()
        added = peak_memory(call, "cpu")
        weights = sum(value.nbytes for value in extractor.state_dict().values()) / 2**20
        if added is not None:
            print(
                f"peak memory of a pair, {LARGE}, {name}: {weights + added:.0f} MiB, of which weights {weights:.0f} "
                f"(1.5 times the weights and 1 GiB are {1.5 * weights + 1024:.0f})",
                flush=True,
            )


def _extract(table: Table) -> None:
    count = 8
    with tempfile.TemporaryDirectory() as place:
        here = Path(place)
        paths = folder.photographs(here / "in", count)
        for name in _dtypes():
            ours = partial(folder.by_command, here / "in", here / "ours", _extractor(name), SIZE)
            plain = partial(folder.by_loop, paths, here / "plain", _extractor(name), SIZE)
            ours(), plain()
            error = folder.difference(here / "ours", here / "plain")
            what = f"extract, {count} JPEG files of 2048 x 1536, {name}"
            found = table.compare(what, ours, {"plain loop": plain}, error, LIMITS[name])
            rates = (count / statistics.median(times) for times in found)
            print("    images per second: {:.2f}, plain loop {:.2f}".format(*rates), flush=True)


def _export(table: Table) -> None:
    if not (hasattr(lift_fast, "export_onnx") and _installed("onnxruntime")):
        print("export: needs export_onnx and ONNX Runtime")
        return
    import onnxruntime

    extractor, imgs = _extractor("float32"), _imgs("float32")
    with tempfile.TemporaryDirectory() as place, torch.inference_mode():
        path = Path(place) / "extractor.onnx"
        lift_fast.export_onnx(extractor, path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        given = {session.get_inputs()[0].name: imgs.numpy()}
        other = lambda: torch.from_numpy(session.run(None, given)[0])  # noqa: E731
        ours = partial(extractor, imgs)
        expected = ours()
        error = relative_error(other().reshape(expected.shape), expected)
        table.compare(f"backbone and LiFT, {SIZE}, float32", ours, {"its ONNX in ONNX Runtime": other}, error, 1e-4)


def _xfeat(table: Table) -> None:
    """XFeat's semi-dense matcher: another network and fewer matches, so times only stand beside each other."""
    given = os.environ.get("LIFT_FAST_XFEAT")
    if not given:
        print("xfeat: set LIFT_FAST_XFEAT to a checkout of verlab/accelerated_features")
        return
    with _importing(Path(given)):
        from modules.xfeat import XFeat  # type: ignore[import-not-found]
    weights = Path(given) / "weights/xfeat.pt"
    network = XFeat(str(weights) if weights.is_file() else None)
    note = "" if weights.is_file() else ", random weights: only its time means something"
    tensors = [torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] for image in _images(SIZE)]
    times, count = [], 0
    for turn in range(table.rounds + 1):
        start = time.perf_counter()
        count = len(network.match_xfeat_star(*tensors)[0])
        times += [time.perf_counter() - start] if turn else []
    print(f"XFeat, semi-dense, {SIZE}: {_ms(times)}, {count} matches{note}", flush=True)


@contextmanager
def _importing(place: Path) -> Iterator[None]:
    sys.path.insert(0, str(place.resolve()))
    try:
        yield
    finally:
        sys.path.remove(str(place.resolve()))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.paired", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts (all)")
    parser.add_argument("--rounds", type=int, default=7, help="of each comparison, at least 3 (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of every engine (%(default)s)")
    parser.add_argument("--before", type=Path, metavar="DIR", help="another checkout of this package, built in place")
    arguments = parser.parse_args()
    if arguments.rounds < 3:
        parser.error("quartiles need three rounds")
    torch.set_num_threads(arguments.threads)
    before = Before(arguments.before, arguments.threads) if arguments.before is not None else None
    table = Table(arguments.rounds, before)
    functions = (_keys, _pairs, _large, _memory, _extract, _export, _xfeat)
    start = time.perf_counter()
    for part, function in zip(PARTS, functions, strict=True):
        if part in arguments.only:
            function(table)
    print(f"{time.perf_counter() - start:.0f} s, {arguments.threads} threads, PyTorch {torch.__version__}")
    if before is not None:
        before.close()


if __name__ == "__main__":
    main()
