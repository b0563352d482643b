"""The curves of an evaluation by CKA, as a chart and as a table."""

from __future__ import annotations

import math
from typing import Any

from PIL import Image

from lift_fast.evaluation.charts import Series, line_chart
from lift_fast.evaluation.results import Estimate
from lift_fast.evaluation.tables import Column, Table


def draw_curves(content: dict[str, Any]) -> Image.Image:
    """The curves of :func:`scale_invariance` as a chart; raises ``ValueError`` if no value is defined."""
    series = []
    for name, curve in content["curves"].items():
        estimates = ((int(size), Estimate.of(entry["cka"])) for size, entry in curve.items())
        known = [(size, one) for size, one in estimates if one is not None and math.isfinite(one.value)]
        series.append(Series.of(name, known))
    title = f"Linear CKA with the features at {content['reference']} x {content['reference']}"
    return line_chart(series, title=f"{title}, {content['pictures']} images", x="input size", y="CKA")


def table(content: dict[str, Any]) -> Table:
    """CKA by method and size."""
    rows = []
    for name, curve in content["curves"].items():
        rows.append((name, [Estimate.of(curve[str(size)]["cka"]) for size in content["sizes"]]))
    title = f"Linear CKA with the features at {content['reference']} pixels, {content['pictures']} images"
    return Table(title, [Column(f"{size}", digits=3) for size in content["sizes"]], rows)
