"""Averages of SPair-71k's scores, and their tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lift_fast.evaluation.tables import Column, Table


def titles(alphas: Sequence[float]) -> list[str]:
    """Names of the figures: by key points with ``<``, then by pairs of images with ``<=``."""
    names = [f"PCK@{alpha:g}" for alpha in alphas]
    return names + [f"{name} per image" for name in names]


def summarise(content: dict[str, Any]) -> dict[str, Any]:
    """Averages in percent.

    ``PCK@alpha`` is the LiFT paper's: by ``<``, over all key points of a category, then the mean over categories.
    ``PCK@alpha per image`` is the data set authors': by ``<=``, over the key points of each pair, then the mean over a
    category's pairs, or over all pairs. Means over seeds of those.

    Returns:
        ``"sizes"``: size -> method -> figures, ``"seed_std"`` (their standard deviation over seeds, None for one
        seed) and ``"categories"``: category -> figures; ``"pairs"`` and ``"points"``: how many of each category were
        used, over all seeds; ``"left_out"``: how many pairs could not be used; ``"skipped"``: how many files and
        categories were the reason.
    """
    options = content["options"]
    count, names = len(options["alphas"]), titles(options["alphas"])

    def by_name(values: Any) -> dict[str, float]:
        return dict(zip(names, map(float, values), strict=True))

    sizes: dict[str, Any] = {}
    pairs: dict[str, int] = {}
    points: dict[str, int] = {}
    for size in map(str, options["sizes"]):
        sizes[size] = {}
        for method in options["methods"]:
            by_seed, by_category = [], []
            pairs, points = {}, {}
            scores = content["scores"].get(size, {}).get(method, {})
            for draw in content["draws"] or [scores]:
                tables = {}
                for category in options["categories"]:
                    taken = [name for name in draw.get(category, ()) if name not in content["left_out"]]
                    rows = [scores[category][name] for name in taken]
                    pairs[category] = pairs.get(category, 0) + len(rows)
                    points[category] = points.get(category, 0) + sum(row[0] for row in rows)
                    if rows:
                        tables[category] = np.array(rows, dtype=np.float64)
                if tables:
                    figures, each = _averages(tables, count)
                    by_seed.append(figures)
                    by_category.append(each)
            if not by_seed:
                continue
            spread = by_name(np.std(by_seed, 0, ddof=1)) if len(by_seed) > 1 else None
            categories = {
                category: by_name(np.mean([each[category] for each in by_category if category in each], 0))
                for category in options["categories"]
                if any(category in each for each in by_category)
            }
            sizes[size][method] = {**by_name(np.mean(by_seed, 0)), "seed_std": spread, "categories": categories}
    return {
        "pairs": pairs,
        "points": points,
        "left_out": len(content["left_out"]),
        "skipped": len(content["skipped"]),
        "sizes": sizes,
    }


def _averages(tables: dict[str, Any], count: int) -> tuple[Any, dict[str, Any]]:
    """Figures of one seed in percent, over all and by category; rows are points, ``<`` counts, ``<=`` counts."""
    each = {}
    for category, table in tables.items():
        per_point = table[:, 1 : 1 + count].sum(0) / table[:, 0].sum()
        per_image = (table[:, 1 + count :] / table[:, :1]).mean(0)
        each[category] = 100 * np.concatenate([per_point, per_image])
    per_point = np.mean([figures[:count] for figures in each.values()], 0)
    everything = np.concatenate(list(tables.values()))
    per_image = 100 * (everything[:, 1 + count :] / everything[:, :1]).mean(0)
    return np.concatenate([per_point, per_image]), each


def tables(content: dict[str, Any], per_category: bool = False) -> list[Table]:
    """One table for each size; with ``per_category`` also one for each size and figure, by category."""
    options, summary = content["options"], content["summary"]
    names = titles(options["alphas"])
    pairs, points = sum(summary["pairs"].values()), sum(summary["points"].values())
    count = sum(1 for number in summary["pairs"].values() if number)
    categories = "1 category" if count == 1 else f"{count} categories"
    about = f"SPair-71k {options['split']}, {categories}, {pairs} pairs, {points} key points"
    if options["seeds"] > 1:
        about += f", {options['seeds']} draws"
    found = []
    for size, entries in summary["sizes"].items():
        rows = [(method, [entry[name] for name in names]) for method, entry in entries.items()]
        found.append(Table(f"{about}, {size} pixels", [Column(name) for name in names], rows))
    for size, entries in summary["sizes"].items() if per_category else ():
        shown = [category for category in options["categories"] if summary["pairs"].get(category)]
        for name in names:
            rows = [
                (method, [*(entry["categories"][category][name] for category in shown), entry[name]])
                for method, entry in entries.items()
            ]
            columns = [Column(category) for category in (*shown, "mean")]
            found.append(Table(f"{name}, {size} pixels", columns, rows))
    return found
