"""Several runs side by side, with published numbers: tables, what differs between the runs, charts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from .charts import Series, line_chart
from .metrics import METRICS, metric_of
from .published import Entry, Published
from .results import Estimate
from .runs import Difference, Run, differences
from .tables import Column, Table, escape_latex

_TITLES = {
    "warp": "Matching under known warps",
    "spair": "SPair-71k",
    "davis": "DAVIS",
    "discovery": "Object discovery",
    "cka": "Scale invariance",
    "cost": "Cost of one image",
}
_KINDS = {
    "measured": "Measured differently",
    "networks": "Networks and options that differ",
    "surroundings": "Versions and machines that differ",
}
# Entries of a list that are still spelt out, and characters of a hash that tell files apart.
_LONG, _HASH = 4, 12
Key = tuple[str, "int | None"]
"""Metric and size."""


@dataclass(frozen=True)
class Row:
    """One method of one run, or of a publication."""

    run: str | None
    """None for published numbers."""
    method: str
    cells: dict[Key, Estimate | float]
    rank: int | None
    """Rows of the same rank measured the same thing; None for published numbers."""
    backbone: str | None
    label: str
    """Name in the table."""
    cited: dict[Key, tuple[str, ...]] = field(default_factory=dict)
    """Sources of published numbers."""

    @property
    def sources(self) -> tuple[str, ...]:
        """Of all its numbers."""
        return tuple(dict.fromkeys(name for names in self.cited.values() for name in names))


@dataclass(frozen=True)
class Group:
    """All runs of one protocol on one data set."""

    protocol: str
    dataset: str
    runs: tuple[Run, ...]
    columns: tuple[Key, ...]
    rows: tuple[Row, ...]
    differences: tuple[Difference, ...]
    left_out: int
    """Number of published numbers of other backbones than the runs'."""

    @property
    def title(self) -> str:
        """What was measured."""
        title = _TITLES[self.protocol]
        return f"{title}, {self.dataset}" if self.dataset else title

    @property
    def unlike(self) -> bool:
        """Whether the runs did not all measure the same thing."""
        return any(difference.kind == "measured" for difference in self.differences)


@dataclass(frozen=True)
class Report:
    """Runs by protocol."""

    runs: tuple[Run, ...]
    groups: tuple[Group, ...]
    sources: dict[str, str]
    """Of the published numbers that are shown, in the order of their footnotes."""

    def markdown(self) -> str:
        """Tables, each with its notes below."""
        parts = []
        for group in self.groups:
            notes = "\n".join(f"- {note}" for note in _notes(group))
            parts.append(f"{_table(group, self.sources).markdown()}\n{notes}\n")
        footnotes = "".join(f"[{n}] {text}\n\n" for n, text in enumerate(self.sources.values(), 1))
        return "\n".join([*parts, footnotes] if footnotes else parts)

    def latex(self) -> str:
        """Each table as a ``tabular`` for ``booktabs``, with its notes below it."""
        parts = []
        for group in self.groups:
            notes = "\n\n".join(escape_latex(note) for note in _notes(group))
            parts.append(f"{_table(group, self.sources).latex()}\n{{\\footnotesize\n{notes}\n\n}}\n")
        footnotes = "\n\n".join(escape_latex(f"[{n}] {text}") for n, text in enumerate(self.sources.values(), 1))
        return "\n".join([*parts, f"{{\\footnotesize\n{footnotes}\n\n}}\n"] if footnotes else parts)

    def as_content(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "protocol": "report",
            "files": {run.name: str(run.path) for run in self.runs},
            "groups": [_group_content(group) for group in self.groups],
            "sources": self.sources,
        }


