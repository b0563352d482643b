"""Report a run's progress: a CSV file, a progress bar, TensorBoard events."""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lift_fast._files import atomic_path

LOG_FILE = "log.csv"


class Log:
    """Appends a row for each step to ``log.csv``: ``step, epoch, loss``, a column ``loss_...`` for each of its
    ``terms``, ``images_per_second, unreadable``. With ``resumed_step``, rows after it are dropped first.

    Raises:
        ValueError: as :func:`tensorboard_writer`.
    """

    def __init__(self, folder: Path, terms: Sequence[str], resumed_step: int, tensorboard: bool) -> None:
        self.terms = terms
        columns = ("step", "epoch", "loss", *(f"loss_{term}" for term in terms), "images_per_second", "unreadable")
        self._events: Any = None
        self.path = folder / LOG_FILE
        rows: list[list[str]] = []
        if resumed_step and self.path.is_file():
            # Skip malformed rows, as a killed process may leave. All fields are numbers, so nothing is quoted; csv's
            # reader would fail on bytes that are not text.
            for line in self.path.read_text(encoding="ascii", errors="replace").splitlines():
                row = line.split(",")
                if len(row) == len(columns) and line.isascii() and row[0].isdecimal() and len(row[0]) < 19:
                    rows.append(row)
        with atomic_path(self.path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(row for row in rows if int(row[0]) <= resumed_step)
        if tensorboard:
            # Replace the later steps of an earlier run in this folder.
            self._events = tensorboard_writer()(str(folder), purge_step=resumed_step + 1)
        self._file = self.path.open("a", newline="")
        self._writer = csv.writer(self._file)

    def write(self, rows: list[tuple[int, int, float, Sequence[float], float, int]]) -> None:
        """Write and flush rows of (step, epoch, loss, its terms, images per second, unreadable)."""
        for step, epoch, loss, terms, speed, unreadable in rows:
            losses = [f"{value:.9g}" for value in (loss, *terms)]
            self._writer.writerow((step, epoch, *losses, f"{speed:.4g}", unreadable))
            if self._events is not None:
                names = ("loss", *(f"loss/{term}" for term in self.terms), "images/s")
                for name, value in zip(names, (loss, *terms, speed), strict=True):
                    self._events.add_scalar(name, value, step)
        self._file.flush()

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._events is not None:
            self._events.close()


def tensorboard_writer() -> Any:
    """PyTorch's writer class of TensorBoard events; ValueError if TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("tensorboard=True needs TensorBoard: pip install tensorboard, or leave it out") from error
    return SummaryWriter


def progress_bar(total: int, done: int, quiet: bool) -> Any:
    """tqdm over steps, on standard error if that is a terminal."""
    from tqdm import tqdm

    return tqdm(total=total, initial=done, unit="step", disable=True if quiet else None, file=sys.stderr)
