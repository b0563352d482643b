"""``lift-fast match``: dense matches between two images, as a sheet and as numbers."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from lift_fast._files import atomic_path, require_regular_file
from lift_fast._text import quoted

from .errors import UsageError, as_usage_error, check_output, writing
from .options import add_model_options, add_output_options, build_extractor, describe, positive, remarks

_DESCRIPTION = """Match every n-th pixel of image A to the most similar pixel of image B, draw the matches on one
sheet, and write them to an .npz file next to it: xy_a and xy_b [rows, columns, 2], (x, y) in upright pixels of the
files, (-1, -1) for no match; similarity, distance (forward-backward, in cells of A's descriptor map), confidence
(similarity, halved with each cell of distance; not a probability) and valid, each [rows, columns]; size_a, size_b,
loaded_size_a, loaded_size_b (height, width of the files and of the loaded images); covered_a, covered_b (top, left,
height, width of the matched pixels of the loaded images); grid_a, grid_b (cells of the descriptor maps) and
random_weights."""
_EXAMPLE = "example: lift-fast match left.jpg right.jpg --model dino_vits16 --lift lift_dino_vits16.pth"


def add_parser(commands: Any) -> None:
    """Add the command to argparse's ``commands``."""
    parser = commands.add_parser("match", help="match two images", description=_DESCRIPTION, epilog=_EXAMPLE)
    parser.add_argument("a", type=Path, metavar="A", help="first image")
    parser.add_argument("b", type=Path, metavar="B", help="second image, searched for the pixels of A")
    parser.add_argument("--out", type=Path, default=Path("matches.png"), metavar="PNG", help="(%(default)s)")
    parser.add_argument("--step", type=positive, default=4, metavar="N", help="match every N-th pixel (%(default)s)")
    parser.add_argument(
        "--mutual",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="a valid match must lead back to within one cell of the descriptor map (on)",
    )
    parser.add_argument("--normalize", default="grid", choices=("grid", "pixel"), help="see dense_match (%(default)s)")
    parser.add_argument("--lines", type=positive, default=40, metavar="N", help="match lines to draw (%(default)s)")
    parser.add_argument(
        "--timing", action="store_true", help="print each stage's seconds, imports and total (--json always does)"
    )
    add_model_options(parser, size_note=", rounded to whole patches")
    add_output_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Match, draw, write; return the exit status."""
    if arguments.out.suffix.lower() != ".png":
        raise UsageError(f"--out must end in .png, got {quoted(arguments.out)}; the numbers go next to it as .npz")
    numbers = arguments.out.with_suffix(".npz")
    for path in (arguments.out, numbers):
        check_output("out", path, (arguments.a, arguments.b, arguments.weights, arguments.lift))
    with as_usage_error():
        for path in (arguments.a, arguments.b):
            require_regular_file(path, "image")

    import numpy as np

    from lift_fast import match_images

    say = (lambda *_: None) if arguments.quiet or arguments.json else lambda text: print(text, file=sys.stderr)
    start = time.perf_counter()
    seconds = {"imports": start - arguments.started}
    extractor = build_extractor(arguments)
    seconds["model"] = time.perf_counter() - start
    for remark in remarks(arguments):
        say(remark)
    with as_usage_error():
        matches = match_images(
            arguments.a,
            arguments.b,
            extractor=extractor,
            size=arguments.size,
            mutual=arguments.mutual,
            step=arguments.step,
            normalize=arguments.normalize,
            lift_iter=arguments.iterations,
            timing=True,
        )
    seconds.update(matches.seconds)

    start = time.perf_counter()
    arrays = matches.numpy()
    valid = arrays["valid"]
    caption = (
        f"{describe(arguments)}   A {_by(arrays['loaded_size_a'])}, B {_by(arrays['loaded_size_b'])} pixels, "
        f"maps of {_by(matches.grid_a)} and {_by(matches.grid_b)} cells   {int(valid.sum())} of {valid.size} matches "
        f"{'lead back to within a cell' if arguments.mutual else 'found'}   {sum(matches.seconds.values()):.2f} s"
    )
    sheet = matches.draw(lines=arguments.lines, caption=caption)
    # Write both files or neither.
    with writing(arguments.out), atomic_path(arguments.out) as drawn, atomic_path(numbers) as temporary:
        sheet.save(drawn, format="PNG")
        with temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # numpy's stubs miss keyword arrays
    seconds["draw"] = time.perf_counter() - start
    seconds["total"] = time.perf_counter() - arguments.started
    if arguments.json:
        figures = {
            "out": str(arguments.out),
            "npz": str(numbers),
            "model": arguments.model,
            "lift": arguments.lift,
            "random_weights": matches.random_weights,
            **{
                name: arrays[name].tolist()
                for name in ("size_a", "size_b", "loaded_size_a", "loaded_size_b", "grid_a", "grid_b")
            },
            "points": int(valid.size),
            "valid": int(valid.sum()),
            "mean_similarity": float(arrays["similarity"][valid].mean()) if valid.any() else None,
            "mean_confidence": float(arrays["confidence"].mean()),
            "seconds": {name: round(value, 4) for name, value in seconds.items()},
        }
        print(json.dumps(figures))
    else:
        say(caption)
        if arguments.timing:
            print("\n".join(f"{name:10} {value:8.3f} s" for name, value in seconds.items()))
        say(f"wrote {quoted(arguments.out)} and {quoted(numbers)}")
    return 0


def _by(size: Any) -> str:
    """(height, width) as text, width first."""
    return f"{size[1]} x {size[0]}"
