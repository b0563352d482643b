"""Random maps with the neighbourhood correlation of ViT features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def smooth_maps(count: int, channels: int, side: int, device: torch.device | str, shared: bool = False) -> Tensor:
    """``[count, channels, side, side]``: rough noise enlarged from half the grid, plus noise.

    ``shared``: all maps have the same rough noise, as the frames of a video do.
    """
    half = max(1, side // 2)
    rough = torch.randn(1 if shared else count, channels, half, half, device=device)
    noise = torch.randn(count, channels, side, side, device=device)
    return F.interpolate(rough, size=(side, side), mode="bilinear") + 0.3 * noise
