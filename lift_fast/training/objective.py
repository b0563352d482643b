"""LiFT's objective: features of a picture at half and quarter size, lifted, against those at full and half size."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lift_fast.backbones import FrozenViT
from lift_fast.lift import LiFT
from lift_fast.losses import feature_loss


class Views(NamedTuple):
    """What the two LiFT passes of one step read: pictures at half and quarter size, features at all three."""

    half: Tensor
    """[B, 3, S/2, S/2]"""
    quarter: Tensor
    """[B, 3, S/4, S/4]"""
    full_features: Tensor
    """[B, T, C], target of the first pass."""
    half_features: Tensor
    """[B, T/4, C], input of the first pass and target of the second."""
    quarter_features: Tensor
    """[B, T/16, C], input of the second pass."""


class Objective(nn.Module):
    """``d(LiFT(I_1/2, F(I_1/2)), F(I))`` and ``d(LiFT(I_1/4, F(I_1/4)), F(I_1/2))`` as ``[2]``.

    One module with both passes, so that a distributed wrapper sees one forward call. Each pass has its own BatchNorm
    statistics, as in the published training.
    """

    def __init__(self, lift: LiFT, loss: str) -> None:
        super().__init__()
        self.lift = lift
        self.distance = feature_loss(loss)

    def forward(self, views: Views) -> Tensor:
        first = self.distance(self.lift(views.half, views.half_features), views.full_features, 2)
        second = self.distance(self.lift(views.quarter, views.quarter_features), views.half_features, 2)
        return torch.stack([first, second])


class FrozenFeatures:
    """Normalises pictures and runs the frozen backbone on them at full, half and quarter size.

    Args:
        backbone: on the device and in the dtype in which it computes.
        compiled: run it through ``torch.compile``.
    """

    def __init__(self, backbone: FrozenViT, compiled: bool = False) -> None:
        weight = backbone.model.patch_embed.proj.weight
        self.dtype, self.device = weight.dtype, weight.device
        self.run = torch.compile(backbone, dynamic=False) if compiled else backbone
        self.mean = torch.tensor(backbone.mean, device=self.device).view(1, 3, 1, 1)
        self.std = torch.tensor(backbone.std, device=self.device).view(1, 3, 1, 1)

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Views:
        """``[B, 3, S, S]`` uint8 to everything that the objective reads, pictures in ``channels_last``."""
        pixels = pixels.to(self.device, non_blocking=True)
        # The operations of images.to_tensor, so that training sees the values that inference will see.
        full = ((pixels.float() / 255 - self.mean) / self.std).to(self.dtype)
        half, quarter = (full[:, :, ::step, ::step].contiguous(memory_format=torch.channels_last) for step in (2, 4))
        return Views(half, quarter, self.run(full), self.run(half), self.run(quarter))
