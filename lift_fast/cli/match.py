"""``lift-fast match``: dense matches between two images or the pairs of a list, as sheets and as numbers."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from lift_fast._files import require_regular_file
from lift_fast._text import quoted

from . import match_pair
from .errors import UsageError, as_usage_error, check_output
from .match_export import (
    FLOW,
    add_export_options,
    check_export_options,
    check_exports,
    image_name,
    none_exported,
    totals,
    write_exports,
)
from .match_list import run_list
from .match_verify import add_verify_options, check_verify_options
from .options import add_model_options, add_output_options, build_extractor, positive, remarks

_DESCRIPTION = """Match every n-th pixel of image A to the most similar pixel of image B, draw the matches on one
sheet, and write them to an .npz file next to it: xy_a and xy_b [rows, columns, 2], (x, y) in upright pixels of the
files, (-1, -1) for no match; similarity, distance (forward-backward, in cells of A's descriptor map), confidence
(0 to 1, agreement with the matches around) and valid, each [rows, columns]; size_a, size_b,
loaded_size_a, loaded_size_b (height, width of the files and of the loaded images); covered_a, covered_b (top, left,
height, width of the matched pixels of the loaded images); grid_a, grid_b (cells of the descriptor maps),
random_weights; settings (JSON, with the dtype), engine (what computed the backbone), source, source_bytes and
orientation (names, lengths and EXIF orientations of the two files); with --verify, inliers [rows, columns] and
transform [3, 3]. A warning is printed where the matches
should not be believed. --pairs matches the pairs of a list instead. Exit status: 0 if all pairs were matched, 1 if some
could not be read, 2 for invalid input."""
_EXAMPLE = """examples: lift-fast match left.jpg right.jpg --model dino_vits16 --lift lift_dino_vits16.pth;
lift-fast match --pairs pairs.txt --root photos/ --out matches/ --sheets none"""
_PAIR_ONLY, _LIST_ONLY = ("a", "b"), ("sheets", "overwrite")


def add_parser(commands: Any) -> None:
    """Add the command to argparse's ``commands``."""
    parser = commands.add_parser(
        "match",
        help="match two images",
        usage="%(prog)s [options] A B\n       %(prog)s [options] --pairs LIST",
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
    )
    parser.add_argument("a", type=Path, nargs="?", metavar="A", help="first image")
    parser.add_argument("b", type=Path, nargs="?", metavar="B", help="second image, searched for the pixels of A")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="the sheet, .png, .jpg, .webp or .pdf (matches.png); with --pairs the folder for all results (matches)",
    )
    parser.add_argument("--step", type=positive, default=4, metavar="N", help="match every N-th pixel (%(default)s)")
    parser.add_argument(
        "--mutual",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="a valid match must lead back to within one cell of the descriptor map (on)",
    )
    parser.add_argument("--normalize", default="pixel", choices=("pixel", "grid"), help="see dense_match (%(default)s)")
    parser.add_argument("--lines", type=positive, default=40, metavar="N", help="most lines to draw (%(default)s)")
    parser.add_argument(
        "--timing", action="store_true", help="print each stage's seconds, imports and total (--json always does)"
    )
    group = parser.add_argument_group("many pairs")
    group.add_argument(
        "--pairs",
        type=Path,
        metavar="LIST",
        help="text file, a pair of images per line, separated by white space; names with spaces need a tab between "
        "them or double quotes; lines that begin with # are left out. A pair's files are named after its images. "
        "Existing results are kept, so an interrupted run resumes where it stopped. A pair that cannot be read is "
        "reported and left out",
    )
    group.add_argument(
        "--sheets",
        choices=(*(suffix[1:] for suffix in match_pair.SHEETS if suffix != ".jpeg"), "none"),
        help="format of each pair's sheet (png)",
    )
    group.add_argument("--overwrite", action="store_true", help="recompute existing results")
    add_verify_options(parser)
    add_export_options(parser)
    add_model_options(parser, size_note=", rounded to whole patches", longest_side=True, dtype="auto")
    add_output_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Match one pair or a list; return the exit status."""
    check_verify_options(arguments)
    check_export_options(arguments)
    given = {name: getattr(arguments, name) not in (None, False) for name in (*_PAIR_ONLY, *_LIST_ONLY)}
    if arguments.pairs is not None:
        if any(given[name] for name in _PAIR_ONLY):
            raise UsageError("give two images or --pairs LIST, not both")
        return run_list(arguments)
    if not all(given[name] for name in _PAIR_ONLY):
        raise UsageError(f"give two images, A and B{', got one' if given['a'] else ''}; or --pairs LIST")
    for name in _LIST_ONLY:
        if given[name]:
            raise UsageError(f"--{name} belongs to --pairs LIST; leave it out for two images")
    return _run_pair(arguments)


def _run_pair(arguments: argparse.Namespace) -> int:
    """Match, draw, write; return the exit status."""
    sheet = Path("matches.png") if arguments.out is None else arguments.out
    if sheet.suffix.lower() not in match_pair.SHEETS:
        endings = " ".join(match_pair.SHEETS)
        raise UsageError(f"--out must end in one of {endings}, got {quoted(sheet)}; the numbers go next to it as .npz")
    numbers = sheet.with_suffix(".npz")
    images, networks = (arguments.a, arguments.b), (arguments.weights, arguments.lift)
    for path in (sheet, numbers):
        check_output("out", path, (*images, *networks))
    with as_usage_error():
        for path in images:
            require_regular_file(path, "image")
    root = arguments.root or Path(os.path.commonpath([path.absolute().parent for path in images]))
    names = image_name(arguments.a, root), image_name(arguments.b, root)
    exports = [sheet.with_suffix(FLOW) if path == Path(FLOW) else path for path in arguments.export]
    check_exports(exports, [names], (*images, *networks))

    say = (lambda *_: None) if arguments.quiet or arguments.json else lambda text: print(text, file=sys.stderr)
    start = time.perf_counter()
    seconds = {"imports": start - arguments.started}
    extractor = build_extractor(arguments)
    seconds["model"] = time.perf_counter() - start
    for remark in remarks(arguments):
        say(remark)
    with as_usage_error():
        matches = match_pair.match(arguments, extractor, *images)
        origins = match_pair.origin(arguments, extractor, matches, images)
    figures = match_pair.write(arguments, matches, sheet, numbers, origins)
    exported: dict[str, list[int]] = {}
    if exports:
        from lift_fast.match_files import MatchedPair

        pair = MatchedPair(names, matches.numpy, matches.orientations)
        exported = write_exports(exports, [pair], arguments.export_cell or 1)
    seconds.update(figures["seconds"])
    seconds["total"] = time.perf_counter() - arguments.started
    if arguments.json:
        figures["exports"], figures["exported"] = list(map(str, exports)), totals(exported)
        print(json.dumps({**figures, "seconds": {name: round(value, 4) for name, value in seconds.items()}}))
    else:
        say(match_pair.summary(arguments, matches))
        if matches.warning:
            say(f"warning: {matches.warning}")
        if line := none_exported(arguments, exported):
            say(line)
        if arguments.timing:
            print("\n".join(f"{name:10} {value:8.3f} s" for name, value in seconds.items()))
        say(f"wrote {', '.join(map(quoted, (sheet, numbers, *exports)))}")
    return 0
