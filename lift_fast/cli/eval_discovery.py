"""``lift-fast eval discovery``: unsupervised object discovery with TokenCut."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lift_fast.evaluation.rules import RULES

from . import eval_options as common
from .errors import UsageError, as_usage_error
from .options import positive

_DESCRIPTION = """CorLoc: the share of images in which TokenCut's one box overlaps an object by half (IoU >= 0.5).
Data sets in their original layouts: VOCdevkit/VOC2007 or VOC2012 (trainval), or COCO with annotations/
instances_train2014.json, train2014/ and the published list coco_20k_filenames.txt. Images without a usable
annotation or that do not decode are named and left out (exit status 1). An interrupted run resumes from --out."""
_EXAMPLE = (
    "example: lift-fast eval discovery --dataset voc07 --root data/ --model dino_vits16 --lift lift_dino_vits16.pth "
    "--method backbone bilinear lift --out voc07.json --table voc07.md"
)
_YEARS = {"voc07": 2007, "voc12": 2012}


def add_parser(protocols: Any) -> None:
    """Add the command to argparse's ``protocols``."""
    parser = protocols.add_parser(
        "discovery", help="object discovery with TokenCut", description=_DESCRIPTION, epilog=_EXAMPLE
    )
    parser.add_argument("--dataset", required=True, choices=("voc07", "voc12", "coco20k"))
    parser.add_argument("--root", type=Path, required=True, metavar="DIR", help="folder of the data set")
    parser.add_argument("--split", default="trainval", help="list of VOC's images (%(default)s)")
    parser.add_argument("--no-hard", action="store_true", help="VOC: leave out difficult and truncated objects")
    parser.add_argument("--list", type=Path, metavar="FILE", help="COCO: list of images (ROOT/coco_20k_filenames.txt)")
    parser.add_argument("--annotations", type=Path, metavar="JSON", help="COCO: another annotation file")
    parser.add_argument("--tau", type=float, help="threshold of the cosine (0.2 for VOC, 0.3 for COCO20k)")
    parser.add_argument(
        "--resolution", type=positive, metavar="S", help="resize images to S x S (their own size, as published)"
    )
    common.add_rule(
        parser,
        "--rule",
        RULES,
        "with --resolution: bilinear, unpadded, the grid over the whole square, true boxes cut to whole pixels, "
        "as published; or Lanczos, padded, each cell where it lies, boxes in the file's pixels",
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N images")
    parser.add_argument(
        "--pictures", type=Path, metavar="DIR", help="folder for sheets: boxes, eigenvector, foreground"
    )
    parser.add_argument("--picture-count", type=positive, default=20, metavar="N", help="sheets a method (%(default)s)")
    common.add_method_options(parser, ("backbone", "bilinear", "lift"), batches=False)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """The protocol. Returns the exit status."""
    import re

    from lift_fast.evaluation import discovery
    from lift_fast.evaluation.discovery.dataset import read_coco, read_voc
    from lift_fast.evaluation.tokencut import TAU

    common.check_outputs(arguments)
    if arguments.pictures is not None:
        common.check_folder("pictures", arguments.pictures)
    voc = arguments.dataset in _YEARS
    for option in ("list", "annotations") if voc else ("no_hard",):
        if getattr(arguments, option):
            other = "coco20k" if voc else "VOC"
            raise UsageError(f"--{option.replace('_', '-')} is an option of {other}, got --dataset {arguments.dataset}")
    if arguments.rule != "published" and arguments.resolution is None:
        raise UsageError("--rule is for images resized to one size; give --resolution S with it")
    with as_usage_error():
        if voc:
            data = read_voc(arguments.root, _YEARS[arguments.dataset], split=arguments.split, no_hard=arguments.no_hard)
        else:
            data = read_coco(arguments.root, annotations=arguments.annotations, names=arguments.list)
        data.samples = data.samples[: arguments.limit]
        if arguments.pictures is not None:
            arguments.pictures.mkdir(parents=True, exist_ok=True)
    backbone, methods = common.build(arguments)
    common.say_remarks(arguments)
    drawn = dict.fromkeys((method.name for method in methods), 0)

    def draw(name: str, sample: Any, image: Any, found: Any, prediction: Any) -> None:
        if arguments.pictures is None or drawn[name] >= arguments.picture_count:
            return
        drawn[name] += 1
        stem = re.sub(r"[^\w.-]", "_", f"{Path(sample.name).stem}_{name}")
        sheet = discovery.draw_discovery(sample, image, found, prediction)
        common.save_image(arguments.pictures / f"{stem}.png", sheet)

    with common.progress(arguments, len(data.samples), "image") as update:
        content = discovery.evaluate(
            [(method.name, method) for method in methods],
            backbone,
            data,
            tau=TAU[arguments.dataset] if arguments.tau is None else arguments.tau,
            resolution=arguments.resolution,
            rule=arguments.rule,
            out=arguments.out,
            record=common.record(arguments, backbone, methods),
            show=draw,
            progress=update,
        )
    return common.show(arguments, {k: v for k, v in content.items() if k != "predictions"}, [discovery.table(content)])
