"""A sheet of the warp protocol: pairs of views, and where each method finds their points."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lift_fast.drawing import draw_match_line, wrap
from lift_fast.evaluation.methods import Batch, Method

from .protocol import View, WarpProtocol, matches, read_views

# Okabe and Ito: colour-blind people can tell them apart, unlike red and green.
RIGHT, WRONG = (86, 180, 233), (213, 94, 0)
_INK, _PAPER = (25, 25, 25), (255, 255, 255)
_PANEL, _GAP, _TEXT = 320, 12, 18


class Pair(NamedTuple):
    """Both views of one photograph, and each method's matches."""

    name: str
    view: View
    matches: dict[str, npt.NDArray[np.int64]]
    """By method: ``[N, 2]`` (x, y) pixels of the second view."""


def choose(paths: Sequence[Path], count: int) -> list[Path]:
    """Up to ``count`` photographs, spread evenly over the list, whatever their matches."""
    return [paths[(2 * n + 1) * len(paths) // (2 * count)] for n in range(count)] if count < len(paths) else [*paths]


def match_pairs(
    methods: Sequence[Method],
    paths: Sequence[Path],
    root: Path,
    size: int,
    normalise: Callable[[Image.Image], Tensor],
    protocol: WarpProtocol,
    seed: int = 0,
) -> Iterator[Pair]:
    """Matches of the points of each photograph; photographs that cannot be used are left out.

    Arguments are as for :func:`lift_fast.evaluation.warp.evaluate`; ``normalise`` is of
    :func:`lift_fast.evaluation.warp.normaliser`.
    """
    for name, view in read_views(paths, root, size, seed, protocol):
        if isinstance(view, str):
            continue
        batches = [Batch(normalise(image)) for image in view[:2]]
        points = torch.from_numpy(view.points)[None]
        found = {}
        with torch.inference_mode():
            for method in methods:
                features = [method(batch) for batch in batches]
                found[method.name] = matches(features, points.to(features[0].map.device), size)[0].cpu().numpy()
        yield Pair(name, view, found)


def draw_sheet(pairs: Sequence[Pair], alpha: float, points: int = 16, caption: str = "") -> Image.Image:
    """A row for each photograph, a column for each method: both views, and lines from the points to their matches.

    A line is blue if the match lies less than alpha * S pixels from the true place, else orange, with a white ring
    around the true place and a thin white line to it. The points are the protocol's first, a random choice; the count
    in a panel's title is of all its points.

    Args:
        pairs: of :func:`match_pairs`, of the same methods and size.
        alpha: share of the side within which a match is right.
        points: how many to draw in each panel.
        caption: text at the top.

    Raises:
        ValueError: for no pairs, or fewer than one point.
    """
    if not pairs or points < 1:
        raise ValueError(f"expected at least one pair and one point, got {len(pairs)} and {points}")
    font = ImageFont.load_default(size=_TEXT)
    methods = list(pairs[0].matches)
    # Two views without a gap between them, so that lines stay short.
    wide, tall = 2 * _PANEL, _PANEL
    width = _GAP + len(methods) * (wide + _GAP)
    legend = (
        f"{points} of each photograph's points. Blue: matched within {alpha:g} x the side. Orange: not, the white ring "
        "is the true place."
    )
    lines = [line for text in (caption, legend) if text for line in wrap(text, font, width - 2 * _GAP)]
    top = _GAP + len(lines) * (_TEXT + 6) + _GAP
    step = 2 * (_TEXT + 6) + tall + _GAP
    sheet = Image.new("RGB", (width, top + len(pairs) * step), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(lines):
        draw.text((_GAP, _GAP + number * (_TEXT + 6)), line, font=font, fill=_INK)
    for row, pair in enumerate(pairs):
        above = top + row * step
        draw.text((_GAP, above), pair.name, font=font, fill=_INK)
        for column, method in enumerate(methods):
            panel, right = _panel(pair, method, alpha, points)
            left = _GAP + column * (wide + _GAP)
            title = f"{method}: {right} of {len(pair.view.points)} right"
            draw.text((left, above + _TEXT + 6), title, font=font, fill=_INK)
            sheet.paste(panel, (left, above + 2 * (_TEXT + 6)))
    return sheet


def _panel(pair: Pair, method: str, alpha: float, count: int) -> tuple[Image.Image, int]:
    """Both views with lines, and how many of all points are right."""
    view, found = pair.view, pair.matches[method]
    size = view.first.width
    scale = _PANEL / size
    panel = Image.new("RGB", (2 * _PANEL, _PANEL))
    for number, image in enumerate((view.first, view.second)):
        way = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST
        panel.paste(image.resize((_PANEL, _PANEL), way), (number * _PANEL, 0))
    draw = ImageDraw.Draw(panel)
    right = np.linalg.norm(found - view.truth, axis=1) < alpha * size

    def place(xy: npt.NDArray[np.generic], second: bool) -> tuple[float, float]:
        x, y = ((float(v) + 0.5) * scale for v in xy)
        return x + _PANEL * second, y

    for point, match, truth, good in list(zip(view.points, found, view.truth, right, strict=True))[:count]:
        start, end = place(point, False), place(match, True)
        if not good:
            x, y = place(truth, True)
            draw.line((*end, x, y), fill=_PAPER, width=1)
            draw.ellipse((x - 5, y - 5, x + 5, y + 5), outline=_PAPER, width=2)
        draw_match_line(draw, start, end, RIGHT if good else WRONG, radius=4, width=3)
    return panel, int(right.sum())
