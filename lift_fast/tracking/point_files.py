"""Points of a first frame in CSV and JSON files, and their tracks as CSV."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lift_fast._files import require_regular_file
from lift_fast._text import quoted, said, shown

from .points import PointTracks

Points = tuple[list[str], list[tuple[float, float]]]
COLUMNS = ("frame", "name", "id", "x", "y", "confidence", "visible")
_MOST_BYTES = 1 << 26


def read_points(path: str | os.PathLike[str]) -> Points:
    """Identifiers and (x, y) of the points in a file; a point without an identifier gets its number, from 0.

    CSV: a header with the columns x, y and perhaps id, in any order; without a header two columns, x and y. JSON: a
    list of ``[x, y]``, or of objects with "x", "y" and perhaps "id".

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file and the point that is malformed, or an identifier that occurs twice.
    """
    path = Path(path)
    require_regular_file(path, "file of points")
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"{quoted(path)} is larger than {_MOST_BYTES} bytes, too large for a file of points")
    try:
        text = path.read_text("utf-8-sig")
        entries = json.loads(text) if path.suffix.lower() == ".json" else _rows(text)
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise ValueError(f"{quoted(path)} cannot be read as points: {said(error)}") from error
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{quoted(path)} holds no list of points; expected x,y on each line, or a JSON list of [x, y]")
    points = []
    names = []
    for number, entry in enumerate(entries):
        try:
            x, y = (entry["x"], entry["y"]) if isinstance(entry, dict) else entry
            points.append((_number(x), _number(y)))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{quoted(path)}, point {number}: expected x and y, got {shown(entry)}") from error
        name = entry.get("id") if isinstance(entry, dict) else None
        names.append(str(number if name is None or name == "" else name))
    if repeated := sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []:
        raise ValueError(f"{quoted(path)} has more than one point {shown(repeated[0])}; identifiers must differ")
    return names, points


def lines_of(number: int, name: str, identifiers: Sequence[str], tracks: PointTracks) -> str:
    """Rows of a CSV file of :data:`COLUMNS` for the points in one frame, the ``number``-th (from 0) called ``name``."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for identifier, (x, y), confidence, visible in zip(
        identifiers, tracks.xy, tracks.confidence, tracks.visible, strict=True
    ):
        writer.writerow((number, name, identifier, f"{x:.2f}", f"{y:.2f}", f"{confidence:.4f}", int(visible)))
    return text.getvalue()


def _rows(text: str) -> list[Any]:
    rows = [row for row in csv.reader(io.StringIO(text)) if any(cell.strip() for cell in row)]
    head = [cell.strip().lower() for cell in rows[0]] if rows else []
    if {"x", "y"} <= set(head):
        return [dict(zip(head, map(str.strip, row), strict=False)) for row in rows[1:]]
    return rows


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise TypeError
    return float(value)
