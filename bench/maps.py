"""Descriptor maps to measure with: random ones with the neighbourhood correlation of ViT features, and real ones."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

PHOTOGRAPHS = Path(__file__).resolve().parents[1] / "examples/photographs"


def smooth_maps(count: int, channels: int, side: int, device: torch.device | str, shared: bool = False) -> Tensor:
    """``[count, channels, side, side]``: rough noise enlarged from half the grid, plus noise.

    ``shared``: all maps have the same rough noise, as the frames of a video do.
    """
    half = max(1, side // 2)
    rough = torch.randn(1 if shared else count, channels, half, half, device=device)
    noise = torch.randn(count, channels, side, side, device=device)
    return F.interpolate(rough, size=(side, side), mode="bilinear") + 0.3 * noise


@lru_cache(maxsize=2)
def _photographs(size: int) -> Tensor:
    from lift_fast import ViTLiFTExtractor
    from lift_fast.demonstration import BACKBONE, LIFT

    extractor = ViTLiFTExtractor(BACKBONE, LIFT, device="cpu", silent=True)
    with torch.no_grad():
        batches = [
            extractor.preprocess(PHOTOGRAPHS / name, (size, size))[0] for name in ("cat.jpg", "cat_second_view.jpg")
        ]
        return torch.cat([extractor.matching_map(batch) for batch in batches])


def photograph_maps(size: int, device: torch.device | str) -> Tensor:
    """LiFT's maps ``[2, 97, size / 8, size / 8]`` of the example photographs, by the demonstration pair."""
    return _photographs(size).to(device)


def nearly_flat(maps: Tensor) -> Tensor:
    """``maps [B, C, h, w]`` plus a direction that all cells share, so that all cosines are above 0.98."""
    shared = maps.mean(dim=(0, 2, 3), keepdim=True)
    return maps + shared * (12 * maps.norm(dim=1).mean() / shared.norm())
