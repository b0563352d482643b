"""``lift_forward``: LiFT's evaluation-mode forward pass as one operator, executed from the composed plan.

The plain PyTorch implementation (reference and baseline) is the module's own graph, ``LiFT._forward_plain``.
:func:`run_plan` executes the plan with PyTorch's convolutions on any device. On the CPU :func:`run_native_plan` takes
over everything behind the image encoder where the native core is there; on GPUs :mod:`.gpu` takes
over the whole where Triton is.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import _env, _native, devices, memory
from ...precision import cpu_computes
from .. import library
from . import gpu
from .cache import prepared_plan
from .plain import TorchEncoder, encode_image, prepare_encoder
from .plan import Architecture, Plan

library.define(
    "lift_forward(Tensor imgs, Tensor x, Tensor[] weights, float[] epsilons, int image_blocks, bool pool,"
    " bool basis=False, bool normalize=False) -> Tensor",
    # The plan is looked up by the weights' versions on the host at each call, which a replayed graph would not see.
    # Releases of PyTorch without this tag leave such operators to the caller.
    tags=[torch.Tag.cudagraph_unsafe] if hasattr(torch.Tag, "cudagraph_unsafe") else [],
)


def lift_forward(
    imgs: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    epsilons: Sequence[float],
    architecture: Architecture,
    *,
    basis: bool = False,
    normalize: bool = False,
) -> Tensor:
    """LiFT in evaluation mode.

    Args:
        imgs: ``[B, 3, s*h, s*w]`` pictures aligned to the grid, s = 16 with pool, else 8; unread without image blocks.
        x: ``[B, h, w, C]`` backbone features in the dtype in which to compute.
        weights, epsilons, architecture: the network, see :func:`.plan.build_plan`; any floating dtype.
        basis: give the descriptors in an orthonormal basis of their span, see :meth:`.plan.Plan.in_basis`.
        normalize: divide each descriptor by max(its norm, 1e-12).

    Returns:
        ``[B, 2h, 2w, C]``, or C // 2 + 1 channels with ``basis``; contiguous, in the dtype of ``x``.

    Raises:
        ValueError: if the weights are not finite.
    """
    if _undisturbed(imgs, x, weights):
        return _compute(imgs, x, weights, epsilons, architecture, basis, normalize)
    out: Tensor = torch.ops.lift_fast.lift_forward.default(
        imgs, x, list(weights), list(epsilons), architecture.image_blocks, architecture.pool, basis, normalize
    )
    return out


_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_Question = Callable[[], Any]


def _watchers() -> tuple[_Question, ...] | None:
    """Tracing, function transforms, dispatch and function modes, profilers: each answers falsely where there is none.

    PyTorch has no public names for these questions. None where a release lacks one.
    """
    core = torch._C
    try:
        found = (core._get_tracing_state, core._functorch.peek_interpreter_stack, core._len_torch_dispatch_stack)
        return (*found, core._len_torch_function_stack, core._autograd._profiler_enabled)
    except AttributeError:
        return None


_WATCHERS = _watchers()


def _undisturbed(imgs: Tensor, x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether nobody but the caller would see the operator: then the dispatcher, 10 us with 37 weights, has no part."""
    if _WATCHERS is None or torch.compiler.is_compiling():
        return False
    for watcher in _WATCHERS:
        if watcher():
            return False
    if torch.is_grad_enabled() and (imgs.requires_grad or x.requires_grad):
        return False
    return type(imgs) is Tensor and type(x) is Tensor and _PLAIN.issuperset(map(type, weights))


class TorchPlan(NamedTuple):
    """The plan's tensors in one dtype, in the layouts that PyTorch's convolutions take (channels last)."""

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


class NativePlan(NamedTuple):
    """The image encoder as in :class:`TorchPlan`, and the decoder's weights as the native core packs them."""

    encoder: TorchEncoder
    packed: Tensor
    """uint8"""
    hidden: int
    """c"""
    out_channels: int
    dtype: str
    isa: str


# Tensor cores want channel counts that are multiples of 8; the ones channel would spoil that, so zeros follow it.
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
        core.lift_decoder_packed_size(channels, hidden, image, image, name, isa), dtype=torch.uint8, device="cpu"
    )
    addresses = [_native.address(part) for part in parts]
    core.lift_decoder_pack(
        *addresses, channels, hidden, image, image, name, _native.address(packed), packed.numel(), isa
    )
    device = torch.device("cpu")
    return NativePlan(
        encoder=prepare_encoder(plan, device, dtype),
        packed=packed,
        hidden=hidden,
        out_channels=out_channels,
        dtype=name,
        isa=isa,
    )


