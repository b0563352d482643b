"""Pictures by which a person can judge matches: lines, matched positions as colours, a warp, a confidence map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

Pixels = npt.NDArray[np.uint8]
Font = ImageFont.ImageFont | ImageFont.FreeTypeFont

_WIDTH, _GAP, _TEXT = 1600, 16, 20
_TALLEST = 620
_INK, _PAPER, _MISSING, _WARNING = (25, 25, 25), (255, 255, 255), (90, 90, 90), (176, 32, 32)
# Corners of the position colours, from the palette of Okabe and Ito, so that colour-blind people can tell them apart:
# top left, top right, bottom left, bottom right.
_CORNERS = np.array([[[0, 90, 181], [240, 228, 66]], [[75, 0, 110], [220, 80, 0]]], dtype=np.float64)
# Anchors of a dark-to-bright scale that stays ordered in grey.
_SCALE = np.array(
    [[13, 8, 85], [84, 2, 163], [156, 23, 158], [204, 71, 120], [237, 121, 83], [253, 180, 47], [240, 249, 33]],
    dtype=np.float64,
)


@dataclass(frozen=True)
class MatchView:
    """What :func:`draw_matches` draws."""

    picture_a: Pixels
    """[Ha, Wa, 3] uint8"""
    picture_b: Pixels
    """[Hb, Wb, 3] uint8"""
    points: npt.NDArray[np.int64]
    """[P, 2] (x, y) pixels of A, the row-major points of a regular grid."""
    matches: npt.NDArray[np.int64]
    """[P, 2] (x, y) pixels of B; (-1, -1) where there is no match."""
    similarity: npt.NDArray[np.floating]
    """[P]"""
    valid: npt.NDArray[np.bool_]
    """[P]"""
    grid: tuple[int, int]
    """(rows, columns) of the points, rows * columns = P."""
    caption: str
    warning: str = ""
    """Shown on a banner across the top."""


def position_colours(xy: npt.NDArray[Any], size: tuple[int, int]) -> Pixels:
    """Colours ``[..., 3]`` of the positions ``xy [..., 2]`` (x, y) in a picture of ``size`` (height, width)."""
    x = np.clip(xy[..., :1] / max(1, size[1] - 1), 0, 1)
    y = np.clip(xy[..., 1:] / max(1, size[0] - 1), 0, 1)
    top = _CORNERS[0, 0] * (1 - x) + _CORNERS[0, 1] * x
    bottom = _CORNERS[1, 0] * (1 - x) + _CORNERS[1, 1] * x
    colours: Pixels = np.rint(top * (1 - y) + bottom * y).astype(np.uint8)
    return colours


def confidence_colours(value: npt.NDArray[np.floating]) -> Pixels:
    """Colours ``[..., 3]`` of values in 0 to 1, dark to bright."""
    at = np.clip(value, 0, 1)[..., None] * (len(_SCALE) - 1)
    low = np.minimum(at.astype(int), len(_SCALE) - 2)[..., 0]
    mixed = _SCALE[low] + (at - low[..., None]) * (_SCALE[low + 1] - _SCALE[low])
    colours: Pixels = np.rint(mixed).astype(np.uint8)
    return colours


def even_sample(grid: tuple[int, int], valid: npt.NDArray[np.bool_], count: int) -> npt.NDArray[np.int64]:
    """Up to ``count`` indices of valid points, spread evenly over the grid and blind to similarity.

    A sample of the best matches would flatter.
    """
    rows, columns = grid
    tall = max(1, round((count * rows / columns) ** 0.5))
    wide = max(1, count // tall)
    ys = ((np.arange(min(tall, rows)) + 0.5) * rows / min(tall, rows)).astype(int)
    xs = ((np.arange(min(wide, columns)) + 0.5) * columns / min(wide, columns)).astype(int)
    chosen = (ys[:, None] * columns + xs).ravel()
    chosen = chosen[valid[chosen]]
    return chosen[:count]


def draw_matches(view: MatchView, lines: int = 40) -> Image.Image:
    """One sheet: both pictures with match lines; below, matched positions as colours, B warped into A, confidence.

    Raises:
        ValueError: if the arrays do not fit each other.
    """
    _check(view)
    font = ImageFont.load_default(size=_TEXT)
    caption = _wrap(view.caption, font, _WIDTH - 2 * _GAP)
    banner = 2 * _TEXT if view.warning else 0
    top = banner + _GAP + len(caption) * (_TEXT + 6) + _GAP
    title = _TEXT + 8

    half, quarter = (_WIDTH - 3 * _GAP) // 2, (_WIDTH - 5 * _GAP) // 4
    size_a, size_b = view.picture_a.shape[:2], view.picture_b.shape[:2]
    scale_a, scale_b = (min(half / s[1], _TALLEST / s[0]) for s in (size_a, size_b))
    big_a, big_b = _resize(view.picture_a, scale_a), _resize(view.picture_b, scale_b)
    tall = max(big_a.height, big_b.height)
    panels = _panels(view)
    small = [_fit(panel, quarter, _TALLEST) for _, panel in panels]
    low = max(image.height for image in small)
    bar = 2 * _TEXT + 12
    sheet = Image.new("RGB", (_WIDTH, top + title + tall + _GAP + title + low + bar + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)

    if view.warning:
        draw.rectangle((0, 0, _WIDTH, banner), fill=_WARNING)
        draw.text((_WIDTH // 2, banner // 2), view.warning.upper(), font=font, fill=_PAPER, anchor="mm")
    for number, line in enumerate(caption):
        draw.text((_GAP, banner + _GAP + number * (_TEXT + 6)), line, font=font, fill=_INK)

    left_a, left_b = _GAP + (half - big_a.width) // 2, 2 * _GAP + half + (half - big_b.width) // 2
    above = top + title
    draw.text((left_a, top), "A", font=font, fill=_INK)
    draw.text((left_b, top), "B", font=font, fill=_INK)
    sheet.paste(big_a, (left_a, above))
    sheet.paste(big_b, (left_b, above))
    _draw_lines(draw, view, lines, (left_a, above, scale_a), (left_b, above, scale_b))

    above = top + title + tall + _GAP
    for number, ((name, _), image) in enumerate(zip(panels, small, strict=True)):
        left = _GAP + number * (quarter + _GAP)
        draw.text((left, above), name, font=font, fill=_INK)
        sheet.paste(image, (left, above + title))
    _draw_bar(sheet, view, (_GAP + 3 * (quarter + _GAP), above + title + small[-1].height + 8, quarter), font)
    return sheet


def _check(view: MatchView) -> None:
    count = view.grid[0] * view.grid[1]
    for name, array, shape in (
        ("points", view.points, (count, 2)),
        ("matches", view.matches, (count, 2)),
        ("similarity", view.similarity, (count,)),
        ("valid", view.valid, (count,)),
    ):
        if array.shape != shape:
            raise ValueError(f"{name} must be {shape} for a grid of {view.grid}, got {array.shape}")
    for name, picture in (("picture_a", view.picture_a), ("picture_b", view.picture_b)):
        if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8 or 0 in picture.shape:
            raise ValueError(f"{name} must be [H, W, 3] uint8, got {list(picture.shape)} {picture.dtype}")


def _panels(view: MatchView) -> list[tuple[str, Image.Image]]:
    size_a, size_b = view.picture_a.shape[:2], view.picture_b.shape[:2]
    valid = view.valid.reshape(view.grid)
    matches = view.matches.reshape(*view.grid, 2)
    everywhere = np.stack(np.meshgrid(np.arange(size_b[1]), np.arange(size_b[0])), axis=-1)
    of_b = _tint(view.picture_b, position_colours(everywhere, size_b))
    colours = np.where(valid[..., None], position_colours(matches, size_b), np.uint8(_MISSING[0]))
    on_a = _tint(view.picture_a, _enlarge(colours, size_a))
    warp = view.picture_b[matches[..., 1], matches[..., 0]].copy()
    warp[~valid] = _MISSING
    value, _, _ = _confidence(view)
    confidence = confidence_colours(value.reshape(view.grid))
    confidence[~valid] = _MISSING
    return [
        ("B, coloured by position", Image.fromarray(of_b)),
        ("A, coloured by match in B", Image.fromarray(on_a)),
        ("B warped into A", Image.fromarray(_enlarge(warp, size_a))),
        ("similarity of the match", Image.fromarray(_enlarge(confidence, size_a))),
    ]


def _confidence(view: MatchView) -> tuple[npt.NDArray[np.floating], float, float]:
    """Similarity stretched to 0 to 1 between the 2nd and 98th percentile of the valid matches, and those two."""
    if not view.valid.any():
        return np.zeros_like(view.similarity), 0.0, 1.0
    low, high = (float(v) for v in np.percentile(view.similarity[view.valid], (2, 98)))
    spread = max(high - low, 1e-6)
    return np.where(view.valid, (np.where(view.valid, view.similarity, low) - low) / spread, 0.0), low, high


def _draw_lines(
    draw: ImageDraw.ImageDraw,
    view: MatchView,
    lines: int,
    place_a: tuple[int, int, float],
    place_b: tuple[int, int, float],
) -> None:
    def on_sheet(xy: npt.NDArray[np.int64], place: tuple[int, int, float]) -> tuple[float, float]:
        left, above, scale = place
        return left + (xy[0] + 0.5) * scale, above + (xy[1] + 0.5) * scale

    size_a = view.picture_a.shape[:2]
    for index in even_sample(view.grid, view.valid, lines):
        red, green, blue = (int(v) for v in position_colours(view.points[index], size_a))
        start, end = on_sheet(view.points[index], place_a), on_sheet(view.matches[index], place_b)
        # A dark rim keeps a line visible on any picture.
        draw.line((start, end), fill=_INK, width=4)
        draw.line((start, end), fill=(red, green, blue), width=2)
        for x, y in (start, end):
            draw.ellipse((x - 5, y - 5, x + 5, y + 5), fill=(red, green, blue), outline=_INK, width=2)


def _draw_bar(sheet: Image.Image, view: MatchView, place: tuple[int, int, int], font: Font) -> None:
    left, above, width = place
    _, low, high = _confidence(view)
    bar = np.repeat(confidence_colours(np.linspace(0, 1, width))[None], 12, axis=0)
    sheet.paste(Image.fromarray(bar), (left, above))
    draw = ImageDraw.Draw(sheet)
    draw.text((left, above + 16), f"{low:.2f}", font=font, fill=_INK)
    draw.text((left + width, above + 16), f"{high:.2f}", font=font, fill=_INK, anchor="ra")
    draw.text((left + width // 2, above + 16), "grey: none", font=font, fill=_MISSING, anchor="ma")


def _tint(picture: Pixels, colours: Pixels) -> Pixels:
    """Colours over the grey picture, so that both position and content stay visible."""
    grey = picture.mean(axis=2, keepdims=True)
    tinted: Pixels = np.rint(0.65 * colours + 0.35 * grey).astype(np.uint8)
    return tinted


def _enlarge(cells: Pixels, size: tuple[int, ...]) -> Pixels:
    """Nearest-neighbour enlargement of a grid ``[rows, columns, 3]`` to a picture's size."""
    rows = np.arange(size[0]) * cells.shape[0] // size[0]
    columns = np.arange(size[1]) * cells.shape[1] // size[1]
    return cells[rows[:, None], columns]


def _resize(picture: Pixels, scale: float) -> Image.Image:
    image = Image.fromarray(picture)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def _fit(image: Image.Image, width: int, height: int) -> Image.Image:
    scale = min(width / image.width, height / image.height)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BOX)


def _wrap(text: str, font: Font, width: int) -> list[str]:
    lines: list[str] = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}" if lines[-1] else word
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
