"""What every job of the GPU report is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

Row = dict[str, Any]
"""One line of the report. ``what`` names it; ``error`` and ``limit`` judge it; ``ms`` is a time; ``flops`` and
``bytes`` are what the work must do at least."""


@dataclass(frozen=True)
class Context:
    """One worker's share of a run."""

    device: torch.device
    rehearse: bool
    """On the CPU, at tiny sizes: that everything runs, and no figures."""
    seed: int


class Job(NamedTuple):
    """A piece of a stage that is worth keeping even where the next one dies."""

    name: str
    run: Callable[[Context], Iterator[Row]]
    """Yields each row as soon as it is known."""
    seconds: float
    """What it takes on an H100, compilation included where no warm-up spared it; it is ended after four times that."""


class Skip(Exception):
    """Why a job has nothing to do here; no failure."""
