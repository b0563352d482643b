"""Published numbers to compare with, each with its source: the ones in the package, or those of a file."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .metrics import METRIC_PROTOCOLS, metric_of
from .results import read_json

FORMAT = 1
SHIPPED = Path(__file__).with_name("published.json")


@dataclass(frozen=True)
class Source:
    """Where numbers were published, and where they were read."""

    paper: str
    arxiv: str | None
    """Number, such as ``2403.14625``; None for a paper that is not on arXiv."""
    version: str | None
    """Of the arXiv text, such as ``v2``; None where it is not known."""
    place: str
    """Table, figure or section."""
    read_from: str
    """The text or image from which the numbers were copied."""
    quoted: bool
    """True if that text only quotes the paper."""

    def __str__(self) -> str:
        arxiv = f", arXiv:{self.arxiv}{self.version or ''}" if self.arxiv else ""
        read = "quoted after" if self.quoted else "read from"
        return f"{self.paper}{arxiv}, {self.place}; {read} {self.read_from}"


@dataclass(frozen=True)
class Entry:
    """One published number."""

    protocol: str
    """As in the results: ``spair``, ``davis``, ``discovery``, ``cka`` or ``cost``; ``warp`` for others."""
    dataset: str | None
    """``2017 val`` for DAVIS, ``voc07``, ``voc12`` or ``coco20k`` for discovery, SPair's split; None for any."""
    label: str
    """Name of the row."""
    method: str
    """As for ``lift-fast eval --method``, or a name of its own."""
    backbone: str
    """As for ``--model``, or a name of its own."""
    metric: str
    size: int | None
    """Pixels S of S x S images; None for images in their own size."""
    value: float
    sources: tuple[str, ...]
    """Keys of :attr:`Published.sources`."""


@dataclass(frozen=True)
class Published:
    """Numbers and their sources."""

    sources: dict[str, Source]
    entries: tuple[Entry, ...]


def load_published(path: str | os.PathLike[str] = SHIPPED) -> Published:
    """Read published numbers from a JSON file in the form of docs/evaluation_report.md.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is a folder, not JSON, or breaks the schema; names the entry and the reason.
    """
    content = read_json(path, "file of published numbers")
    try:
        return _published(content)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{path}: {error}; docs/evaluation_report.md describes files of published numbers") from error


def _published(content: Any) -> Published:
    _check_keys("the file", content, ("format", "sources", "entries"))
    if content["format"] != FORMAT:
        raise ValueError(f'"format" must be {FORMAT}, got {content["format"]!r}')
    if not isinstance(content["sources"], dict) or not isinstance(content["entries"], list):
        raise ValueError('"sources" must be an object and "entries" a list')
    sources = {name: _source(f"source {name!r}", source) for name, source in content["sources"].items()}
    entries = []
    places: dict[tuple[Any, ...], int] = {}
    for number, item in enumerate(content["entries"], 1):
        entry = _entry(f"entry {number}", item, sources)
        key = (entry.protocol, entry.dataset, entry.label, entry.backbone, entry.metric, entry.size)
        if key in places:
            raise ValueError(f"entry {number} repeats entry {places[key]}: {entry.label}, {entry.metric}")
        places[key] = number
        entries.append(entry)
    return Published(sources, tuple(entries))


def _source(where: str, source: Any) -> Source:
    _check_keys(where, source, ("paper", "place", "read_from", "quoted"), ("arxiv", "version"))
    for name in ("paper", "place", "read_from", *(n for n in ("arxiv", "version") if source.get(n) is not None)):
        _check_text(where, name, source[name])
    if not isinstance(source["quoted"], bool):
        raise ValueError(f'{where}: "quoted" must be true or false, got {source["quoted"]!r}')
    return Source(**{"arxiv": None, "version": None, **source})


def _entry(where: str, item: Any, sources: dict[str, Source]) -> Entry:
    texts = ("protocol", "label", "method", "backbone", "metric")
    _check_keys(where, item, (*texts, "size", "value", "sources"), ("dataset",))
    for name in texts if item.get("dataset") is None else (*texts, "dataset"):
        _check_text(where, name, item[name])
    if item["protocol"] not in METRIC_PROTOCOLS:
        raise ValueError(f'{where}: "protocol" must be one of {", ".join(METRIC_PROTOCOLS)}, got {item["protocol"]!r}')
    metric = metric_of(item["protocol"], item["metric"])
    if metric is None:
        raise ValueError(f"{where}: {item['protocol']} has no metric {item['metric']!r}")
    size, value = item["size"], item["value"]
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise ValueError(f'{where}: "size" must be a number of pixels or null, got {size!r}')
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f'{where}: "value" must be a number, got {value!r}')
    if not metric.lowest <= value <= metric.highest:
        limits = f"{metric.lowest:g} to {metric.highest:g}"
        raise ValueError(f"{where}: {item['metric']} must lie from {limits}, got {value!r}")
    names = item["sources"]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f'{where}: "sources" must name at least one source, got {names!r}')
    unknown = [name for name in names if name not in sources]
    if unknown:
        raise ValueError(f"{where}: there is no source {unknown[0]!r}; there are {', '.join(sources) or 'none'}")
    return Entry(**{"dataset": None, **item, "value": float(value), "sources": tuple(names)})


def _check_keys(where: str, item: Any, needed: Iterable[str], more: Iterable[str] = ()) -> None:
    if not isinstance(item, dict):
        raise ValueError(f"{where} must be an object, got {type(item).__name__}")
    missing = [name for name in needed if name not in item]
    if missing:
        raise ValueError(f'{where} has no "{missing[0]}"')
    unknown = [name for name in item if name not in {*needed, *more}]
    if unknown:
        raise ValueError(f"{where} has an unknown {unknown[0]!r}; expected {', '.join([*needed, *more])}")


def _check_text(where: str, name: str, text: Any) -> None:
    if not isinstance(text, str) or not text.strip() or "\n" in text:
        raise ValueError(f'{where}: "{name}" must be a line of text, got {text!r}')
