"""``lift-fast eval spair``: semantic correspondence on SPair-71k."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from lift_fast.evaluation.rules import DRAWS, PLACEMENTS

from . import eval_options as common
from .errors import UsageError, as_usage_error
from .options import positive

_DESCRIPTION = """SPair-71k: each key point of a source image is matched to all S x S pixels of a target image with
another object of the category. PCK@alpha, the share of right matches, per category and mean, in both usual averages:
"PCK@alpha" over key points with <, as in the LiFT paper, and "PCK@alpha per image" with <=, as by the data set's
authors. An interrupted run resumes from --out after its last complete category. What cannot be read is named and left
out (exit status 1)."""
_EXAMPLE = (
    "example: lift-fast eval spair --root SPair-71k --model dino_vits16 --lift lift_dino_vits16.pth "
    "--method backbone bilinear lift double-size stride-8 --out spair.json --table spair.md"
)


def add_parser(protocols: Any) -> None:
    """Add the protocol to argparse's ``protocols``."""
    parser = protocols.add_parser(
        "spair", help="semantic correspondence on SPair-71k", description=_DESCRIPTION, epilog=_EXAMPLE
    )
    parser.add_argument("--root", type=Path, required=True, metavar="DIR", help="folder of SPair-71k (original form)")
    common.add_sizes(parser, (56, 112, 224, 448))
    common.add_alphas(parser)
    about = "lay each map over the whole square, as published, or over the pixels that it covers"
    common.add_rule(parser, "--placement", PLACEMENTS, about)
    parser.add_argument("--per-category", action="store_true", help="tables by category too")
    parser.add_argument(
        "--cache",
        type=positive,
        default=1024,
        metavar="MIB",
        help="memory for descriptors of a category's images (%(default)s)",
    )
    pairs = parser.add_argument_group("pairs")
    pairs.add_argument("--split", choices=("trn", "val", "test"), default="test", help="(%(default)s)")
    pairs.add_argument("--layout", choices=("large", "small"), help="list of pairs (large, if it is there)")
    pairs.add_argument("--categories", nargs="+", metavar="NAME", help="only these")
    pairs.add_argument("--pairs-per-category", type=positive, metavar="N", help="draw N pairs of each (all)")
    about = "no pair twice, or as the published evaluation draws: with replacement, by NumPy's global generator"
    common.add_rule(pairs, "--draw", DRAWS, about)
    pairs.add_argument("--seeds", type=positive, default=1, metavar="N", help="such draws (%(default)s)")
    for name, grades in (
        ("viewpoint-variation", "0 easy, 1 medium, 2 hard"),
        ("scale-variation", "0 easy, 1 medium, 2 hard"),
        ("truncation", "0 none, 1 source, 2 target, 3 both"),
        ("occlusion", "0 none, 1 source, 2 target, 3 both"),
    ):
        pairs.add_argument(f"--{name}", type=int, nargs="+", metavar="K", help=f"only pairs with {grades}")
    common.add_method_options(parser, ("backbone", "bilinear", "lift"))
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """The protocol. Returns the exit status."""
    from lift_fast.evaluation import spair

    common.check_outputs(arguments)
    if arguments.seeds > 1 and arguments.pairs_per_category is None:
        raise UsageError("--seeds needs --pairs-per-category N: without it all pairs are taken and none is drawn")
    if arguments.draw != "distinct" and arguments.pairs_per_category is None:
        raise UsageError("--draw needs --pairs-per-category N: without it all pairs are taken and none is drawn")
    names = ("viewpoint_variation", "scale_variation", "truncation", "occlusion")
    chosen = {name: getattr(arguments, name) for name in names}
    filters = spair.Filters(**{name: None if k is None else tuple(k) for name, k in chosen.items()})
    with as_usage_error():
        protocol = spair.Protocol(tuple(arguments.alphas), arguments.placement)
        dataset = spair.SPair(arguments.root, arguments.split, arguments.layout)
        with common.progress(arguments, None, "annotation") as update:
            selection = dataset.select(arguments.categories, filters, update)
    if not selection.pairs:
        for name, reason in selection.skipped.items():
            print(f"skipped: {name}: {reason}", file=sys.stderr)
        raise UsageError(f"{arguments.root}: no pair is left to evaluate")
    backbone, methods = common.build(arguments)
    common.say_remarks(arguments)
    count = arguments.pairs_per_category or 0
    few = {name: len(pairs) for name, pairs in selection.pairs.items() if len(pairs) < count}
    if few and arguments.draw == "distinct" and not (arguments.quiet or arguments.json):
        least = min(few, key=lambda name: few[name])
        print(
            f"{len(few)} of {len(selection.pairs)} categories hold fewer than {count} pairs (the fewest: {least} with "
            f"{few[least]}); all of their pairs are taken",
            file=sys.stderr,
        )
    wanted = spair.drawn(selection, arguments.pairs_per_category, arguments.seeds, arguments.draw)
    total = sum(map(len, wanted.values())) * len(arguments.sizes)
    with common.progress(arguments, total, "pair") as update:
        content = spair.evaluate(
            methods,
            backbone,
            dataset,
            selection,
            sizes=arguments.sizes,
            seeds=arguments.seeds,
            pairs_per_category=arguments.pairs_per_category,
            draw=arguments.draw,
            filters=filters,
            protocol=protocol,
            batch_size=arguments.batch_size,
            cache_bytes=arguments.cache << 20,
            out=arguments.out,
            record=common.record(arguments, backbone, methods),
            progress=update,
        )
    status = common.show(arguments, content, spair.tables(content, arguments.per_category))
    if content["remarks"] and not arguments.quiet:
        first = next(iter(content["remarks"].values()))
        print(f"{len(content['remarks'])} remarks on annotations that were used, the first: {first}", file=sys.stderr)
    return status
