"""``cosine_loss``: 1 - cosine along one dimension, with the gradient written by the forward pass.

The gradient for the prediction g of ``1 - cos(g, t)`` is ``cos * g / |g|^2 - t / (|g| |t|)``: everything that the loss
reads. So one pass over both inputs gives loss and gradient, and the backward pass only scales it. The plain form reads
and writes them about thirty times.

Epsilon, everywhere: 1e-12 is added to both squared norms, as :class:`torch.nn.CosineEmbeddingLoss` does.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _env, _native, devices, memory
from . import library

library.define(
    "cosine_loss(Tensor prediction, Tensor target, int dim, str reduction, bool with_gradient) -> (Tensor, Tensor)"
)
library.define("cosine_loss_backward(Tensor gradient, Tensor grad_loss, int dim) -> Tensor")
library.define(
    "cosine_loss_gradient(Tensor prediction, Tensor target, Tensor grad_loss, int dim, str reduction) -> Tensor"
)

# 1e-12 as a float32, which is how PyTorch writes it down.
EPSILON = 9.999999960041972e-13
_NATIVE_TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
# Squared norms beyond which sums or factors may leave a dtype's range, and what brings such vectors back.
_RANGE = {torch.float32: (1e28, 2.0**-80), torch.float64: (1e280, 2.0**-600)}


def loss_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the loss: float32 for inputs in half precision."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _reduce(loss: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    total = loss.sum(dtype=torch.float64)
    return (total / loss.numel() if reduction == "mean" else total).to(loss.dtype)


def _share(prediction: Tensor, dim: int, reduction: str) -> float:
    """Of each position in the reduced loss."""
    positions = math.prod(prediction.shape[:dim]) * math.prod(prediction.shape[dim + 1 :])
    return 1.0 / positions if reduction == "mean" and positions else 1.0


def _keeps_gradient(dtype: torch.dtype) -> bool:
    """Whether the forward pass writes the gradient for the backward pass."""
    return dtype != torch.float16


class _Sums(NamedTuple):
    """Of two vectors at each position, in the dtype of the loss."""

    x: Tensor
    y: Tensor
    product: Tensor
    own: Tensor
    """Squared norm of x and epsilon."""
    other: Tensor
    factor: Tensor | None
    """What x was multiplied by to stay in range, None for nothing; a cosine does not change with it."""


def _sums(prediction: Tensor, target: Tensor, dim: int) -> _Sums:
    dtype = loss_dtype(prediction.dtype)
    x, y = prediction.to(dtype), target.to(dtype)
    product = (x * y).sum(dim, keepdim=True)
    own, other = x.square().sum(dim, keepdim=True), y.square().sum(dim, keepdim=True)
    most, smaller = _RANGE[dtype]
    if _can_ask(own) and bool(((own <= most) & (other <= most)).all()):
        return _Sums(x, y, product, own + EPSILON, other + EPSILON, None)
    of_x, of_y = (torch.ones_like(s).masked_fill(~(s <= most), smaller).detach() for s in (own, other))
    x, y = x * of_x, y * of_y
    own, other = x.square().sum(dim, keepdim=True), y.square().sum(dim, keepdim=True)
    # Beside lengths beyond the range epsilon is nothing.
    own, other = own + EPSILON * (of_x == 1).to(dtype), other + EPSILON * (of_y == 1).to(dtype)
    return _Sums(x, y, (x * y).sum(dim, keepdim=True), own, other, of_x)


def _can_ask(tensor: Tensor) -> bool:
    """Whether a Python program may look at the numbers: no compiler, no transform of ``torch.func`` follows them."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    # A mode may stand for a program that records operations, whatever the numbers.
    return not tensor.is_meta and type(tensor) is Tensor and not torch._C._len_torch_dispatch_stack()


def cosine_loss_plain(prediction: Tensor, target: Tensor, dim: int = 1, reduction: str = "mean") -> Tensor:
    """:func:`lift_fast.cosine_loss` in plain PyTorch, differentiable as often as one likes in both inputs.

    Reference, baseline and fallback.
    """
    sums = _sums(prediction, target, dim)
    # A root of each: their product leaves the range of float32.
    cosine = sums.product / (sums.own.sqrt() * sums.other.sqrt())
    return _reduce((1 - cosine).squeeze(dim), reduction)


def gradient_plain(prediction: Tensor, target: Tensor, dim: int, reduction: str) -> tuple[Tensor, Tensor]:
    """Loss, and its gradient for ``prediction`` in the dtype and memory format of it."""
    sums = _sums(prediction, target, dim)
    gradient = _new_gradient(prediction, dim)
    gradient.copy_(_slope(sums, _share(prediction, dim, reduction)))
    cosine = sums.product / (sums.own.sqrt() * sums.other.sqrt())
    return _reduce((1 - cosine).squeeze(dim), reduction), gradient


