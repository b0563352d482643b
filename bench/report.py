"""Turn a benchmark run into a table of ratios (Markdown), a chart (PNG) and a compact record (JSON).

pytest bench/ --benchmark-only --benchmark-json=run.json
python -m bench.report run.json --out bench/results/my-machine
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib
import torch

from lift_fast import _native
from lift_fast._files import atomic_path

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import NullLocator

_OURS, _OTHER = "#0072b2", "#b0b0b0"


def rows_of(run: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per benchmark that carries a paired comparison."""
    rows = []
    for bench in run["benchmarks"]:
        info = bench["extra_info"]
        if "speedup" not in info:
            continue
        parameters = bench.get("params") or {}
        name = parameters.get("variant") or f"lift_fast {parameters.get('dtype', '')}".strip()
        rows.append({"group": bench["group"], "name": name, **info})
    if not rows:
        raise SystemExit("the run holds no paired benchmarks; expected the JSON of: pytest bench/ --benchmark-only")
    # Rows of one group stand together.
    groups = list(dict.fromkeys(row["group"] for row in rows))
    return sorted(rows, key=lambda row: groups.index(row["group"]))


def environment(run: dict[str, Any]) -> dict[str, Any]:
    """What a reader needs to interpret the figures; no host name."""
    cpu = run.get("machine_info", {}).get("cpu", {})
    return {
        "date": run.get("datetime", "")[:10],
        "commit": run.get("commit_info", {}).get("id", "")[:12],
        "cpu": cpu.get("brand_raw", platform.processor()),
        "cores": cpu.get("count"),
        "instructions": _native.require().cpu_isas()[0] if _native.can_run()[0] else None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "timm", "lift_fast")},
    }


def markdown(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    lines = [
        "# Benchmark",
        "",
        ", ".join(f"{name} {value}" for name, value in about.items() if value),
        "",
        "Plain and other implementation run in turn (A B A B ...); the speed-up is the median of the pairs' ratios, "
        "in brackets its quartiles. Memory: the most that one call holds beyond its inputs. Scaled: measured on a "
        "share of the work.",
        "",
        "| work | implementation | plain, ms | this, ms | speed-up | error | plain, MiB | this, MiB |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        low, high = row["speedup_quartiles"]
        memory = [row.get(key) for key in ("plain_memory_mib", "memory_mib")]
        scaled = " (scaled)" if "plain_share" in row else ""
        plain_memory, own_memory = ("" if mib is None else f"{mib:.0f}" for mib in memory)
        lines.append(
            f"| {row['group']} | {row['name']} | {row['plain_ms']:.2f}{scaled} | {row['paired_ms']:.2f} "
            f"| **{row['speedup']:.2f}x** ({low:.2f} to {high:.2f}) | {row['error']:.1e} "
            f"| {plain_memory} | {own_memory} |"
        )
    if staged := [row for row in rows if "stages_ms" in row]:
        stages = list(staged[0]["stages_ms"])
        lines += ["", "Stages, ms: plain / this.", "", f"| work | {' | '.join(stages)} |"]
        lines.append(f"| --- |{' ---: |' * len(stages)}")
        for row in staged:
            cells = (f"{plain:.1f} / {ours:.1f}" for plain, ours in row["stages_ms"].values())
            lines.append(f"| {row['group']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def chart(rows: list[dict[str, Any]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(10, 0.36 * len(rows) + 1.2), layout="constrained")
    labels = [f"{row['group']}\n{row['name']}" for row in rows]
    speedups = [row["speedup"] for row in rows]
    spread = [
        [max(0.0, row["speedup"] - row["speedup_quartiles"][0]) for row in rows],
        [max(0.0, row["speedup_quartiles"][1] - row["speedup"]) for row in rows],
    ]
    colours = [_OURS if row["name"].startswith("lift_fast") else _OTHER for row in rows]
    # Bars begin at 1: on a logarithmic axis the length of a bar then is the gain.
    bars = axes.barh(labels, [value - 1 for value in speedups], left=1, xerr=spread, color=colours)
    axes.bar_label(bars, labels=[f"{value:.2f}x" for value in speedups], padding=6, fontsize=8)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    low, high = min(0.9, 0.9 * min(speedups)), 1.8 * max(speedups)
    axes.set_xlim(low, high)
    ticks = [tick for tick in (0.2, 0.5, 1, 1.5, 2, 3, 5, 10, 20, 50, 100, 1000) if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("speed-up over the plain implementation (blue: lift_fast, grey: other ways)")
    axes.tick_params(axis="y", labelsize=7)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    figure.savefig(path, dpi=130, format="png")
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="JSON written by pytest --benchmark-json")
    parser.add_argument("--out", type=Path, default=Path("benchmark"), help="stem of the files to write")
    arguments = parser.parse_args(argv)
    try:
        run = json.loads(arguments.run.read_text())
    except (OSError, json.JSONDecodeError) as error:
        parser.error(f"cannot read {arguments.run}: {error}")
    rows, about = rows_of(run), environment(run)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    table = markdown(rows, about)
    for suffix, text in ((".md", table), (".json", json.dumps({"environment": about, "rows": rows}, indent=1) + "\n")):
        with atomic_path(arguments.out.with_suffix(suffix)) as temporary:
            temporary.write_text(text)
    with atomic_path(arguments.out.with_suffix(".png")) as temporary:
        chart(rows, temporary)
    sys.stdout.write(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
