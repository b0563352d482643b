"""``lift-fast info``: the facts for a bug report."""

from __future__ import annotations

import argparse
import json
from typing import Any


def add_parser(commands: Any) -> None:
    """Add the command to argparse's ``commands``."""
    parser = commands.add_parser(
        "info",
        help="versions, and what runs where",
        description="Versions, what runs on this machine and why other parts do not.",
        epilog="example: lift-fast info --json",
    )
    parser.add_argument("--json", action="store_true", help="print as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the report."""
    from lift_fast.env_report import report, report_text

    print(json.dumps(report(), indent=2) if arguments.json else report_text())
    return 0
