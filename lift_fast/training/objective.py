"""LiFT's objective: lifted features of an image at half and quarter size against features on twice their grid."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lift_fast.backbones import FrozenViT
from lift_fast.lift import LiFT
from lift_fast.losses import feature_loss


class Views(NamedTuple):
    """Inputs of the two LiFT passes of one step: images and features at half and quarter size, and targets."""

    half: Tensor
    """[B, 3, S/2, S/2]"""
    quarter: Tensor
    """[B, 3, S/4, S/4]"""
    half_features: Tensor
    """[B, T, C], input of the first pass."""
    quarter_features: Tensor
    """[B, T/4, C], input of the second pass."""
    half_target: Tensor
    """[B, 4T, C], on twice the grid."""
    quarter_target: Tensor
    """[B, T, C]"""


class Objective(nn.Module):
    """``d(LiFT(I_1/2, F(I_1/2)), target)`` and ``d(LiFT(I_1/4, F(I_1/4)), target)`` as ``[2]``.

    Both passes are in one module, so that a distributed wrapper sees one forward call. Each pass has its own BatchNorm
    statistics, as in the published training.
    """

    def __init__(self, lift: LiFT, loss: str) -> None:
        super().__init__()
        self.lift = lift
        self.distance = feature_loss(loss)

    def forward(self, views: Views) -> Tensor:
        first = self.distance(self.lift(views.half, views.half_features), views.half_target, 2)
        second = self.distance(self.lift(views.quarter, views.quarter_features), views.quarter_target, 2)
        return torch.stack([first, second])


class FrozenFeatures:
    """Normalises images and runs the frozen backbone on them.

    Args:
        backbone: on the device and in the dtype of the computation.
        compiled: run it through ``torch.compile``.
        target: ``"double-size"``: features of the image at twice the size, as published: F(I) and F(I_1/2);
            ``"half-stride"``: features of the same image with patches half a patch apart.

    Raises:
        ValueError: for ``"half-stride"`` with an odd patch size.
    """

    def __init__(self, backbone: FrozenViT, compiled: bool = False, target: str = "double-size") -> None:
        self.dtype, self.device = backbone.dtype, backbone.device
        self.run = torch.compile(backbone, dynamic=False) if compiled else backbone
        self.mean = torch.tensor(backbone.mean, dtype=torch.float32, device=self.device).view(1, 3, 1, 1)
        self.std = torch.tensor(backbone.std, dtype=torch.float32, device=self.device).view(1, 3, 1, 1)
        self.patch_size = backbone.patch_size
        self.overlapping: nn.Module | None = None
        if target == "half-stride":
            if self.patch_size % 2:
                raise ValueError(f"target 'half-stride' needs an even patch size, got {self.patch_size}")
            strided = backbone.strided(self.patch_size // 2)
            self.overlapping = torch.compile(strided, dynamic=False) if compiled else strided  # type: ignore[assignment]

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Views:
        """``[B, 3, S, S]`` uint8 to the inputs of the objective, images in ``channels_last``."""
        pixels = pixels.to(self.device, non_blocking=True)
        # The operations of images.to_tensor, so that training and inference see the same values.
        full = ((pixels.float() / 255 - self.mean) / self.std).to(self.dtype)
        half, quarter = (full[:, :, ::step, ::step].contiguous(memory_format=torch.channels_last) for step in (2, 4))
        half_features, quarter_features = self.run(half), self.run(quarter)
        if self.overlapping is None:
            targets = self.run(full), half_features
        else:
            targets = self._half_stride(half), self._half_stride(quarter)
        return Views(half, quarter, half_features, quarter_features, *targets)

    def _half_stride(self, imgs: Tensor) -> Tensor:
        """``[B, 4T, C]``: patches centred on the cells of the doubled grid."""
        assert self.overlapping is not None
        before = self.patch_size // 4
        after = self.patch_size // 2 - before
        wide = F.pad(imgs, (before, after, before, after), mode="reflect")
        features: Tensor = self.overlapping(wide.contiguous(memory_format=torch.channels_last))
        return features
