"""Losses between predicted and target features."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from ._text import shown
from .checks import as_whole, check_dense
from .ops.cosine_loss.op import CosineLossFunction
from .ops.cosine_loss.plain import cosine_loss_plain

__all__ = ["LOSSES", "CosineLoss", "cosine_loss", "cosine_loss_plain", "feature_loss"]

_REDUCTIONS = ("mean", "sum", "none")


def cosine_loss(prediction: Tensor, target: Tensor, dim: int = 1, reduction: str = "mean") -> Tensor:
    """1 - cosine of ``prediction`` and ``target`` along ``dim``: LiFT's training loss (paper, section 3.2).

    It equals :class:`torch.nn.CosineEmbeddingLoss` with target 1 in values and gradients, including its epsilon (1e-12
    added to both squared norms), for inputs of any layout without a permuted copy. One pass over both inputs computes
    the loss and, if ``prediction`` requires one, its gradient; the backward pass only scales that. In addition to the
    inputs, memory holds the gradient and one float32 for each position.

    Args:
        prediction: ``[..., C, ...]`` with the descriptors along ``dim``; float32, bfloat16, float16 or float64. Sums
            are formed in float32 (float64 for float64).
        target: same shape, dtype and device. If it requires a gradient as well, plain PyTorch computes everything.
        dim: may be negative.
        reduction: ``"mean"`` or ``"sum"`` over the positions, or ``"none"``. The mean over zero positions is NaN.

    Returns:
        A scalar, or the shape of the inputs without ``dim``; float32 for inputs in half precision (as PyTorch's loss
        under autocast). Differentiable in ``prediction`` any number of times: with ``create_graph=True`` plain PyTorch
        computes the gradient, as it does for the transforms of ``torch.func`` and forward-mode differentiation.

    Raises:
        TypeError: for inputs that are not dense floating-point tensors, or differ in dtype.
        ValueError: for scalars, different shapes or devices, a ``dim`` out of range, an unknown ``reduction``.
    """
    dim = _check(prediction, target, dim, reduction)
    if not torch.compiler.is_compiling() and _is_transformed(prediction, target):
        return cosine_loss_plain(prediction, target, dim, reduction)
    if not torch.is_grad_enabled() or not (prediction.requires_grad or target.requires_grad):
        return torch.ops.lift_fast.cosine_loss(prediction, target, dim, reduction, False)[0]
    if target.requires_grad:
        return cosine_loss_plain(prediction, target, dim, reduction)
    if torch.compiler.is_compiling() or not (_is_ordinary(prediction) and _is_ordinary(target)):
        return torch.ops.lift_fast.cosine_loss(prediction, target, dim, reduction, True)[0]
    return CosineLossFunction.apply(prediction, target, dim, reduction)


class CosineLoss(nn.Module):
    """:func:`cosine_loss` as a module; ValueError for an unknown ``reduction``."""

    def __init__(self, dim: int = 1, reduction: str = "mean") -> None:
        super().__init__()
        _check_reduction(reduction)
        self.dim, self.reduction = dim, reduction

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        return cosine_loss(prediction, target, self.dim, self.reduction)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, reduction={self.reduction!r}"


def _l1(prediction: Tensor, target: Tensor, dim: int = 1) -> Tensor:
    return F.l1_loss(prediction.float(), target.float())


def _l2(prediction: Tensor, target: Tensor, dim: int = 1) -> Tensor:
    return F.mse_loss(prediction.float(), target.float())


LOSSES: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {"cosine": cosine_loss, "l1": _l1, "l2": _l2}
"""Training losses (paper, ablations): ``loss(prediction, target, dim)`` returns a scalar."""


def feature_loss(name: str) -> Callable[[Tensor, Tensor, int], Tensor]:
    """One of :data:`LOSSES`; ValueError for another name."""
    if name not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {name!r}")
    return LOSSES[name]


def _is_ordinary(tensor: Tensor) -> bool:
    """Whether ``tensor`` has memory; fake tensors and other classes must go through the dispatcher."""
    return type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta


def _is_transformed(*tensors: Tensor) -> bool:
    """Whether ``torch.func`` or forward-mode differentiation is applied to ``tensors``.

    Both support plain operations only: the first would reject the operator, the second silently drop the tangent.
    """
    if torch._C._are_functorch_transforms_active():
        return True
    # The level first: looking for tangents takes longer than a small loss.
    return forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    )


def _check_reduction(reduction: str) -> None:
    if not isinstance(reduction, str) or reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(map(repr, _REDUCTIONS))}, got {shown(reduction)}")


def _check(prediction: Tensor, target: Tensor, dim: int, reduction: str) -> int:
    """Check the arguments; returns the non-negative ``dim``."""
    check_dense("prediction", prediction)
    check_dense("target", target)
    if prediction.dtype != target.dtype:
        raise TypeError(
            f"prediction is {prediction.dtype}, target is {target.dtype}; convert one of them, for example "
            "target.to(prediction.dtype)"
        )
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction {list(prediction.shape)} and target {list(target.shape)} must have the same shape"
        )
    if prediction.device != target.device:
        raise ValueError(f"prediction is on {prediction.device}, target on {target.device}; move one of them")
    _check_reduction(reduction)
    count = prediction.dim()
    if count == 0:
        raise ValueError("prediction and target are scalars; expected at least the dimension of the descriptors")
    whole = as_whole(dim)
    if whole is None or not -count <= whole < count:
        raise ValueError(f"dim must be an integer from {-count} to {count - 1} ({count} dimensions), got {shown(dim)}")
    return whole % count