def build(runs: Sequence[Run], published: Published | None = None, metrics: Sequence[str] | None = None) -> Report:
    """Arrange runs by protocol and data set.

    Args:
        runs: of :func:`lift_fast.evaluation.runs.read_run`.
        published: numbers to show below the runs, where a run has the same protocol, data set, metric and size; only
            those of the runs' backbones if there are any, else all.
        metrics: to show; None shows the main ones of each protocol.

    Raises:
        ValueError: for no runs, two of one name, one file twice, or metrics that no run has.
    """
    if not runs:
        raise ValueError("a report needs at least one run")
    names, files = [run.name for run in runs], [run.path.resolve() for run in runs]
    for run, file in zip(runs, files, strict=True):
        if names.count(run.name) > 1:
            raise ValueError(f"two runs are called {run.name!r}; give names, NAME=FILE")
        if files.count(file) > 1:
            raise ValueError(f"{run.path} is given twice")
    known = dict.fromkeys(figure.metric for run in runs for figure in run.figures)
    unknown = [metric for metric in metrics or () if metric not in known]
    if unknown:
        raise ValueError(f"no run has the metric {unknown[0]!r}; there are {', '.join(known)}")
    groups = []
    for key in dict.fromkeys((run.protocol, run.dataset) for run in runs):
        group = _group([run for run in runs if (run.protocol, run.dataset) == key], published, metrics)
        if group.columns:
            groups.append(group)
    cited = dict.fromkeys(name for group in groups for row in group.rows for name in row.sources)
    sources = {name: str(published.sources[name]) for name in cited} if published is not None else {}
    return Report(tuple(runs), tuple(groups), sources)


def _group(runs: list[Run], published: Published | None, metrics: Sequence[str] | None) -> Group:
    protocol, dataset = runs[0].protocol, runs[0].dataset
    found = {(figure.metric, figure.size) for run in runs for figure in run.figures}
    columns = sorted((key for key in found if _wanted(protocol, key[0], metrics)), key=_order(protocol, metrics))
    rows = []
    ranks: dict[str, int] = {}
    for run in runs:
        rank = ranks.setdefault(json.dumps(run.measured, sort_keys=True), len(ranks))
        for method in dict.fromkeys(figure.method for figure in run.figures):
            cells = {(f.metric, f.size): f.value for f in run.figures if f.method == method}
            cells = {key: value for key, value in cells.items() if key in columns}
            if cells:
                rows.append(Row(run.name, method, cells, rank, run.networks.get("model"), method))
    entries = [
        entry
        for entry in (published.entries if published is not None else ())
        if entry.protocol == protocol and entry.dataset in (None, dataset) and (entry.metric, entry.size) in columns
    ]
    models = {run.networks.get("model") for run in runs}
    own = [entry for entry in entries if entry.backbone in models] or entries
    rows += _published_rows(own)
    differing = tuple(differences(runs))
    return Group(protocol, dataset, tuple(runs), tuple(columns), tuple(rows), differing, len(entries) - len(own))


def _wanted(protocol: str, metric: str, metrics: Sequence[str] | None) -> bool:
    if metrics is not None:
        return metric in metrics
    found = metric_of(protocol, metric)
    return found is not None and found.shown


def _order(protocol: str, metrics: Sequence[str] | None) -> Any:
    """Sorting key of columns: metrics in the requested order or as protocols list them, wide thresholds and small
    images first."""
    known = [metric for metric in METRICS if protocol in metric.protocols]

    def key(column: Key) -> tuple[Any, ...]:
        name, size = column
        metric = metric_of(protocol, name)
        place = list(metrics).index(name) if metrics is not None else -1
        threshold = -float(name.partition("@")[2].split()[0]) if metric is not None and "@" in name else 0.0
        rank = known.index(metric) if metric is not None else len(known)
        return place, rank, threshold, name, -1 if size is None else size

    return key


def _published_rows(entries: list[Entry]) -> list[Row]:
    rows: dict[tuple[str, str, str], list[Entry]] = {}
    for entry in entries:
        rows.setdefault((entry.label, entry.method, entry.backbone), []).append(entry)
    found = []
    for (label, method, backbone), own in rows.items():
        values: dict[Key, Estimate | float] = {(entry.metric, entry.size): entry.value for entry in own}
        cited = {(entry.metric, entry.size): entry.sources for entry in own}
        found.append(Row(None, method, values, None, backbone, label, cited))
    return found


