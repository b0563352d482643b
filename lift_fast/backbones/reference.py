"""Plain feature extraction: run the whole timm model and hook one block. Reference of tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def extract_hooked(model: nn.Module, imgs: Tensor, layer: int = -1, facet: str = "key") -> Tensor:
    """Run the whole ``model`` on ``imgs`` and return what a forward hook recorded in block ``layer``.

    Args:
        model: a timm VisionTransformer or Eva, in evaluation mode, that accepts the size of ``imgs``.
        imgs: ``[B, 3, H, W]`` normalised, floating point.
        layer: index of the block, negative from the end.
        facet: ``"key"``, ``"query"``, ``"value"`` (projection output with bias, before q/k norm and rotary
            embedding) or ``"token"`` (block output).

    Returns:
        ``[B, T, C]`` without class and register tokens, heads concatenated in order.
    """
    vit: Any = model
    block = vit.blocks[layer]
    seen: list[Tensor] = []
    attention = block.attn
    if facet == "token":
        handle = block.register_forward_hook(lambda module, args, out: seen.append(out))
    elif getattr(attention, "qkv", None) is None:
        projection = getattr(attention, f"{facet[0]}_proj")
        handle = projection.register_forward_hook(lambda module, args, out: seen.append(out))
    elif getattr(attention, "q_bias", None) is None:
        handle = attention.qkv.register_forward_hook(lambda module, args, out: seen.append(_rows(out, facet)))
    else:
        # timm's EVA attention adds its three biases separately and may bypass the module call of qkv.
        def project(module: Any, args: tuple[Tensor, ...]) -> None:
            bias = torch.cat((module.q_bias, module.k_bias, module.v_bias))
            seen.append(_rows(module.qkv(args[0]) + bias, facet))

        handle = attention.register_forward_pre_hook(project)
    try:
        vit(imgs)
    finally:
        handle.remove()
    return seen[0][:, vit.num_prefix_tokens :]


def _rows(qkv: Tensor, facet: str) -> Tensor:
    return qkv.chunk(3, dim=-1)[("query", "key", "value").index(facet)]
