"""The report's tables and its roofline chart."""

from __future__ import annotations

from typing import Any

from lift_fast._files import atomic_path

from .context import Row
from .predictions import COPY, PRODUCTS, Figures, table
from .state import State


def smoke_lines(rows: list[Row]) -> list[str]:
    """One line for each kernel and dtype, the worst first: its largest error as a share of the limit."""
    worst: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = row["what"], row["dtype"]
        if key not in worst or not row["error"] / row["limit"] <= worst[key]["error"] / worst[key]["limit"]:
            worst[key] = row
    ordered = sorted(worst.values(), key=lambda row: -row["error"] / row["limit"])
    counts = {key: sum((row["what"], row["dtype"]) == key for row in rows) for key in worst}
    return [
        f"{row['error'] / row['limit']:8.3f} of the limit  {row['what']:34} {row['dtype']}  error {row['error']:.1e}"
        f"  at {row['case']}  ({counts[row['what'], row['dtype']]} cases)"
        for row in ordered
    ]


def outcomes(state: State) -> list[dict[str, Any]]:
    """The table of predictions and outcomes; a rehearsal has no outcomes."""
    figures = Figures([] if state.rehearse else state.rows("figures"))
    return [prediction.line(figures) for prediction in table()]


def prediction_lines(lines: list[dict[str, Any]]) -> list[str]:
    """The same as text."""
    found = [f"{'what':62} {'predicted':>16} {'outcome':>12} {'goal':>8}"]
    for line in lines:
        outcome = "" if line["outcome"] is None else f"{line['outcome']:.3g} {line['unit']}"
        met = {None: "", True: "  met", False: "  MISSED"}[line["met"]]
        found.append(f"{line['what']:62} {line['predicted']:>16} {outcome:>12} {line['goal'] or '':>8}{met}")
    return found


def markdown(state: State) -> str:
    """The whole report as Markdown."""
    about = state.results.get("environment", {})
    lines = [f"# GPU report: {about.get('gpu', 'no GPU')}", ""]
    if state.rehearse:
        lines += ["**REHEARSAL on the CPU at tiny sizes. None of these numbers is a figure.**", ""]
    lines += [", ".join(f"{name} {value}" for name, value in about.items() if value)]
    lines += ["", "## Predictions and outcomes", "", "| what | predicted | outcome | goal | met |"]
    lines.append("| --- | ---: | ---: | ---: | --- |")
    for line in outcomes(state):
        outcome = "not measured" if line["outcome"] is None else f"{line['outcome']:.3g} {line['unit']}"
        met = {None: "", True: "yes", False: "**no**"}[line["met"]]
        lines.append(f"| {line['what']} | {line['predicted']} | {outcome} | {line['goal'] or ''} | {met} |")
    lines += ["", "## Figures", ""]
    lines += [
        "'of products' and 'of copy' are shares of the two ceilings in the first rows. Rows marked 'eager' include the",
        "host's time, those marked 'graph' do not; 'host alone' is the time until the call returns.",
        "",
    ]
    lines += ["| what | time | TFLOP/s | of products | TB/s | of copy | peak, MB |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    rows = state.rows("figures")
    figures = Figures(rows)
    for row in rows:
        if "ms" not in row:
            continue
        time = f"{1e3 * row['ms']:.1f} us" if row["ms"] < 1 else f"{row['ms']:.3f} ms"
        rates = []
        for key, ceiling in (("flops", PRODUCTS), ("bytes", COPY)):
            share = None if state.rehearse else figures.of(ceiling, key, row["what"])
            rates += [
                f"{row[key] / row['ms'] / 1e9:.3g}" if key in row else "",
                "" if share is None else f"{share:.0%}",
            ]
        peak = "" if row.get("peak bytes") is None else f"{row['peak bytes'] / 1e6:.0f}"
        lines.append(f"| {row['what']} | {time} | {' | '.join(rates)} | {peak} |")
    if state.rows("smoke"):
        lines += ["", "## Smoke: largest errors against float64, the worst first", "", "```"]
        lines += [*smoke_lines(state.rows("smoke")), "```"]
    for title in ("tests", "sanitizer", "profile"):
        if state.results.get(title):
            lines += ["", f"## {title.capitalize()}", ""]
            lines += [f"* {name}: {value}" for name, value in state.results[title].items()]
    lines += ["", "## Seconds of the stages", ""]
    lines += [f"* {name}: {value}" for name, value in state.results.get("seconds", {}).items()]
    for title, entries in (("Failures", state.failures), ("Skipped", state.skipped)):
        lines += ["", f"## {title}", "", *(f"* {entry}" for entry in entries or ["none"])]
    return "\n".join(lines) + "\n"


def chart(state: State) -> None:
    """LiFT's kernels under the two measured ceilings."""
    try:
        import matplotlib
    except ImportError:
        state.skipped.append("chart: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = {row["what"]: row for row in state.rows("figures") if "ms" in row}
    kernels = [row for row in rows.values() if {"flops", "bytes"} <= row.keys() and "tile" not in row["what"]]
    if not kernels or PRODUCTS not in rows or COPY not in rows:
        return
    flops = rows[PRODUCTS]["flops"] / rows[PRODUCTS]["ms"] * 1e3
    copy = rows[COPY]["bytes"] / rows[COPY]["ms"] * 1e3
    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    intensities = [row["flops"] / row["bytes"] for row in kernels]
    low, high = min(intensities) / 2, max(intensities) * 2
    corners = sorted({low, high, min(max(flops / copy, low), high)})
    axes.plot(corners, [min(flops, copy * x) / 1e12 for x in corners], color="black", label="measured ceilings")
    for stage in dict.fromkeys(row["what"].split(" B")[0] for row in kernels):
        chosen = [row for row in kernels if row["what"].split(" B")[0] == stage]
        x = [row["flops"] / row["bytes"] for row in chosen]
        y = [row["flops"] / (row["ms"] / 1e3) / 1e12 for row in chosen]
        axes.plot(x, y, "o", label=stage)
        for row, across, up in zip(chosen, x, y, strict=True):
            name = row["what"].removeprefix(stage).strip()
            axes.annotate(name, (across, up), fontsize=7, xytext=(4, 2), textcoords="offset points")
    axes.set(xscale="log", yscale="log", xlabel="operations per byte that must move", ylabel="TFLOP/s")
    axes.set_title("REHEARSAL: no figures" if state.rehearse else state.results.get("environment", {}).get("gpu", ""))
    axes.legend()
    with atomic_path(state.file(".png")) as path:
        figure.savefig(path, dpi=130, format="png")
    plt.close(figure)