def _slope(sums: _Sums, weight: float | Tensor) -> Tensor:
    """``weight`` times the gradient of each position's loss for the prediction."""
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
    """The same, of a copy where it must be."""
    found = as_three(tensor, dim)
    found = as_three(tensor.contiguous(), dim) if found is None else found
    assert found is not None
    return found


def _new_gradient(prediction: Tensor, dim: int) -> Tensor:
    """In the memory format of ``prediction``, unless that cannot be seen as three dimensions."""
    gradient = memory.empty_like(prediction)
    if as_three(gradient, dim) is None:
        gradient = memory.empty_like(prediction, memory_format=torch.contiguous_format)
    return gradient


def _strides(tensor: Tensor) -> tuple[int, ...]:
    # A dimension of one element may have any stride; 1 for channels is the layout that costs least.
    return tuple(1 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _operands(
    prediction: Tensor, target: Tensor, dim: int, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """What a kernel reads and writes: both inputs as three dimensions, the loss, the gradient, and that as three."""
    gradient = _new_gradient(prediction, dim) if with_gradient else None
    into = None if gradient is None else as_three(gradient, dim)
    loss = memory.new_empty(prediction, prediction.shape[:dim] + prediction.shape[dim + 1 :], dtype=torch.float32)
    return _three(prediction, dim), _three(target, dim), loss, gradient, into


def cosine_loss_native(
    prediction: Tensor,
    target: Tensor,
    dim: int,
    reduction: str,
    with_gradient: bool,
    grad_loss: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """In the native core: float32, bfloat16 or float16 on the CPU; the gradient times ``grad_loss`` where given."""
    x, y, loss, gradient, into = _operands(prediction, target, dim, with_gradient)
    weight, upstream = _share(prediction, dim, reduction), None
    if grad_loss is not None:
        if grad_loss.dim():
            upstream = grad_loss.float().contiguous()
        else:
            weight *= float(grad_loss)
    _native.require().cosine_loss(
        _native.address(x),
        _native.address(y),
        _NATIVE_TYPES[x.dtype],
        x.shape,
        _strides(x),
        _strides(y),
        (0, 0, 0) if into is None else _strides(into),
        weight,
        _native.address(loss),
        0 if gradient is None else _native.address(gradient),
        torch.get_num_threads(),
        _env.cpu_isa(),
        0 if upstream is None else _native.address(upstream),
    )
    return _reduce(loss, reduction), gradient


def _fits_native(prediction: Tensor) -> bool:
    return prediction.device.type == "cpu" and prediction.dtype in _NATIVE_TYPES and devices.native_runs()[0]


def _fits_triton(prediction: Tensor) -> bool:
    return prediction.numel() > 0 and devices.kernels_run(prediction.device, prediction.dtype)[0]


def cosine_loss_triton(
    prediction: Tensor,
    target: Tensor,
    dim: int,
    reduction: str,
    with_gradient: bool,
    grad_loss: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """By the Triton kernel, on the device of the inputs; the gradient times ``grad_loss`` where given."""
    from ..kernels import cosine_loss as kernel

    x, y, loss, gradient, into = _operands(prediction, target, dim, with_gradient)
    upstream = None if grad_loss is None else grad_loss.float().contiguous()
    kernel.cosine_loss(x, y, into, loss, _share(prediction, dim, reduction), EPSILON, upstream)
    return _reduce(loss, reduction), gradient


def _cosine_loss(
    prediction: Tensor, target: Tensor, dim: int, reduction: str, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    prediction, target = library.resolved(prediction), library.resolved(target)
    with_gradient = with_gradient and _keeps_gradient(prediction.dtype)
    none = memory.new_empty(prediction, 0)
    if _fits_native(prediction):
        loss, gradient = cosine_loss_native(prediction, target, dim, reduction, with_gradient)
    elif _fits_triton(prediction):
        loss, gradient = cosine_loss_triton(prediction, target, dim, reduction, with_gradient)
    elif with_gradient:
        loss, gradient = gradient_plain(prediction, target, dim, reduction)
    else:
        loss, gradient = cosine_loss_plain(prediction, target, dim, reduction), None
    return loss, none if gradient is None else gradient


def _cosine_loss_gradient(prediction: Tensor, target: Tensor, grad_loss: Tensor, dim: int, reduction: str) -> Tensor:
    """``grad_loss`` times the gradient, rounded once."""
    prediction, target, grad_loss = map(library.resolved, (prediction, target, grad_loss))
    if _fits_native(prediction):
        gradient = cosine_loss_native(prediction, target, dim, reduction, True, grad_loss)[1]
    elif _fits_triton(prediction):
        gradient = cosine_loss_triton(prediction, target, dim, reduction, True, grad_loss)[1]
    else:
        gradient = _new_gradient(prediction, dim)
        gradient.copy_(_gradient_of(prediction, target, grad_loss, dim, reduction))
    assert gradient is not None
    return gradient


def _gradient_of(prediction: Tensor, target: Tensor, grad_loss: Tensor, dim: int, reduction: str) -> Tensor:
    """The same in plain PyTorch, where ``grad_loss`` may stand for many."""
    sums = _sums(prediction, target, dim)
    grad_loss = grad_loss.to(sums.x.dtype)
    grad_loss = grad_loss.unsqueeze(dim) if grad_loss.dim() else grad_loss
    return _slope(sums, _share(prediction, dim, reduction) * grad_loss).to(prediction.dtype)


def _fake_cosine_loss_gradient(
    prediction: Tensor, target: Tensor, grad_loss: Tensor, dim: int, reduction: str
) -> Tensor:
    return _new_gradient(prediction, dim)


def _fake_cosine_loss(
    prediction: Tensor, target: Tensor, dim: int, reduction: str, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    positions = prediction.shape[:dim] + prediction.shape[dim + 1 :]
    loss = prediction.new_empty(positions if reduction == "none" else (), dtype=loss_dtype(prediction.dtype))
    if not with_gradient or not _keeps_gradient(prediction.dtype):
        return loss, prediction.new_empty(0)
    return loss, _new_gradient(prediction, dim)


def _scaled(gradient: Tensor, grad_loss: Tensor, dim: int) -> Tensor:
    """Each position's gradient times what comes back for its loss, in the dtype of ``gradient``."""
    if grad_loss.dim():
        grad_loss = grad_loss.unsqueeze(dim)
    # The product of half precision with a float32 scalar would be rounded before it is multiplied.
    return (gradient.to(grad_loss.dtype) * grad_loss).to(gradient.dtype)


def _cosine_loss_backward(gradient: Tensor, grad_loss: Tensor, dim: int) -> Tensor:
    return _scaled(gradient, grad_loss, dim)


def _fake_cosine_loss_backward(gradient: Tensor, grad_loss: Tensor, dim: int) -> Tensor:
    return _scaled(gradient, grad_loss, dim)


library.implement("cosine_loss", _cosine_loss, fake=_fake_cosine_loss)
library.implement("cosine_loss_backward", _cosine_loss_backward, fake=_fake_cosine_loss_backward)
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
        # Somebody will differentiate this gradient again, as in :class:`CosineLossFunction`.
        loss = cosine_loss_plain(prediction, target, ctx.dim, ctx.reduction)
        (out,) = torch.autograd.grad(loss, prediction, grad_loss, create_graph=True)
    elif ctx.keeps_gradient:
        out = torch.ops.lift_fast.cosine_loss_backward(gradient, grad_loss, ctx.dim)
    else:
        out = torch.ops.lift_fast.cosine_loss_gradient(prediction, target, grad_loss, ctx.dim, ctx.reduction)
    return out, None, None, None, None


torch.library.register_autograd("lift_fast::cosine_loss", _backward, setup_context=_setup_context, lib=library.LIBRARY)


class CosineLossFunction(torch.autograd.Function):
    """The operator in eager mode, where the backward pass may keep the very tensor that the forward pass wrote.

    An operator's own backward must not write to its outputs, and so would copy the gradient once more.
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
            # Somebody will differentiate this gradient again: it has to be made of operations that can be.
            loss = cosine_loss_plain(prediction, target, ctx.dim, ctx.reduction)
            (out,) = torch.autograd.grad(loss, prediction, grad_loss, create_graph=True)
            return out, None, None, None
        # Taken, not kept: it is changed in place. A second backward pass through a graph that was retained
        # computes it again.
        gradient, ctx.gradient = ctx.gradient, None
        if _is_batched(grad_loss):
            # Many gradients at once do not fit into the one that is here.
            return _gradient_of(prediction, target, grad_loss, ctx.dim, ctx.reduction), None, None, None
        if not _keeps_gradient(prediction.dtype):
            return _cosine_loss_gradient(prediction, target, grad_loss, ctx.dim, ctx.reduction), None, None, None
        if gradient is None:
            gradient = _cosine_loss(prediction, target, ctx.dim, ctx.reduction, True)[1]
        return _scale_in_place(gradient, grad_loss, ctx.dim), None, None, None


def _is_batched(tensor: Tensor) -> bool:
    """Whether ``tensor`` stands for many: of ``torch.func.vmap``, or of autograd's older ``is_grads_batched``."""
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(tensor) or functorch.is_legacy_batchedtensor(tensor)


def _scale_in_place(gradient: Tensor, grad_loss: Tensor, dim: int) -> Tensor:
    if grad_loss.dim():
        grad_loss = grad_loss.unsqueeze(dim)
        return gradient.mul_(grad_loss) if gradient.dtype == grad_loss.dtype else _scaled(gradient, grad_loss, 0)
    if gradient.device.type == "cuda" and _fits_triton(gradient):
        from ..kernels import cosine_loss as kernel

        # Looks at the factor on the device, where it is one as a rule, and then touches nothing.
        return kernel.scale_in_place(gradient, grad_loss)
    factor = float(grad_loss)
    return gradient if factor == 1 else gradient.mul_(factor)
