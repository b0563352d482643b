"""``cosine_loss``: 1 - cosine along one dimension, with the gradient written by the forward pass.

The gradient of ``1 - cos(g, t)`` for the prediction g is ``cos * g / |g|^2 - t / (|g| |t|)``. It needs only what the
loss reads, so one pass over both inputs gives loss and gradient, and the backward pass only scales it. The plain form
reads and writes the inputs about thirty times.

Every implementation adds epsilon = 1e-12 to both squared norms, as :class:`torch.nn.CosineEmbeddingLoss` does.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ... import memory
from .. import library
from . import cpu, gpu, plain
from .plain import cosine_loss_plain, gradient_of, loss_dtype, new_gradient

library.define(
    "cosine_loss(Tensor prediction, Tensor target, int dim, str reduction, bool with_gradient) -> (Tensor, Tensor)"
)
library.define("cosine_loss_backward(Tensor gradient, Tensor grad_loss, int dim) -> Tensor")
library.define(
    "cosine_loss_gradient(Tensor prediction, Tensor target, Tensor grad_loss, int dim, str reduction) -> Tensor"
)


def _keeps_gradient(dtype: torch.dtype) -> bool:
    """Whether the forward pass writes the gradient for the backward pass."""
    return dtype != torch.float16


def _backend(prediction: Tensor) -> ModuleType:
    return cpu if cpu.fits(prediction) else gpu if gpu.fits(prediction) else plain


def _cosine_loss(
    prediction: Tensor, target: Tensor, dim: int, reduction: str, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    prediction, target = library.resolved(prediction), library.resolved(target)
    with_gradient = with_gradient and _keeps_gradient(prediction.dtype)
    loss, gradient = _backend(prediction).loss_and_gradient(prediction, target, dim, reduction, with_gradient)
    return loss, memory.new_empty(prediction, 0) if gradient is None else gradient


def _cosine_loss_gradient(prediction: Tensor, target: Tensor, grad_loss: Tensor, dim: int, reduction: str) -> Tensor:
    """``grad_loss`` times the gradient, rounded once."""
    prediction, target, grad_loss = map(library.resolved, (prediction, target, grad_loss))
    gradient: Tensor = _backend(prediction).loss_and_gradient(prediction, target, dim, reduction, True, grad_loss)[1]
    return gradient


def _fake_cosine_loss_gradient(prediction: Tensor, target: Tensor, grad_loss: Tensor, dim: int, *_: Any) -> Tensor:
    return new_gradient(prediction, dim)


def _fake_cosine_loss(
    prediction: Tensor, target: Tensor, dim: int, reduction: str, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    positions = prediction.shape[:dim] + prediction.shape[dim + 1 :]
    loss = prediction.new_empty(positions if reduction == "none" else (), dtype=loss_dtype(prediction.dtype))
    if not with_gradient or not _keeps_gradient(prediction.dtype):
        return loss, prediction.new_empty(0)
    return loss, new_gradient(prediction, dim)


def _scaled(gradient: Tensor, grad_loss: Tensor, dim: int) -> Tensor:
    """Each position's gradient times ``grad_loss`` of that position, in the dtype of ``gradient``."""
    if grad_loss.dim():
        grad_loss = grad_loss.unsqueeze(dim)
    # PyTorch would round a float32 scalar to half precision before it multiplies.
    return (gradient.to(grad_loss.dtype) * grad_loss).to(gradient.dtype)


library.implement("cosine_loss", _cosine_loss, fake=_fake_cosine_loss)
library.implement("cosine_loss_backward", _scaled, fake=_scaled)
library.implement("cosine_loss_gradient", _cosine_loss_gradient, fake=_fake_cosine_loss_gradient)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    prediction, target, ctx.dim, ctx.reduction, ctx.with_gradient = inputs
    ctx.keeps_gradient = _keeps_gradient(prediction.dtype)
    ctx.save_for_backward(prediction, target, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_loss: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 5
    if not ctx.with_gradient:
        raise RuntimeError("cosine_loss was called with with_gradient=False, so it has no gradient; pass True")
    prediction, target, gradient = ctx.saved_tensors
    if torch.is_grad_enabled():
        # The gradient itself may be differentiated, as in :class:`CosineLossFunction`.
        loss = cosine_loss_plain(prediction, target, ctx.dim, ctx.reduction)
        (out,) = torch.autograd.grad(loss, prediction, grad_loss, create_graph=True)
    elif ctx.keeps_gradient:
        out = torch.ops.lift_fast.cosine_loss_backward(gradient, grad_loss, ctx.dim)
    else:
        out = torch.ops.lift_fast.cosine_loss_gradient(prediction, target, grad_loss, ctx.dim, ctx.reduction)
    return out, None, None, None, None


torch.library.register_autograd("lift_fast::cosine_loss", _backward, setup_context=_setup_context, lib=library.LIBRARY)


class CosineLossFunction(torch.autograd.Function):
    """The operator in eager mode, whose backward pass scales the forward pass's gradient in place.

    The operator's own backward must not write to its outputs, so it would copy the gradient once more.
    """

    @staticmethod
    def forward(ctx: Any, prediction: Tensor, target: Tensor, dim: int, reduction: str) -> Tensor:
        loss, gradient = _cosine_loss(prediction, target, dim, reduction, True)
        ctx.save_for_backward(prediction, target)
        ctx.gradient = gradient if _keeps_gradient(prediction.dtype) else None
        ctx.dim, ctx.reduction = dim, reduction
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_loss,) = grads
        prediction, target = ctx.saved_tensors
        if torch.is_grad_enabled():
            # The gradient itself may be differentiated: build it from differentiable operations.
            loss = cosine_loss_plain(prediction, target, ctx.dim, ctx.reduction)
            (out,) = torch.autograd.grad(loss, prediction, grad_loss, create_graph=True)
            return out, None, None, None
        # It is scaled in place, so a second backward pass through a retained graph computes it again.
        gradient, ctx.gradient = ctx.gradient, None
        if _is_batched(grad_loss):
            # A batch of gradients does not fit into the stored one.
            return gradient_of(prediction, target, grad_loss, ctx.dim, ctx.reduction), None, None, None
        if not _keeps_gradient(prediction.dtype):
            return _cosine_loss_gradient(prediction, target, grad_loss, ctx.dim, ctx.reduction), None, None, None
        if gradient is None:
            gradient = _cosine_loss(prediction, target, ctx.dim, ctx.reduction, True)[1]
        return _scale_in_place(gradient, grad_loss, ctx.dim), None, None, None


def _is_batched(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a batch of ``torch.func.vmap`` or of autograd's older ``is_grads_batched``."""
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(tensor) or functorch.is_legacy_batchedtensor(tensor)


def _scale_in_place(gradient: Tensor, grad_loss: Tensor, dim: int) -> Tensor:
    if grad_loss.dim():
        grad_loss = grad_loss.unsqueeze(dim)
        return gradient.mul_(grad_loss) if gradient.dtype == grad_loss.dtype else _scaled(gradient, grad_loss, 0)
    if gradient.is_cuda and gpu.fits(gradient):
        from ...kernels import cosine_loss as kernel

        # The kernel reads the factor on the device and, if it is one (the usual case), writes nothing.
        return kernel.scale_in_place(gradient, grad_loss)
    factor = float(grad_loss)
    return gradient if factor == 1 else gradient.mul_(factor)
