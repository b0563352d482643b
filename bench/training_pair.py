"""Our training step and the published loop on equal networks, for the benchmarks on the CPU and on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lift_fast import LiFT, load_backbone
from lift_fast.training.objective import FrozenFeatures, Objective
from lift_fast.training.reference import PlainObjective, PlainStep
from lift_fast.training.step import TrainingStep


def build_ours(model: str, device: torch.device, dtype: torch.dtype, compiled: bool = False) -> TrainingStep:
    """The step that ``lift-fast train`` runs, random weights."""
    # timm's position rule, because the hooked network is timm's own.
    backbone = load_backbone(model, random_weights=True, head_order="interleaved", position_rule="timm")
    lift = _lift(backbone.embed_dim, backbone.patch_size, device, tokens=True).to(memory_format=torch.channels_last)
    adam = torch.optim.Adam(lift.parameters(), lr=1e-3, fused=device.type == "cuda")
    objective = Objective(lift, "cosine")
    return TrainingStep(
        FrozenFeatures(backbone.to(device, dtype), compiled),
        torch.compile(objective, dynamic=False) if compiled else objective,  # type: ignore[arg-type]
        adam,
    )


def build_plain(model: str, device: torch.device, dtype: torch.dtype = torch.float32) -> PlainStep:
    """The published loop on the same weights; in other dtypes than float32 under autocast."""
    backbone = load_backbone(model, random_weights=True).to(device)
    lift = _lift(backbone.embed_dim, backbone.patch_size, device, tokens=False)
    return PlainStep(PlainObjective(backbone.model, lift), backbone.mean, backbone.std, dtype=dtype)


def losses_and_gradients(step: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """One step; the losses and all gradients, flattened."""
    seen: list[Tensor] = []

    def keep(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        seen.append(torch.cat([p.grad.flatten() for p in optimizer.param_groups[0]["params"]]))

    handle = step.optimizer.register_step_pre_hook(keep)
    losses = step(pixels)
    handle.remove()
    return losses, seen[0]


def _lift(channels: int, patch: int, device: torch.device, tokens: bool) -> LiFT:
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        return LiFT(channels, patch, pre_shape=tokens, post_shape=tokens).to(device).train()
