"""Results of any protocol read back into one form: figures by method, metric and size, and what they depend on."""

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
    """What could not be used."""
    content: str
    """All of the result but its date, to recognise copies."""


class Difference(NamedTuple):
    """Something that is not the same in all runs."""

    kind: str
    """``"measured"``, ``"networks"`` or ``"surroundings"``."""
    name: str
    values: dict[str, Any]
    """By the name of the run; None where a run does not say."""


def read_run(path: str | os.PathLike[str], name: str | None = None) -> Run:
    """Read a result of ``lift-fast eval``.

    Args:
        path: the file.
        name: what the report calls it; None takes the file's name without suffix.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds no result, one of an unknown protocol, one without a summary, or one of another form.
    """
    path = Path(path)
    content = load_json(path)
    protocol = content["protocol"]
    reader = READERS.get(protocol) if isinstance(protocol, str) else None
    if reader is None:
        raise ValueError(f"{path} holds results of {protocol!r}; a report takes those of {', '.join(READERS)}")
    if content.get("complete") is False and "summary" not in content:
        raise ValueError(f"{path} is of a run that was interrupted; give its command again, and it goes on to the end")
    try:
        shape = reader(content)
        record = dict(content.get("record") or {})
        if not isinstance(record.get("model", ""), str):
            raise TypeError(f"expected the name of a model, got {record['model']!r}")
        skipped = len(content.get("skipped") or {})
        surroundings = {key: record.pop(key) for key in _SURROUNDINGS if key in record}
        date = str(record.pop("date", ""))
        weights = {f"weights of {key}": _weights(entry) for key, entry in dict(record.pop("weights", {})).items()}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ValueError(
            f"{path} says that it holds results of {protocol}, but not in their form ({type(error).__name__}: {error})"
        ) from error
    if not shape.figures:
        raise ValueError(f"{path} holds no figures: nothing could be evaluated")
    # A date says nothing of what was found.
    undated = {**content, "record": {k: v for k, v in (content.get("record") or {}).items() if k != "date"}}
    return Run(
        path.stem if name is None else name,
        path,
        protocol,
        shape.dataset,
        tuple(shape.figures),
        _flat(shape.measured),
        _flat({**record, **weights}),
        _flat(surroundings),
        date,
        skipped,
        json.dumps(undated, sort_keys=True),
    )


def differences(runs: Sequence[Run]) -> list[Difference]:
    """What is not the same in all runs, in the order of the kinds."""
    found = []
    for kind in ("measured", "networks", "surroundings"):
        told = {run.name: getattr(run, kind) for run in runs}
        for name in dict.fromkeys(key for entries in told.values() for key in entries):
            values = {run: entries.get(name) for run, entries in told.items()}
            # A method's weights say nothing about runs without that method.
            if name.startswith("weights of "):
                values = {run: value for run, value in values.items() if value is not None}
            first = next(iter(values.values()))
            if any(value != first for value in values.values()):
                found.append(Difference(kind, name, values))
    return found


def _weights(entry: Any) -> str:
    return str(entry["sha256"] or entry["file"])


def _flat(entries: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in entries.items():
        if isinstance(value, dict):
            result.update(_flat(value, f"{prefix}{key} "))
        else:
            result[f"{prefix}{key}"] = value
    return result
