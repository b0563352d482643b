"""What the sections share: the device, the time that is left, and the results, written after every section."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lift_fast._files import atomic_path


@dataclass
class State:
    """One run of the report."""

    out: Path
    """Prefix of the files."""
    device: torch.device
    rehearse: bool
    """On the CPU, at tiny sizes: that everything runs, and no figures."""
    budget: float
    """Seconds for the whole run."""
    seed: int
    results: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    goals: list[dict[str, Any]] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        """Seconds until the budget is spent."""
        return self.budget - (time.monotonic() - self.began)

    def run(self, name: str, section: Callable[[State], None], least: float) -> None:
        """Run one section if ``least`` seconds are left; an error in it is a failure and ends only it."""
        if self.left() < least:
            self.skipped.append(f"{name}: {max(self.left(), 0):.0f} s of {self.budget:.0f} left, it wants {least:.0f}")
            return
        start = time.monotonic()
        print(f"== {name}", flush=True)
        try:
            section(self)
        except Exception as error:
            self.failures.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        self.results.setdefault("seconds", {})[name] = round(time.monotonic() - start, 1)
        self.write()

    def goal(self, text: str, value: float | None, limit: float, at_least: bool) -> None:
        """Judge a figure; None where it was not measured."""
        met = None if value is None else bool(value >= limit if at_least else value <= limit)
        self.goals.append({"goal": text, "measured": value, "limit": limit, "met": met})

    def write(self) -> None:
        """Write what there is so far."""
        content = {
            "rehearsal": self.rehearse,
            "seed": self.seed,
            **self.results,
            "failures": self.failures,
            "skipped": self.skipped,
            "goals": self.goals,
        }
        with atomic_path(self.out.with_suffix(".json")) as path:
            path.write_text(json.dumps(content, indent=1) + "\n")
