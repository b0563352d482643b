"""LiFT's plan on the GPU: image encoders, composed upsample and head, one fused kernel each.

The two GEMM stages run in Triton. The image encoders run in the native core's CUDA kernel; if that is missing or does
not support the network, in Triton, and otherwise in PyTorch's convolutions. In addition to inputs and outputs, memory
holds f, g and the c-channel fine map.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ... import _env, devices
from ...kernels import launch
from ...kernels.launch import product_precision, tf32_allowed
from ...kernels.tiles import Tile
from . import gpu_pass, image_encoder_cuda, plain, tiles
from .plan import Plan

if TYPE_CHECKING:
    from ...kernels.lift_forward_head import HeadWeights
    from ...kernels.lift_forward_upsample import UpsampleWeights

# Many, since detectors see images of many sizes.
_MOST_PASSES = 256


class GpuPlan(NamedTuple):
    """The plan's weights in one dtype on one device, in the layouts of the kernels."""

    encoder: str
    """Image encoder of ``encoder_weights``: "cuda", "triton", "torch", or "none" without image."""
    encoder_weights: Any
    upsample: UpsampleWeights
    head: HeadWeights
    upsample_counts: tuple[int, ...]
    """Possible numbers of accumulators in a block of the upsample kernel."""
    head_counts: tuple[int, ...]
    passes: dict[Any, gpu_pass.Pass]
    """Recorded passes, by the sizes of their inputs."""


@cache
def _kernels() -> tuple[Any, Any, Any, Any]:
    """Image encoder, upsample, head, and the packing of their weights.

    Imported only here: Triton is optional and slow to load. Cached: an import statement costs 1 us a call.
    """
    from ...kernels import lift_forward_head, lift_forward_image_encoder, lift_forward_upsample
    from . import gpu_weights

    return lift_forward_image_encoder, lift_forward_upsample, lift_forward_head, gpu_weights


# Channels of the head's 3x3 convolution; a block holds all in registers, and compilers take minutes beyond this.
_MOST_HIDDEN = 1024


def serves(channels: int) -> bool:
    """Whether the kernels support this many feature channels; wider networks run on PyTorch's convolutions."""
    return channels // 2 <= _MOST_HIDDEN


def route(device: torch.device, dtype: torch.dtype, channels: int) -> tuple[Any, ...] | None:
    """A key of everything that decides the layout of a plan; None if the kernels do not support it.

    The environment switches and PyTorch's TF32 setting may change at any time.
    """
    return _route(device, dtype, channels, _env.switches(), dtype != torch.float32 or tf32_allowed())


@cache
def _route(
    device: torch.device, dtype: torch.dtype, channels: int, switches: tuple[str, ...], rounded: bool
) -> tuple[Any, ...] | None:
    if not serves(channels) or not devices.kernels_run(device, dtype)[0]:
        return None
    return "gpu", rounded and devices.cuda_runs(device)[0], device, dtype


def prepare_gpu(plan: Plan, device: torch.device, dtype: torch.dtype, encoder: str | None = None) -> GpuPlan:
    """Lay the plan out for the kernels.

    Args:
        plan: the network's plan.
        device: where the kernels run.
        dtype: bfloat16, float16 or float32.
        encoder: "cuda", "triton" or "torch" selects that image encoder; None the best available one.

    Raises:
        RuntimeError: if ``encoder`` cannot run; gives the reason.
    """
    _, upsample, head, weights = _kernels()
    if not plan.image_convs_1:
        encoder = "none"
    elif encoder is None:
        encoder = _best_encoder(plan, device, dtype)
    elif missing := _missing(encoder, plan, device, dtype):
        name = "CUDA" if encoder == "cuda" else "Triton"
        raise RuntimeError(f"the {name} image encoder cannot run: {missing}; pass encoder=None")
    pack: dict[str, Any] = {
        "cuda": image_encoder_cuda.pack_encoder,
        "triton": weights.pack_encoder,
        "torch": plain.prepare_encoder,
    }
    packed = None if encoder == "none" else pack[encoder](plan, device, dtype)
    first, second = weights.pack_upsample(plan, device, dtype), weights.pack_head(plan, device, dtype)
    counts = (tuple(upsample.accumulators_of(first)), tuple(head.accumulators_of(second)))
    return GpuPlan(encoder, packed, first, second, *counts, passes={})


def _best_encoder(plan: Plan, device: torch.device, dtype: torch.dtype) -> str:
    """The first image encoder that can run; PyTorch's always can."""
    return next(name for name in ("cuda", "triton", "torch") if not _missing(name, plan, device, dtype))


def _missing(encoder: str, plan: Plan, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why an image encoder does not support the plan; None if it does. PyTorch's always does."""
    if encoder == "cuda":
        runs, reason = devices.cuda_runs(device)
        return image_encoder_cuda.unsupported(plan, dtype) if runs else reason
    return _kernels()[3].encoder_unsupported(plan, device, dtype) if encoder == "triton" else None


def encode_image(plan: GpuPlan, imgs: Tensor) -> tuple[Tensor, Tensor]:
    """Image encoders: ``imgs [B, 3, s*h, s*w]`` to f ``[B, 2h, 2w, F]`` and g ``[B, h, w, F]``, contiguous."""
    if plan.encoder == "cuda":
        return image_encoder_cuda.encode_image(imgs, plan.encoder_weights)
    if plan.encoder == "triton":
        f, g = _kernels()[0].encode_image(imgs, plan.encoder_weights)
        return f, g
    return plain.encode_image_nhwc(plan.encoder_weights, imgs)


def upsample_work(plan: GpuPlan, x: Tensor) -> tiles.Work:
    """The upsample stage's launch for features ``x [B, h, w, C]``."""
    batch, height, width, channels = x.shape
    # Four phases each.
    positions = 4 * batch * height * width
    return tiles.Work("upsample", positions, plan.upsample.channels, channels, plan.upsample_counts, x.dtype)


def upsample(plan: GpuPlan, x: Tensor, f: Tensor | None, g: Tensor | None, tile: Tile | None = None) -> Tensor:
    """First stage: x ``[B, h, w, C]``, f and g of :func:`encode_image` to u ``[B, 2h, 2w, c]``, all contiguous."""
    tile = tile or tiles.tile_for(upsample_work(plan, x), x.device)
    u: Tensor = _kernels()[1].upsample(x, f, g, plan.upsample, tile)
    return u


def head_work(plan: GpuPlan, u: Tensor) -> tiles.Work:
    """The head's launch for ``u [B, 2h, 2w, c]``."""
    batch, height, width, channels = u.shape
    return tiles.Work("head", batch * height * width, plan.head.channels, channels, plan.head_counts, u.dtype)


def head(plan: GpuPlan, u: Tensor, normalize: bool = False, tile: Tile | None = None) -> Tensor:
    """Second stage: u ``[B, 2h, 2w, c]`` to descriptors ``[B, 2h, 2w, C]``, with ``normalize`` L2-normalised."""
    tile = tile or tiles.tile_for(head_work(plan, u), u.device)
    out: Tensor = _kernels()[2].head(u, plan.head, tile, normalize)
    return out


def run_gpu_plan(plan: GpuPlan, imgs: Tensor, x: Tensor, normalize: bool = False) -> Tensor:
    """Run the plan; shapes as :func:`.op.lift_forward`."""
    x = x.contiguous()
    key = gpu_pass.key(imgs, x, normalize, product_precision(x.dtype), tiles.edition())
    known = plan.passes.get(key)
    if known is not None:
        return known.run(imgs, x)
    with launch.journal() as launches:
        f, g = encode_image(plan, imgs) if plan.encoder != "none" else (None, None)
        u = upsample(plan, x, f, g)
        out = head(plan, u, normalize)
    if key is not None and plan.encoder != "torch":
        encode = image_encoder_cuda.launcher(imgs, plan.encoder_weights) if plan.encoder == "cuda" else None
        weights = (*(plan.encoder_weights or ()), *plan.upsample, *plan.head)
        again = gpu_pass.build(launches, (imgs, x, f, g, u, out), weights, encode)
        if again is not None:
            if len(plan.passes) >= _MOST_PASSES:
                plan.passes.clear()
            plan.passes[key] = again
    return out
