"""``cosine_loss`` on the CPU, in the native core."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _env, _native, devices
from .plain import operands, reduced, share

_TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def fits(prediction: Tensor) -> bool:
    """Whether the native core supports this ``prediction``."""
    return prediction.device.type == "cpu" and prediction.dtype in _TYPES and devices.native_runs()[0]


def loss_and_gradient(
    prediction: Tensor,
    target: Tensor,
    dim: int,
    reduction: str,
    with_gradient: bool,
    grad_loss: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """:func:`lift_fast.ops.cosine_loss.plain.loss_and_gradient`."""
    x, y, loss, gradient, into = operands(prediction, target, dim, with_gradient)
    weight, upstream = share(prediction, dim, reduction), None
    if grad_loss is not None:
        if grad_loss.dim():
            upstream = grad_loss.float().contiguous()
        else:
            weight *= float(grad_loss)
    _native.require().cosine_loss(
        _native.address(x),
        _native.address(y),
        _TYPES[x.dtype],
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
    return reduced(loss, reduction), gradient


def _strides(tensor: Tensor) -> tuple[int, ...]:
    # A dimension of one element may have any stride; 1 for channels selects the fastest layout.
    return tuple(1 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
