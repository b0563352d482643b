"""One HTML file, without server or network: moving over an image shows the matches in the other."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from importlib import resources
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lift_fast.drawing import SCALE

from .maps import Shown

_LONGEST, _MOST_CELLS = 900, 112
_SAMPLE = 512


class PageError(NamedTuple):
    """Error of a page's similarities of one method, compared with those of the full descriptors."""

    mean: float
    """Mean absolute difference over the sampled cells of the first image and all cells of the last."""
    most: float
    """Largest."""
    same_best: float
    """Share of the sampled cells with the same best cell."""


def build_page(
    pictures: Sequence[Shown], *, dimensions: int = 64, caption: str = "", warning: str = ""
) -> tuple[str, dict[str, PageError]]:
    """Build the page and measure the error of its compression.

    Descriptors are scaled to unit length and projected on the leading directions of both images' descriptors (not
    centred, so that inner products stay similarities), then stored as 8-bit integers with a factor for each cell, and
    the length that the cell had, which is its weight in interpolation. Maps of more than 112 cells per side are first
    averaged down to 112.

    Args:
        pictures: one image (compared with itself) or two, with the same methods.
        dimensions: directions to keep, at least 1; all if there are fewer.
        caption, warning: shown above the images.

    Returns:
        The HTML text, and the error of each method.

    Raises:
        ValueError: for ``dimensions`` below 1.
    """
    if dimensions < 1:
        raise ValueError(f"dimensions must be at least 1, got {dimensions}")
    pair = [pictures[0], pictures[-1]]
    errors, methods = {}, []
    for method in pictures[0].features:
        maps = [_coarse(shown.features[method].map[0]) for shown in pair]
        packed, errors[method] = _pack(maps, dimensions)
        methods.append(
            {
                "name": method,
                "error": errors[method]._asdict(),
                "maps": [{**each, "covered": shown.covered(method)} for each, shown in zip(packed, pair, strict=True)],
            }
        )
    content = {
        "pictures": [
            {"name": shown.name, "size": [shown.image.width, shown.image.height], "source": _as_jpeg(shown.image)}
            for shown in pair
        ],
        "methods": methods,
        "scale": SCALE.astype(int).tolist(),
        "caption": caption,
        "warning": warning,
    }
    # Only "</" and "<!--" could end or change the script element.
    text = json.dumps(content, allow_nan=False).replace("<", "\\u003c")
    template = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    title = html.escape(" and ".join(dict.fromkeys(shown.name for shown in pair)))
    return template.replace("{{title}}", title).replace("{{data}}", text), errors


def _coarse(found: Tensor) -> Tensor:
    """``[C, h, w]`` on at most 112 x 112 cells, float32 on the CPU."""
    found = found.cpu()
    h, w = found.shape[1:]
    if max(h, w) > _MOST_CELLS:
        found = F.adaptive_avg_pool2d(found, (min(h, _MOST_CELLS), min(w, _MOST_CELLS)))
    return found


def _pack(maps: Sequence[Tensor], dimensions: int) -> tuple[list[dict[str, Any]], PageError]:
    rows = [F.normalize(each, dim=0).flatten(1).T for each in maps]
    every = torch.cat(rows).double()
    basis = torch.linalg.eigh(every.T @ every)[1].flip(1)[:, :dimensions].float()
    norms = [torch.linalg.vector_norm(each.double(), dim=0).flatten() for each in maps]
    longest = max(float(each.max()) for each in norms) or 1.0
    packed, restored = [], []
    for found, cells, lengths in zip(maps, rows, norms, strict=True):
        projected = cells @ basis
        factor = projected.abs().amax(1).clamp_min(1e-30) / 127
        codes = (projected / factor[:, None]).round().to(torch.int8)
        restored.append(codes.float() * factor[:, None])
        packed.append(
            {
                "grid": list(found.shape[1:]),
                "codes": _as_base64(codes.numpy()),
                "factors": _as_base64(factor.numpy().astype("<f4")),
                "lengths": _as_base64((lengths / longest).numpy().astype("<f4")),
            }
        )
    step = -(-len(rows[0]) // _SAMPLE)
    exact, close = rows[0][::step] @ rows[1].T, restored[0][::step] @ restored[1].T
    difference = (exact - close).abs()
    same = (exact.argmax(1) == close.argmax(1)).float().mean()
    return packed, PageError(float(difference.mean()), float(difference.max()), float(same))


def _as_base64(values: np.ndarray[Any, Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode("ascii")


def _as_jpeg(image: Image.Image) -> str:
    small = image.copy()
    small.thumbnail((_LONGEST, _LONGEST), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
