"""A sheet that shows what TokenCut found: boxes, eigenvector, foreground."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lift_fast.drawing import confidence_colours, place_cells

from .dataset import Sample
from .protocol import Discovery, Prediction

_PANEL, _GAP, _TEXT = 480, 12, 18
_PREDICTED, _TRUE, _INK = (220, 40, 40), (40, 200, 80), (25, 25, 25)


def draw_discovery(sample: Sample, image: Image.Image, discovery: Discovery, prediction: Prediction) -> Image.Image:
    """One sheet: the image with the predicted (red) and the true boxes (green), the eigenvector, the foreground."""
    font = ImageFont.load_default(size=_TEXT)
    scale = min(_PANEL / image.width, _PANEL / image.height)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    cut, vector = discovery.cut, discovery.cut.eigenvector
    spread = float(vector.max() - vector.min())
    stretched = confidence_colours((vector - vector.min()) / (spread if spread > 0 else 1.0))
    rows = cut.foreground.astype(np.uint8) * 90 + cut.component.astype(np.uint8) * 165
    panels = [
        ("image", image.resize(size, Image.Resampling.LANCZOS)),
        (f"eigenvector, {vector.shape[1]} x {vector.shape[0]}", place_cells(stretched, size, discovery.covered)),
        ("foreground, its component", place_cells(np.repeat(rows[..., None], 3, 2), size, discovery.covered)),
    ]
    top = 3 * _GAP + 2 * _TEXT
    sheet = Image.new("RGB", (_GAP + 3 * (size[0] + _GAP), top + size[1] + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    result = ("found" if prediction.found else "missed") + (", cut not determined" if prediction.degenerate else "")
    draw.text((_GAP, _GAP), f"{sample.name}: IoU {prediction.iou:.3f}, {result}", font=font, fill=_INK)
    for number, (title, panel) in enumerate(panels):
        left = _GAP + number * (size[0] + _GAP)
        draw.text((left, _GAP + _TEXT + _GAP), title, font=font, fill=_INK)
        sheet.paste(panel, (left, top))
        if number == 0:
            for box, colour in [*((b, _TRUE) for b in sample.boxes), (prediction.box, _PREDICTED)]:
                x0, y0, x1, y1 = (v * scale for v in box)
                far = (left + max(x0, x1 - 1), top + max(y0, y1 - 1))
                draw.rectangle((left + x0, top + y0, *far), outline=colour, width=3)
    return sheet
