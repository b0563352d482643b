"""``lift-fast eval``: one command for each evaluation protocol."""

from __future__ import annotations

from typing import Any

from . import eval_cka, eval_cost, eval_davis, eval_discovery, eval_report, eval_spair, eval_warp


def add_parser(commands: Any) -> None:
    """Add the command to argparse's ``commands``."""
    parser = commands.add_parser(
        "eval",
        help="evaluation protocols",
        description="Compare methods for dense features by the published protocols.",
        epilog="Each protocol has its own --help with an example.",
    )
    protocols = parser.add_subparsers(dest="protocol", metavar="PROTOCOL", title="protocols", required=True)
    for module in (eval_spair, eval_warp, eval_davis, eval_discovery, eval_cka, eval_cost, eval_report):
        module.add_parser(protocols)
