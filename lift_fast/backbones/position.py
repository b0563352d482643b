"""Position embeddings for a token grid that differs from the pretrained one.

A program that is exported must serve every grid with one graph, and inference engines disagree on bicubic resizes (the
kernel, the borders, antialiasing, a scale that is no quotient of sizes). While exporting, both rules are therefore
computed as two products with matrices of interpolation weights, built in the graph from the sizes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .._exporting import is_exporting

Grid = tuple[int, int]
PositionRule = Callable[[Tensor, Grid, Grid], Tensor]


def dino_rule(position: Tensor, old: Grid, new: Grid) -> Tensor:
    """Bicubic resize as in DINO's reference code.

    The scale factor of each side is ``(n + 0.1) / n_old``: the 0.1 keeps the floor of the product at ``n`` and shifts
    the sampling positions, so features differ measurably from a resize to an exact size. If ``new`` equals ``old``,
    ``position`` is returned unchanged.

    Args:
        position: ``[1, h_old * w_old, C]`` embeddings of the patch tokens, floating point.
        old: pretrained grid ``(h_old, w_old)``.
        new: requested grid ``(h, w)``.

    Returns:
        ``[1, h * w, C]`` in the dtype of ``position``.

    Source: facebookresearch/dino, ``VisionTransformer.interpolate_pos_encoding``; for overlapping patches the same rule
    on the grid ``1 + (H - p) // s`` (Amir et al., "Deep ViT Features as Dense Visual Descriptors").
    """
    if is_exporting():
        return _by_products(position, old, new, _dino_weights)
    if old == new:
        return position
    grid = position.float().unflatten(1, old).permute(0, 3, 1, 2)
    scale = ((new[0] + 0.1) / old[0], (new[1] + 0.1) / old[1])
    resized = F.interpolate(grid, scale_factor=scale, mode="bicubic", align_corners=False, recompute_scale_factor=False)
    return resized.permute(0, 2, 3, 1).flatten(1, 2).to(position.dtype)


def timm_rule(position: Tensor, old: Grid, new: Grid) -> Tensor:
    """Antialiased bicubic resize to the exact size, timm's ``resample_abs_pos_embed``; shapes as :func:`dino_rule`."""
    if is_exporting():
        return _by_products(position, old, new, _timm_weights)
    if old == new:
        return position
    grid = position.float().unflatten(1, old).permute(0, 3, 1, 2)
    resized = F.interpolate(grid, size=new, mode="bicubic", antialias=True)
    return resized.permute(0, 2, 3, 1).flatten(1, 2).to(position.dtype)


RULES: dict[str, PositionRule] = {"dino": dino_rule, "timm": timm_rule}


def _by_products(position: Tensor, old: Grid, new: Grid, weights: Callable[[int, Tensor], Tensor]) -> Tensor:
    """A rule without branches on ``new``, whose sides may be symbols."""
    cells = [torch.arange(n, device=position.device) for n in new]
    same = (_count(cells[0]) == old[0]) & (_count(cells[1]) == old[1])
    rows, columns = (
        torch.where(same, torch.eye(n, device=position.device)[c.clamp(max=n - 1)], weights(n, c))
        for n, c in zip(old, cells, strict=True)
    )
    resized = rows @ position.float().view(old[0], -1)
    resized = columns @ resized.view(new[0], old[1], -1)
    return resized.view(1, new[0] * new[1], -1).to(position.dtype)


def _dino_weights(old: int, cells: Tensor) -> Tensor:
    """``[n, old]`` for ``cells [n]``, 0 to n - 1: PyTorch's bicubic kernel (a = -0.75) with repeated borders."""
    source = (cells + 0.5) * (old / (_count(cells) + 0.1)) - 0.5
    first = source.floor()
    known = torch.arange(old, device=cells.device)
    weights = [
        _cubic(source - first - tap, -0.75)[:, None] * ((first + tap).clamp(0, old - 1)[:, None] == known)
        for tap in (-1, 0, 1, 2)
    ]
    return sum(weights[1:], start=weights[0])


def _timm_weights(old: int, cells: Tensor) -> Tensor:
    """As :func:`_dino_weights`: PyTorch's antialiased bicubic kernel (a = -0.5), without what lies beyond borders."""
    scale = old / _count(cells)
    centre = (cells + 0.5) * scale
    known = torch.arange(old, device=cells.device) + 0.5
    weights = _cubic((known - centre[:, None]) / scale.clamp(min=1), -0.5)
    return weights / weights.sum(dim=1, keepdim=True)


def _count(cells: Tensor) -> Tensor:
    return (cells[-1] + 1).float()


def _cubic(x: Tensor, a: float) -> Tensor:
    """Keys' cubic convolution kernel."""
    x = x.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * a - 4 * a
    return torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
