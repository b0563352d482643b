"""LiFT's plan on PyTorch's convolutions, on any device; other backends use its image encoders if they have none."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import memory
from .plan import ImageConv, Plan


class TorchEncoder(NamedTuple):
    """The image encoders in one dtype, in channels-last layout for PyTorch's convolutions."""

    image_convs_1: tuple[ImageConv, ...]
    pool: bool
    image_convs_2: tuple[ImageConv, ...]


def prepare_encoder(plan: Plan, device: torch.device, dtype: torch.dtype) -> TorchEncoder:
    """Lay the plan's image encoders out for :func:`encode_image`."""

    def cast(conv: ImageConv) -> ImageConv:
        weight = conv.weight.to(device, dtype).contiguous(memory_format=torch.channels_last)
        return ImageConv(weight, conv.bias.to(device, dtype), conv.stride)

    return TorchEncoder(tuple(map(cast, plan.image_convs_1)), plan.pool, tuple(map(cast, plan.image_convs_2)))


def encode_image(encoder: TorchEncoder, imgs: Tensor) -> tuple[Tensor, Tensor]:
    """Image encoders: ``imgs [B, 3, s*h, s*w]`` to f ``[B, F, 2h, 2w]`` and g ``[B, F, h, w]``, channels last."""
    f = imgs.contiguous(memory_format=torch.channels_last)
    for conv in encoder.image_convs_1:
        f = F.conv2d(f, conv.weight, conv.bias, conv.stride, padding=1).relu_()
    if encoder.pool:
        f = F.max_pool2d(f, 2)
    g = f
    for conv in encoder.image_convs_2:
        g = F.conv2d(g, conv.weight, conv.bias, conv.stride, padding=1).relu_()
    return f, g


def encode_image_nhwc(encoder: TorchEncoder, imgs: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`encode_image` with f ``[B, 2h, 2w, F]`` and g ``[B, h, w, F]``, contiguous, as the decoders read them."""
    f, g = encode_image(encoder, imgs)
    return f.permute(0, 2, 3, 1).contiguous(), g.permute(0, 2, 3, 1).contiguous()


class TorchPlan(NamedTuple):
    """The plan's tensors in one dtype, in channels-last layout for PyTorch's convolutions."""

    encoder: TorchEncoder
    phase: Tensor
    """[4c, K padded, 2, 2]"""
    fine: Tensor
    """[c, F, 3, 3]"""
    bias: Tensor
    conv: Tensor
    """[c, c, 3, 3]"""
    conv_bias: Tensor
    out: Tensor
    """[C, c]"""
    out_bias: Tensor


# Tensor cores need channel counts that are multiples of 8: zeros pad the channels after the ones channel.
_CHANNEL_MULTIPLE = 8


def prepare_torch(plan: Plan, device: torch.device, dtype: torch.dtype) -> TorchPlan:
    """Lay the plan out for :func:`run_plan`."""

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(device=device, dtype=dtype)

    def kernel(tensor: Tensor) -> Tensor:
        return cast(tensor).contiguous(memory_format=torch.channels_last)

    channels = plan.phase.shape[-1]
    phase = F.pad(plan.phase, (0, 0, 0, -plan.phase.shape[-2] % _CHANNEL_MULTIPLE))
    return TorchPlan(
        encoder=prepare_encoder(plan, device, dtype),
        phase=kernel(phase.permute(0, 1, 5, 4, 2, 3).reshape(4 * channels, -1, 2, 2)),
        fine=kernel(plan.fine.permute(3, 2, 0, 1)),
        bias=cast(plan.bias),
        conv=kernel(plan.conv.permute(3, 2, 0, 1)),
        conv_bias=cast(plan.conv_bias),
        out=cast(plan.out.t()).contiguous(),
        out_bias=cast(plan.out_bias),
    )


def run_plan(plan: TorchPlan, imgs: Tensor, x: Tensor) -> Tensor:
    """Run the plan on PyTorch's convolutions; shapes as :func:`lift_forward`."""
    batch, h, w, _ = x.shape
    coarse = [x.permute(0, 3, 1, 2)]
    if plan.encoder.image_convs_1:
        f, g = encode_image(plan.encoder, imgs)
        coarse.append(g)
        u = F.conv2d(f, plan.fine, plan.bias, padding=1)
    else:
        u = memory.new_empty(x, (batch, 2 * h, 2 * w, plan.bias.shape[0])).permute(0, 3, 1, 2)
        u.copy_(plan.bias.view(1, -1, 1, 1).expand_as(u))
    coarse.append(x.new_ones((1, 1, 1, 1)).expand(batch, 1, h, w))
    coarse.append(x.new_zeros((1, 1, 1, 1)).expand(batch, plan.phase.shape[1] - sum(c.shape[1] for c in coarse), h, w))
    # With one ring of zeros every phase is a 2x2 window of the padded grid, starting at its own corner.
    padded = F.pad(torch.cat(coarse, dim=1), (1, 1, 1, 1)).contiguous(memory_format=torch.channels_last)
    windows = F.conv2d(padded, plan.phase).unflatten(1, (2, 2, -1))
    for a in (0, 1):
        for b in (0, 1):
            u[:, :, a::2, b::2] += windows[:, a, b, :, a : a + h, b : b + w]
    v = F.conv2d(u.relu_(), plan.conv, plan.conv_bias, padding=1).relu_()
    return F.linear(v.permute(0, 2, 3, 1), plan.out, plan.out_bias).contiguous()
