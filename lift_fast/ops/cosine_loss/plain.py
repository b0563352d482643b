"""``cosine_loss`` in plain PyTorch, and the layouts that every backend shares."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ... import memory

# 1e-12 as a float32, as in PyTorch.
EPSILON = 9.999999960041972e-13
# Squared norms above which sums or factors may leave a dtype's range, and the factor that brings such vectors back.
_RANGE = {torch.float32: (1e28, 2.0**-80), torch.float64: (1e280, 2.0**-600)}


def loss_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the loss: float32 for inputs in half precision."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def reduced(loss: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    total = loss.sum(dtype=torch.float64)
    return (total / loss.numel() if reduction == "mean" else total).to(loss.dtype)


def share(prediction: Tensor, dim: int, reduction: str) -> float:
    """Weight of each position in the reduced loss."""
    positions = math.prod(prediction.shape[:dim]) * math.prod(prediction.shape[dim + 1 :])
    return 1.0 / positions if reduction == "mean" and positions else 1.0


class _Sums(NamedTuple):
    """Two vectors and their products at each position, in the dtype of the loss."""

    x: Tensor
    y: Tensor
    product: Tensor
    own: Tensor
    """Squared norm of x plus epsilon."""
    other: Tensor
    factor: Tensor | None
    """Scale that keeps x in range, or None; the cosine does not depend on it."""


def _sums(prediction: Tensor, target: Tensor, dim: int) -> _Sums:
    dtype = loss_dtype(prediction.dtype)
    x, y = prediction.to(dtype), target.to(dtype)
    product = (x * y).sum(dim, keepdim=True)
    own, other = x.square().sum(dim, keepdim=True), y.square().sum(dim, keepdim=True)
    most, smaller = _RANGE[dtype]
    if _has_values(own) and bool(((own <= most) & (other <= most)).all()):
        return _Sums(x, y, product, own + EPSILON, other + EPSILON, None)
    of_x, of_y = (torch.ones_like(s).masked_fill(~(s <= most), smaller).detach() for s in (own, other))
    x, y = x * of_x, y * of_y
    own, other = x.square().sum(dim, keepdim=True), y.square().sum(dim, keepdim=True)
    # Epsilon is negligible next to norms beyond the range.
    own, other = own + EPSILON * (of_x == 1).to(dtype), other + EPSILON * (of_y == 1).to(dtype)
    return _Sums(x, y, (x * y).sum(dim, keepdim=True), own, other, of_x)


def _has_values(tensor: Tensor) -> bool:
    """Whether Python may branch on the values: no compiler and no ``torch.func`` transform is active."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    # A dispatch mode may record operations for other values.
    return not tensor.is_meta and type(tensor) is Tensor and not torch._C._len_torch_dispatch_stack()


def cosine_loss_plain(prediction: Tensor, target: Tensor, dim: int = 1, reduction: str = "mean") -> Tensor:
    """:func:`lift_fast.cosine_loss` in plain PyTorch, differentiable in both inputs any number of times.

    Reference, baseline and fallback.
    """
    sums = _sums(prediction, target, dim)
    # Two roots: the product of the squares would leave the range of float32.
    cosine = sums.product / (sums.own.sqrt() * sums.other.sqrt())
    return reduced((1 - cosine).squeeze(dim), reduction)


def loss_and_gradient(
    prediction: Tensor,
    target: Tensor,
    dim: int,
    reduction: str,
    with_gradient: bool,
    grad_loss: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The loss, and its gradient in the dtype and memory format of ``prediction``; every backend has this function.

    Args:
        prediction, target, dim, reduction: as checked by :func:`lift_fast.cosine_loss`.
        with_gradient: False returns None for the gradient.
        grad_loss: one factor of the gradient, or one for each position.
    """
    if not with_gradient:
        return cosine_loss_plain(prediction, target, dim, reduction), None
    sums = _sums(prediction, target, dim)
    gradient = new_gradient(prediction, dim)
    gradient.copy_(_slope(sums, _weight(prediction, grad_loss, dim, reduction)))
    cosine = sums.product / (sums.own.sqrt() * sums.other.sqrt())
    return reduced((1 - cosine).squeeze(dim), reduction), gradient


def gradient_of(prediction: Tensor, target: Tensor, grad_loss: Tensor, dim: int, reduction: str) -> Tensor:
    """``grad_loss``, which may be a batch of ``vmap``, times the gradient."""
    weight = _weight(prediction, grad_loss, dim, reduction)
    return _slope(_sums(prediction, target, dim), weight).to(prediction.dtype)


def _weight(prediction: Tensor, grad_loss: Tensor | None, dim: int, reduction: str) -> float | Tensor:
    weight = share(prediction, dim, reduction)
    if grad_loss is None:
        return weight
    grad_loss = grad_loss.to(loss_dtype(prediction.dtype))
    return weight * (grad_loss.unsqueeze(dim) if grad_loss.dim() else grad_loss)


def _slope(sums: _Sums, weight: float | Tensor) -> Tensor:
    """``weight`` times the gradient of each position's loss with respect to the prediction."""
    own, other = sums.own.sqrt(), sums.other.sqrt()
    cosine = sums.product / (own * other)
    slope = (weight * cosine / own / own) * sums.x - (weight / own / other) * sums.y
    return slope if sums.factor is None else slope * sums.factor


def as_three(tensor: Tensor, dim: int) -> Tensor | None:
    """``tensor`` as ``[outer, channels, inner]`` without a copy, None where its strides forbid it."""
    shape = tensor.shape
    try:
        return tensor.view(math.prod(shape[:dim]), shape[dim], math.prod(shape[dim + 1 :]))
    except RuntimeError:
        return None


def _three(tensor: Tensor, dim: int) -> Tensor:
    """:func:`as_three`, of a contiguous copy if needed."""
    found = as_three(tensor, dim)
    found = as_three(tensor.contiguous(), dim) if found is None else found
    assert found is not None
    return found


def new_gradient(prediction: Tensor, dim: int) -> Tensor:
    """An empty gradient in the memory format of ``prediction`` if :func:`as_three` can view that, else contiguous."""
    gradient = memory.empty_like(prediction)
    if as_three(gradient, dim) is None:
        gradient = memory.empty_like(prediction, memory_format=torch.contiguous_format)
    return gradient


def operands(
    prediction: Tensor, target: Tensor, dim: int, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Both inputs in three dimensions, the empty loss, the empty gradient, and its view in three dimensions."""
    gradient = new_gradient(prediction, dim) if with_gradient else None
    into = None if gradient is None else as_three(gradient, dim)
    loss = memory.new_empty(prediction, prediction.shape[:dim] + prediction.shape[dim + 1 :], dtype=torch.float32)
    return _three(prediction, dim), _three(target, dim), loss, gradient, into
