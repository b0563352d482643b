"""CorLoc of predictions, and its table."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lift_fast.evaluation.tables import Column, Table

from .protocol import Prediction


def corloc(predictions: Iterable[Prediction]) -> dict[str, Any]:
    """Figures over images: ``corloc`` (percent of images whose box is correct), ``pictures``, ``found``,
    ``mean_iou`` (0 to 1) and ``degenerate`` (how many)."""
    all_of_them = list(predictions)
    count, found = len(all_of_them), sum(p.found for p in all_of_them)
    return {
        "corloc": 100 * found / count if count else None,
        "pictures": count,
        "found": found,
        "mean_iou": sum(p.iou for p in all_of_them) / count if count else None,
        "degenerate": sum(p.degenerate for p in all_of_them),
    }


def table(content: dict[str, Any]) -> Table:
    """CorLoc by method."""
    columns = [Column("CorLoc, %", digits=2), Column("mean IoU", digits=3), Column("not determined", "", 0)]
    rows = [(name, [f["corloc"], f["mean_iou"], f["degenerate"]]) for name, f in content["summary"].items()]
    options = content["options"]
    counted = max(figures["pictures"] for figures in content["summary"].values())
    where = "own size" if options["resolution"] is None else f"{options['resolution']} pixels"
    if options["resolution"] is not None and options.get("rule") == "exact":
        where += ", exact rule"
    title = f"{options['dataset']}, {counted} images at {where}, {len(content['skipped'])} left out"
    return Table(f"{title}, tau {options['tau']:g}", columns, rows)
