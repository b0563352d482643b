"""Jobs of the GPU report: their inputs, their rows, and the programs that they call."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[2]
Row = dict[str, Any]
"""One line of the report. ``what`` names it; ``error`` must not exceed ``limit``; ``ms`` is a time; ``flops`` and
``bytes`` are the least work."""


@dataclass(frozen=True)
class Context:
    """One worker's share of a run."""

    device: torch.device
    rehearse: bool
    """On the CPU at tiny sizes: a check that everything runs, without figures."""
    seed: int


class Job(NamedTuple):
    """A piece of a stage; its rows are kept even if the next job crashes."""

    name: str
    run: Callable[[Context], Iterator[Row]]
    """Yields each row as soon as it is known."""
    seconds: float
    """Expected time on an H100, with compilation unless the warm-up did it; the job is ended after four times that."""


class Skip(Exception):
    """The reason why a job has nothing to do here; not a failure."""


def call(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program in the repository's root and keep its output; its status is the caller's to check."""
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, **options)


def last_line(*outputs: str) -> str:
    """The last line of the first output that has one."""
    return next((output.strip().splitlines()[-1] for output in outputs if output.strip()), "no output")