def run_plan(plan: TorchPlan, imgs: Tensor, x: Tensor) -> Tensor:
    """Execute the plan with PyTorch's own convolutions; shapes as :func:`lift_forward`."""
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
    # One ring of zeros; every phase then is a 2x2 window of the padded grid, starting at its own corner.
    padded = F.pad(torch.cat(coarse, dim=1), (1, 1, 1, 1)).contiguous(memory_format=torch.channels_last)
    windows = F.conv2d(padded, plan.phase).unflatten(1, (2, 2, -1))
    for a in (0, 1):
        for b in (0, 1):
            u[:, :, a::2, b::2] += windows[:, a, b, :, a : a + h, b : b + w]
    v = F.conv2d(u.relu_(), plan.conv, plan.conv_bias, padding=1).relu_()
    return F.linear(v.permute(0, 2, 3, 1), plan.out, plan.out_bias).contiguous()


def run_native_plan(plan: NativePlan, imgs: Tensor, x: Tensor) -> Tensor:
    """Execute the plan on the CPU with the native core's decoder; shapes as :func:`lift_forward`."""
    batch, h, w, channels = x.shape
    x = x.contiguous()
    out = memory.new_empty(x, (batch, 2 * h, 2 * w, channels))
    f_address = g_address = image = 0
    if plan.encoder.image_convs_1:
        f, g = encode_image(plan.encoder, imgs)
        f, g = f.permute(0, 2, 3, 1).contiguous(), g.permute(0, 2, 3, 1).contiguous()
        f_address, g_address, image = _native.address(f), _native.address(g), f.shape[3]
    _native.require().lift_decoder(
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


def _lift_forward(
    imgs: Tensor,
    x: Tensor,
    weights: list[Tensor],
    epsilons: list[float],
    image_blocks: int,
    pool: bool,
    basis: bool = False,
    normalize: bool = False,
) -> Tensor:
    return _compute(imgs, x, weights, epsilons, Architecture(image_blocks, pool), basis, normalize)


def _compute(
    imgs: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    epsilons: Sequence[float],
    architecture: Architecture,
    basis: bool,
    normalize: bool,
) -> Tensor:
    device = x.device
    if imgs.is_neg() or x.is_neg():
        imgs, x = library.resolved(imgs), library.resolved(x)
    if torch.is_autocast_enabled(device.type):
        # The inputs are already in the dtype in which to compute; autocast would only copy the plan's tensors.
        with torch.autocast(device.type, enabled=False):
            return _compute(imgs, x, weights, epsilons, architecture, basis, normalize)
    route = gpu.route(device, x.dtype)
    if route is not None and gpu.serves(x.shape[-1]):
        # At batch 1 the host takes as long as the device.
        return _run_gpu(imgs, x, weights, epsilons, architecture, basis, normalize, route)
    given = x.dtype
    # Half precision that the processor would have to emulate is the inputs' and the result's alone.
    dtype = given if device.type != "cpu" or cpu_computes(given) else torch.float32
    imgs, x = imgs.to(dtype), x.to(dtype)

    def prepared(variant: tuple[Hashable, ...], prepare: Callable[[Plan], Any]) -> Any:
        name = (*variant, device, dtype, basis)
        return prepared_plan(
            weights, epsilons, architecture, name, lambda plan: prepare(plan.in_basis() if basis else plan)
        )

    if device.type == "cpu" and dtype in (torch.float32, torch.bfloat16) and devices.native_runs()[0]:
        isa = _env.cpu_isa()
        out = run_native_plan(prepared(("native", isa), lambda p: prepare_native(p, dtype, isa)), imgs, x)
    else:
        out = run_plan(prepared(("torch",), lambda p: prepare_torch(p, device, dtype)), imgs, x)
    # Half precision would lose digits of the norm.
    wide = torch.promote_types(dtype, torch.float32)
    return (F.normalize(out.to(wide), dim=-1) if normalize else out).to(given)


def _run_gpu(
    imgs: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    epsilons: Sequence[float],
    architecture: Architecture,
    basis: bool,
    normalize: bool,
    route: tuple[Any, ...],
) -> Tensor:
    dtype = x.dtype

    def prepare(plan: Plan) -> gpu.GpuPlan:
        return gpu.prepare_gpu(plan.in_basis() if basis else plan, x.device, dtype)

    plan = prepared_plan(weights, epsilons, architecture, (route, basis), prepare)
    return gpu.run_gpu_plan(plan, imgs if imgs.dtype == dtype else imgs.to(dtype), x, normalize)


def _fake_lift_forward(
    imgs: Tensor,
    x: Tensor,
    weights: list[Tensor],
    epsilons: list[float],
    image_blocks: int,
    pool: bool,
    basis: bool = False,
    normalize: bool = False,
) -> Tensor:
    batch, h, w, channels = x.shape
    # outc.weight is [C, c, 1, 1].
    return x.new_empty((batch, 2 * h, 2 * w, weights[-2].shape[1] + 1 if basis else channels))


library.implement("lift_forward", _lift_forward, fake=_fake_lift_forward)
