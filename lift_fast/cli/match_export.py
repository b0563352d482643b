"""``lift-fast match --export``: matches for COLMAP, hloc and optical flow."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lift_fast._text import quoted

from .errors import UsageError, as_usage_error, check_output, refuse_input, writing
from .options import positive

if TYPE_CHECKING:
    from lift_fast.match_files import MatchedPair

FLOW = ".flo"
# Of export_matches.
_MOST_CELL = 1 << 20


def add_export_options(parser: argparse.ArgumentParser) -> None:
    """``--export`` and its companions."""
    group = parser.add_argument_group("files for other tools")
    group.add_argument(
        "--export",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="write the valid matches (inliers, if verified) as FILE too, may be repeated: .txt for COLMAP's "
        "matches_importer, with key points in FILE_keypoints/; .h5 for hloc, with key points in FILE_keypoints.h5; "
        ".flo is Middlebury's optical flow from A to B (.flo alone is next to the numbers of each pair)",
    )
    group.add_argument(
        "--export-cell",
        type=positive,
        metavar="N",
        help="positions of an image within a cell of N x N loaded pixels become one key point (1; with --pairs that of "
        "--step)",
    )
    group.add_argument(
        "--root",
        type=Path,
        metavar="DIR",
        help="folder of all images, from which exported names start (the folder that holds A and B; that of LIST)",
    )


def check_export_options(arguments: argparse.Namespace) -> None:
    """Check them before the networks are loaded; raise ``UsageError``."""
    if arguments.root is not None and not arguments.root.is_dir():
        raise UsageError(f"--root {quoted(arguments.root)} is not a folder; give the one that holds all images")
    if arguments.export_cell is not None and arguments.export_cell > _MOST_CELL:
        raise UsageError(f"--export-cell must be at most {_MOST_CELL} pixels, got {arguments.export_cell}")


def image_name(path: Path, root: Path) -> str:
    """Name of an image relative to the folder of all, with forward slashes."""
    return Path(os.path.relpath(path, root)).as_posix()


def check_exports(
    exports: Sequence[Path], names: Sequence[tuple[str, str]], inputs: Iterable[str | Path | None]
) -> None:
    """Check before the work that all files can be written and hold these names."""
    if not exports:
        return
    from lift_fast.match_files import check_export

    inputs = list(inputs)
    written: dict[str, Path] = {}
    for path in exports:
        if path.suffix.lower() == FLOW and len(names) > 1:
            raise UsageError(
                f"--export {quoted(path)} would hold one pair of {len(names)}; give .flo alone, for a file for each"
            )
        try:
            with as_usage_error():
                first, *more = check_export(path, names)
        except ImportError as error:
            raise UsageError(f"--export {quoted(path)}: {error}") from error
        for each in (first, *more):
            # The same file twice is harmless, unless it is to hold two things.
            if written.setdefault(os.path.realpath(each), path) != path:
                raise UsageError(
                    f"--export {quoted(path)} and --export {quoted(written[os.path.realpath(each)])} would both write "
                    f"{quoted(each)}; give one of them another name"
                )
        check_output("export", first, inputs)
        for other in more:
            if other.suffix:
                check_output("export", other, inputs)
            elif os.path.lexists(other) and not other.is_dir():
                raise UsageError(f"--export {quoted(path)}: {quoted(other)} is a file; expected a folder, give another")
            else:
                refuse_input("export", other, inputs)


def write_exports(exports: Sequence[Path], pairs: Sequence[MatchedPair], cell: int) -> dict[str, list[int]]:
    """Write all files of ``exports``; return the number of matches of each pair in each."""
    if not exports:
        return {}
    from lift_fast.match_files import export_matches

    counts = {}
    for path in exports:
        with writing(path), as_usage_error():
            counts[str(path)] = export_matches(path, pairs, cell)
    return counts


def totals(counts: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Matches in each file, for ``--json``."""
    return {path: sum(each) for path, each in counts.items()}


def none_exported(arguments: argparse.Namespace, counts: Mapping[str, Sequence[int]]) -> str:
    """One line if a file got no match of a pair, else ""."""
    empty = max((list(each).count(0) for each in counts.values()), default=0)
    if not empty:
        return ""
    pairs = max(map(len, counts.values()))
    of = "" if pairs == 1 else f" of {empty} of {pairs} pairs"
    return f"0 matches exported{of}: {'not verified' if arguments.verify else 'none is valid'}"
