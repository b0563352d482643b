"""What a run has found so far; on disk from the first row on, so that a kill loses one row."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lift_fast._files import atomic_path

from .context import Row
from .crew import Listener


@dataclass
class State:
    """One run of the report."""

    out: Path
    """Prefix of the files."""
    rehearse: bool
    """On the CPU, at tiny sizes: that everything runs, and no figures."""
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
        """One of the files; the stem's own dots stay."""
        return self.out.with_name(self.out.name + suffix)

    @property
    def deadline(self) -> float:
        return self.began + self.budget

    def rows(self, stage: str) -> list[Row]:
        found: list[Row] = self.results.setdefault(stage, [])
        return found

    def listener(self, stage: str) -> Listener:
        """Keeps what a stage's workers say, and prints it as it comes."""
        seconds: dict[str, float] = self.results.setdefault("seconds of jobs", {})

        def row(job: str, found: Row) -> None:
            self.rows(stage).append({"job": job, **found})
            error, limit = found.get("error"), found.get("limit")
            if error is not None and limit is not None and not error <= limit:
                case = f" {found['case']} {found['dtype']}" if "case" in found else ""
                self.failures.append(f"{stage}: {found['what']}{case}: error {error:.3e} > {limit:.0e}")
            if stage != "smoke":
                print(describe(found), flush=True)
            self.write()

        def failed(job: str, reason: str) -> None:
            self.failures.append(f"{stage}: {job}: {reason}")
            print(f"FAILED {job}: {reason}", flush=True)
            self.write()

        def skipped(job: str, reason: str) -> None:
            self.skipped.append(f"{stage}: {job}: {reason}")

        def ended(job: str, took: float) -> None:
            seconds[f"{stage}: {job}"] = took

        return Listener(row, failed, skipped, ended)

    def write(self) -> None:
        """Write what there is so far."""
        content = {
            "rehearsal": self.rehearse,
            "seed": self.seed,
            **self.results,
            "failures": self.failures,
            "skipped": self.skipped,
        }
        with atomic_path(self.file(".json")) as path:
            path.write_text(json.dumps(_strict(content), indent=1, allow_nan=False) + "\n")


def _strict(value: Any) -> Any:
    """The same in what JSON has: NaN and infinity, a broken kernel's errors, as text."""
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
