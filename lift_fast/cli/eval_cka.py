"""``lift-fast eval cka``: how little features change with the size of the image."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from . import eval_options as common
from .errors import UsageError, as_usage_error
from .options import positive

_DESCRIPTION = """Scale invariance: linear CKA between a method's features of an image at each size and its features at
the reference size, both read at the same lattice of positions; averaged over images, with 95 % confidence
intervals. Any folder of images will do. Images that do not decode are named and left out (exit status 1). An
interrupted run resumes from --out."""
_EXAMPLE = (
    "example: lift-fast eval cka --root photos/ --model dino_vits16 --lift lift_dino_vits16.pth --out cka.json "
    "--chart cka.png"
)


def add_parser(protocols: Any) -> None:
    """Add the command to argparse's ``protocols``."""
    parser = protocols.add_parser("cka", help="scale invariance of features", description=_DESCRIPTION, epilog=_EXAMPLE)
    parser.add_argument("--root", type=Path, required=True, metavar="DIR", help="folder of images")
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N images by name")
    common.add_sizes(parser, (56, 112, 224, 448), "S x S pixels ")
    parser.add_argument("--reference", type=positive, default=448, metavar="S", help="to compare with (%(default)s)")
    parser.add_argument("--grid", type=positive, default=28, metavar="N", help="N x N positions (%(default)s)")
    parser.add_argument("--chart", type=Path, metavar="PNG", help="the curves as an image")
    common.add_method_options(parser, ("backbone", "bilinear", "lift"), batches=False)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """The protocol. Returns the exit status."""
    from lift_fast.evaluation import cka
    from lift_fast.images import list_images

    common.check_outputs(arguments, "chart")
    with as_usage_error():
        paths = list_images(arguments.root)[: arguments.limit]
    backbone, methods = common.build(arguments)
    for size in (*arguments.sizes, arguments.reference):
        if size < backbone.patch_size:
            raise UsageError(f"--sizes {size}: smaller than a patch of {backbone.patch_size} pixels")
    common.say_remarks(arguments)
    with common.progress(arguments, len(paths), "image") as update:
        content = cka.scale_invariance(
            [(method.name, method) for method in methods],
            paths,
            sizes=arguments.sizes,
            reference=arguments.reference,
            grid=arguments.grid,
            mean=backbone.mean,
            std=backbone.std,
            device=backbone.device,
            dtype=backbone.dtype,
            root=arguments.root,
            out=arguments.out,
            record=common.record(arguments, backbone, methods),
            progress=update,
        )
    if arguments.chart is not None:
        with as_usage_error():
            common.save_image(arguments.chart, cka.draw_curves(content))
    return common.show(arguments, content, [cka.table(content)])
