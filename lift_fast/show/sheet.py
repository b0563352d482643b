"""One sheet with a column for each method: similarity to chosen points, principal components, TokenCut's saliency."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont

from lift_fast.drawing import confidence_colours, place_cells, wrap
from lift_fast.evaluation.tokencut import tokencut
from lift_fast.matching import dense_match

from .maps import Shown, pca_colours, similarity_map

VIEWS = ("similarity", "pca", "saliency")
_PANEL, _GAP, _TEXT = 300, 14, 18
_INK, _FAINT, _WARNING, _MARK, _BOX = (25, 25, 25), (95, 95, 95), (190, 40, 25), (255, 255, 255), (230, 60, 40)
# TokenCut's graph takes a bit for each pair of tokens.
_MOST_TOKENS = 128 * 128

Point = tuple[float, float]


class _Row(NamedTuple):
    label: str
    shown: Shown
    panels: list[Image.Image]
    notes: list[str]
    mark: Point | None
    """On the image itself."""


def draw_sheet(
    pictures: Sequence[Shown],
    points: Sequence[Point],
    views: Sequence[str] = VIEWS,
    *,
    caption: str = "",
    warning: str = "",
    saliency_note: str = "",
    tau: float = 0.2,
) -> Image.Image:
    """Draw a row for each image and view (and point): the image, then a panel for each method.

    Cells are drawn as blocks to show their size. Similarity has one colour range for all methods and images of a point;
    its ends are printed. The cross in the second image is the best match of all its pixels.

    Args:
        pictures: one image, or two to find the first one's points in the second; the same methods in both.
        points: (x, y) in pixels of the first image as stored; pixel centres at halves.
        views: of :data:`VIEWS`.
        caption: at the top.
        warning: below it, in red.
        saliency_note: what to know of these features' saliency, printed with it.
        tau: of :func:`lift_fast.evaluation.tokencut.tokencut`.

    Raises:
        ValueError: for an unknown view, or a point outside the first image.
    """
    unknown = sorted(set(views) - set(VIEWS))
    if unknown:
        raise ValueError(f"unknown view {unknown[0]!r}; use {', '.join(VIEWS)}")
    first = pictures[0]
    for x, y in points:
        if not (0 <= x <= first.image.width and 0 <= y <= first.image.height):
            raise ValueError(
                f"the point {x:g},{y:g} lies outside {first.name}, which has {first.image.width} x "
                f"{first.image.height} pixels"
            )
    methods = list(first.features)
    rows: list[_Row] = []
    if "similarity" in views:
        for point in points:
            rows += _similarity_rows(pictures, methods, point)
    if "pca" in views:
        colours = [pca_colours([shown.features[method].map[0] for shown in pictures]) for method in methods]
        for number, shown in enumerate(pictures):
            panels = [
                place_cells(each[number], _size(shown), shown.covered(method))
                for method, each in zip(methods, colours, strict=True)
            ]
            rows.append(_Row("principal components", shown, panels, [""] * len(methods), None))
    if "saliency" in views:
        rows += [_saliency_row(shown, methods, tau, saliency_note) for shown in pictures]
    return _lay_out(rows, methods, first, caption, warning)


def _similarity_rows(images: Sequence[Shown], methods: Sequence[str], point: Point) -> list[_Row]:
    first = images[0]
    loaded = _in_loaded(first, point)
    maps = [
        [similarity_map(first.features[method], shown.features[method], loaded) for method in methods]
        for shown in images
    ]
    low = min(float(each.min()) for row in maps for each in row)
    high = max(float(each.max()) for row in maps for each in row)
    rows = []
    for number, (shown, row) in enumerate(zip(images, maps, strict=True)):
        panels, notes = [], []
        for method, values in zip(methods, row, strict=True):
            scaled = (values - low) / max(high - low, 1e-12)
            panel = place_cells(confidence_colours(scaled), _size(shown), shown.covered(method))
            if number == 0:
                best, note = point, ""
            else:
                best, similarity = best_match(first, shown, method, point)
                note = f"best {similarity:.3f} at {_pixel(best)}"
            _cross(panel, _on_panel(shown, best))
            panels.append(panel)
            notes.append(note)
        label = f"similarity to {_pixel(point)}   dark {low:.2f}, bright {high:.2f}"
        rows.append(_Row(label, shown, panels, notes, point if number == 0 else None))
    return rows


def best_match(source: Shown, target: Shown, method: str, point: Point) -> tuple[Point, float]:
    """The best pixel of ``target`` for a point of ``source``, (x, y) in its stored pixels, and the similarity.

    Both are results of :func:`lift_fast.dense_match` with ``normalize="pixel"``, as ``lift-fast match`` finds them.
    """
    here, there = source.features[method], target.features[method]
    x, y = _in_loaded(source, point)
    top, left, height, width = here.covered
    column, row = (int(min(max(v - start, 0), length - 1)) for v, start, length in ((x, left, width), (y, top, height)))
    start = torch.tensor([[[column, row]]], dtype=torch.int64, device=here.map.device)
    found = dense_match(here.map, there.map, (height, width), there.covered[2:], points=start, normalize="pixel")
    column, row = found.xy[0, 0].tolist()
    scale = target.image.width / target.size[1], target.image.height / target.size[0]
    best = (column + there.covered[1] + 0.5) * scale[0], (row + there.covered[0] + 0.5) * scale[1]
    return best, float(found.similarity[0, 0])


def _saliency_row(shown: Shown, methods: Sequence[str], tau: float, note: str) -> _Row:
    panels, notes = [], []
    for method in methods:
        features = shown.features[method]
        h, w = features.map.shape[2:]
        if h * w > _MOST_TOKENS:
            panels.append(Image.new("RGB", _size(shown), (128, 128, 128)))
            notes.append(f"left out: {h * w} tokens")
            continue
        cut = tokencut(features.map[0].flatten(1).T, (h, w), tau=tau)
        vector = cut.eigenvector - cut.eigenvector.min()
        spread = float(vector.max())
        panel = place_cells(
            confidence_colours(vector / (spread if spread > 0 else 1.0)), _size(shown), shown.covered(method)
        )
        x0, y0, x1, y1 = cut.box(shown.size, features.covered)
        scale = panel.width / shown.size[1], panel.height / shown.size[0]
        far = max(x0 * scale[0], x1 * scale[0] - 1), max(y0 * scale[1], y1 * scale[1] - 1)
        ImageDraw.Draw(panel).rectangle((x0 * scale[0], y0 * scale[1], *far), outline=_BOX, width=3)
        panels.append(panel)
        notes.append("no cut" if cut.degenerate else "")
    label = "TokenCut saliency and its box" + (f". {note}" if note else "")
    return _Row(label, shown, panels, notes, None)


def _lay_out(rows: Sequence[_Row], methods: Sequence[str], first: Shown, caption: str, warning: str) -> Image.Image:
    font = ImageFont.load_default(size=_TEXT)
    width = _GAP + (1 + len(methods)) * (_PANEL + _GAP)
    line = _TEXT + 6
    header = [
        (text, ink)
        for given, ink in ((caption, _INK), (warning, _WARNING))
        if given
        for text in wrap(given, font, width - 2 * _GAP)
    ]
    labels = [wrap(f"{row.shown.name}: {row.label}", font, width - 2 * _GAP) for row in rows]
    heights = [(1 + len(label)) * line + _size(row.shown)[1] + _GAP for row, label in zip(rows, labels, strict=True)]
    top = _GAP // 2 + (1 + len(header)) * line + _GAP // 2
    sheet = Image.new("RGB", (width, top + sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (text, ink) in enumerate(header):
        draw.text((_GAP, _GAP // 2 + number * line), text, font=font, fill=ink)
    for number, method in enumerate(methods):
        h, w = first.features[method].map.shape[2:]
        left = _GAP + (number + 1) * (_PANEL + _GAP)
        draw.text((left, top - _GAP // 2 - line), f"{method}, {w} x {h}", font=font, fill=_INK)
    for row, label, height in zip(rows, labels, heights, strict=True):
        for number, text in enumerate(label):
            draw.text((_GAP, top + number * line), text, font=font, fill=_INK)
        above = top + len(label) * line
        image = row.shown.image.resize(_size(row.shown), Image.Resampling.LANCZOS)
        if row.mark is not None:
            _cross(image, _on_panel(row.shown, row.mark))
        for number, (panel, note) in enumerate(zip([image, *row.panels], ["", *row.notes], strict=True)):
            left = _GAP + number * (_PANEL + _GAP)
            sheet.paste(panel, (left, above))
            draw.text((left, above + panel.height + 2), note, font=font, fill=_FAINT)
        top += height
    return sheet


def _size(shown: Shown) -> tuple[int, int]:
    """(width, height) of a panel."""
    return _PANEL, max(1, min(3 * _PANEL, round(_PANEL * shown.image.height / shown.image.width)))


def _in_loaded(shown: Shown, point: Point) -> Point:
    """``point`` in pixels of the loaded image."""
    return point[0] * shown.size[1] / shown.image.width, point[1] * shown.size[0] / shown.image.height


def _pixel(point: Point) -> str:
    """The pixel of a point. Rounding would give the next pixel for every second centre."""
    return f"{math.floor(point[0])}, {math.floor(point[1])}"


def _on_panel(shown: Shown, point: Point) -> Point:
    width, height = _size(shown)
    return point[0] * width / shown.image.width, point[1] * height / shown.image.height


def _cross(panel: Image.Image, at: Point) -> None:
    draw, (x, y) = ImageDraw.Draw(panel), at
    for reach, width, colour in ((10, 5, _INK), (9, 2, _MARK)):
        draw.line((x - reach, y, x + reach, y), fill=colour, width=width)
        draw.line((x, y - reach, x, y + reach), fill=colour, width=width)
