"""Averages of the warp protocol's scores, and their tables."""

from __future__ import annotations

from typing import Any

import numpy as np

from lift_fast.evaluation import results
from lift_fast.evaluation.results import Estimate
from lift_fast.evaluation.tables import Column, Table


def summarise(content: dict[str, Any]) -> dict[str, Any]:
    """Means over photographs with 95 % intervals, by size and method; paired differences from the reference.

    Returns:
        ``{size: {method: {"PCK@alpha": [value, low, high] in percent, ..., "error": ... in pixels, "median": ...,
        "difference": {"PCK@alpha": ...} or None}}}``, and under ``"photographs"`` how many were used.
    """
    options = content["options"]
    titles = [f"PCK@{alpha:g}" for alpha in options["alphas"]]
    seeds = [str(seed) for seed in range(options["seeds"])]
    summary: dict[str, Any] = {}
    counted = 0
    for size in map(str, options["sizes"]):
        tables = {}
        for method in options["methods"]:
            by_seed = [content["scores"].get(seed, {}).get(size, {}).get(method, {}) for seed in seeds]
            # A photograph that was skipped at one size is left out at all of them.
            names = [n for n in options["photographs"] if n not in content["skipped"] and all(n in s for s in by_seed)]
            values = np.array([[scores[name] for name in names] for scores in by_seed]).reshape(
                len(seeds), len(names), len(titles) + 2
            )
            tables[method] = values.mean(0) * np.array([100.0] * len(titles) + [1.0, 1.0])
            counted = len(names)
        summary[size] = {}
        for method, table in tables.items() if counted else ():
            estimates = dict(zip([*titles, "error", "median"], results.bootstrap(table), strict=True))
            entry: dict[str, Any] = {name: estimate.as_list() for name, estimate in estimates.items()}
            entry["difference"] = None
            if options["reference"] not in (None, method):
                difference = results.bootstrap(table - tables[options["reference"]])
                entry["difference"] = {n: e.as_list() for n, e in zip(titles, difference[: len(titles)], strict=True)}
            summary[size][method] = entry
    return {"photographs": counted, "sizes": summary}


def tables(content: dict[str, Any]) -> list[Table]:
    """One table for each size."""
    options, summary = content["options"], content["summary"]
    reference = options["reference"]
    titles = [f"PCK@{alpha:g}" for alpha in options["alphas"]]
    columns = [*(Column(title) for title in titles), Column("median error, px", "low", 2)]
    if reference is not None:
        columns += [Column(f"{title} - {reference}", "", 1) for title in titles[:2]]
    found = []
    for size, entries in summary["sizes"].items():
        rows: list[tuple[str, list[Estimate | float | None]]] = []
        for method, entry in entries.items():
            cells: list[Estimate | float | None] = [Estimate.of(entry[name]) for name in (*titles, "median")]
            if reference is not None:
                difference = entry["difference"] or {}
                cells += [Estimate.of(difference.get(title)) for title in titles[:2]]
            rows.append((method, cells))
        warps = "1 warp" if options["seeds"] == 1 else f"{options['seeds']} warps"
        heading = f"{size} pixels, {summary['photographs']} photographs, {warps} each"
        found.append(Table(heading, columns, rows))
    return found
