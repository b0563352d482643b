"""Position embeddings for a token grid that differs from the pretrained one."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

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
    if old == new:
        return position
    grid = position.float().unflatten(1, old).permute(0, 3, 1, 2)
    scale = ((new[0] + 0.1) / old[0], (new[1] + 0.1) / old[1])
    resized = F.interpolate(grid, scale_factor=scale, mode="bicubic", align_corners=False, recompute_scale_factor=False)
    return resized.permute(0, 2, 3, 1).flatten(1, 2).to(position.dtype)


def timm_rule(position: Tensor, old: Grid, new: Grid) -> Tensor:
    """Antialiased bicubic resize to the exact size, timm's ``resample_abs_pos_embed``; shapes as :func:`dino_rule`."""
    if old == new:
        return position
    grid = position.float().unflatten(1, old).permute(0, 3, 1, 2)
    resized = F.interpolate(grid, size=new, mode="bicubic", antialias=True)
    return resized.permute(0, 2, 3, 1).flatten(1, 2).to(position.dtype)


RULES: dict[str, PositionRule] = {"dino": dino_rule, "timm": timm_rule}
