"""One optimiser step on one batch, in any precision."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lift_fast.precision import resolve_dtype

from .objective import FrozenFeatures


class TrainingStep:
    """Features of the frozen backbone, the objective, its gradient, the optimiser.

    Args:
        features: the frozen part; its dtype is also the precision of the network.
        objective: an :class:`Objective`, possibly wrapped.
        optimizer: of the objective's parameters, which are float32.
    """

    def __init__(self, features: FrozenFeatures, objective: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.features, self.objective, self.optimizer = features, objective, optimizer
        # Gradients exceed the range of float16, but not of bfloat16.
        self.scaler = torch.amp.GradScaler(features.device.type, enabled=features.dtype == torch.float16)

    def __call__(self, pixels: Tensor) -> Tensor:
        """``[B, 3, S, S]`` uint8 images to the two terms of the loss before the step, ``[2]``."""
        views = self.features(pixels)
        with autocast(self.features.device, self.features.dtype):
            losses: Tensor = self.objective(views)
        self.scaler.scale(losses.sum()).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return losses.detach()


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[object]:
    """Context of the network: weights stay float32, convolutions compute in ``dtype``."""
    return torch.autocast(device.type, dtype) if dtype in (torch.bfloat16, torch.float16) else contextlib.nullcontext()


@contextlib.contextmanager
def tuned_convolutions() -> Iterator[None]:
    """Let cuDNN benchmark its algorithms, because every step has the same shapes."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of ``precision``; ``"auto"`` is bfloat16 if the hardware supports it. No float16 on the CPU."""
    if precision == "auto":
        return resolve_dtype("auto", device)
    if precision == "float16" and device.type == "cpu":
        raise ValueError("precision float16 needs a GPU; on the CPU use bfloat16 or float32")
    dtype: torch.dtype = getattr(torch, precision)
    return dtype
