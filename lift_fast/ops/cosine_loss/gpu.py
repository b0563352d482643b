"""``cosine_loss`` on the GPU, in a Triton kernel."""

from __future__ import annotations

from torch import Tensor

from ... import devices
from .plain import EPSILON, operands, reduced, share


def fits(prediction: Tensor) -> bool:
    """Whether the kernel supports this ``prediction``."""
    return prediction.numel() > 0 and devices.kernels_run(prediction.device, prediction.dtype)[0]


def loss_and_gradient(
    prediction: Tensor,
    target: Tensor,
    dim: int,
    reduction: str,
    with_gradient: bool,
    grad_loss: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """:func:`lift_fast.ops.cosine_loss.plain.loss_and_gradient`."""
    from ...kernels import cosine_loss as kernel

    x, y, loss, gradient, into = operands(prediction, target, dim, with_gradient)
    upstream = None if grad_loss is None else grad_loss.float().contiguous()
    kernel.cosine_loss(x, y, into, loss, share(prediction, dim, reduction), EPSILON, upstream)
    return reduced(loss, reduction), gradient
