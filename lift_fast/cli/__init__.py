"""The command line: ``lift-fast match | track | extract | export | train | eval | show | info``.

Only running one imports PyTorch.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext

from lift_fast._interrupts import STATUS, ending_at_once
from lift_fast._text import one_line

from . import eval as evaluation
from . import export, extract, info, match, show, track, train
from .clock import process_start
from .errors import UsageError
from .options import run_within_limits

_SILENCE = logging.NullHandler()


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command."""
    parser = argparse.ArgumentParser(
        prog="lift-fast",
        description="Dense features of frozen Vision Transformers with LiFT.",
        epilog="Each command has its own --help with an example.",
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for module in (match, track, extract, export, train, evaluation, show, info):
        module.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: arguments; None takes those of this process, and Ctrl-C then ends it immediately.

    Returns:
        0 on success, 1 if some inputs were skipped or a training diverged or could not be saved, 2 for invalid input
        (reported on stderr), 130 after an interrupt, 143 after a SIGTERM that saved a training.
    """
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if arguments.version:
        from importlib.metadata import version

        print(f"lift_fast {version('lift_fast')}")
        return 0
    if arguments.command is None:
        parser.print_help()
        return 2
    name = f"lift-fast {arguments.command}"
    arguments.started = process_start() if argv is None else time.perf_counter()
    if argv is None:
        _import_pytorch()
    try:
        with ending_at_once(name) if argv is None else nullcontext(), warnings.catch_warnings():
            # Pillow's warnings do not name the file, and problems that matter are errors.
            warnings.filterwarnings("ignore", module="PIL")
            logging.getLogger("PIL").addHandler(_SILENCE)
            return run_within_limits(arguments)
    except UsageError as error:
        print(f"{name}: {one_line(error)}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader of the pipe, such as head, has closed it. Without this Python would fail again on closing stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted", file=sys.stderr)
        return STATUS


def _import_pytorch() -> None:
    """Import it for a process that runs one command and ends.

    Before the command looks after Ctrl-C, because only the system's default action works while a library is loaded.
    Python's collector would traverse all that PyTorch creates several times on the way, and once more at the end: a
    quarter of the seconds that the import and the exit take.
    """
    gc.disable()
    import torch  # noqa: F401

    gc.freeze()
    gc.enable()
    atexit.register(gc.freeze)
