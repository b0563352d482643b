"""``lift-fast match --pairs``: many pairs with one set of networks, each with files of its own, resumable."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from lift_fast._files import make_folder, require_regular_file
from lift_fast._text import one_line, quoted

from . import match_pair
from .errors import UsageError, as_usage_error
from .kept import FEATURES, check_kept, marks, settings_of
from .options import build_extractor, remarks

_SETTINGS = (*FEATURES, "step", "mutual", "normalize")
# Two of the longest paths that Linux opens.
_LONGEST_LINE = 2 * 4096
# File systems take 255 bytes, of which an ending and a temporary name need some.
_LONGEST_STEM = 180
_AWKWARD = str.maketrans(dict.fromkeys('<>:"|?*', "_") | {"/": "-", "\\": "-"})


class Pair(NamedTuple):
    """One line of the list."""

    line: int
    a: str
    b: str


def run_list(arguments: argparse.Namespace) -> int:
    """Match the pairs of the list; return the exit status."""
    from tqdm import tqdm

    out = Path("matches") if arguments.out is None else arguments.out
    root = arguments.pairs.parent if arguments.root is None else arguments.root
    ending = None if arguments.sheets == "none" else f".{arguments.sheets or 'png'}"
    with as_usage_error():
        pairs, failed = read_pairs(arguments.pairs)
        if not root.is_dir():
            raise UsageError(f"--root {quoted(root)} is not a folder; give the one that holds the images of the list")
        make_folder(out)
    stems = name_results(pairs)
    settings = settings_of(arguments, _SETTINGS)
    inputs = {os.path.realpath(root / name) for pair in pairs for name in (pair.a, pair.b)}
    inputs |= {os.path.realpath(path) for path in (arguments.pairs, arguments.weights, arguments.lift) if path}
    waiting: list[tuple[Pair, Path, Path | None]] = []
    for pair, stem in zip(pairs, stems, strict=True):
        numbers, sheet = out / f"{stem}.npz", None if ending is None else out / f"{stem}{ending}"
        for path in (numbers, sheet):
            if path is not None and path.exists() and os.path.realpath(path) in inputs:
                raise UsageError(f"--out: {quoted(path)} is an input, which would be overwritten; give another folder")
        if not arguments.overwrite and numbers.is_file():
            check_kept(numbers, settings, [root / pair.a, root / pair.b], "match --pairs", "matches")
            if sheet is None or sheet.is_file():
                continue
        waiting.append((pair, numbers, sheet))
    quiet = arguments.quiet
    kept = len(pairs) - len(waiting)
    if kept and not (quiet or arguments.json):
        print(f"{kept} of {len(pairs)} results exist already; --overwrite recomputes them", file=sys.stderr)
    figures: list[dict[str, Any]] = []
    start = time.perf_counter()
    seconds: dict[str, float] = {}
    if waiting:
        extractor = build_extractor(arguments)
        seconds["model"] = time.perf_counter() - start
        for remark in [] if quiet or arguments.json else remarks(arguments):
            print(remark, file=sys.stderr)
        # None shows it on a terminal only.
        for pair, numbers, sheet in tqdm(waiting, unit="pair", disable=True if quiet else None, file=sys.stderr):
            paths = root / pair.a, root / pair.b
            try:
                matches = match_pair.match(arguments, extractor, *paths)
                more = marks(settings, paths)
            except (ValueError, OSError) as error:
                failed.append(f"line {pair.line}: {error}")
                continue
            found = match_pair.write(arguments, matches, sheet, numbers, more)
            for name, value in found["seconds"].items():
                seconds[name] = seconds.get(name, 0.0) + value
            found["seconds"] = {name: round(value, 4) for name, value in found["seconds"].items()}
            figures.append({"a": pair.a, "b": pair.b, **found})
    for message in failed:
        print(f"skipped: {one_line(message)}", file=sys.stderr)
    total = round(time.perf_counter() - start, 3)
    if arguments.json:
        document = {
            "out": str(out),
            "pairs": figures,
            "written": len(figures),
            "kept": kept,
            "failed": failed,
            "seconds": total,
        }
        print(json.dumps(document))
    elif not quiet:
        if arguments.timing:
            print("\n".join(f"{name:10} {value:8.3f} s" for name, value in seconds.items()))
        count = len(figures) + len(failed)
        print(
            f"matched {len(figures)} pairs in {total} s, results in {quoted(out)}"
            + (f"; {len(failed)} of {count} pairs were skipped" if failed else ""),
            file=sys.stderr,
        )
    return 1 if failed else 0


def read_pairs(path: Path) -> tuple[list[Pair], list[str]]:
    """The different pairs of a list, in its order, and a message for each line that holds none.

    A line holds two names, separated by white space or, where there is one, by a tab. Empty lines and lines that begin
    with # are left out.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a regular file, or no line holds a pair.
    """
    require_regular_file(path, "list of pairs")
    pairs: dict[tuple[str, str], Pair] = {}
    failed = []
    for number, line in _lines(path):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        names = [name.strip() for name in line.split("\t")] if "\t" in line.strip() else line.split()
        if len(names) == 2 and all(names) and len(line) < _LONGEST_LINE and "\0" not in line:
            pairs.setdefault((names[0], names[1]), Pair(number, *names))
        else:
            count = f"more than {_LONGEST_LINE} characters" if len(line) >= _LONGEST_LINE else f"{len(names)}"
            count = "a zero byte" if "\0" in line else count
            failed.append(
                f"line {number}: expected two images, separated by white space, or by a tab if a name contains spaces; "
                f"got {count}"
            )
    if not pairs:
        raise ValueError(f"no pairs in {quoted(path)}: {failed[0] if failed else 'it has no line with two images'}")
    return list(pairs.values()), failed


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbers and lines, each cut to ``_LONGEST_LINE`` characters; bytes outside UTF-8 stay as in names of files."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        number = 0
        while line := file.readline(_LONGEST_LINE):
            number += 1
            yield number, line
            while not line.endswith("\n") and (line := file.readline(_LONGEST_LINE)):
                pass


def name_results(pairs: Sequence[Pair]) -> list[str]:
    """A file name without ending for each pair: those of its images, with a hash of the pair where it is not unique.

    Unique also where upper and lower case are the same. Independent of the pairs' order.
    """
    stems = [f"{_flat(pair.a)}--{_flat(pair.b)}" for pair in pairs]
    counts = Counter(stem.casefold() for stem in stems)
    return [
        stem
        if counts[stem.casefold()] == 1 and len(os.fsencode(stem)) <= _LONGEST_STEM
        else f"{_cut(stem)}-{_hash(pair)}"
        for pair, stem in zip(pairs, stems, strict=True)
    ]


def _flat(name: str) -> str:
    """The path without its suffix as one name."""
    path = PurePath(name)
    flat = str(path.with_suffix("") if path.name else path).translate(_AWKWARD)
    return "".join(c if c.isprintable() else "_" for c in flat).lstrip(".-") or "image"


def _hash(pair: Pair) -> str:
    # No name contains a zero byte.
    return hashlib.sha256(os.fsencode(f"{pair.a}\0{pair.b}")).hexdigest()[:12]


def _cut(stem: str) -> str:
    return stem.encode(errors="replace")[: _LONGEST_STEM - 20].decode(errors="ignore")
