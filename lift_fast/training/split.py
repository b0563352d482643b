"""Divide images into training and held out ones, by one rule for training and evaluation."""

from __future__ import annotations

import os
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path


def split(
    paths: Iterable[str | os.PathLike[str]], held_out: float = 0.1, root: str | os.PathLike[str] | None = None
) -> tuple[list[Path], list[Path]]:
    """Divide images into training and held out images: every tenth is held out by default, evenly by name.

    Only the names matter: paths are sorted by their POSIX form relative to ``root``, and image i (from 0) is held out
    if ``(i + 1) * held_out`` reaches the next whole number (9, 19, 29, ... for a tenth).

    Args:
        paths: images, in any order.
        held_out: fraction from 0 to 1, rounded to the nearest fraction with a denominator of at most 1000.
        root: folder that the names are relative to; None sorts the paths as given.

    Returns:
        ``(training, held out)``, each sorted.

    Raises:
        ValueError: if ``held_out`` lies outside 0 to 1, or a path outside ``root``.
    """
    if not 0 <= held_out <= 1:
        raise ValueError(f"held_out must be a fraction from 0 to 1, got {held_out!r}")
    share = Fraction(held_out).limit_denominator(1000)
    found = [Path(path) for path in paths]
    ordered = sorted(found, key=lambda p: (p.relative_to(root) if root is not None else p).as_posix())
    parts: tuple[list[Path], list[Path]] = [], []
    for index, path in enumerate(ordered):
        parts[int((index + 1) * share) > int(index * share)].append(path)
    return parts
