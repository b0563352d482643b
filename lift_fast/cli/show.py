"""``lift-fast show``: visualise the features of one or two images on a sheet and an interactive page."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from lift_fast._files import atomic_path, require_regular_file
from lift_fast._text import quoted
from lift_fast.demonstration import BACKBONE

from .errors import UsageError, as_usage_error, check_output, writing
from .eval_options import METHODS, build
from .options import (
    add_longest_side,
    add_model_options,
    add_output_options,
    describe,
    load_size,
    positive,
    remarks,
    takes_demonstration_lift,
)

_DESCRIPTION = """Visualise features. The sheet has a column for each method: similarity of every cell to chosen points
of A (in A, and in B with the best match), the three strongest principal components as colours, and TokenCut's saliency
with its box. The page (--html) is one file without server or network: moving over one image shows similarity and best
match in the other."""
_EXAMPLE = "example: lift-fast show left.jpg right.jpg --point 320,200 --out show.png --html show.html"
_NO_SALIENCY = (
    "The demonstration backbone recognises textures, not objects: its saliency does not show what stands out."
)
_VIEWS = ("similarity", "pca", "saliency")


def add_parser(commands: Any) -> None:
    """Add the command to argparse's ``commands``."""
    parser = commands.add_parser("show", help="visualise features", description=_DESCRIPTION, epilog=_EXAMPLE)
    parser.add_argument("a", type=Path, metavar="A", help="image")
    parser.add_argument("b", type=Path, metavar="B", nargs="?", help="second image, searched for A's points")
    parser.add_argument("--out", type=Path, metavar="PNG", help="the sheet (show.png, unless --html is given)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="the page")
    parser.add_argument(
        "--point", type=_point, action="append", metavar="X,Y", help="pixel of A to find; may be repeated (the centre)"
    )
    parser.add_argument(
        "--method",
        nargs="+",
        metavar="M",
        help=f"{METHODS} (backbone bilinear double-size, and where there is a LiFT lift lift-2)",
    )
    parser.add_argument(
        "--views",
        nargs="+",
        choices=_VIEWS,
        default=_VIEWS,
        metavar="V",
        help=f"rows of the sheet: {' '.join(_VIEWS)} (all)",
    )
    parser.add_argument(
        "--size", type=load_size, default=224, metavar="S", help="shorter side of loaded images, or HxW (%(default)s)"
    )
    add_longest_side(parser)
    parser.add_argument("--tau", type=float, default=0.2, metavar="X", help="of TokenCut (%(default)s)")
    parser.add_argument(
        "--dimensions", type=positive, default=64, metavar="N", help="of descriptors in the page (%(default)s)"
    )
    add_model_options(parser, sizes=False)
    add_output_options(parser)
    parser.set_defaults(run=run, iterations=1)


def run(arguments: argparse.Namespace) -> int:
    """Draw and write; return the exit status."""
    if arguments.out is None and arguments.html is None:
        arguments.out = Path("show.png")
    for option, suffixes in (("out", (".png",)), ("html", (".html", ".htm"))):
        path = getattr(arguments, option)
        if path is None:
            continue
        if path.suffix.lower() not in suffixes:
            raise UsageError(f"--{option} must end in {suffixes[0]}, got {quoted(path)}")
        check_output(option, path, (arguments.a, arguments.b, arguments.weights, arguments.lift))
    paths = [path for path in (arguments.a, arguments.b) if path is not None]
    with as_usage_error():
        for path in paths:
            require_regular_file(path, "image")
    if not -1 < arguments.tau < 1:
        raise UsageError(f"--tau {arguments.tau}: must lie between -1 and 1")

    from lift_fast import show
    from lift_fast.images import read_image

    say = (lambda *_: None) if arguments.quiet or arguments.json else lambda text: print(text, file=sys.stderr)
    if arguments.method is None:
        arguments.method = _default_methods(arguments)
    backbone, methods = build(arguments)
    notes = [f"{remark[0].upper()}{remark[1:]}." for remark in remarks(arguments)]
    own_weights = arguments.weights or arguments.random_weights
    saliency_note = _NO_SALIENCY if arguments.model == BACKBONE and not own_weights else ""
    for remark in notes:
        say(remark)
    figures: dict[str, Any] = {"methods": {}, "out": None, "html": None}
    with as_usage_error():
        images = [read_image(path) for path in paths]
        points = arguments.point or [((images[0].width - 1) // 2, (images[0].height - 1) // 2)]
        for x, y in points:
            if x >= images[0].width or y >= images[0].height:
                size = f"{images[0].width} x {images[0].height}"
                raise UsageError(f"--point {x},{y} lies outside {quoted(paths[0])}, which has {size} pixels")
        loaded = [
            show.load(quoted(path.name), image, arguments.size, backbone, methods, arguments.max_side)
            for path, image in zip(paths, images, strict=True)
        ]
        sizes = ", ".join(f"{each.size[1]} x {each.size[0]}" for each in loaded)
        caption = f"{describe(arguments)}; read at {sizes} pixels"
        figures["methods"] = {
            method.name: {"grids": [list(each.features[method.name].map.shape[2:]) for each in loaded]}
            for method in methods
        }
        if arguments.out is not None:
            centres = [(x + 0.5, y + 0.5) for x, y in points]
            sheet = show.draw_sheet(
                loaded,
                centres,
                arguments.views,
                caption=caption,
                warning=" ".join(notes),
                saliency_note=saliency_note,
                tau=arguments.tau,
            )
            with writing(arguments.out), atomic_path(arguments.out) as temporary:
                sheet.save(temporary, format="PNG")
            figures["out"] = str(arguments.out)
            say(f"wrote {quoted(arguments.out)}")
        if arguments.html is not None:
            text, errors = show.build_page(
                loaded, dimensions=arguments.dimensions, caption=caption, warning=" ".join([*notes, saliency_note])
            )
            with writing(arguments.html), atomic_path(arguments.html) as temporary:
                temporary.write_text(text, encoding="utf-8")
            figures["html"] = str(arguments.html)
            for name, error in errors.items():
                figures["methods"][name]["page_error"] = error._asdict()
                say(
                    f"{name}: similarities in the page are off by {error.mean:.1e}, at most {error.most:.1e}; "
                    f"{error.same_best:.1%} of the best cells are the same"
                )
            say(f"wrote {quoted(arguments.html)} ({arguments.html.stat().st_size / 1e6:.1f} MB)")
    if arguments.json:
        print(json.dumps(figures))
    return 0


def _default_methods(arguments: argparse.Namespace) -> list[str]:
    lifted = arguments.lift or arguments.random_lift or takes_demonstration_lift(arguments)
    return ["backbone", "bilinear", "double-size", *(["lift", "lift-2"] if lifted else [])]


def _point(text: str) -> tuple[int, int]:
    """argparse type: ``X,Y``, whole pixels."""
    x, comma, y = text.partition(",")
    if not (comma and x.strip().isdecimal() and y.strip().isdecimal()):
        raise argparse.ArgumentTypeError(f"expected X,Y in whole pixels, got {text!r}")
    return int(x), int(y)
