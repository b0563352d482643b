"""Lists of pairs of images, as hloc and COLMAP write them, and names for the results of each pair."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

from lift_fast._files import require_regular_file
from lift_fast._text import quoted

# Two of the longest paths that Linux opens.
_LONGEST_LINE = 2 * 4096
# File systems take 255 bytes, of which an ending and a temporary name need some.
_LONGEST_STEM = 180
_WORDS = re.compile(r'(?<!\S)"([^"]+)"(?!\S)|(\S+)')
_AWKWARD = str.maketrans(dict.fromkeys('<>:"|?*', "_") | {"/": "-", "\\": "-"})


class Pair(NamedTuple):
    """One line of a list."""

    line: int
    a: str
    b: str


def read_pairs(path: Path) -> tuple[list[Pair], list[str]]:
    """The different pairs of a list, in its order, and a message for each line that holds none.

    A line holds two names, separated by a tab where there is one, else by white space; the latter may stand within
    double quotes. Empty lines and lines that begin with # are left out.

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
        if "\t" in line.strip():
            names = [name.strip() for name in line.split("\t")]
        else:
            names = [quoted_name or name for quoted_name, name in _WORDS.findall(line)]
        if len(names) == 2 and all(names) and len(line) < _LONGEST_LINE and "\0" not in line:
            pairs.setdefault((names[0], names[1]), Pair(number, *names))
        else:
            count = f"more than {_LONGEST_LINE} characters" if len(line) >= _LONGEST_LINE else f"{len(names)}"
            count = "a zero byte" if "\0" in line else count
            failed.append(
                f"line {number}: expected two images, separated by white space; names with spaces need a tab between "
                f"them or double quotes; got {count}"
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
