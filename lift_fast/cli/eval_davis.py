"""``lift-fast eval davis``: video object segmentation on DAVIS 2017 by label propagation."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lift_fast.evaluation.rules import PLACEMENTS, PROTOCOLS

from . import eval_options as common
from .errors import UsageError, as_usage_error
from .options import positive, whole

if TYPE_CHECKING:
    from lift_fast.backbones import FrozenViT
    from lift_fast.evaluation.davis import Davis, SequenceScores
    from lift_fast.evaluation.methods import Method

_METHODS = ("backbone", "bilinear", "lift")
_DESCRIPTION = """DAVIS 2017, semi-supervised: label propagation carries the masks of each video's first frame through
the video, and the masks of all frames but the first and the last are scored: J (region), F (boundary), mean, recall and
decay, means over objects. Masks go to --masks as MASKS/<method>/<sequence>/<frame>.png, indexed; an interrupted run
resumes there. A sequence that cannot be used is named and left out (exit status 1)."""
_EXAMPLE = (
    "examples: lift-fast eval davis --root DAVIS --model dino_vits16 --lift lift_dino_vits16.pth --out davis.json; "
    "lift-fast eval davis --root DAVIS --model dino_vits16 --protocol dino --out dino.json; "
    "lift-fast eval davis --root DAVIS --score MASKS/lift OTHER=elsewhere/masks"
)


def add_parser(protocols: Any) -> None:
    """Add the protocol to argparse's ``protocols``."""
    parser = protocols.add_parser(
        "davis", help="video object segmentation on DAVIS 2017", description=_DESCRIPTION, epilog=_EXAMPLE
    )
    parser.add_argument("--root", type=Path, required=True, metavar="DIR", help="folder of DAVIS (480p, original form)")
    parser.add_argument("--subset", default="val", help="list of sequences in ImageSets (%(default)s)")
    parser.add_argument("--year", default="2017", help="folder of that list (%(default)s)")
    parser.add_argument(
        "--binary-masks",
        action="store_true",
        help="every value of a mask but 0 is the one object, as in DAVIS 2016; otherwise 255 is void",
    )
    parser.add_argument("--resolution", default="480p", help="folder of frames and masks (%(default)s)")
    parser.add_argument("--sequences", nargs="+", metavar="NAME", help="only these of the list")
    parser.add_argument(
        "--masks", type=Path, default=Path("davis_masks"), metavar="DIR", help="folder for the masks (%(default)s)"
    )
    steps = parser.add_mutually_exclusive_group()
    steps.add_argument("--predict-only", action="store_true", help="write masks and score nothing")
    steps.add_argument(
        "--score",
        nargs="+",
        metavar="[LABEL=]DIR",
        help="score existing folders of masks, DIR/<sequence>/<frame>.png, and predict nothing",
    )
    parser.add_argument("--overwrite", action="store_true", help="predict again what exists")
    parser.add_argument(
        "--csv", action="store_true", help="next to the masks, the published evaluation's two CSV files"
    )
    numbers = parser.add_argument_group("protocol")
    common.add_rule(
        numbers,
        "--protocol",
        PROTOCOLS,
        "the LiFT paper's: S x S pixels, the facet key; or that of DINO's own table: shorter side S, longer one "
        "cut to a multiple of 64, the last block's tokens after the final norm",
    )
    numbers.add_argument(
        "--size", type=positive, metavar="S", help="frames are resized to S, see --protocol (448; 480 for dino)"
    )
    common.add_rule(
        numbers,
        "--placement",
        PLACEMENTS,
        "lay each map over the whole frame and enlarge its labels by the patch size, as published, or over the "
        "pixels that it covers",
    )
    numbers.add_argument("--queue", type=whole, default=7, metavar="N", help="last frames as context (%(default)s)")
    numbers.add_argument(
        "--radius", type=whole, default=12, metavar="N", help="of the neighbourhood in cells (%(default)s)"
    )
    numbers.add_argument("--topk", type=positive, default=5, metavar="K", help="keys to average (%(default)s)")
    numbers.add_argument("--temperature", type=float, default=0.1, metavar="T", help="of their weights (%(default)s)")
    common.add_method_options(
        parser, _METHODS, by_protocol=("backbone with --protocol dino", "final, tokens after the final norm, with dino")
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Predict and score. Returns the exit status."""
    import torch

    from lift_fast.evaluation.davis import Davis, summary
    from lift_fast.evaluation.results import save_json

    common.check_outputs(arguments)
    if not arguments.score:
        common.check_folder("masks", arguments.masks)
    _by_protocol(arguments)
    with as_usage_error():
        dataset = Davis(
            arguments.root, arguments.subset, arguments.resolution, arguments.year, binary_masks=arguments.binary_masks
        )
    names = _chosen(dataset, arguments.sequences)
    options = {
        "subset": arguments.subset,
        "year": arguments.year,
        "resolution": arguments.resolution,
        "sequences": names,
        "binary_masks": arguments.binary_masks,
    }
    skipped: dict[str, str] = {}
    if arguments.score:
        folders = _labelled(arguments.score)
        about: dict[str, Any] = {}
    else:
        backbone, methods = common.build(arguments)
        common.say_remarks(arguments)
        folders = {method.name: arguments.masks / method.name for method in methods}
        about = common.record(arguments, backbone, methods)
        options.update(_numbers(arguments))
        skipped = _predict(arguments, dataset, names, backbone, methods, about)
    if arguments.predict_only:
        for name, reason in skipped.items():
            print(f"skipped: {name}: {reason}", file=sys.stderr)
        return 1 if skipped else 0
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    scores = _score(arguments, dataset, [name for name in names if name not in skipped], folders, skipped)
    content = summary.content(scores, skipped, options, about)
    if arguments.out is not None:
        save_json(arguments.out, content)
    return common.show(arguments, content, summary.tables(content))


def _predict(
    arguments: argparse.Namespace,
    dataset: Davis,
    names: list[str],
    backbone: FrozenViT,
    methods: list[Method],
    record: dict[str, Any],
) -> dict[str, str]:
    """Predict the masks of all methods. Returns what was left out, and why."""
    from lift_fast.evaluation.davis import Job, Network, PropagationOptions, frames, predict_dataset

    normalisation = (backbone.mean, backbone.std)
    if arguments.protocol == "dino":
        normalisation = (frames.DINO_MEAN, frames.DINO_STD)
    network = Network(methods, *normalisation, backbone.patch_size, backbone.device, backbone.dtype)
    with as_usage_error():
        options = PropagationOptions(**_numbers(arguments), batch_size=arguments.batch_size)
    # Machines and versions may change between parts of a run, networks and numbers may not.
    kept = ("model", "random_weights", "facet", "layer", "stride", "dtype", "seed", "image_branch")
    jobs = []
    for method in methods:
        if method.name in (".", ".."):
            raise UsageError(f"{method.name!r} cannot be a label here: masks go to a folder of that name")
        settings = {
            "method": method.name,
            **{name: record[name] for name in kept},
            "weights": {name: record["weights"].get(name) for name in ("backbone", method.name)},
            **_numbers(arguments),
            "binary_masks": arguments.binary_masks,
        }
        jobs.append(Job(method.name, method, arguments.masks / method.name, settings))
    total = sum(len(list((dataset.frames_folder / name).glob("*.jpg"))) for name in names)
    with common.progress(arguments, total, "frame") as update:
        done = predict_dataset(
            dataset, jobs, network, options, names=names, overwrite=arguments.overwrite, progress=update
        )
    if done.kept and not arguments.quiet:
        print(
            f"{len(done.kept)} of {len(done.kept) + len(done.computed)} exist already; --overwrite predicts them again",
            file=sys.stderr,
        )
    return done.problems


def _score(
    arguments: argparse.Namespace,
    dataset: Davis,
    names: list[str],
    folders: dict[str, Path],
    skipped: dict[str, str],
) -> dict[str, list[SequenceScores]]:
    """Scores by method. What could not be scored is added to ``skipped`` and left out for every method."""
    import torch

    from lift_fast.evaluation.davis import score_folder, write_csv

    scores = {}
    with common.progress(arguments, len(names) * len(folders), "sequence") as update:
        for method, folder in folders.items():
            scores[method], problems = score_folder(
                dataset, folder, names, threads=torch.get_num_threads(), progress=update
            )
            for name, problem in problems.items():
                skipped.setdefault(name, problem)
    # Means over different objects cannot be compared.
    scores = {method: [one for one in found if one.name not in skipped] for method, found in scores.items()}
    if arguments.csv:
        for method, folder in folders.items():
            if scores[method]:
                write_csv(scores[method], folder, arguments.subset)
    return scores


def _numbers(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("protocol", "placement", "size", "queue", "radius", "topk", "temperature")
    return {name: getattr(arguments, name) for name in names}


def _by_protocol(arguments: argparse.Namespace) -> None:
    """Each protocol's defaults."""
    from lift_fast.evaluation.davis import frames

    dino = arguments.protocol == "dino"
    if arguments.method is None:
        # A requested LiFT is used, whether or not it was trained on these features.
        arguments.method = list(_METHODS if not dino or arguments.lift or arguments.random_lift else _METHODS[:1])
    if arguments.facet is None:
        arguments.facet = "final" if dino else "key"
    if arguments.size is None:
        arguments.size = frames.SIZES[arguments.protocol]


def _chosen(dataset: Davis, wanted: list[str] | None) -> list[str]:
    unknown = [name for name in wanted or () if name not in dataset.names]
    if unknown:
        raise UsageError(f"{dataset.list_path} does not list {', '.join(unknown)}")
    return [name for name in dataset.names if wanted is None or name in wanted]


def _labelled(entries: list[str]) -> dict[str, Path]:
    """Folders of masks by label; the default label is the folder's name."""
    folders: dict[str, Path] = {}
    for entry in entries:
        label, equals, path = entry.partition("=")
        if not equals or Path(entry).is_dir():
            label, path = Path(entry).resolve().name, entry
        if not Path(path).is_dir():
            raise UsageError(f"--score: no folder {path}")
        if label in folders:
            raise UsageError(f"--score: two folders are called {label!r}; give labels, LABEL=DIR")
        folders[label] = Path(path)
    return folders
