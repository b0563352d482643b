"""The metrics of each protocol: their range, and how a table shows them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One metric of one or more protocols."""

    protocols: tuple[str, ...]
    pattern: str
    """Regular expression of its name in results."""
    best: str
    """``"high"``, ``"low"``, or ``""`` where neither is better."""
    digits: int
    """After the point."""
    lowest: float = 0.0
    highest: float = math.inf
    shown: bool = True
    """Whether a report shows it by default."""
    title: str = ""
    """Of its column; empty for its name."""


_POINTS = ("warp", "spair")
METRICS = (
    Metric(_POINTS, r"PCK@\d+(\.\d+)?(e-\d+)?", "high", 2, highest=100.0),
    Metric(_POINTS, r"PCK@\d+(\.\d+)?(e-\d+)? per image", "high", 2, highest=100.0, shown=False),
    Metric(_POINTS, r"median", "low", 2, title="median error, px"),
    Metric(_POINTS, r"error", "low", 2, shown=False, title="mean error, px"),
    Metric(("davis",), r"J&F-Mean", "high", 1, highest=100.0),
    Metric(("davis",), r"J-Mean", "high", 1, highest=100.0),
    Metric(("davis",), r"F-Mean", "high", 1, highest=100.0),
    Metric(("davis",), r"[JF]-Recall", "high", 1, highest=100.0, shown=False),
    Metric(("davis",), r"[JF]-Decay", "low", 1, lowest=-100.0, highest=100.0, shown=False),
    Metric(("discovery",), r"CorLoc", "high", 2, highest=100.0, title="CorLoc, %"),
    Metric(("discovery",), r"mean IoU", "high", 3, highest=1.0),
    # Mostly whole images, which count as right where objects are large: CorLoc cannot be read without this number.
    Metric(("discovery",), r"not determined", "", 0),
    Metric(("cka",), r"CKA", "high", 3, highest=1.0),
    Metric(("cka",), r"pooled CKA", "high", 3, highest=1.0, shown=False),
    Metric(("cost",), r"parameters, M", "", 1),
    Metric(("cost",), r"GFLOPs", "", 2),
    Metric(("cost",), r"GFLOPs as published", "", 2),
    Metric(("cost",), r"ms", "", 2),
)
METRIC_PROTOCOLS = tuple(dict.fromkeys(name for metric in METRICS for name in metric.protocols))


def metric_of(protocol: str, name: str) -> Metric | None:
    """The metric with this name in a protocol's results, or None."""
    for metric in METRICS:
        if protocol in metric.protocols and re.fullmatch(metric.pattern, name):
            return metric
    return None
