"""LiFT's image encoders on PyTorch's convolutions: on the CPU, and for networks that the GPU kernels do not serve."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .plan import ImageConv, Plan


class TorchEncoder(NamedTuple):
    """The image encoders in one dtype, in the layouts that PyTorch's convolutions take (channels last)."""

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
