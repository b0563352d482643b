"""Results of any protocol in one form: figures by method, metric and size, and what they depend on."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .figures import READERS, Figure
from .results import load_json

_SURROUNDINGS = {"versions", "platform", "device", "cpu"}


@dataclass(frozen=True)
class Run:
    """One result."""

    name: str
    path: Path
    protocol: str
    dataset: str
    figures: tuple[Figure, ...]
    measured: dict[str, Any]
    networks: dict[str, Any]
    """Model, options and weights."""
    surroundings: dict[str, Any]
    """Versions and machine."""
    date: str
    skipped: int
    """How many inputs could not be used."""
    content: str
    """The whole result without its date, to recognise copies."""


class Difference(NamedTuple):
    """Something that differs between runs."""

    kind: str
    """``"measured"``, ``"networks"`` or ``"surroundings"``."""
    name: str
    values: dict[str, Any]
    """By the name of the run; None where a run does not record it."""


def read_run(path: str | os.PathLike[str], name: str | None = None) -> Run:
    """Read a result of ``lift-fast eval``; ``name`` in the report defaults to the file's name without suffix.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a valid result, its protocol is unknown, or it has no summary.
    """
    path = Path(path)
    content = load_json(path)
    protocol = content["protocol"]
    reader = READERS.get(protocol) if isinstance(protocol, str) else None
    if reader is None:
        raise ValueError(f"{path} holds results of {protocol!r}; expected results of one of {', '.join(READERS)}")
    if content.get("complete") is False and "summary" not in content:
        raise ValueError(f"{path} holds an interrupted run; give its command again to resume it")
    try:
        shape = reader(content)
        record = dict(content.get("record") or {})
        if not isinstance(record.get("model", ""), str):
            raise TypeError(f"expected the name of a model, got {record['model']!r}")
        skipped = len(content.get("skipped") or {})
        surroundings = {key: record.pop(key) for key in _SURROUNDINGS if key in record}
        date = str(record.pop("date", ""))
        files = dict(record.pop("weights", {}))
        weights = {f"weights of {key}": str(entry["sha256"] or entry["file"]) for key, entry in files.items()}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is not a valid {protocol} results file ({reason})") from error
    if not shape.figures:
        raise ValueError(f"{path} holds no figures: nothing could be evaluated")
    # The date does not matter for the findings.
    undated = {**content, "record": {k: v for k, v in (content.get("record") or {}).items() if k != "date"}}
    name = path.stem if name is None else name
    about = (_flat(shape.measured), _flat({**record, **weights}), _flat(surroundings))
    content_of = json.dumps(undated, sort_keys=True)
    return Run(name, path, protocol, shape.dataset, tuple(shape.figures), *about, date, skipped, content_of)


def differences(runs: Sequence[Run]) -> list[Difference]:
    """What differs between runs, in the order of the kinds."""
    found = []
    for kind in ("measured", "networks", "surroundings"):
        by_run = {run.name: getattr(run, kind) for run in runs}
        for name in dict.fromkeys(key for entries in by_run.values() for key in entries):
            values = {run: entries.get(name) for run, entries in by_run.items()}
            # The weights of a method mean nothing for runs without that method.
            if name.startswith("weights of "):
                values = {run: value for run, value in values.items() if value is not None}
            first = next(iter(values.values()))
            if any(value != first for value in values.values()):
                found.append(Difference(kind, name, values))
    return found


def _flat(entries: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in entries.items():
        result.update(_flat(value, f"{prefix}{key} ") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return result
