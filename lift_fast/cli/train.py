"""``lift-fast train``: train a LiFT for a frozen backbone on a folder of images."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from lift_fast._text import one_line, quoted
from lift_fast.training.settings import FACETS, FITS, LOSSES, PRECISIONS, TARGETS, TrainingSettings

from .errors import UsageError, as_usage_error
from .options import add_output_options, add_pixel_limit, positive, threads, whole

_DESCRIPTION = """Train a LiFT for a frozen backbone, without labels: it learns to predict the backbone's features of an
image from those of the image at half the size. DATA is a folder, searched with its subfolders. OUT receives
lift.pth (weights in the published format, for --lift), last.pth (training state, for --resume) and log.csv (a row for
each step). Unreadable images are replaced by others and reported at the end. The defaults are the paper's. Ctrl-C and
SIGTERM save and stop (exit status 130, 143). Under torchrun all processes train one LiFT: torchrun --nproc-per-node 8
-m lift_fast train ..."""
_EXAMPLE = "example: lift-fast train photos/ --out runs/dino16 --model dino_vits16 --batch-size 64 --holdout"


def add_parser(commands: Any) -> None:
    """Add the command to argparse's ``commands``."""
    parser = commands.add_parser(
        "train", help="train a LiFT on a folder of images", description=_DESCRIPTION, epilog=_EXAMPLE
    )
    parser.add_argument("data", type=Path, metavar="DATA", help="folder of images")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--resume", action="store_true", help="resume from OUT/last.pth, if it exists")
    parser.add_argument("--overwrite", action="store_true", help="start over if OUT contains a training")

    group = parser.add_argument_group("backbone")
    group.add_argument("--model", help="an official name or any timm ViT (%(default)s)")
    group.add_argument("--weights", type=Path, metavar="FILE", help="local checkpoint of the backbone")
    group.add_argument("--checkpoint-key", metavar="KEY", help="entry of the checkpoint with the weights")
    group.add_argument("--random-weights", action="store_true", help="random backbone weights, for tests")
    group.add_argument("--facet", choices=FACETS, help="(%(default)s)")
    group.add_argument("--layer", type=int, metavar="N", help="block of the backbone, may be negative (the last)")

    group = parser.add_argument_group("network")
    group.add_argument("--no-image", action="store_false", dest="use_image", help='the "no image" ablation')
    group.add_argument("--image-channels", type=positive, metavar="N", help="image encoder (%(default)s)")
    group.add_argument("--extra-image-blocks", type=whole, metavar="N", help="more blocks in it (%(default)s)")

    group = parser.add_argument_group("images")
    group.add_argument(
        "--size", dest="image_size", type=positive, metavar="S", help="side, a multiple of 4 patches (%(default)s)"
    )
    group.add_argument(
        "--fit",
        choices=FITS,
        help="resize both sides to S, as published, or the shorter side and crop the centre (%(default)s)",
    )
    group.add_argument("--jitter", type=float, metavar="X", help="colour jitter, 0 for none (%(default)s)")
    add_pixel_limit(group)
    group.add_argument("--limit", type=positive, metavar="N", help="only the first N images by name")
    group.add_argument(
        "--holdout",
        dest="held_out",
        type=float,
        nargs="?",
        const=0.1,
        metavar="X",
        help="hold out a fraction of the images, evenly by name; without a number every tenth",
    )
    group.add_argument("--workers", type=whole, metavar="N", help="processes that read images, for each process (auto)")

    group = parser.add_argument_group("training")
    group.add_argument("--loss", choices=LOSSES, help="(%(default)s)")
    group.add_argument(
        "--target",
        choices=TARGETS,
        help="predict features of the image at twice the size, as published, or of the same image with patches half a "
        "patch apart, for backbones that get worse on enlarged images (%(default)s)",
    )
    group.add_argument(
        "--batch-size", type=positive, metavar="N", help="images in a step, over all processes (256; patch 8: 64)"
    )
    group.add_argument("--epochs", type=positive, metavar="N", help="(%(default)s)")
    group.add_argument("--max-steps", type=positive, metavar="N", help="stop after N steps")
    group.add_argument(
        "--lr", dest="learning_rate", type=float, metavar="X", help="learning rate of Adam (%(default)s)"
    )
    group.add_argument("--seed", type=whole, metavar="N", help="(%(default)s)")
    group.add_argument(
        "--save-every", dest="save_every_steps", type=positive, metavar="N", help="also save after every N steps"
    )
    group.add_argument("--save-every-epochs", type=positive, metavar="N", help="(%(default)s)")

    group = parser.add_argument_group("machine")
    group.add_argument("--device", help="cpu, cuda, cuda:1, ... (CUDA if there is one)")
    group.add_argument(
        "--precision", choices=PRECISIONS, help="compute in; auto is bfloat16 if supported (%(default)s)"
    )
    group.add_argument("--compile", action="store_true", help="torch.compile, minutes that pay off in long GPU runs")
    group.add_argument("--sync-batchnorm", action="store_true", help="BatchNorm over the whole batch of all processes")
    group.add_argument("--threads", type=threads, metavar="N", help="CPU threads (all)")
    group.add_argument("--tensorboard", action="store_true", help="TensorBoard events in OUT, if it is installed")
    add_output_options(parser)
    # The settings hold the defaults, which the help above prints.
    defaults = {field.name: field.default for field in fields(TrainingSettings) if field.default is not MISSING}
    parser.set_defaults(run=run, **defaults)


def run(arguments: argparse.Namespace) -> int:
    """Train; return the exit status."""
    import torch

    from lift_fast.distributed import leads
    from lift_fast.training import Interrupted, NotSaved, train

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    if arguments.resume and arguments.overwrite:
        raise UsageError("--resume and --overwrite exclude each other; give only one")
    with as_usage_error():
        try:
            settings = TrainingSettings(
                **{each.name: getattr(arguments, each.name) for each in fields(TrainingSettings)}
            )
            figures = train(settings, resume=arguments.resume, overwrite=arguments.overwrite, quiet=arguments.quiet)
        except FileExistsError as error:
            raise UsageError(str(error)) from error
        except (FloatingPointError, NotSaved) as error:
            print(f"lift-fast train: {one_line(error)}", file=sys.stderr)
            return 1
        except Interrupted as stop:
            if leads():
                print(f"lift-fast train: {one_line(stop)}", file=sys.stderr)
            return 128 + stop.number
    if not leads():
        return 0
    for message in figures["unreadable"]:
        print(f"skipped: {one_line(message)}", file=sys.stderr)
    if arguments.json:
        print(json.dumps(figures))
    elif not arguments.quiet and figures["steps"] > figures["resumed"]:
        speed = figures["images_per_second"]
        rate = "" if speed is None else f", {speed:.3g} images/s, {figures['waiting']:.0%} of it waiting for images"
        skipped = len(figures["unreadable"])
        replaced = f"; {skipped} unreadable images were replaced by others" if skipped else ""
        print(
            f"wrote {quoted(figures['lift'])} after {figures['steps']} steps, {figures['seconds']} s{rate}{replaced}",
            file=sys.stderr,
        )
    return 0
