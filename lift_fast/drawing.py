"""Sheets that show matches: lines, B warped into A, matched positions as colours, a confidence map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

from .match_field import between_points, enlarge, grid_positions, interpolate, spread_sample

Pixels = npt.NDArray[np.uint8]
Font = ImageFont.ImageFont | ImageFont.FreeTypeFont
Colour = tuple[int, int, int]

# Pixels: the widest and narrowest content of a sheet, and distances.
_WIDEST, _NARROWEST, _MARGIN, _GAP, _FRAME = 1552, 992, 24, 20, 10
_TALLEST, _TALLEST_STACKED, _SHORTEST_BAR = 720, 440, 140
_TEXT, _SMALL, _LEADING = 22, 19, 8
_INK, _FAINT, _PAPER, _WARNING = (25, 25, 25), (96, 96, 96), (255, 255, 255), (176, 32, 32)
_PALE = np.array([226, 230, 238], dtype=np.float32)
# Position colours of the corners: top left, top right, bottom left, bottom right. Their mixtures along the borders are
# bright, too, and cool is left and warm right, light above and dark below, which colour-blind people can tell apart.
_CORNERS = np.array([[[0, 205, 255], [255, 232, 0]], [[140, 50, 255], [255, 50, 50]]], dtype=np.float32)
# Cyan and vermilion, which colour-blind people can tell apart; the dots of outliers are hollow, too.
_INLIER, _OUTLIER = (0, 229, 255), (255, 84, 20)
# A neighbour whose match lies further away than this many steps of the grid belongs to another surface.
_JUMP = 3.0
# Lines show matches that are at least so confident, if there are any.
_CONFIDENT = 0.5
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
    confidence: npt.NDArray[np.floating]
    """[rows, columns], 0 to 1"""
    valid: npt.NDArray[np.bool_]
    """[rows, columns]"""
    caption: str
    warning: str = ""
    """Shown on a banner across the top."""
    inliers: npt.NDArray[np.bool_] | None = None
    """[rows, columns]: valid matches that agree with one geometry; None if that was not tested."""
    verdict: str = ""
    """Of the geometric verification, in words; shown on a line of its own."""


def position_colours(xy: npt.NDArray[Any], size: tuple[int, int]) -> Pixels:
    """Colours ``[..., 3]`` of the positions ``xy [..., 2]`` (x, y) in an image of ``size`` (height, width)."""
    x, y = (np.clip(xy[..., axis] * np.float32(255 / max(1, size[1 - axis] - 1)), 0, 255) for axis in (0, 1))
    colours: Pixels = (
        _position_table().reshape(-1, 3).take(np.rint(y).astype(int) * 256 + np.rint(x).astype(int), axis=0)
    )
    return colours


@lru_cache(maxsize=1)
def _position_table() -> Pixels:
    """[256, 256, 3]: the corners' colours mixed, each as bright as can be."""
    x = np.linspace(0, 1, 256)[:, None]
    top, bottom = (left + x * (right - left) for left, right in _CORNERS)
    mixed = top + x[:, None] * (bottom - top)
    return np.rint(mixed * (255 / mixed.max(-1, keepdims=True))).astype(np.uint8)


def confidence_colours(value: npt.NDArray[np.floating]) -> Pixels:
    """Colours ``[..., 3]`` of values in 0 to 1, dark to bright."""
    colours: Pixels = _confidence_table().take(np.rint(np.nan_to_num(np.clip(value, 0, 1)) * 1023).astype(int), axis=0)
    return colours


@lru_cache(maxsize=1)
def _confidence_table() -> Pixels:
    """[1024, 3]"""
    at = np.linspace(0, len(SCALE) - 1, 1024)
    channels = [np.interp(at, np.arange(len(SCALE)), channel) for channel in SCALE.T]
    return np.rint(np.stack(channels, axis=-1)).astype(np.uint8)


def place_cells(cells: Pixels, size: tuple[int, int], covered: tuple[float, float, float, float]) -> Image.Image:
    """Draw cells ``[h, w, 3]`` as blocks on a grey image of ``size`` (width, height).

    ``covered`` is the rectangle of the cells, (top, left, height, width) as fractions of the image.
    """
    top, left, height, width = (share * size[1 - i % 2] for i, share in enumerate(covered))
    sheet = Image.new("RGB", size, (128, 128, 128))
    shape = (max(1, round(width)), max(1, round(height)))
    sheet.paste(Image.fromarray(cells).resize(shape, Image.Resampling.NEAREST), (round(left), round(top)))
    return sheet


