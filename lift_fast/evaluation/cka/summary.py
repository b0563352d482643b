"""The curves of an evaluation by CKA, as a chart and as a table."""

from __future__ import annotations

import math
from typing import Any

from PIL import Image

from lift_fast.evaluation.charts import Series, line_chart
from lift_fast.evaluation.results import Estimate
from lift_fast.evaluation.tables import Column, Table


def draw_curves(content: dict[str, Any]) -> Image.Image:
    """The curves of :func:`scale_invariance` as a chart.

    Raises:
        ValueError: if no value is defined.
    """
    series = []
    for name, curve in content["curves"].items():
        known = [(int(size), entry["cka"]) for size, entry in curve.items() if _known(entry["cka"][0])]
        series.append(
            Series(
                name,
                [(size, cka[0]) for size, cka in known],
                [(cka[1], cka[2]) if _known(cka[1]) else (math.nan, math.nan) for _, cka in known],
            )
        )
    size, count = content["reference"], content["pictures"]
    return line_chart(
        series, title=f"Linear CKA with the features at {size} x {size}, {count} images", x="input size", y="CKA"
    )


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def table(content: dict[str, Any]) -> Table:
    """CKA by method and size."""
    rows = []
    for name, curve in content["curves"].items():
        cells = [Estimate.of(curve[str(size)]["cka"]) for size in content["sizes"]]
        rows.append((name, cells))
    title = f"Linear CKA with the features at {content['reference']} pixels, {content['pictures']} images"
    return Table(title, [Column(f"{size}", digits=3) for size in content["sizes"]], rows)
