"""``lift-fast eval report``: runs side by side, with published numbers."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from . import eval_options as common
from .errors import UsageError, as_usage_error

_DESCRIPTION = """Put results of any protocol side by side, one table for each protocol and data set, and next to them
published numbers with their source. The notes below each table list what differs between the runs: weights, options,
versions, images. They name runs that did not measure the same thing. Tables go to standard output as Markdown."""
_EXAMPLE = "example: lift-fast eval report old=runs/warp1.json new=runs/warp2.json cka.json --chart size.png"


def add_parser(protocols: Any) -> None:
    """Add the command to argparse's ``protocols``."""
    parser = protocols.add_parser(
        "report", help="several runs side by side, with published numbers", description=_DESCRIPTION, epilog=_EXAMPLE
    )
    parser.add_argument("runs", nargs="+", metavar="[NAME=]JSON", help="what lift-fast eval wrote with --out")
    parser.add_argument(
        "--metrics", nargs="+", metavar="M", help="such as PCK@0.1 or J-Decay (the main ones of each protocol)"
    )
    parser.add_argument(
        "--published",
        metavar="none|FILE",
        help="no published numbers, or those of a file (those that ship with the package)",
    )
    parser.add_argument("--out", type=Path, metavar="JSON", help="the report as JSON")
    parser.add_argument("--latex", type=Path, metavar="FILE", help="the tables and their notes for LaTeX")
    parser.add_argument("--chart", type=Path, metavar="PNG", help="the first of --metrics against --against")
    parser.add_argument(
        "--against", choices=("size", "cost"), default="size", help="cost needs a result of eval cost (%(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON on standard output")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Read, compare, write. Returns the exit status."""
    from lift_fast._files import atomic_path
    from lift_fast.evaluation import report
    from lift_fast.evaluation.published import SHIPPED, load_published
    from lift_fast.evaluation.results import as_json, save_json
    from lift_fast.evaluation.runs import read_run

    common.check_outputs(arguments, "latex", "chart")
    with as_usage_error():
        runs = [read_run(path, name) for name, path in map(_named, arguments.runs)]
        published = None if arguments.published == "none" else load_published(arguments.published or SHIPPED)
        found = report.build(runs, published, arguments.metrics)
        metric = arguments.metrics[0] if arguments.metrics else None
        chart = report.draw(found, metric, arguments.against) if arguments.chart is not None else None
        if chart is not None:
            common.save_image(arguments.chart, chart)
        content = found.as_content()
        if arguments.out is not None:
            save_json(arguments.out, content)
        if arguments.latex is not None:
            with atomic_path(arguments.latex) as temporary:
                temporary.write_text(found.latex(), encoding="utf-8")
    print(json.dumps(as_json(content)) if arguments.json else found.markdown())
    return 0


def _named(text: str) -> tuple[str | None, Path]:
    """A run's name and file; a file whose name holds ``=`` is taken as it is."""
    name, equals, path = text.partition("=")
    if not equals or Path(text).is_file():
        return None, Path(text)
    if not name.strip() or "\n" in name or not path:
        raise UsageError(f"expected a file or NAME=FILE, got {text!r}")
    return name, Path(path)