def _table(group: Group, sources: dict[str, str]) -> Table:
    numbers = {name: number for number, name in enumerate(sources, 1)}
    columns = []
    for name, size in group.columns:
        metric = metric_of(group.protocol, name)
        title = (metric.title if metric is not None else "") or name
        place = f" at {size}" if size is not None else ", own size" if group.protocol == "discovery" else ""
        columns.append(Column(title + place, metric.best if metric else "", metric.digits if metric else 2))
    rows = []
    for row in group.rows:
        name = _name(row)
        if row.run is None:
            name += f" [{', '.join(str(number) for number in sorted(numbers[source] for source in row.sources))}]"
        rows.append((name, [row.cells.get(key) for key in group.columns]))
    return Table(group.title, columns, rows, [row.rank for row in group.rows])


def _name(row: Row) -> str:
    return f"{'published' if row.run is None else row.run}: {row.label}"


def _notes(group: Group) -> list[str]:
    """What a reader of the table has to know."""
    notes = [f"{run.name}: {_about(run)}" for run in group.runs]
    if group.unlike:
        notes.append(
            "UNLIKE RUNS: they did not all measure the same thing (see below), so their figures cannot be compared; "
            "the best is bold within each set of like runs"
        )
    for kind, title in _KINDS.items():
        parts = [f"{d.name}: {_values(d)}" for d in group.differences if d.kind == kind]
        if parts:
            notes.append(f"{title}: " + "; ".join(parts))
    seen: dict[str, str] = {}
    for run in group.runs:
        if run.content in seen:
            notes.append(f"{run.name} and {seen[run.content]} hold the same result")
        seen.setdefault(run.content, run.name)
    if any(row.run is None for row in group.rows):
        notes.append(
            "Published rows were measured by others, on whole data sets or their choice of them, with their code, "
            "weights and machines; they are never bold"
        )
        models = {run.networks.get("model") for run in group.runs}
        if not any(row.run is None and row.backbone in models for row in group.rows):
            notes.append("The published rows are of other backbones than the runs'")
    if group.left_out:
        notes.append(f"{group.left_out} published numbers of other backbones are left out")
    return notes


def _about(run: Run) -> str:
    model = run.networks.get("model")
    parts = [f"{model}" if model else "masks or figures without a record of the networks behind them"]
    if run.networks.get("random_weights"):
        parts.append("RANDOM WEIGHTS, its figures mean nothing")
    parts += [
        f"{key[10:].replace('_', ' ')}: {value}" for key, value in run.measured.items() if key.startswith("number of ")
    ]
    if run.skipped:
        parts.append(f"{run.skipped} skipped")
    if run.date:
        parts.append(run.date)
    return ", ".join([*parts, run.path.name])


def _values(difference: Difference) -> str:
    lists = {run: value for run, value in difference.values.items() if isinstance(value, list)}
    if any(len(value) > _LONG for value in lists.values()):
        shared = set.intersection(*(set(map(str, value)) for value in lists.values()))
        counts = [f"{len(value)} ({run})" for run, value in lists.items()]
        counts += [f"not recorded ({run})" for run in difference.values if run not in lists]
        return f"{', '.join(counts)}, {len(shared)} of them in all"
    return ", ".join(f"{_short(difference.name, value)} ({run})" for run, value in difference.values.items())


def _short(name: str, value: Any) -> str:
    if value is None:
        return "all" if name == "pairs_per_category" else "not recorded"
    if isinstance(value, list):
        return "[" + ", ".join(map(str, value)) + "]"
    return str(value)[:_HASH] if name.startswith("weights of ") else str(value)


