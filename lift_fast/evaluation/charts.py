"""Line charts, drawn with Pillow: a few methods over a few sizes, with intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from PIL import Image, ImageDraw, ImageFont

from .results import Estimate, as_estimate

# Okabe and Ito: colour-blind people can tell them apart; different marks help in print.
_COLOURS = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (230, 159, 0), (90, 90, 90))
_MARKS = ("circle", "square", "triangle", "diamond")
_INK, _PAPER, _GRID = (25, 25, 25), (255, 255, 255), (225, 225, 225)
_TEXT, _WIDTH, _HEIGHT = 20, 1000, 680
_LEFT, _RIGHT, _TOP, _BELOW = 110, 30, 90, 90
_DASH = 10


@dataclass(frozen=True)
class Series:
    """One line.

    Attributes:
        points: (x, y), finite.
        intervals: (low, high) of each point, or empty; NaN where there is none.
        dashed: for numbers that were taken from elsewhere, not measured.
    """

    name: str
    points: Sequence[tuple[float, float]]
    intervals: Sequence[tuple[float, float]] = ()
    dashed: bool = False

    @classmethod
    def of(cls, name: str, points: Iterable[tuple[float, Estimate | float]], dashed: bool = False) -> Series:
        """From figures (x, y), with the intervals of estimates."""
        known = [(x, as_estimate(y)) for x, y in points]
        return cls(name, [(x, y.value) for x, y in known], [(y.low, y.high) for _, y in known], dashed)


def line_chart(series: Sequence[Series], *, title: str, x: str, y: str, log_x: bool = False) -> Image.Image:
    """A chart with its legend; raises ``ValueError`` without finite points, and for x <= 0 on a logarithmic axis."""
    points = [point for line in series for point in line.points]
    if not points or not all(math.isfinite(v) for point in points for v in point):
        raise ValueError("a chart needs at least one point, and all points finite")
    if log_x and min(p[0] for p in points) <= 0:
        raise ValueError("a logarithmic axis needs positive values")
    font = ImageFont.load_default(size=_TEXT)
    # As many columns as the longest name leaves room for.
    longest = max(font.getlength(line.name) for line in series) + 36
    columns = max(1, min(3, int((_WIDTH - _LEFT) // longest)))
    legend = -(-len(series) // columns)
    height = _HEIGHT + legend * (_TEXT + 12)
    sheet = Image.new("RGB", (_WIDTH, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    ends = [v for line in series for pair in line.intervals for v in pair if math.isfinite(v)]
    across = _Axis([p[0] for p in points], _LEFT, _WIDTH - _RIGHT, log_x)
    up = _Axis([*(p[1] for p in points), *ends], _HEIGHT - _BELOW, _TOP, False)

    draw.text((_LEFT, 20), title, font=font, fill=_INK)
    draw.text((_LEFT, _TOP - _TEXT - 12), y, font=font, fill=_INK)
    draw.text(((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 30), x, font=font, fill=_INK, anchor="mm")
    for value in up.ticks():
        draw.line((_LEFT, up(value), _WIDTH - _RIGHT, up(value)), fill=_GRID)
        draw.text((_LEFT - 12, up(value)), f"{value:.6g}", font=font, fill=_INK, anchor="rm")
    values = sorted({p[0] for p in points})
    # The sizes that were measured, where there is room for their names.
    ticks = values if len(values) <= 9 and not log_x else across.ticks()
    for value in ticks:
        draw.line((across(value), _TOP, across(value), _HEIGHT - _BELOW), fill=_GRID)
        draw.text((across(value), _HEIGHT - _BELOW + 18), f"{value:.6g}", font=font, fill=_INK, anchor="mm")
    draw.rectangle((_LEFT, _TOP, _WIDTH - _RIGHT, _HEIGHT - _BELOW), outline=_INK)

    for number, line in enumerate(series):
        colour, mark = _COLOURS[number % len(_COLOURS)], _MARKS[number % len(_MARKS)]
        for (value, _), (low, high) in zip(line.points, line.intervals, strict=bool(line.intervals)):
            if math.isfinite(low) and math.isfinite(high):
                at, bars = across(value), (up(low), up(high))
                for piece in ((at, *bars[:1], at, *bars[1:]), *((at - 6, end, at + 6, end) for end in bars)):
                    draw.line(piece, fill=colour, width=2)
        places = [(across(one), up(other)) for one, other in sorted(line.points)]
        for start, stop in pairwise(places):
            for piece in _dashes(start, stop) if line.dashed else [(*start, *stop)]:
                draw.line(piece, fill=colour, width=3)
        for place in places:
            _draw_mark(draw, place, mark, colour)
        left = _LEFT + (number % columns) * ((_WIDTH - _LEFT) // columns)
        above = _HEIGHT + 6 + (number // columns) * (_TEXT + 12)
        _draw_mark(draw, (left, above), mark, colour)
        draw.text((left + 16, above), line.name, font=font, fill=_INK, anchor="lm")
    return sheet


class _Axis:
    """From values to pixels."""

    def __init__(self, values: Sequence[float], start: float, stop: float, log: bool) -> None:
        self.log, self.start, self.stop = log, start, stop
        low, high = min(values), max(values)
        if log:
            self.low, self.high = math.log10(low) - 0.1, math.log10(high) + 0.1
        else:
            # A single value is put in the middle.
            room = 0.06 * (high - low) or 0.1 * max(abs(high), 1e-12)
            self.low, self.high = low - room, high + room

    def __call__(self, value: float) -> float:
        at = math.log10(value) if self.log else value
        return self.start + (at - self.low) / (self.high - self.low) * (self.stop - self.start)

    def ticks(self) -> list[float]:
        """Round values."""
        if self.log:
            decades = range(math.floor(self.low), math.ceil(self.high) + 1)
            values = [m * 10.0**d for d in decades for m in (1, 2, 5)]
            return [v for v in values if self.low <= math.log10(v) <= self.high]
        step = 10 ** math.floor(math.log10((self.high - self.low) / 4))
        step = next(step * m for m in (1, 2, 2.5, 5, 10) if (self.high - self.low) / (step * m) <= 7)
        first = math.ceil(self.low / step)
        return [i * step for i in range(first, math.floor(self.high / step) + 1)]


def _dashes(start: tuple[float, float], stop: tuple[float, float]) -> list[tuple[float, float, float, float]]:
    """Every other piece of a line, as ends (x0, y0, x1, y1)."""
    (x, y), wide, tall = start, stop[0] - start[0], stop[1] - start[1]
    count = 2 * max(1, round(math.hypot(wide, tall) / (2 * _DASH))) + 1
    return [
        (x + wide * i / count, y + tall * i / count, x + wide * (i + 1) / count, y + tall * (i + 1) / count)
        for i in range(0, count, 2)
    ]


def _draw_mark(draw: ImageDraw.ImageDraw, at: tuple[float, float], mark: str, colour: tuple[int, int, int]) -> None:
    (x, y), size = at, 7
    if mark in ("circle", "square"):
        shape = draw.ellipse if mark == "circle" else draw.rectangle
        shape((x - size, y - size, x + size, y + size), fill=colour, outline=_PAPER)
    else:
        diamond = ((x + size, y), (x, y + size), (x - size, y))
        base = ((x + size, y + size), (x - size, y + size)) if mark == "triangle" else diamond
        draw.polygon(((x, y - size), *base), fill=colour, outline=_PAPER)