def draw_matches(view: MatchView, lines: int = 40) -> Image.Image:
    """Draw the matches on one sheet.

    A and B with at most ``lines`` lines between valid matches with a confidence of at least 0.5, spread over A
    (:func:`lift_fast.match_field.spread_sample`); where there are none between the most confident, which the title
    says. They are coloured by position in B, as B's frame shows, or, with ``inliers``, by whether they are. B warped
    into A: each pixel of A shows its match in B. A coloured by the position of each pixel's match in B. The confidence.
    Between the points of the grid the matches are interpolated where neighbours agree; what has no valid match is pale
    grey.

    Raises:
        ValueError: if the shapes of the arrays do not agree, or for a negative number of ``lines``.
    """
    _check(view)
    if lines < 0:
        raise ValueError(f"lines must be at least 0, got {lines}")
    confident = view.valid & (view.confidence >= _CONFIDENT)
    sample = spread_sample(confident if confident.any() else view.valid, view.confidence, lines)
    pair = _draw_pair(view, sample)
    # Tall images leave room for the panels beside them.
    room = _WIDEST - pair.width - _GAP
    beside = room > 0.55 * _WIDEST
    images = _join([pair, _draw_panels(view, room if beside else max(pair.width, _NARROWEST))], beside)
    width = max(images.width, _NARROWEST)
    sheet = ImageOps.expand(_join([_draw_header(view, sample, width), images]), _MARGIN, _PAPER)
    if view.warning:
        sheet = _join([_draw_banner(view.warning, sheet.width), sheet], gap=0)
    return sheet


def _check(view: MatchView) -> None:
    grid = view.valid.shape
    for name, array, shape in (
        ("points", view.points, (*grid, 2)),
        ("matches", view.matches, (*grid, 2)),
        ("confidence", view.confidence, grid),
        ("inliers", view.valid if view.inliers is None else view.inliers, grid),
    ):
        if len(grid) != 2 or array.shape != shape:
            raise ValueError(
                f"{name} must be {list(shape)} for valid [rows, columns] = {list(grid)}, got {array.shape}"
            )
    for name, image in (("image_a", view.image_a), ("image_b", view.image_b)):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
            raise ValueError(f"{name} must be [H, W, 3] uint8, got {list(image.shape)} {image.dtype}")


def _draw_pair(view: MatchView, sample: npt.NDArray[np.int64]) -> Image.Image:
    """A and B, side by side or, if both are wide, one above the other, with the matches of ``sample``."""
    wide_a, wide_b = (image.shape[1] / image.shape[0] for image in (view.image_a, view.image_b))
    stacked = min(wide_a, wide_b) > 2
    room = _WIDEST - 2 * _FRAME - _GAP
    if stacked:
        boxes = [(room, _TALLEST_STACKED)] * 2
    elif max(wide_a, wide_b) <= 2.5 * min(wide_a, wide_b):
        # Equally tall, and at least as wide as the text above.
        tall = min(max(_TALLEST, _NARROWEST / (wide_a + wide_b)), 1.25 * _TALLEST, room / (wide_a + wide_b))
        boxes = [(room, tall)] * 2
    else:
        # Of equal area, or the wide one leaves nothing to the other.
        share = wide_a**0.5 / (wide_a**0.5 + wide_b**0.5)
        boxes = [(room * share, _TALLEST), (room * (1 - share), _TALLEST)]
    a, b = (_fit(image, box) for image, box in zip((view.image_a, view.image_b), boxes, strict=True))
    if stacked:
        left_a, top_a, left_b, top_b = _FRAME, 0, _FRAME, a.height + _GAP + _FRAME
    else:
        # The shorter one in the middle, where lines are shortest.
        tall = max(a.height, b.height)
        left_a, top_a = 0, _FRAME + (tall - a.height) // 2
        left_b, top_b = a.width + _GAP + _FRAME, _FRAME + (tall - b.height) // 2
    size = max(left_a + a.width, left_b + b.width + _FRAME), max(top_a + a.height, top_b + b.height + _FRAME)
    sheet = Image.new("RGB", size, _PAPER)
    sheet.paste(a, (left_a, top_a))
    sheet.paste(_framed(b), (left_b - _FRAME, top_b - _FRAME))
    chosen = tuple(sample.T)
    ends = [
        (xy[chosen] + 0.5) * (shown.width / image.shape[1], shown.height / image.shape[0]) + corner
        for xy, image, shown, corner in (
            (view.points, view.image_a, a, (left_a, top_a)),
            (view.matches, view.image_b, b, (left_b, top_b)),
        )
    ]
    if view.inliers is None:
        colours, filled = position_colours(view.matches[chosen], view.image_b.shape[:2]), np.ones(len(sample), bool)
    else:
        filled = view.inliers[chosen]
        colours = np.where(filled[:, None], _INLIER, _OUTLIER).astype(np.uint8)
    sheet = _draw_lines(sheet, ends[0], ends[1], colours, filled)
    for name, corner in (("A", (left_a, top_a)), ("B", (left_b, top_b))):
        _draw_tag(sheet, name, corner)
    return sheet


