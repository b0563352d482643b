"""Tracked objects and points, drawn over their frame."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageColor, ImageDraw

from .masks import usual_palette
from .points import PointTracks
from .tracker import TrackedFrame

_STRENGTH = 0.45
_INK = (25, 25, 25)
# The frame's shorter side has this many widths of a line.
_LINES = 240
# The golden angle: hues of points next to each other differ, however many there are.
_HUES = 137.508


def draw_overlay(
    frame: TrackedFrame, palette: Sequence[int] | None = None, trail: Sequence[PointTracks] = ()
) -> Image.Image:
    """The frame with its objects in colour, outlined, and its points: dots, rings where they are hidden.

    Args:
        frame: what :class:`Tracker` returned.
        palette: 768 values, colours by object number; None for the usual ones. Black ones are replaced.
        trail: the points in the frames before, oldest first; each point's way is drawn where it was visible.
    """
    if frame.mask is None:
        sheet = frame.image.copy()
    else:
        sheet = Image.fromarray(_tinted(np.asarray(frame.image), frame.mask, _colours(palette)))
    if frame.points is None:
        return sheet
    draw = ImageDraw.Draw(sheet)
    line = max(1, round(min(sheet.size) / _LINES))
    ways = [*trail, frame.points]
    for number, (x, y) in enumerate(frame.points.xy + 0.5):
        colour = ImageColor.getrgb(f"hsv({number * _HUES % 360:.1f}, 70%, 100%)")
        for before, after in pairwise(ways):
            if before.visible[number] and after.visible[number]:
                ends = [tuple(one.xy[number] + 0.5) for one in (before, after)]
                draw.line(ends, fill=colour, width=line)
        radius = 2 * line + 1
        inside = colour if frame.points.visible[number] else None
        for grown, rim, fill in ((1, _INK, None), (0, colour, inside)):
            box = (x - radius - grown, y - radius - grown, x + radius + grown, y + radius + grown)
            draw.ellipse(box, fill=fill, outline=rim, width=line)
    return sheet


def _colours(palette: Sequence[int] | None) -> npt.NDArray[np.float64]:
    """``[256, 3]``; dark ones are brightened, as they must show on any frame."""
    usual = np.array(usual_palette(), dtype=np.float64).reshape(256, 3)
    own = usual if palette is None else np.array(palette, dtype=np.float64).reshape(256, 3)
    return 255 * (np.where(own.any(1, keepdims=True), own, usual) / 255) ** 0.5


def _tinted(
    image: npt.NDArray[np.uint8], mask: npt.NDArray[np.uint8], colours: npt.NDArray[np.float64]
) -> npt.NDArray[np.uint8]:
    """Objects in colour; their outermost pixels in full colour."""
    edge = np.zeros(mask.shape, dtype=bool)
    reach = max(1, round(min(mask.shape) / _LINES))
    for axis in (0, 1):
        ahead = [slice(None), slice(None)]
        behind = [slice(None), slice(None)]
        ahead[axis], behind[axis] = slice(reach, None), slice(None, -reach)
        differs = mask[tuple(ahead)] != mask[tuple(behind)]
        edge[tuple(ahead)] |= differs
        edge[tuple(behind)] |= differs
    strength = np.where(edge, 1.0, _STRENGTH)[..., None]
    tinted = image * (1 - strength) + colours[mask] * strength
    return np.where(mask[..., None] > 0, np.rint(tinted), image).astype(np.uint8)
