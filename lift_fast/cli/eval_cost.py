"""``lift-fast eval cost``: parameters, FLOPs and milliseconds of methods, and what they buy."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import eval_options as common
from .errors import UsageError, as_usage_error

if TYPE_CHECKING:
    from torch import Tensor

    from lift_fast.evaluation.methods import Method
    from lift_fast.evaluation.runs import Run

_DESCRIPTION = """Cost of one image of S x S pixels: parameters, FLOPs (2 x multiply-adds of what the method's plain
graph computes), and GFLOPs as the LiFT paper counts them (4.34 for DINO S/16 at 224 pixels). With --results, files of
other protocols, accuracy against cost is drawn into --chart."""
_EXAMPLE = (
    "example: lift-fast eval cost --model dino_vits16 --lift lift_dino_vits16.pth --method backbone lift double-size "
    "stride-8 --sizes 112 224 --results warp.json --metric PCK@0.1 --chart cost.png"
)


def add_parser(protocols: Any) -> None:
    """Add the command to argparse's ``protocols``."""
    parser = protocols.add_parser(
        "cost", help="parameters, FLOPs, milliseconds", description=_DESCRIPTION, epilog=_EXAMPLE
    )
    common.add_sizes(parser, (56, 112, 224, 448), "S x S pixels ")
    parser.add_argument("--measure", action="store_true", help="also milliseconds: median of 10 calls, one image")
    parser.add_argument(
        "--results", type=Path, nargs="+", default=[], metavar="JSON", help="results by size of other protocols"
    )
    parser.add_argument("--metric", default="PCK@0.1", help="figure of --results (%(default)s)")
    parser.add_argument("--published", action="store_true", help="draw over the paper's count instead of FLOPs")
    parser.add_argument("--chart", type=Path, metavar="PNG", help="metric against cost; needs --results")
    common.add_method_options(parser, ("backbone", "bilinear", "lift", "double-size"), batches=False)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """The protocol. Returns the exit status."""
    import torch

    from lift_fast.evaluation import cost
    from lift_fast.evaluation.results import save_json

    common.check_outputs(arguments, "chart")
    if arguments.chart is not None and not arguments.results:
        raise UsageError("--chart draws --metric against cost; give the files of other protocols with --results")
    with as_usage_error():
        scores = {}
        if arguments.results:
            scores = cost.accuracies(_results(arguments.results, arguments.model), arguments.metric)
    backbone, methods = common.build(arguments)
    pairs = [(method, size) for size in arguments.sizes for method in methods]
    costs = []
    with common.progress(arguments, len(pairs), "cost") as update:
        for method, size in pairs:
            milliseconds = None
            if arguments.measure:
                imgs = torch.zeros(1, 3, size, size, device=backbone.device, dtype=backbone.dtype)
                milliseconds = cost.measure(partial(_once, method, imgs), backbone.device)
            costs.append(cost.method_cost(method.name, backbone, size, method.network, milliseconds))
            update(1)
    content = cost.as_content(costs)
    content["record"] = common.record(arguments, backbone, methods)
    tables = [cost.table(costs)]
    if scores:
        content["metric"] = arguments.metric
        for entry in content["costs"]:
            score = scores.get((entry["method"], entry["size"]))
            entry["score"] = score and score.as_list()
        known = {name for name, _ in scores}
        missing = [method.name for method in methods if method.name not in known]
        if missing and not (arguments.quiet or arguments.json):
            print(f"--results hold no {arguments.metric} of {', '.join(missing)}", file=sys.stderr)
        tables.append(cost.score_table(costs, scores, arguments.metric))
    if arguments.out is not None:
        save_json(arguments.out, content)
    if arguments.chart is not None:
        with as_usage_error():
            common.save_image(arguments.chart, cost.draw_curve(costs, scores, arguments.metric, arguments.published))
    return common.show(arguments, content, tables)


def _results(paths: list[Path], model: str) -> list[Run]:
    """Read the results, which must be of the backbone whose costs are counted."""
    from lift_fast.evaluation.runs import read_run

    runs = [read_run(path) for path in paths]
    for run in runs:
        measured = run.networks.get("model", model)
        if measured != model:
            # The figures of one backbone over the costs of another would mean nothing.
            raise UsageError(
                f"{run.path} was measured with {measured}, the costs are of {model}; give --model {measured}"
            )
    return runs


def _once(method: Method, imgs: Tensor) -> None:
    from lift_fast.evaluation.methods import Batch

    # A batch keeps its tokens, so each call needs its own.
    method(Batch(imgs))