def _draw_lines(
    sheet: Image.Image,
    starts: npt.NDArray[np.floating],
    ends: npt.NDArray[np.floating],
    colours: Pixels,
    filled: npt.NDArray[np.bool_],
) -> Image.Image:
    """Lines between (x, y) ``[n, 2]`` with dots at both ends, rings if not ``filled``; the first lie on top."""
    # Drawn twice as large and reduced, since Pillow's lines have jagged edges.
    large = sheet.resize((2 * sheet.width, 2 * sheet.height), Image.Resampling.NEAREST)
    # This mode blends.
    draw = ImageDraw.Draw(large, "RGBA")
    # Many lines must not hide the images.
    radius, width, opaque = (13, 5, 220) if len(starts) <= 100 else (8, 3, 150)
    order = [
        (tuple(2 * start), tuple(2 * end), tuple(map(int, colour)), bool(dot))
        for start, end, colour, dot in zip(starts, ends, colours, filled, strict=True)
    ][::-1]
    for start, end, colour, _ in order:
        draw.line((start, end), fill=(*_INK, opaque // 2), width=width + 4)
        draw.line((start, end), fill=(*colour, opaque), width=width)
    for start, end, colour, dot in order:
        for x, y in (start, end):
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=_INK)
            inner = radius - 3
            box = (x - inner, y - inner, x + inner, y + inner)
            draw.ellipse(box, fill=colour if dot else _INK, outline=colour, width=3)
    return large.reduce(2)


def _draw_panels(view: MatchView, width: int) -> Image.Image:
    """B warped into A, A coloured by matches, and the confidence: side by side unless A is wide."""
    (height_a, width_a), size_b = view.image_a.shape[:2], view.image_b.shape[:2]
    across = width_a <= 3 * height_a
    image_a = _fit(view.image_a, ((width - 2 * _GAP) / 3, _TALLEST) if across else (width, _TALLEST_STACKED / 1.5))
    columns, rows = (
        grid_positions(axis, (np.arange(length) + 0.5) * whole / length - 0.5)
        for axis, length, whole in (
            (view.points[0, :, 0], image_a.width, width_a),
            (view.points[:, 0, 1], image_a.height, height_a),
        )
    )
    step = max(int(np.diff(axis).max(initial=1)) for axis in (view.points[0, :, 0], view.points[:, 0, 1]))
    reach = _JUMP * step * max(1, size_b[0] / height_a, size_b[1] / width_a)
    xy, covered = between_points(view.matches, view.valid, columns, rows, reach)
    # Rounded at the edges: the staircase of the grid is not in the images. A single match stays visible.
    soft = Image.fromarray(np.rint(255 * covered).astype(np.uint8))
    soft = soft.filter(ImageFilter.GaussianBlur(0.4 * step * image_a.width / width_a))
    share = (np.clip(np.asarray(soft) / np.float32(100) - 0.4, 0, 1) * (covered > 0))[..., None]
    grey = np.asarray(image_a.convert("L"), dtype=np.float32)[..., None]
    pale = 0.35 * grey + 0.65 * _PALE

    def over_pale(pixels: npt.NDArray[Any]) -> Image.Image:
        return Image.fromarray(np.rint(pale + share * (pixels - pale)).astype(np.uint8))

    tinted = 0.75 * _chequered_colours(xy, size_b) + 0.25 * grey
    panels = [
        ("B warped into A", over_pale(interpolate(view.image_b, xy)), "pale grey: A, without a valid match"),
        ("A coloured by its matches", over_pale(tinted), "colours: as on the frame of B"),
        ("Confidence", Image.fromarray(confidence_colours(enlarge(view.confidence, columns, rows))), ""),
    ]
    return _join([_with_text(*panel) for panel in panels], across)


def _with_text(title: str, image: Image.Image, note: str) -> Image.Image:
    """An image below its title and above a note, or above a colour bar from 0 to 1."""
    title_font, font = _font(_TEXT), _font(_SMALL)
    above, below = _TEXT + _LEADING, _SMALL + 2 * _LEADING
    span = max(image.width, _SHORTEST_BAR)
    width = max(span, round(title_font.getlength(title)) + 1, round(font.getlength(note)) + 1)
    block = Image.new("RGB", (width, above + image.height + below), _PAPER)
    draw = ImageDraw.Draw(block)
    draw.text((0, 0), title, font=title_font, fill=_INK)
    block.paste(image, (0, above))
    base = above + image.height + _LEADING
    if note:
        draw.text((0, base), note, font=font, fill=_FAINT)
    else:
        draw.text((0, base), "0", font=font, fill=_FAINT)
        draw.text((span, base), "1", font=font, fill=_FAINT, anchor="ra")
        bar = confidence_colours(np.linspace(0, 1, span - 3 * _SMALL))
        block.paste(Image.fromarray(np.repeat(bar[None], 14, axis=0)), (_SMALL, base + 4))
    return block


def _draw_header(view: MatchView, sample: npt.NDArray[np.int64], width: int) -> Image.Image:
    """The caption, the verdict, and what the lines mean."""
    small, font = _font(_SMALL), _font(_TEXT)
    caption = wrap(view.caption, small, width) if view.caption else []
    verdict = wrap(view.verdict[:1].upper() + view.verdict[1:], font, width) if view.verdict else []
    title = _lines_title(view, sample)
    drawn = len(sample)
    legend: list[tuple[Colour | None, str]] = []
    if view.inliers is not None and drawn:
        inside = int(view.inliers[tuple(sample.T)].sum())
        legend = [
            (None, f"Of the {_counted(drawn, 'line')}:"),
            (_INLIER, _counted(inside, "inlier")),
            (_OUTLIER, _counted(drawn - inside, "outlier")),
        ]
    elif drawn:
        legend = [(None, "Colours: position in B, as on its frame.")]
    lengths = [round(font.getlength(text)) + (0 if colour is None else _TEXT) for colour, text in legend]
    left = round(font.getlength(title)) + _GAP
    # The legend stays whole.
    below = left + sum(lengths) + _GAP * (len(legend) - 1) > width
    step = _TEXT + _LEADING
    height = len(caption) * (_SMALL + _LEADING)
    block = Image.new("RGB", (width, height + (len(verdict) + 1 + below) * step), _PAPER)
    draw = ImageDraw.Draw(block)
    for number, line in enumerate(caption):
        draw.text((0, number * (_SMALL + _LEADING)), line, font=small, fill=_FAINT)
    for line in (*verdict, title):
        draw.text((0, height), line, font=font, fill=_INK)
        height += step
    if below:
        left = 0
    else:
        height -= step
    for (colour, text), long in zip(legend, lengths, strict=True):
        if colour is not None:
            draw.ellipse((left, height + 6, left + 15, height + 21), fill=colour, outline=_INK, width=2)
        draw.text((left + long, height), text, font=font, fill=_INK, anchor="ra")
        left += long + _GAP
    return block


def _lines_title(view: MatchView, sample: npt.NDArray[np.int64]) -> str:
    """Which of the valid matches the lines show."""
    drawn, known = len(sample), int(view.valid.sum())
    if not known:
        return "No valid match."
    if not drawn:
        return f"{known:,} valid match{'' if known == 1 else 'es'}."
    title = f"{drawn} of {known:,} valid match{'' if known == 1 else 'es'}"
    if view.confidence[tuple(sample.T)].min() >= _CONFIDENT:
        return f"{title}: confidence of at least {_CONFIDENT}, spread over A."
    return f"{title}: the most confident, spread over A; none reaches {_CONFIDENT}."


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _draw_banner(text: str, width: int) -> Image.Image:
    font = _font(_TEXT)
    lines = wrap(text[:1].upper() + text[1:], font, width - 2 * _MARGIN - 40)
    step = _TEXT + _LEADING
    block = Image.new("RGB", (width, len(lines) * step + 2 * _LEADING + 4), _WARNING)
    draw = ImageDraw.Draw(block)
    draw.regular_polygon((_MARGIN + 12, block.height / 2 + 3, 16), 3, fill=_PAPER)
    draw.text((_MARGIN + 12, block.height / 2 + 2), "!", font=font, fill=_WARNING, anchor="mm")
    for number, line in enumerate(lines):
        draw.text((_MARGIN + 40, _LEADING + 2 + number * step), line, font=font, fill=_PAPER)
    return block


def _framed(image: Image.Image) -> Image.Image:
    """The image of B in a frame of its position colours, dark and light as its fields, as maps have it."""
    x, y = (np.clip(np.arange(-_FRAME, side + _FRAME), 0, side - 1) for side in image.size)
    framed = np.zeros((len(y), len(x), 3), dtype=np.uint8)
    first, last, every = np.s_[:_FRAME], np.s_[-_FRAME:], np.s_[:]
    for rows, columns in ((first, every), (last, every), (every, first), (every, last)):
        xy = np.stack(np.meshgrid(x[columns], y[rows]), axis=-1)
        framed[rows, columns] = _chequered_colours(xy, (image.height, image.width))
    sheet = Image.fromarray(framed)
    sheet.paste(image, (_FRAME, _FRAME))
    return sheet


def _draw_tag(sheet: Image.Image, name: str, corner: tuple[int, int]) -> None:
    draw, (left, top) = ImageDraw.Draw(sheet), corner
    draw.rectangle((left, top, left + 30, top + 32), fill=_INK)
    draw.text((left + 15, top + 16), name, font=_font(_TEXT), fill=_PAPER, anchor="mm")


def draw_match_line(
    draw: ImageDraw.ImageDraw,
    start: tuple[float, float],
    end: tuple[float, float],
    colour: Colour,
    radius: int = 5,
    width: int = 2,
) -> None:
    """Draw a line with dots of ``radius`` at its ends (x, y); a dark rim keeps it visible on any image."""
    draw.line((start, end), fill=_INK, width=width + 2)
    draw.line((start, end), fill=colour, width=width)
    for x, y in (start, end):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour, outline=_INK, width=2)


