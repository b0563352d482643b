"""The results of a run so far; on disk from the first row on, so that a kill loses one row."""

from __future__ import annotations

import json
import math
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lift_fast._files import atomic_path

from .context import Row


@dataclass
class State:
    """One run of the report."""

    out: Path
    """Prefix of the files."""
    rehearse: bool
    """On the CPU at tiny sizes: a check that everything runs, without figures."""
    budget: float
    """Seconds for the whole run."""
    seed: int
    results: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        """Seconds until the budget is spent."""
        return self.deadline - time.monotonic()

    def file(self, suffix: str) -> Path:
        """One of the files; dots in the stem are kept."""
        return self.out.with_name(self.out.name + suffix)

    @property
    def deadline(self) -> float:
        return self.began + self.budget

    def rows(self, stage: str) -> list[Row]:
        found: list[Row] = self.results.setdefault(stage, [])
        return found

    def write(self) -> None:
        """Write the results so far."""
        content = {
            "rehearsal": self.rehearse,
            "seed": self.seed,
            **self.results,
            "failures": self.failures,
            "skipped": self.skipped,
        }
        with atomic_path(self.file(".json")) as path:
            path.write_text(json.dumps(_strict(content), indent=1, allow_nan=False) + "\n")


class Listener:
    """Keeps and prints the reports of a stage's workers. Several threads call its methods, with ``lock`` held."""

    def __init__(self, state: State, stage: str) -> None:
        self.state, self.stage, self.lock = state, stage, threading.Lock()
        self.seconds: dict[str, float] = state.results.setdefault("seconds of jobs", {})

    def row(self, job: str, found: Row) -> None:
        self.state.rows(self.stage).append({"job": job, **found})
        error, limit = found.get("error"), found.get("limit")
        if error is not None and limit is not None and not error <= limit:
            case = f" {found['case']} {found['dtype']}" if "case" in found else ""
            self.state.failures.append(f"{self.stage}: {found['what']}{case}: error {error:.3e} > {limit:.0e}")
        if self.stage != "smoke":
            print(describe(found), flush=True)
        self.state.write()

    def failed(self, job: str, reason: str) -> None:
        self.state.failures.append(f"{self.stage}: {job}: {reason}")
        print(f"FAILED {job}: {reason}", flush=True)
        self.state.write()

    def skipped(self, job: str, reason: str) -> None:
        self.state.skipped.append(f"{self.stage}: {job}: {reason}")

    def ended(self, job: str, took: float) -> None:
        self.seconds[f"{self.stage}: {job}"] = took


def _strict(value: Any) -> Any:
    """The same without values that JSON lacks: NaN and infinity, a broken kernel's errors, become text."""
    if isinstance(value, dict):
        return {name: _strict(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def describe(row: Row) -> str:
    """One line of the output."""
    parts = [f"{row['what']:66}"]
    if "ms" in row:
        parts.append(f"{1e3 * row['ms']:10.1f} us" if row["ms"] < 1 else f"{row['ms']:10.3f} ms")
        if "flops" in row:
            parts.append(f"{row['flops'] / row['ms'] / 1e9:6.0f} TFLOP/s")
        if "bytes" in row:
            parts.append(f"{row['bytes'] / row['ms'] / 1e9:6.2f} TB/s")
    if "ratio" in row:
        parts.append(f"{row['ratio']:10.3g} x")
    if "error" in row:
        parts.append(f"error {row['error']:.1e} of {row['limit']:.0e}")
    if row.get("peak bytes") is not None:
        parts.append(f"{row['peak bytes'] / 1e6:.0f} MB")
    if "note" in row:
        parts.append(str(row["note"]))
    return "  ".join(parts)
