"""``lift-fast eval warp``: matching under known random warps."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import eval_options as common
from .errors import UsageError, as_usage_error
from .options import positive, remarks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lift_fast.backbones import FrozenViT
    from lift_fast.evaluation.methods import Method
    from lift_fast.evaluation.warp import WarpProtocol

_DESCRIPTION = """Find points of photographs again in a second view of the same photograph, a known random homography of
it with changed colours: PCK@alpha, the share of points found within alpha * S pixels of S x S, with 95 % confidence
intervals over photographs. Any folder of photographs will do. An interrupted run resumes from --out."""
_EXAMPLE = (
    "example: lift-fast eval warp --root photos/ --held-out --model dino_vits16 --lift lift_dino_vits16.pth "
    "--method backbone bilinear lift random-lift l1=l1/lift.pth --seeds 3 --out warp.json --table warp.md"
)


def add_parser(protocols: Any) -> None:
    """Add the command to argparse's ``protocols``."""
    parser = protocols.add_parser(
        "warp", help="matching under known random warps", description=_DESCRIPTION, epilog=_EXAMPLE
    )
    parser.add_argument("--root", type=Path, required=True, metavar="DIR", help="folder of photographs")
    parser.add_argument(
        "--held-out",
        type=float,
        nargs="?",
        const=0.1,
        metavar="X",
        help="only the fraction that lift-fast train --holdout left out; without a number every tenth",
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N photographs by name")
    common.add_sizes(parser, (112, 224, 448))
    parser.add_argument("--points", type=positive, default=100, metavar="N", help="in each photograph (%(default)s)")
    common.add_alphas(parser)
    parser.add_argument("--seeds", type=positive, default=1, metavar="N", help="warps of each (%(default)s)")
    parser.add_argument("--no-photometric", action="store_true", help="leave the second view's colours as they are")
    parser.add_argument("--reference", metavar="M", help="method to compare with (bilinear, if it is among them)")
    parser.add_argument(
        "--sheet", type=Path, metavar="PNG", help="draw some photographs' views and matches, largest of --sizes"
    )
    parser.add_argument(
        "--sheet-count", type=positive, default=4, metavar="N", help="photographs on the sheet (%(default)s)"
    )
    common.add_method_options(parser, ("backbone", "bilinear", "lift"))
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """The warp protocol. Returns the exit status."""
    from lift_fast.evaluation import warp
    from lift_fast.evaluation.warp import WarpProtocol, image_name
    from lift_fast.images import list_images
    from lift_fast.training import split

    common.check_outputs(arguments, "sheet")
    if arguments.sheet is not None and arguments.sheet.suffix.lower() != ".png":
        raise UsageError(f"--sheet must end in .png, got {arguments.sheet}")
    with as_usage_error():
        paths = list_images(arguments.root)
        root = arguments.root if arguments.root.is_dir() else arguments.root.parent
        if arguments.held_out is not None:
            paths = split(paths, arguments.held_out, root=root)[1]
        paths = paths[: arguments.limit]
        if not paths:
            raise UsageError(f"no photographs of {arguments.root} are held out; run without --held-out")
        protocol = WarpProtocol(arguments.points, tuple(arguments.alphas), not arguments.no_photometric)
    backbone, methods = common.build(arguments)
    common.say_remarks(arguments)
    reference = arguments.reference
    if reference is None and "bilinear" in arguments.method:
        reference = "bilinear"
    total = len(paths) * len(arguments.sizes) * arguments.seeds
    with common.progress(arguments, total, "pair") as update:
        content = warp.evaluate(
            methods,
            backbone,
            paths,
            root,
            sizes=arguments.sizes,
            seeds=arguments.seeds,
            protocol=protocol,
            reference=reference,
            batch_size=arguments.batch_size,
            out=arguments.out,
            record=common.record(arguments, backbone, methods),
            progress=update,
        )
    if arguments.sheet is not None:
        readable = [path for path in paths if image_name(path, root) not in content["skipped"]]
        _draw_sheet(arguments, methods, backbone, readable, root, protocol)
    return common.show(arguments, content, warp.tables(content))


def _draw_sheet(
    arguments: argparse.Namespace,
    methods: Sequence[Method],
    backbone: FrozenViT,
    paths: Sequence[Path],
    root: Path,
    protocol: WarpProtocol,
) -> None:
    from lift_fast.evaluation import warp
    from lift_fast.evaluation.warp import normaliser

    normalise = normaliser(backbone.mean, backbone.std, backbone.device, backbone.dtype)
    size, chosen = max(arguments.sizes), warp.choose(paths, arguments.sheet_count)
    pairs = list(warp.match_pairs(methods, chosen, root, size, normalise, protocol))
    if not pairs:
        print(f"--sheet {arguments.sheet}: there is no photograph to draw", file=sys.stderr)
        return
    caption = "; ".join([f"{arguments.model}, {size} x {size} pixels", *remarks(arguments)])
    # The middle threshold: the widest accepts too much, the narrowest too little.
    alpha = sorted(protocol.alphas)[len(protocol.alphas) // 2]
    common.save_image(arguments.sheet, warp.draw_sheet(pairs, alpha, caption=caption))