def _chequered_colours(xy: npt.NDArray[Any], size: tuple[int, int]) -> Pixels:
    """Position colours with every other of 8 x 8 fields darker, to show folds and shifts without hue."""
    x, y = ((xy[..., axis] + 0.5) * np.float32(8 / size[1 - axis]) for axis in (0, 1))
    light = np.where((x.astype(int) + y.astype(int)) % 2, np.float32(0.75), np.float32(1))
    colours: Pixels = (position_colours(xy, size) * light[..., None]).astype(np.uint8)
    return colours


def _fit(image: Pixels, box: tuple[float, float]) -> Image.Image:
    """The image, as large as fits into ``box`` (width, height)."""
    scale = min(box[0] / image.shape[1], box[1] / image.shape[0])
    size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    return Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)


def _join(images: Sequence[Image.Image], across: bool = False, gap: int = _GAP) -> Image.Image:
    """Images beside each other (``across``) or below each other."""
    lengths = [image.width if across else image.height for image in images]
    breadth = max(image.height if across else image.width for image in images)
    length = sum(lengths) + gap * (len(images) - 1)
    sheet = Image.new("RGB", (length, breadth) if across else (breadth, length), _PAPER)
    at = 0
    for image, own in zip(images, lengths, strict=True):
        sheet.paste(image, (at, 0) if across else (0, at))
        at += own + gap
    return sheet


@lru_cache
def _font(size: int) -> Font:
    return ImageFont.load_default(size=size)


def wrap(text: str, font: Font, width: int) -> list[str]:
    """Lines of ``text`` at most ``width`` pixels wide, broken between words, and within words that are wider."""
    lines: list[str] = [""]
    for word in " ".join(text.splitlines()).split(" "):
        longer = f"{lines[-1]} {word}" if lines[-1] else word
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines
