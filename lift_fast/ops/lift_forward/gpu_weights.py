"""The plan's weights in the padded layouts of ``lift_forward``'s Triton kernels. Importing this imports Triton."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...kernels.lift_forward_head import HeadWeights
from ...kernels.lift_forward_image_encoder import EncoderWeights
from ...kernels.lift_forward_upsample import UpsampleWeights
from ...kernels.tiles import next_power_of_2, padded
from .plan import ImageConv, Plan


def encoder_unsupported(plan: Plan, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the image encoder's kernels do not support a network in ``dtype`` on a device; None if they do."""
    if len(plan.image_convs_1) != 2:
        return f"the first image encoder has {len(plan.image_convs_1)} convolutions, the kernel has 2"
    if plan.fine.shape[2] > 128:
        return f"the image encoders are {plan.fine.shape[2]} channels wide, the kernel goes up to 128"
    if plan.pool and dtype == torch.float32 and device.type == "cuda":
        # Correct in the interpreter, in half precision and without pooling; the cause is not known.
        return "with pooling in float32 the kernel gave wrong results on an H200"
    return None


def pack_encoder(plan: Plan, device: torch.device, dtype: torch.dtype) -> EncoderWeights:
    """Lay out the plan's image encoders."""
    channels = plan.fine.shape[2]
    width = max(16, next_power_of_2(channels))
    more = width - channels

    def taps(conv: ImageConv) -> Tensor:
        return pad(conv.weight, (0, 0, 0, 0, 0, more, 0, more)).permute(2, 3, 0, 1).flatten(0, 1)

    def bias(conv: ImageConv) -> Tensor:
        return pad(conv.bias, (0, more)).to(device, torch.float32)

    (first, second), (third,) = plan.image_convs_1, plan.image_convs_2
    return EncoderWeights(
        first=pad(first.weight.flatten(1), (0, 5, 0, more)).to(device, dtype).contiguous(),
        first_bias=bias(first),
        second=taps(second).to(device, dtype).contiguous(),
        second_bias=bias(second),
        third=taps(third).to(device, dtype).contiguous(),
        third_bias=bias(third),
        channels=channels,
        pool=plan.pool,
    )


def pack_upsample(plan: Plan, device: torch.device, dtype: torch.dtype) -> UpsampleWeights:
    """Lay out the plan's first stage."""
    channels = plan.bias.shape[0]
    extra = padded(channels) - channels
    phase = pad(plan.phase[..., :-1, :], (0, extra)).flatten(2, 3).flatten(0, 1).permute(0, 3, 1, 2)
    image = plan.fine.shape[2]
    features = phase.shape[3] - image

    def cast(weight: Tensor) -> Tensor:
        return weight.to(device, dtype).contiguous()

    bias = pad(plan.edge_bias(), (0, extra)).flatten(0, 1)
    return UpsampleWeights(
        coarse=cast(phase[..., :features]),
        image=cast(phase[..., features:]) if image else None,
        fine=cast(pad(plan.fine, (0, extra)).flatten(0, 1).permute(2, 0, 1)) if image else None,
        bias=bias.to(device, torch.float32).contiguous(),
        bias_terms=cast(_bias_terms(bias, dtype).t()),
        channels=channels,
    )


def _bias_terms(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """The bias ``[9 position classes, N]`` as ``[32, N]`` rows, exact in a product in ``dtype``.

    Three terms for each class, which sum to all digits of a float32, and 5 rows of zeros.
    """
    # TF32 represents bfloat16 exactly.
    short = torch.float16 if dtype == torch.float16 else torch.bfloat16
    terms = []
    for _ in range(3):
        terms.append(bias.to(short).to(bias.dtype))
        bias = bias - terms[-1]
    return pad(torch.cat(terms), (0, 0, 0, 5))


def pack_head(plan: Plan, device: torch.device, dtype: torch.dtype) -> HeadWeights:
    """Lay out the plan's second stage."""
    channels, out_channels = plan.out.shape
    more = padded(channels) - channels
    more_out = padded(out_channels) - out_channels
    return HeadWeights(
        conv=pad(plan.conv.flatten(0, 1).permute(2, 0, 1), (0, more, 0, 0, 0, more)).to(device, dtype).contiguous(),
        conv_bias=pad(plan.conv_bias, (0, more)).to(device, torch.float32),
        out=pad(plan.out.t(), (0, more, 0, more_out)).to(device, dtype).contiguous(),
        out_bias=pad(plan.out_bias, (0, more_out)).to(device, torch.float32),
        channels=channels,
        out_channels=out_channels,
    )
