"""The results of each protocol in one form: figures by method, metric and size, and what decides them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from .discovery.dataset import PUBLISHED_NAMES
from .metrics import metric_of
from .results import Estimate

# Options that choose what is reported and do not change a figure; sizes are columns.
_NEUTRAL = {"methods", "sizes", "alphas", "reference"}


@dataclass(frozen=True)
class Figure:
    """One figure of a run."""

    method: str
    metric: str
    """As :mod:`lift_fast.evaluation.metrics` names it."""
    size: int | None
    """Pixels S of S x S images; None for images in their own size, and where the result does not record it."""
    value: Estimate | float


class Shape(NamedTuple):
    """The content of one protocol's result."""

    dataset: str
    """Results on different data sets never share a table; empty where the protocol has none."""
    figures: list[Figure]
    measured: dict[str, Any]
    """What decides which figures are measured: runs that differ in it cannot be compared."""


def _options(content: dict[str, Any], *columns: str) -> dict[str, Any]:
    """Options that decide what is measured; the table shows ``columns`` already."""
    return {key: value for key, value in content["options"].items() if key not in _NEUTRAL and key not in columns}


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise TypeError(f"expected a number, got {value!r}")
    return float(value)


def _value(entry: Any) -> Estimate | float | None:
    """A figure of a result: a number, ``[value, low, high]`` or null."""
    if not isinstance(entry, list):
        return None if entry is None else _number(entry)
    value, low, high = (math.nan if part is None else _number(part) for part in entry)
    return Estimate(value, low, high) if math.isfinite(value) else None


def _by_size(content: dict[str, Any]) -> Shape:
    summary = content["summary"]
    figures = []
    for size, methods in summary["sizes"].items():
        for method, entries in methods.items():
            for metric, entry in entries.items():
                # Differences, categories and other entries stand next to the metrics.
                if metric_of(content["protocol"], metric) is not None:
                    value = _value(entry)
                    if value is not None:
                        figures.append(Figure(method, metric, int(size), value))
    counts = {
        f"number of {key}": sum(value.values()) if isinstance(value, dict) else value
        for key, value in summary.items()
        if key != "sizes"
    }
    return Shape(str(content["options"].get("split", "")), figures, {**_options(content, "split"), **counts})


def _davis(content: dict[str, Any]) -> Shape:
    options = content["options"]
    # Masks that were only scored do not record the size of the frames.
    size = options.get("size")
    figures, counts = [], {}
    for method, entries in content["summary"].items():
        for metric, entry in entries.items():
            if metric in ("sequences", "objects"):
                counts[f"number of {metric}"] = entry
            elif entry is not None:
                figures.append(Figure(method, metric, None if size is None else int(size), _number(entry)))
    # LiFT's published figures do not belong next to results of DINO's own protocol.
    protocol = ", DINO's protocol" if options.get("protocol") == "dino" else ""
    dataset = f"{options['year']} {options['subset']}{protocol}"
    return Shape(dataset, figures, {**_options(content, "year", "subset", "size"), **counts})


def _discovery(content: dict[str, Any]) -> Shape:
    options = content["options"]
    size = options["resolution"]
    figures, counts = [], {}
    for method, entries in content["summary"].items():
        counts["number of images"] = entries["pictures"]
        for metric, key in (("CorLoc", "corloc"), ("mean IoU", "mean_iou"), ("not determined", "degenerate")):
            if entries[key] is not None:
                figures.append(Figure(method, metric, None if size is None else int(size), _number(entries[key])))
    name = str(options["dataset"])
    measured = {**_options(content, "dataset", "resolution"), **counts}
    return Shape(PUBLISHED_NAMES.get(name, name), figures, measured)


def _cka(content: dict[str, Any]) -> Shape:
    figures = []
    for method, curve in content["curves"].items():
        for size, entry in curve.items():
            for metric, key in (("CKA", "cka"), ("pooled CKA", "pooled")):
                value = _value(entry[key])
                if value is not None:
                    figures.append(Figure(method, metric, int(size), value))
    measured = {key: content[key] for key in ("estimator", "reference", "grid")}
    measured["photographs"] = content.get("options", {}).get("photographs")
    return Shape("", figures, {**measured, "number of images": content["pictures"]})


def _cost(content: dict[str, Any]) -> Shape:
    figures, timed = [], False
    for cost in content["costs"]:
        values = {
            "parameters, M": _number(cost["parameters"]) / 1e6,
            "GFLOPs": _number(cost["gflops"]),
            "GFLOPs as published": _number(cost["published_gflops"]),
        }
        if cost["milliseconds"] is not None:
            timed, values["ms"] = True, _number(cost["milliseconds"])
        figures += [Figure(str(cost["method"]), metric, int(cost["size"]), value) for metric, value in values.items()]
    # Only milliseconds depend on the machine.
    record = content.get("record") or {}
    return Shape("", figures, {key: record.get(key) for key in ("device", "cpu")} if timed else {})


READERS: dict[str, Callable[[dict[str, Any]], Shape]] = {
    "warp": _by_size,
    "spair": _by_size,
    "davis": _davis,
    "discovery": _discovery,
    "cka": _cka,
    "cost": _cost,
}
