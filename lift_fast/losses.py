"""Losses between predicted and target features."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

_REDUCTIONS = ("mean", "sum", "none")
_EPSILON = 1e-12


def cosine_loss_plain(prediction: Tensor, target: Tensor, dim: int = 1, reduction: str = "mean") -> Tensor:
    """:func:`cosine_loss` in plain PyTorch: reference, baseline and fallback."""
    # torch.nn.CosineEmbeddingLoss adds its epsilon to the squared norms.
    prediction, target = prediction.float(), target.float()
    product = (prediction * target).sum(dim)
    squares = (prediction.square().sum(dim) + _EPSILON) * (target.square().sum(dim) + _EPSILON)
    loss = 1 - product / squares.sqrt()
    return loss.mean() if reduction == "mean" else loss.sum() if reduction == "sum" else loss


def cosine_loss(prediction: Tensor, target: Tensor, dim: int = 1, reduction: str = "mean") -> Tensor:
    """1 - cosine along ``dim``."""
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(_REDUCTIONS)}, got {reduction!r}")
    return cosine_loss_plain(prediction, target, dim, reduction)


class CosineLoss(nn.Module):
    """:func:`cosine_loss` as a module."""

    def __init__(self, dim: int = 1, reduction: str = "mean") -> None:
        super().__init__()
        self.dim, self.reduction = dim, reduction

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        return cosine_loss(prediction, target, self.dim, self.reduction)


def feature_loss(name: str) -> Callable[[Tensor, Tensor, int], Tensor]:
    """The loss of that name, ``"cosine"``, ``"l1"`` or ``"l2"``, as a function of (prediction, target, dim)."""
    if name == "cosine":
        return cosine_loss
    if name == "l1":
        return lambda prediction, target, dim: F.l1_loss(prediction.float(), target.float())
    if name == "l2":
        return lambda prediction, target, dim: F.mse_loss(prediction.float(), target.float())
    raise ValueError(f"loss must be one of 'cosine', 'l1', 'l2', got {name!r}")
