"""BatchNorm over the batch of all processes on any device; PyTorch's own runs only on GPUs."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def synchronize(module: nn.Module, device: torch.device) -> None:
    """Replace each BatchNorm2d inside ``module`` by one with statistics over all processes, with the same parameters.

    All processes must have the same number of values.
    """
    for name, child in module.named_children():
        if type(child) is nn.BatchNorm2d:
            shared = nn.SyncBatchNorm.convert_sync_batchnorm(child) if device.type == "cuda" else _like(child)
            setattr(module, name, shared)
        else:
            synchronize(child, device)


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Plain form, with the state dict of BatchNorm2d; two reductions in each direction."""

    batch_norm_in_evaluation = True
    """Marks it as foldable for :mod:`lift_fast.layers`."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        values = x.float()
        count = x.numel() // x.shape[1] * dist.get_world_size()
        mean = _sum(values.sum((0, 2, 3))) / count
        centred = values - mean.view(1, -1, 1, 1)
        variance = _sum(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            assert self.momentum is not None
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / max(count - 1, 1)), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)).to(x.dtype)


class _SumOverProcesses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        # Every process's loss depends on every process's sum.
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


def _sum(value: Tensor) -> Tensor:
    out: Tensor = _SumOverProcesses.apply(value)
    return out


def _like(norm: nn.BatchNorm2d) -> SyncBatchNorm2d:
    out = SyncBatchNorm2d(norm.num_features, norm.eps, norm.momentum)
    # The same parameters and buffers, because an optimiser may already hold them.
    out._parameters, out._buffers = norm._parameters, norm._buffers
    return out.train(norm.training)
