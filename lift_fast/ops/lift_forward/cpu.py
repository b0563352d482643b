"""LiFT's plan on the CPU: the image encoders on PyTorch's convolutions, the rest in the native core."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import _env, _native, devices, memory
from .plain import TorchEncoder, encode_image_nhwc, prepare_encoder
from .plan import Plan


class NativePlan(NamedTuple):
    """The image encoder as in :class:`TorchPlan`, and the decoder's weights packed for the native core."""

    encoder: TorchEncoder
    packed: Tensor
    """uint8"""
    hidden: int
    """c"""
    out_channels: int
    dtype: str
    isa: str


def instructions(device: torch.device, dtype: torch.dtype) -> str | None:
    """The instruction set with which the native core would run the plan; None if it does not support it."""
    supported = device.type == "cpu" and dtype in (torch.float32, torch.bfloat16) and devices.native_runs()[0]
    return _env.cpu_isa() if supported else None


def prepare_native(plan: Plan, dtype: torch.dtype, isa: str) -> NativePlan:
    """Pack the plan for :func:`run_native_plan`; ``dtype`` float32 or bfloat16."""
    core, name = _native.require(), str(dtype).removeprefix("torch.")
    image = plan.fine.shape[2]
    hidden, out_channels = plan.out.shape
    channels = plan.phase.shape[-2] - 1 - image
    # The decoder writes as many channels as it reads; a basis has fewer.
    wide = [F.pad(part, (0, channels - out_channels)) for part in (plan.out, plan.out_bias)]
    parts = [plan.phase[..., :-1, :], plan.fine, plan.edge_bias(), plan.conv, plan.conv_bias, *wide]
    parts = [part.cpu().contiguous() for part in parts]
    packed = memory.empty(
        core.lift_forward_packed_size(channels, hidden, image, image, name, isa), dtype=torch.uint8, device="cpu"
    )
    addresses = [_native.address(part) for part in parts]
    core.lift_forward_pack(
        *addresses, channels, hidden, image, image, name, _native.address(packed), packed.numel(), isa
    )
    return NativePlan(prepare_encoder(plan, torch.device("cpu"), dtype), packed, hidden, out_channels, name, isa)


def run_native_plan(plan: NativePlan, imgs: Tensor, x: Tensor) -> Tensor:
    """Run the plan with the native core's decoder; shapes as :func:`lift_forward`."""
    batch, h, w, channels = x.shape
    x = x.contiguous()
    out = memory.new_empty(x, (batch, 2 * h, 2 * w, channels))
    f_address = g_address = image = 0
    if plan.encoder.image_convs_1:
        f, g = encode_image_nhwc(plan.encoder, imgs)
        f_address, g_address, image = _native.address(f), _native.address(g), f.shape[3]
    _native.require().lift_forward(
        _native.address(x),
        g_address,
        f_address,
        _native.address(plan.packed),
        plan.packed.numel(),
        _native.address(out),
        batch,
        h,
        w,
        channels,
        plan.hidden,
        image,
        image,
        plan.dtype,
        torch.get_num_threads(),
        plan.isa,
    )
    return out[..., : plan.out_channels].contiguous()
