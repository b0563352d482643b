"""LiFT's image encoders in the native core's CUDA kernel: f and g in one pass over the image, on the tensor cores."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ... import _native, memory
from ...kernels import launch
from ...kernels.launch import tf32_allowed
from .plan import ImageConv, Plan

# The core's names of dtypes.
_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
_CHANNELS = 32


class EncoderWeights(NamedTuple):
    """The encoders' weights in the layout of :func:`encode_image`."""

    packed: Tensor
    """[1 + 9 + 9 parts, 4 output octets, 32 lanes, 8 values]: the operands of the tensor cores, lane by lane"""
    bias: Tensor
    """[3, 32] float32; the first convolution's is in ``packed``"""
    pool: bool


def unsupported(plan: Plan, dtype: torch.dtype) -> str | None:
    """Why this kernel does not support a network in a dtype; None if it does."""
    if dtype not in _NAMES:
        return f"the kernel computes in {', '.join(map(str, _NAMES))}, not in {dtype}"
    if dtype == torch.float32 and not tf32_allowed():
        return "PyTorch is set to full precision for float32 products, the kernel rounds them to TF32"
    if len(plan.image_convs_1) != 2:
        return f"the first image encoder has {len(plan.image_convs_1)} convolutions, the kernel has 2"
    if plan.fine.shape[2] != _CHANNELS:
        return f"the image encoders are {plan.fine.shape[2]} channels wide, the kernel {_CHANNELS}"
    return None


def _operand_order() -> Tensor:
    """[4, 32 lanes, 8]: the input channel of each value of a lane, the same for all octets."""
    lane, value = torch.arange(32, device="cpu")[:, None], torch.arange(8, device="cpu")[None, :]
    return (8 * (value // 2) + 2 * (lane % 4) + value % 2).expand(4, 32, 8)


def _window_order() -> Tensor:
    """[4, 32 lanes, 8]: each value's source, a window value 0 to 26 (channel, row, column), a part of the bias 27 to
    29, or nothing, 30."""

    def at(line: int, column: int) -> int:
        row, channel = divmod(line, 3)
        return 9 * channel + 3 * row + column

    shared = ((at(8, 1), at(8, 2)), (at(8, 0), 30), (27, 28), (29, 30))
    lanes = [
        [at(t, 1), at(t, 2), at(t + 4, 1), at(t + 4, 2), at(t, 0), at(t + 4, 0), *shared[t]]
        for t in (lane % 4 for lane in range(32))
    ]
    return torch.tensor(lanes, device="cpu").expand(4, 32, 8)


def _output_order() -> Tensor:
    """[4, 32 lanes, 8]: the output channel of each value of a lane."""
    octet, lane = torch.arange(4, device="cpu")[:, None, None], torch.arange(32, device="cpu")[None, :, None]
    return (8 * octet + lane // 4).expand(4, 32, 8)


def round_operand(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Float64 numbers in ``dtype`` as tensor-core operands; float32 is rounded to TF32's 11 bits."""
    limit = torch.finfo(dtype).max
    value = value.clamp(-limit, limit).to(dtype)
    if dtype != torch.float32:
        return value
    return ((value.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def pack_encoder(plan: Plan, device: torch.device, dtype: torch.dtype) -> EncoderWeights:
    """Lay out the plan's image encoders for :func:`encode_image`."""
    (first, second), (third,) = plan.image_convs_1, plan.image_convs_2
    outputs, inputs = _output_order(), _operand_order()

    def taps(conv: ImageConv) -> Tensor:
        weight = conv.weight.cpu().double()
        return torch.stack([weight[:, :, row, column][outputs, inputs] for row in range(3) for column in range(3)])

    # The window has room for ones; their weights are the bias in three parts of at least 8 bits each.
    left, parts = first.bias.cpu().double(), []
    for _ in range(3):
        parts.append(round_operand(left, dtype).double())
        left = left - parts[-1]
    window = torch.cat([first.weight.cpu().double().flatten(1), torch.stack([*parts, torch.zeros_like(left)], 1)], 1)
    packed = torch.cat([window[outputs, _window_order()][None], taps(second), taps(third)])
    bias = torch.stack([conv.bias.cpu() for conv in (first, second, third)])
    return EncoderWeights(
        packed=round_operand(packed, dtype).contiguous().to(device),
        bias=bias.to(device, torch.float32).contiguous(),
        pool=plan.pool,
    )


def encode_image(imgs: Tensor, weights: EncoderWeights, cut: str = "walk") -> tuple[Tensor, Tensor]:
    """Image encoders.

    Args:
        imgs: ``[B, 3, s*h, s*w]`` images of any strides, s = 16 with pool, else 8.
        weights: from :func:`pack_encoder`, in the dtype and on the device of ``imgs``.
        cut: partition of the work on the device: "walk", "stream" or "spread"; results do not depend on it.

    Returns:
        f ``[B, 2h, 2w, 32]`` and g ``[B, h, w, 32]``, contiguous, in the dtype of ``imgs``.

    Raises:
        ValueError: if dtypes, devices or shapes do not fit.
        RuntimeError: if the native core has no CUDA part, or CUDA fails.
    """
    side = 16 if weights.pool else 8
    if imgs.dim() != 4 or imgs.shape[1] != 3 or imgs.shape[2] % side or imgs.shape[3] % side:
        raise ValueError(f"imgs must be [B, 3, {side} h, {side} w], got {list(imgs.shape)}")
    for name, tensor in (("weights", weights.packed), ("biases", weights.bias)):
        if tensor.device != imgs.device or (tensor is weights.packed and tensor.dtype != imgs.dtype):
            raise ValueError(
                f"the {name} are {tensor.dtype} on {tensor.device}, imgs {imgs.dtype} on {imgs.device}; "
                "pack the plan for the dtype and device of imgs"
            )
    if launch.device_of(imgs) < 0:
        raise ValueError(f"the native image encoder needs a CUDA device, got {imgs.device}")
    batch, height, width = imgs.shape[0], imgs.shape[2] // side, imgs.shape[3] // side
    f = memory.new_empty(imgs, (batch, 2 * height, 2 * width, _CHANNELS))
    g = memory.new_empty(imgs, (batch, height, width, _CHANNELS))
    launcher(imgs, weights, cut)(imgs, f.data_ptr(), g.data_ptr(), launch.current_stream(launch.device_of(imgs)))
    return f, g


def launcher(imgs: Tensor, weights: EncoderWeights, cut: str = "walk") -> Callable[[Tensor, int, int, int], None]:
    """``encode(imgs, f, g, stream)`` for images like these, with addresses of f, g and a stream on their device.

    Arguments are not checked here, :func:`encode_image` does that.
    """
    side = 16 if weights.pool else 8
    batch, height, width = imgs.shape[0], imgs.shape[2] // side, imgs.shape[3] // side
    cells = batch * height * width * _CHANNELS
    packed = (weights.packed.data_ptr(), weights.packed.numel(), weights.bias.data_ptr())
    where = (batch, height, width, weights.pool, _NAMES[imgs.dtype], launch.device_of(imgs))
    return partial(_encode, _native.require().image_encoder, packed, cells, where, cut)


def _encode(
    core: Callable[..., None],
    packed: tuple[int, int, int],
    cells: int,
    where: tuple[int, int, int, bool, str, int],
    cut: str,
    imgs: Tensor,
    f: int,
    g: int,
    stream: int,
) -> None:
    core(imgs.data_ptr(), imgs.stride(), *packed, f, 4 * cells, g, cells, *where, stream, cut)
