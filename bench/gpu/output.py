"""The report's table and roofline chart."""

from __future__ import annotations

from typing import Any

from lift_fast._files import atomic_path

from .state import State


def markdown(state: State) -> str:
    """The whole report for a reader."""
    about = state.results.get("environment", {})
    lines = [f"# GPU report: {about.get('gpu', 'no GPU')}", ""]
    if state.rehearse:
        lines += ["**REHEARSAL on the CPU at tiny sizes. None of these numbers is a figure.**", ""]
    lines += [", ".join(f"{name} {value}" for name, value in about.items() if value), ""]
    for name, value in state.results.get("ceilings", {}).items():
        lines.append(f"* {name}: {value:.3g}")
    lines += ["", "## Goals", "", "| goal | measured | limit | met |", "| --- | ---: | ---: | --- |"]
    for goal in state.goals:
        measured = "not measured" if goal["measured"] is None else f"{goal['measured']:.3g}"
        met = {None: "", True: "yes", False: "**no**"}[goal["met"]]
        lines.append(f"| {goal['goal']} | {measured} | {goal['limit']:g} | {met} |")
    lines += ["", "## Forward pass", "", "| work | what | us | floor, us | of matmul | of copy | beside it |"]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: | --- |")
    for row in state.results.get("forward", []):
        lines.append(_row(row))
    lines += _matching(state.results.get("matching", {}))
    lines += _training(state.results.get("training", {}))
    errors = state.results.get("equality", [])
    lines += ["", "## Equality with the plain module in float64, worst relative errors", ""]
    for kernel in dict.fromkeys(row["kernel"] for row in errors):
        worst: dict[str, float] = {}
        for row in errors:
            if row["kernel"] == kernel:
                worst[row["dtype"]] = max(worst.get(row["dtype"], 0.0), row["error"])
        lines.append(f"* {kernel}: " + ", ".join(f"{dtype} {error:.1e}" for dtype, error in worst.items()))
    for title, entries in (("Failures", state.failures), ("Skipped", state.skipped)):
        lines += ["", f"## {title}", "", *(f"* {entry}" for entry in entries or ["none"])]
    return "\n".join(lines) + "\n"


def _matching(results: dict[str, Any]) -> list[str]:
    if not results:
        return []
    lines = [
        "",
        "## Matching",
        "",
        "| what | ms | TFLOP/s | of matmul | peak MB |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in results["times"]:
        rate = f"{row['TFLOP/s']:.0f}" if "TFLOP/s" in row else ""
        share = f"{row['of matmul']:.0%}" if "of matmul" in row else ""
        peak = "" if row.get("peak bytes") is None else f"{row['peak bytes'] / 1e6:.0f}"
        lines.append(f"| {row['what']} | {row['ms']:.3f} | {rate} | {share} | {peak} |")
    worst = max((row["error"] for row in results["errors"]), default=0.0)
    return [*lines, "", f"Worst error against float64, {len(results['errors'])} cases: {worst:.1e}"]


def _training(results: dict[str, Any]) -> list[str]:
    if not results:
        return []
    lines = ["", "## Training step", "", "| what | ms | images/s | peak MB |", "| --- | ---: | ---: | ---: |"]
    for row in results["times"]:
        peak = "" if row["peak bytes"] is None else f"{row['peak bytes'] / 1e6:.0f}"
        lines.append(f"| {row['what']} | {row['ms']:.2f} | {row['images per second']:.1f} | {peak} |")
    errors = ", ".join(f"{row['what']} in {row['dtype']} {row['error']:.1e}" for row in results["errors"])
    return [*lines, "", f"Against the plain float32 loop: {errors}"]


def _row(row: dict[str, Any]) -> str:
    beside = [
        f"{key.removesuffix(' ms')} {1e3 * row[key]:.1f}" for key in row if key.endswith(" ms") and key != "floor ms"
    ]
    if row.get("scratch bytes") is not None:
        beside.append(f"scratch {row['scratch bytes'] / 1e6:.1f} of {row['least scratch bytes'] / 1e6:.1f} MB")
    share = [f"{row[key]:.0%}" if key in row else "" for key in ("of matmul", "of copy")]
    floor = f"{1e3 * row['floor ms']:.1f}" if "floor ms" in row else ""
    cells = [row["work"], row["what"], f"{1e3 * row['ms']:.1f}", floor, *share, "; ".join(beside)]
    return "| " + " | ".join(cells) + " |"


def chart(state: State) -> None:
    """Each kernel under the two measured ceilings."""
    try:
        import matplotlib
    except ImportError:
        state.skipped.append("chart: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in state.results.get("forward", []) if "flops" in row]
    ceilings = state.results.get("ceilings")
    if not rows or not ceilings:
        return
    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    flops, copy = ceilings["bf16 flops per second"], ceilings["copy bytes per second"]
    intensities = [row["flops"] / row["bytes"] for row in rows]
    low, high = min(intensities) / 2, max(intensities) * 2
    ridge = flops / copy
    corners = sorted({low, high, min(max(ridge, low), high)})
    axes.plot(corners, [min(flops, copy * x) / 1e12 for x in corners], color="black", label="measured ceilings")
    for what in dict.fromkeys(row["what"] for row in rows):
        chosen = [row for row in rows if row["what"] == what]
        x = [row["flops"] / row["bytes"] for row in chosen]
        y = [row["flops"] / (row["ms"] / 1e3) / 1e12 for row in chosen]
        axes.plot(x, y, "o", label=what)
        for row, across, up in zip(chosen, x, y, strict=True):
            axes.annotate(row["work"], (across, up), fontsize=7, xytext=(4, 2), textcoords="offset points")
    axes.set(xscale="log", yscale="log", xlabel="operations per byte that must move", ylabel="TFLOP/s")
    axes.set_title("REHEARSAL: no figures" if state.rehearse else state.results.get("environment", {}).get("gpu", ""))
    axes.legend()
    with atomic_path(state.out.with_suffix(".png")) as path:
        figure.savefig(path, dpi=130, format="png")
    plt.close(figure)
