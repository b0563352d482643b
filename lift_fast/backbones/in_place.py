"""timm's standard ViT block on the CPU with reused buffers: the same operations and bitwise the same results.

A block allocates its large intermediate results again each time, and the operating system is slow to provide fresh
pages: at 785 tokens this costs about a fifth of the arithmetic. Here one buffer serves all blocks of a forward pass. On
a GPU PyTorch's caching allocator does that already.
"""

from __future__ import annotations

from operator import itemgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import memory
from ..untouched import Unchanged, is_original, is_untouched
from . import network


class StandardBlocks:
    """Decides whether :func:`run` may replace calls of blocks, and caches the answer; copies and pickles do not."""

    def __init__(self) -> None:
        self._known: Unchanged | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return StandardBlocks, ()

    def __call__(self, blocks: list[nn.Module], tokens: Tensor) -> bool:
        """Whether this is plain inference on the CPU without autocast, and all ``blocks`` and their parts are timm's
        originals: if one is hooked, overridden or replaced, it must be called itself."""
        return (
            is_plain_inference(tokens)
            and not (torch.is_grad_enabled() and any(p.requires_grad for block in blocks for p in block.parameters()))
            and self._standard(blocks)
        )

    def _standard(self, blocks: list[nn.Module]) -> bool:
        known = self._known
        if known is not None and known.still(blocks):
            return True
        self._known = None
        if not all(map(is_standard, blocks)):
            return False
        every: list[Any] = blocks
        settings = [
            (itemgetter("fused_attn", "num_heads"), [block.attn.__dict__ for block in every]),
            (itemgetter("approximate"), [block.mlp.act.__dict__ for block in every]),
            (itemgetter("training"), [part.__dict__ for block in every for part in idle_parts(block)]),
        ]
        self._known = Unchanged(blocks, settings)
        return True


def run(blocks: list[nn.Module], tokens: Tensor) -> Tensor:
    """``[B, N, C]`` tokens through ``blocks``, as new memory."""
    batch, count, width = tokens.shape
    # What made the tokens may have kept them.
    tokens = memory.new_empty(tokens, tokens.shape).copy_(tokens)
    x = tokens.view(batch * count, width)
    wide, narrow = memory.new_empty(tokens, 0), memory.empty_like(x)
    for item in blocks:
        block: Any = item
        attention, mlp = block.attn, block.mlp
        columns = max(attention.qkv.out_features, mlp.fc1.out_features)
        if wide.numel() < x.shape[0] * columns:
            wide = memory.new_empty(tokens, x.shape[0] * columns)

        qkv = _linear(attention.qkv, block.norm1(x), wide)
        heads = qkv.view(batch, count, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = heads.unbind(0)
        mixed = F.scaled_dot_product_attention(attention.q_norm(query), attention.k_norm(key), value)
        mixed = attention.norm(mixed.transpose(1, 2).reshape(x.shape[0], -1))
        x.add_(_scaled(block.ls1, _linear(attention.proj, mixed, narrow)))

        hidden = _linear(mlp.fc1, block.norm2(x), wide)
        torch.ops.aten.gelu_(hidden, approximate=mlp.act.approximate)
        x.add_(_scaled(block.ls2, _linear(mlp.fc2, mlp.norm(hidden), narrow)))
    return tokens


def _linear(layer: Any, x: Tensor, buffer: Tensor) -> Tensor:
    out = buffer.view(-1)[: x.shape[0] * layer.out_features].view(x.shape[0], layer.out_features)
    if layer.bias is None:
        return torch.mm(x, layer.weight.t(), out=out)
    return torch.addmm(layer.bias, x, layer.weight.t(), out=out)


def _scaled(scale: Any, x: Tensor) -> Tensor:
    return x if isinstance(scale, nn.Identity) else x.mul_(scale.gamma)


def is_plain_inference(tensor: Tensor) -> bool:
    """Whether operations on ``tensor`` only compute values on the CPU: no gradient, autocast, transform,
    compiler or tracer."""
    return (
        tensor.device.type == "cpu"
        and not tensor.requires_grad
        and not torch.compiler.is_compiling()
        # A trace would lose what is written into buffers.
        and not torch.jit.is_tracing()
        and not torch.is_autocast_enabled("cpu")
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch.autograd.forward_ad._current_level < 0
    )


def idle_parts(block: Any) -> list[Any]:
    """What has no effect in evaluation mode."""
    return [block.drop_path1, block.drop_path2, block.attn.proj_drop, block.mlp.drop1, block.mlp.drop2]


def is_standard(block: Any) -> bool:
    """Whether a block and its parts are timm's originals or this package's twins, neither edited nor hooked."""
    classes, norm_classes, scale_classes, idle_classes = _classes(block)
    attention: Any = getattr(block, "attn", None)
    mlp: Any = getattr(block, "mlp", None)
    if (type(block), type(attention), type(mlp)) != classes:
        return False
    norms = (block.norm1, block.norm2, attention.q_norm, attention.k_norm, attention.norm, mlp.norm)
    return (
        attention.fused_attn
        and getattr(attention, "gate", None) is None
        and all(type(layer) is nn.Linear for layer in (attention.qkv, attention.proj, mlp.fc1, mlp.fc2))
        and type(mlp.act) is nn.GELU
        and all(type(scale) in (*scale_classes, nn.Identity) for scale in (block.ls1, block.ls2))
        and all(type(norm) in (*norm_classes, nn.LayerNorm, nn.Identity) for norm in norms)
        and all(type(part) in (*idle_classes, nn.Dropout, nn.Identity) for part in idle_parts(block))
        and not any(part.training for part in idle_parts(block))
        and all(is_original(part) for part in (block, attention, mlp))
        and is_untouched(*block.modules())
    )


def _classes(block: Any) -> tuple[tuple[type, ...], tuple[type, ...], tuple[type, ...], tuple[type, ...]]:
    """Classes of a block, its attention and its MLP; further ones of norms, of scales, and of parts without effect."""
    if type(block) is network.Block:
        return (network.Block, network.Attention, network.Mlp), (), (), ()
    from timm.layers import DropPath, LayerNorm, LayerScale, Mlp
    from timm.models.vision_transformer import Attention, Block

    return (Block, Attention, Mlp), (LayerNorm,), (LayerScale,), (DropPath,)
