"""``lift_forward``: LiFT's evaluation-mode forward pass as one operator, run from the composed plan.

The reference is the module's own graph, ``LiFT._forward_plain``. The plan runs in the Triton kernels (:mod:`.gpu`), on
the CPU in the native core (:mod:`.cpu`), and where neither supports it on PyTorch's convolutions (:mod:`.plain`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...precision import cpu_computes
from .. import library
from . import cpu, gpu, plain
from .cache import prepared_plan
from .plan import Architecture

library.define(
    "lift_forward(Tensor imgs, Tensor x, Tensor[] weights, float[] epsilons, int image_blocks, bool pool,"
    " bool basis=False, bool normalize=False) -> Tensor",
    # Each call looks up the plan by the weights' versions on the host; a replayed graph would skip that. Older releases
    # of PyTorch have no such tag and leave this to the caller.
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
        imgs: ``[B, 3, s*h, s*w]`` images aligned to the grid, s = 16 with pool, else 8; unread without image blocks.
        x: ``[B, h, w, C]`` backbone features in the dtype of the computation.
        weights, epsilons, architecture: the network, see :func:`.plan.build_plan`; any floating dtype.
        basis: return the descriptors in an orthonormal basis of their span, see :meth:`.plan.Plan.in_basis`.
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
    """Queries for tracing, function transforms, dispatch and function modes, and profilers; false if there is none.

    PyTorch has no public names for them. None if this release lacks one.
    """
    core = torch._C
    try:
        found = (core._get_tracing_state, core._functorch.peek_interpreter_stack, core._len_torch_dispatch_stack)
        return (*found, core._len_torch_function_stack, core._autograd._profiler_enabled)
    except AttributeError:
        return None


_WATCHERS = _watchers()


def _undisturbed(imgs: Tensor, x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether nothing observes the operator, so that the dispatcher, 10 us with 37 weights, can be skipped."""
    if _WATCHERS is None or torch.compiler.is_compiling():
        return False
    for watcher in _WATCHERS:
        if watcher():
            return False
    if torch.is_grad_enabled() and (imgs.requires_grad or x.requires_grad):
        return False
    return type(imgs) is Tensor and type(x) is Tensor and _PLAIN.issuperset(map(type, weights))


def _lift_forward(
    imgs: Tensor, x: Tensor, weights: list[Tensor], epsilons: list[float], image_blocks: int, pool: bool, *flags: bool
) -> Tensor:
    return _compute(imgs, x, weights, epsilons, Architecture(image_blocks, pool), *flags)


def _compute(
    imgs: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    epsilons: Sequence[float],
    architecture: Architecture,
    basis: bool = False,
    normalize: bool = False,
) -> Tensor:
    device = x.device
    if imgs.is_neg() or x.is_neg():
        imgs, x = library.resolved(imgs), library.resolved(x)
    if torch.is_autocast_enabled(device.type):
        # The inputs already have the dtype of the computation; autocast would only copy the plan's tensors.
        with torch.autocast(device.type, enabled=False):
            return _compute(imgs, x, weights, epsilons, architecture, basis, normalize)
    given, network = x.dtype, (weights, epsilons, architecture, basis)
    route = gpu.route(device, given, x.shape[-1])
    if route is not None:
        # No needless ``imgs.to``: at batch 1 the host takes as long as the device.
        ready = prepared_plan(*network, route, lambda plan: gpu.prepare_gpu(plan, device, given))
        return gpu.run_gpu_plan(ready, imgs if imgs.dtype == given else imgs.to(given), x, normalize)
    # If the processor would emulate half precision, compute in float32 and keep it for inputs and result only.
    dtype = given if device.type != "cpu" or cpu_computes(given) else torch.float32
    imgs, x = imgs.to(dtype), x.to(dtype)
    isa = cpu.instructions(device, dtype)
    if isa is not None:
        ready = prepared_plan(*network, ("native", dtype, isa), lambda plan: cpu.prepare_native(plan, dtype, isa))
        out = cpu.run_native_plan(ready, imgs, x)
    else:
        ready = prepared_plan(*network, ("torch", device, dtype), lambda plan: plain.prepare_torch(plan, device, dtype))
        out = plain.run_plan(ready, imgs, x)
    # Half precision would lose digits of the norm.
    wide = torch.promote_types(dtype, torch.float32)
    return (F.normalize(out.to(wide), dim=-1) if normalize else out).to(given)


def _fake_lift_forward(
    imgs: Tensor, x: Tensor, weights: list[Tensor], epsilons: Any, blocks: int, pool: bool, basis: bool = False, *_: Any
) -> Tensor:
    batch, h, w, channels = x.shape
    # outc.weight is [C, c, 1, 1].
    return x.new_empty((batch, 2 * h, 2 * w, weights[-2].shape[1] + 1 if basis else channels))


library.implement("lift_forward", _lift_forward, fake=_fake_lift_forward)
