"""What the commands of ``lift-fast eval`` share: options for methods and results, and what they describe."""

from __future__ import annotations

import argparse
import json
import re
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lift_fast.demonstration import BACKBONE, LIFT
from lift_fast.evaluation.rules import IMAGE_BRANCHES

from .errors import UsageError, as_usage_error, check_output
from .options import (
    add_model_options,
    add_output_options,
    announce_compilation,
    positive,
    remarks,
    takes_demonstration_lift,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from PIL import Image

    from lift_fast.backbones import FrozenViT
    from lift_fast.evaluation.methods import Method
    from lift_fast.evaluation.tables import Table

METHODS = (
    "backbone, bilinear, lift, lift-N (applied N times), random-lift, double-size, stride-S, LABEL=FILE (another LiFT "
    "checkpoint), LABEL=MODULE:CALLABLE (an nn.Module with forward(imgs, x))"
)


def add_method_options(
    parser: argparse.ArgumentParser, default: Sequence[str], batches: bool = True, by_protocol: Sequence[str] = ()
) -> None:
    """Options for the methods and the results, and those of :func:`add_model_options`.

    With ``by_protocol``, which describes what else the command takes in which case, ``--method`` and ``--facet`` are
    None by default.
    """
    shown = " ".join(default)
    parser.add_argument(
        "--method",
        nargs="+",
        default=None if by_protocol else list(default),
        metavar="M",
        help=f"{METHODS} ({'; '.join([shown, *by_protocol[:1]])})",
    )
    parser.add_argument("--out", type=Path, metavar="JSON", help="results with their provenance; resumed if they exist")
    parser.add_argument("--table", type=Path, metavar="FILE", help="tables, Markdown or by the suffix .tex LaTeX")
    if batches:
        parser.add_argument("--batch-size", type=positive, default=8, metavar="N", help="images at once (%(default)s)")
    if by_protocol:
        add_model_options(parser, sizes=False, facet=None, facet_help=f"(key; {by_protocol[1]})")
    else:
        add_model_options(parser, sizes=False)
    add_rule(
        parser,
        "--image-branch",
        IMAGE_BRANCHES,
        "where images are not whole patches: what LiFT's image branch sees as in the published evaluation (from "
        "pixel 2 on at 56 pixels and patch 16), or the pixels of the tokens",
    )
    add_output_options(parser)


def add_rule(group: argparse._ActionsContainer, option: str, rules: Sequence[str], about: str) -> None:
    """An option that takes one of the rules of :mod:`lift_fast.evaluation.rules`; the first is the default."""
    group.add_argument(option, choices=rules, default=rules[0], help=f"{about} (%(default)s)")


def add_sizes(parser: argparse.ArgumentParser, default: Sequence[int], about: str = "") -> None:
    """``--sizes``: pixels S of S x S."""
    parser.add_argument(
        "--sizes", type=positive, nargs="+", default=list(default), metavar="S", help=f"{about}(%(default)s)"
    )


def add_alphas(parser: argparse.ArgumentParser) -> None:
    """``--alphas``: the thresholds of PCK."""
    parser.add_argument(
        "--alphas", type=float, nargs="+", default=[0.1, 0.05, 0.01], metavar="A", help="of PCK (%(default)s)"
    )


def build(arguments: argparse.Namespace) -> tuple[FrozenViT, list[Method]]:
    """Backbone and methods of the options; ``arguments.lift`` then names the LiFT that was used.

    Raises:
        UsageError: if they cannot be built; names the option that helps.
    """
    import torch

    from lift_fast import devices
    from lift_fast.backbones import load_backbone
    from lift_fast.evaluation.methods import build_methods
    from lift_fast.lift import LiFT

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    if takes_demonstration_lift(arguments):
        arguments.lift = LIFT
    _require_lift(arguments)
    with as_usage_error():
        device = devices.resolve(arguments.device)
        backbone = load_backbone(
            arguments.model,
            weights=arguments.weights,
            random_weights=arguments.random_weights,
            facet=arguments.facet,
            layer=arguments.layer,
            stride=arguments.stride,
            head_order="interleaved",
            seed=arguments.seed,
            engine=arguments.engine,
        ).to(device, getattr(torch, arguments.dtype))
        backbone.require_engine()
        announce_compilation(arguments)
        lift: Any = arguments.lift
        # Commands that draw do not follow a published placement.
        image_branch = getattr(arguments, "image_branch", "aligned")
        if arguments.random_lift:
            with torch.random.fork_rng(devices=[]):
                torch.random.default_generator.manual_seed(arguments.seed)
                lift = LiFT(backbone.embed_dim, backbone.patch_size)
        return backbone, build_methods(arguments.method, backbone, lift, arguments.seed, image_branch)


def _require_lift(arguments: argparse.Namespace) -> None:
    """Refuse methods that need a LiFT where there is none; name the option that gives one."""
    wanted = [name for name in arguments.method if re.fullmatch(r"lift(-\d+)?", name)]
    if not wanted or arguments.lift or arguments.random_lift:
        return
    why = ""
    if arguments.model == BACKBONE and not (arguments.weights or arguments.random_weights or arguments.no_lift):
        chosen = arguments.facet if arguments.layer is None else f"{arguments.facet} of block {arguments.layer}"
        why = f" (the demonstration's was trained on the last block's keys, not on {chosen})"
    raise UsageError(f"{wanted[0]} needs a LiFT{why}; give --lift FILE or --random-lift, or leave the method out")


def say_remarks(arguments: argparse.Namespace) -> None:
    """Print what a reader of the results should know, on standard error unless that is switched off."""
    for remark in [] if arguments.quiet or arguments.json else remarks(arguments):
        print(remark, file=sys.stderr)


@contextmanager
def progress(arguments: argparse.Namespace, total: int | None, unit: str) -> Iterator[Callable[[int], object]]:
    """A bar on a terminal unless it is switched off; gives its update, and turns input errors into usage errors."""
    from tqdm import tqdm

    hidden = True if arguments.quiet else None
    with tqdm(total=total, unit=unit, disable=hidden, file=sys.stderr) as bar, as_usage_error():
        yield bar.update


def save_image(path: Path, image: Image.Image) -> None:
    """Write a chart or a sheet as a whole or not at all."""
    from PIL import Image

    from lift_fast._files import atomic_path

    with atomic_path(path) as temporary:
        image.save(temporary, format=Image.registered_extensions().get(path.suffix.lower(), "PNG"))


def record(arguments: argparse.Namespace, backbone: FrozenViT, methods: Sequence[Method]) -> dict[str, Any]:
    """What the results depend on, in the form of JSON."""
    from lift_fast import demonstration
    from lift_fast.evaluation.results import provenance

    files: dict[str, Any] = {"backbone": arguments.weights}
    if arguments.model == demonstration.BACKBONE and not (arguments.weights or arguments.random_weights):
        files["backbone"] = demonstration.backbone_file()
    for method in methods:
        if method.weights is not None:
            files[method.name] = demonstration.lift_file(method.weights)
    return {
        "model": arguments.model,
        "random_weights": arguments.random_weights,
        "facet": backbone.facet,
        "layer": backbone.layer,
        "stride": backbone.stride,
        "dtype": arguments.dtype,
        "seed": arguments.seed,
        "image_branch": arguments.image_branch,
        **provenance(str(backbone.device), files),
    }


def show(arguments: argparse.Namespace, content: dict[str, Any], tables: Sequence[Table]) -> int:
    """Print the figures and write the tables. Returns the exit status: 1 if something was left out."""
    from lift_fast._files import atomic_path
    from lift_fast.evaluation.results import as_json

    if arguments.table is not None and tables:
        latex = arguments.table.suffix.lower() == ".tex"
        with atomic_path(arguments.table) as temporary:
            temporary.write_text(
                "\n".join(table.latex() if latex else table.markdown() for table in tables), encoding="utf-8"
            )
    if arguments.json:
        print(json.dumps(as_json({name: value for name, value in content.items() if name != "scores"})))
    elif tables:
        print("\n".join(table.markdown() for table in tables))
    for name, reason in content["skipped"].items():
        print(f"skipped: {name}: {reason}", file=sys.stderr)
    return 1 if content["skipped"] else 0


def check_outputs(arguments: argparse.Namespace, *more: str) -> None:
    """Refuse files that cannot be written (--out, --table and ``more``) before hours of work."""
    for option in ("out", "table", *more):
        path = getattr(arguments, option, None)
        if path is not None:
            check_output(option, path)


def check_folder(option: str, path: Path) -> None:
    """Refuse a folder that cannot be made because there is a file at its path or above it."""
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise UsageError(f"--{option} {path}: {there} is a file; expected a folder")
