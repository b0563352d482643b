"""Sheets that show matches: lines, matched positions as colours, a warp, a confidence map."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

Pixels = npt.NDArray[np.uint8]
Font = ImageFont.ImageFont | ImageFont.FreeTypeFont

_WIDTH, _GAP, _TEXT = 1600, 16, 20
_TALLEST, _TALLEST_PANEL = 620, 560
_BAR = 2 * _TEXT + 8
_INK, _PAPER, _WARNING = (25, 25, 25), (255, 255, 255), (176, 32, 32)
_HATCH = np.array([[220, 220, 220], [150, 150, 150]], dtype=np.uint8)
# Position colours of the corners, from Okabe and Ito's palette for colour-blind people: top left, top right, bottom
# left, bottom right.
_CORNERS = np.array([[[0, 90, 181], [240, 228, 66]], [[75, 0, 110], [220, 80, 0]]], dtype=np.float64)
SCALE = np.array(
    [[13, 8, 85], [84, 2, 163], [156, 23, 158], [204, 71, 120], [237, 121, 83], [253, 180, 47], [240, 249, 33]],
    dtype=np.float64,
)
"""Dark-to-bright colour scale that stays ordered in grey and for colour-blind people."""


@dataclass(frozen=True)
class MatchView:
    """What :func:`draw_matches` draws."""

    image_a: Pixels
    """[Ha, Wa, 3] uint8"""
    image_b: Pixels
    """[Hb, Wb, 3] uint8"""
    points: npt.NDArray[np.int64]
    """[rows, columns, 2] (x, y) pixels of A, a regular grid."""
    matches: npt.NDArray[np.int64]
    """[rows, columns, 2] (x, y) pixels of B; (-1, -1) where there is no match."""
    similarity: npt.NDArray[np.floating]
    """[rows, columns]"""
    confidence: npt.NDArray[np.floating]
    """[rows, columns], 0 to 1"""
    valid: npt.NDArray[np.bool_]
    """[rows, columns]"""
    caption: str
    warning: str = ""
    """Shown on a banner across the top."""


def position_colours(xy: npt.NDArray[Any], size: tuple[int, int]) -> Pixels:
    """Colours ``[..., 3]`` of the positions ``xy [..., 2]`` (x, y) in an image of ``size`` (height, width)."""
    x = np.clip(xy[..., :1] / max(1, size[1] - 1), 0, 1)
    y = np.clip(xy[..., 1:] / max(1, size[0] - 1), 0, 1)
    top = _CORNERS[0, 0] * (1 - x) + _CORNERS[0, 1] * x
    bottom = _CORNERS[1, 0] * (1 - x) + _CORNERS[1, 1] * x
    colours: Pixels = np.rint(top * (1 - y) + bottom * y).astype(np.uint8)
    return colours


def confidence_colours(value: npt.NDArray[np.floating]) -> Pixels:
    """Colours ``[..., 3]`` of values in 0 to 1, dark to bright."""
    at = np.clip(value, 0, 1)[..., None] * (len(SCALE) - 1)
    low = np.minimum(at.astype(int), len(SCALE) - 2)[..., 0]
    mixed = SCALE[low] + (at - low[..., None]) * (SCALE[low + 1] - SCALE[low])
    colours: Pixels = np.rint(mixed).astype(np.uint8)
    return colours


def place_cells(cells: Pixels, size: tuple[int, int], covered: tuple[float, float, float, float]) -> Image.Image:
    """Draw cells ``[h, w, 3]`` as blocks on a grey image of ``size`` (width, height).

    ``covered`` is the rectangle of the cells, (top, left, height, width) as fractions of the image.
    """
    top, left, height, width = (share * size[1 - i % 2] for i, share in enumerate(covered))
    sheet = Image.new("RGB", size, (128, 128, 128))
    shape = (max(1, round(width)), max(1, round(height)))
    sheet.paste(Image.fromarray(cells).resize(shape, Image.Resampling.NEAREST), (round(left), round(top)))
    return sheet


def even_sample(valid: npt.NDArray[np.bool_], count: int) -> npt.NDArray[np.int64]:
    """Up to ``count`` (row, column) of valid points, evenly spread: ``[n, 2]``.

    The grid is cut into about ``count`` fields, and the valid point nearest to the centre of each field is taken.
    Similarity plays no part: a sample of the best matches would look better than the matches are.
    """
    rows, columns = valid.shape
    tall = min(rows, max(1, round((count * rows / columns) ** 0.5)))
    wide = min(columns, max(1, count // tall))
    tall = min(tall, count)
    chosen = []
    ys, xs = (np.arange(n + 1) * length // n for n, length in ((tall, rows), (wide, columns)))
    for top, bottom in pairwise(ys):
        for left, right in pairwise(xs):
            inside = np.argwhere(valid[top:bottom, left:right])
            if len(inside):
                centre = ((bottom - top - 1) / 2, (right - left - 1) / 2)
                chosen.append(inside[np.square(inside - centre).sum(1).argmin()] + (top, left))
    return np.array(chosen, dtype=np.int64).reshape(-1, 2)


def draw_matches(view: MatchView, lines: int = 40) -> Image.Image:
    """Draw the matches on one sheet.

    First row: A and B with lines between an evenly spread sample of the valid matches, coloured by position in A.
    Second row: A, B warped into A's frame through the matches (each pixel of A shows its match in B), and the
    confidence from 0 to 1. Third row: B coloured by position, A coloured by the position of each pixel's match in B,
    and the similarity between its 2nd and 98th percentile. Hatched areas have no valid match.

    Raises:
        ValueError: if the shapes of the arrays do not agree.
    """
    _check(view)
    font = ImageFont.load_default(size=_TEXT)
    caption = wrap(view.caption, font, _WIDTH - 2 * _GAP)
    banner = 2 * _TEXT if view.warning else 0
    top = banner + _GAP + len(caption) * (_TEXT + 6) + _GAP
    title = _TEXT + 8

    half, third = (_WIDTH - 3 * _GAP) // 2, (_WIDTH - 4 * _GAP) // 3
    size_a, size_b = view.image_a.shape[:2], view.image_b.shape[:2]
    scale_a, scale_b = (min(half / s[1], _TALLEST / s[0]) for s in (size_a, size_b))
    big_a, big_b = _resize(view.image_a, scale_a), _resize(view.image_b, scale_b)
    tall = max(big_a.height, big_b.height)
    panels = [_panels(view, third)[n : n + 3] for n in (0, 3)]
    low = [max(panel.image.height + (_BAR if panel.scale else 0) for panel in row) for row in panels]
    height = top + title + tall + _GAP + sum(title + n + _GAP for n in low)
    sheet = Image.new("RGB", (_WIDTH, height), _PAPER)
    draw = ImageDraw.Draw(sheet)

    if view.warning:
        draw.rectangle((0, 0, _WIDTH, banner), fill=_WARNING)
        draw.text((_WIDTH // 2, banner // 2), view.warning.upper(), font=font, fill=_PAPER, anchor="mm")
    for number, line in enumerate(caption):
        draw.text((_GAP, banner + _GAP + number * (_TEXT + 6)), line, font=font, fill=_INK)

    # Side by side, so that lines stay short.
    left_a, left_b = _WIDTH // 2 - _GAP // 2 - big_a.width, _WIDTH // 2 + _GAP // 2
    above = top + title
    sample = even_sample(view.valid, lines)
    draw.text((left_a, top), f"A, and {len(sample)} of its matches, spread evenly", font=font, fill=_INK)
    draw.text((left_b, top), "B", font=font, fill=_INK)
    sheet.paste(big_a, (left_a, above))
    sheet.paste(big_b, (left_b, above))
    _draw_lines(draw, view, sample, (left_a, above, scale_a), (left_b, above, scale_b))

    above += tall + _GAP
    for row, deepest in zip(panels, low, strict=True):
        for number, panel in enumerate(row):
            left = _GAP + number * (third + _GAP)
            draw.text((left, above), panel.title, font=font, fill=_INK)
            sheet.paste(panel.image, (left, above + title))
            if panel.scale:
                _draw_bar(sheet, panel.scale, (left, above + title + panel.image.height + 8, panel.image.width), font)
        above += title + deepest + _GAP
    return sheet


def _check(view: MatchView) -> None:
    grid = view.valid.shape
    for name, array, shape in (
        ("points", view.points, (*grid, 2)),
        ("matches", view.matches, (*grid, 2)),
        ("similarity", view.similarity, grid),
        ("confidence", view.confidence, grid),
    ):
        if len(grid) != 2 or array.shape != shape:
            raise ValueError(
                f"{name} must be {list(shape)} for valid [rows, columns] = {list(grid)}, got {array.shape}"
            )
    for name, image in (("image_a", view.image_a), ("image_b", view.image_b)):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
            raise ValueError(f"{name} must be [H, W, 3] uint8, got {list(image.shape)} {image.dtype}")


class _Panel(NamedTuple):
    title: str
    image: Image.Image
    scale: tuple[str, str] | None = None
    """Labels of the ends of the colour scale."""


def _panels(view: MatchView, width: int) -> list[_Panel]:
    size_a, size_b = view.image_a.shape[:2], view.image_b.shape[:2]
    everywhere = np.stack(np.meshgrid(np.arange(size_b[1]), np.arange(size_b[0])), axis=-1)
    of_b = _tint(view.image_b, _chequered_colours(everywhere, size_b))
    on_a = _tint(view.image_a, _enlarge(_chequered_colours(view.matches, size_b), size_a))
    warp = _enlarge(view.image_b[view.matches[..., 1], view.matches[..., 0]], size_a)
    confidence = _enlarge(confidence_colours(view.confidence), size_a)
    value, low, high = _stretch(view)
    similarity = _enlarge(confidence_colours(value), size_a)
    missing = _enlarge(~view.valid, size_a)
    no_match = _enlarge(view.matches[..., 0] < 0, size_a)

    def on_sheet(pixels: Pixels, mask: npt.NDArray[np.bool_] | None = None) -> Image.Image:
        scale = min(width / pixels.shape[1], _TALLEST_PANEL / pixels.shape[0])
        image = _resize(pixels, scale, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BOX)
        return image if mask is None else _hatch(image, mask)

    return [
        _Panel("A", on_sheet(view.image_a)),
        _Panel("B warped into A (hatched: no valid match)", on_sheet(warp, missing)),
        _Panel("confidence: similarity, halved per cell missed on return", on_sheet(confidence, no_match), ("0", "1")),
        _Panel("B, coloured by position", on_sheet(of_b)),
        _Panel("A, coloured by match in B", on_sheet(on_a, missing)),
        _Panel("similarity", on_sheet(similarity, no_match), (f"{low:.2f}", f"{high:.2f}")),
    ]


def _stretch(view: MatchView) -> tuple[npt.NDArray[np.floating], float, float]:
    """Similarity scaled to 0 to 1 between the 2nd and 98th percentile of the matches, and these two."""
    matched = (view.matches >= 0).all(-1)
    if not matched.any():
        return np.zeros_like(view.similarity), 0.0, 1.0
    low, high = (float(v) for v in np.percentile(view.similarity[matched], (2, 98)))
    return (np.where(matched, view.similarity, low) - low) / max(high - low, 1e-6), low, high


def _draw_lines(
    draw: ImageDraw.ImageDraw,
    view: MatchView,
    sample: npt.NDArray[np.int64],
    place_a: tuple[int, int, float],
    place_b: tuple[int, int, float],
) -> None:
    def on_sheet(xy: npt.NDArray[np.int64], place: tuple[int, int, float]) -> tuple[float, float]:
        left, above, scale = place
        return left + (xy[0] + 0.5) * scale, above + (xy[1] + 0.5) * scale

    size_a = view.image_a.shape[:2]
    for row, column in sample:
        red, green, blue = (int(v) for v in position_colours(view.points[row, column], size_a))
        start, end = on_sheet(view.points[row, column], place_a), on_sheet(view.matches[row, column], place_b)
        draw_match_line(draw, start, end, (red, green, blue))


def draw_match_line(
    draw: ImageDraw.ImageDraw,
    start: tuple[float, float],
    end: tuple[float, float],
    colour: tuple[int, int, int],
    radius: int = 5,
    width: int = 2,
) -> None:
    """Draw a line with dots of ``radius`` at its ends (x, y); a dark rim keeps it visible on any image."""
    draw.line((start, end), fill=_INK, width=width + 2)
    draw.line((start, end), fill=colour, width=width)
    for x, y in (start, end):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour, outline=_INK, width=2)


def _draw_bar(sheet: Image.Image, ends: tuple[str, str], place: tuple[int, int, int], font: Font) -> None:
    left, above, width = place
    bar = np.repeat(confidence_colours(np.linspace(0, 1, width))[None], 12, axis=0)
    sheet.paste(Image.fromarray(bar), (left, above))
    draw = ImageDraw.Draw(sheet)
    draw.text((left, above + 16), ends[0], font=font, fill=_INK)
    draw.text((left + width, above + 16), ends[1], font=font, fill=_INK, anchor="ra")


def _chequered_colours(xy: npt.NDArray[Any], size: tuple[int, int]) -> Pixels:
    """Position colours with every other of 8 x 8 fields darker, to show folds and shifts without hue."""
    dark = (xy * 8 // (size[1], size[0])).sum(-1, keepdims=True) % 2
    colours: Pixels = np.rint(position_colours(xy, size) * np.where(dark, 0.7, 1.0)).astype(np.uint8)
    return colours


def _tint(image: Pixels, colours: Pixels) -> Pixels:
    """Colours over the grey image: both position and content stay visible."""
    grey = image.mean(axis=2, keepdims=True)
    tinted: Pixels = np.rint(0.65 * colours + 0.35 * grey).astype(np.uint8)
    return tinted


def _hatch(image: Image.Image, mask: npt.NDArray[np.bool_]) -> Image.Image:
    """Diagonal stripes over ``mask``, which cannot be mistaken for a part of a photograph."""
    shown = Image.fromarray(mask).resize(image.size, Image.Resampling.NEAREST)
    y, x = np.indices((image.height, image.width))
    stripes = _HATCH[(x + y) // 4 % 2]
    return Image.fromarray(np.where(np.asarray(shown)[..., None], stripes, np.asarray(image)))


def _enlarge(cells: npt.NDArray[Any], size: tuple[int, ...]) -> npt.NDArray[Any]:
    """Nearest-neighbour enlargement of a grid ``[rows, columns, ...]`` to an image's size."""
    rows = np.arange(size[0]) * cells.shape[0] // size[0]
    columns = np.arange(size[1]) * cells.shape[1] // size[1]
    return cells[rows[:, None], columns]


def _resize(pixels: Pixels, scale: float, resample: Image.Resampling = Image.Resampling.LANCZOS) -> Image.Image:
    size = (max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale)))
    return Image.fromarray(pixels).resize(size, resample)


def wrap(text: str, font: Font, width: int) -> list[str]:
    """Lines of ``text`` at most ``width`` pixels wide, broken between words."""
    lines: list[str] = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}" if lines[-1] else word
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