def _group_content(group: Group) -> dict[str, Any]:
    return {
        "protocol": group.protocol,
        "dataset": group.dataset,
        "unlike": group.unlike,
        "columns": [{"metric": metric, "size": size} for metric, size in group.columns],
        "rows": [
            {
                "run": row.run,
                "method": row.method,
                "published": row.run is None,
                "backbone": row.backbone,
                "label": row.label,
                "set": row.rank,
                "values": [
                    cell.as_list() if isinstance(cell, Estimate) else cell for cell in map(row.cells.get, group.columns)
                ],
                "sources": [list(row.cited.get(key, ())) for key in group.columns],
            }
            for row in group.rows
        ],
        "differences": [difference._asdict() for difference in group.differences],
        "notes": _notes(group),
    }


def draw(report: Report, metric: str | None = None, against: str = "size") -> Image.Image:
    """A chart of a metric against the images' size or against cost.

    Args:
        report: runs of one protocol that has the metric by size; for cost also runs of the protocol ``cost``, with the
            the same backbones and methods.
        metric: to draw; None takes the first with at least two sizes.
        against: ``"size"``, with published numbers of the runs' methods, or ``"cost"``.

    Raises:
        ValueError: if nothing fits, or more than one group does.
    """
    if against not in ("size", "cost"):
        raise ValueError(f"against must be 'size' or 'cost', got {against!r}")
    least = 2 if against == "size" else 1
    fitting = []
    for group in report.groups:
        if against == "cost" and group.protocol == "cost":
            continue
        names = dict.fromkeys(name for name, _ in group.columns) if metric is None else [metric]
        for name in names:
            if len({size for found, size in group.columns if found == name and size is not None}) >= least:
                fitting.append((group, name))
                break
    if not fitting:
        what = metric or "metric"
        raise ValueError(f"there is nothing to draw: no run has a {what} at {least} or more sizes")
    if len(fitting) > 1:
        titles = ", ".join(group.title for group, _ in fitting)
        raise ValueError(f"one chart takes one protocol, but several fit: {titles}; give their runs one at a time")
    group, name = fitting[0]
    if against == "size":
        methods = {row.method for row in group.rows if row.run is not None}
        sizes = _lines(group, name, lambda row, size: float(size) if size and row.method in methods else None)
        return line_chart(sizes, title=f"{group.title}: {name}", x="input size, pixels", y=name)
    costs = _costs(report)
    series = _lines(group, name, lambda row, size: row.run and costs.get((row.backbone, row.method, size)))
    if not series:
        raise ValueError("the cost results hold no backbone, method and size of the runs")
    return line_chart(series, title=f"{group.title}: {name} against cost", x="GFLOPs", y=name, log_x=True)


def _lines(group: Group, metric: str, place: Callable[[Row, int | None], Any]) -> list[Series]:
    """The rows that have points; ``place`` gives x of a row's figure at a size, or None to leave it out."""
    found = []
    for row in group.rows:
        cells = ((place(row, size), cell) for (name, size), cell in row.cells.items() if name == metric)
        points = sorted(((x, cell) for x, cell in cells if x is not None), key=lambda point: point[0])
        if points:
            found.append(Series.of(_name(row), points, dashed=row.run is None))
    return found


def _costs(report: Report) -> dict[tuple[Any, str, int | None], float]:
    """GFLOPs by backbone, method and size."""
    costs: dict[tuple[Any, str, int | None], float] = {}
    for run in (run for run in report.runs if run.protocol == "cost"):
        for figure in run.figures:
            if figure.metric == "GFLOPs" and not isinstance(figure.value, Estimate):
                key = run.networks.get("model"), figure.method, figure.size
                if costs.setdefault(key, figure.value) != figure.value:
                    raise ValueError(
                        f"two runs give different costs of {figure.method} on {key[0]} at {figure.size} pixels"
                    )
    if not costs:
        raise ValueError("a chart against cost needs a result of lift-fast eval cost; give one with the runs")
    return costs
