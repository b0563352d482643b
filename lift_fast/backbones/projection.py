"""One facet (query, key or value) of one attention block, and nothing else of that block."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

FACETS = ("key", "query", "value", "token", "final")
HEAD_ORDERS = ("concatenated", "interleaved")
_ROW = {"query": 0, "key": 1, "value": 2}

# What stands between a block's input and its attention: LayerNorm first (pre-norm), or nothing (post-norm).
_PRE_NORM_BLOCKS = frozenset({"Block", "EvaBlock"})
_POST_NORM_BLOCKS = frozenset({"ResPostBlock", "EvaBlockPostNorm"})


class FacetProjection:
    """Reads q, k or v of a timm block from the block's input tokens.

    The value is the output of the linear projection with its bias, before q/k normalisation and before rotary
    position embedding (where a model has them).

    Args:
        block: a timm transformer block with ``attn.qkv`` or ``attn.{q,k,v}_proj``.
        facet: ``"query"``, ``"key"`` or ``"value"``.
        interleaved: channel ``d * heads + head`` instead of ``head * head_dim + d``.

    Raises:
        ValueError: for a block whose queries, keys and values cannot be read separately.
    """

    def __init__(self, block: nn.Module, facet: str, interleaved: bool) -> None:
        kind = type(block).__name__
        attention: Any = getattr(block, "attn", None)
        split = getattr(attention, f"{facet[0]}_proj", None)
        fused: Any = getattr(attention, "qkv", None)
        if kind not in _PRE_NORM_BLOCKS | _POST_NORM_BLOCKS or (split is None and fused is None):
            raise ValueError(
                f"facet {facet!r} cannot be read from a block of type {kind}: supported are timm's "
                f"{', '.join(sorted(_PRE_NORM_BLOCKS | _POST_NORM_BLOCKS))} with a qkv or q_proj/k_proj/v_proj layer; "
                "use facet='token'"
            )
        self.facet = facet
        self.interleaved = interleaved
        self.pre_norm = kind in _PRE_NORM_BLOCKS
        if split is not None:
            self.width = int(split.out_features)
            heads = getattr(attention, "num_heads", 1)
            self.heads = heads if facet == "query" else getattr(attention, "num_kv_heads", heads)
        else:
            self.width = int(fused.out_features) // 3
            self.heads = attention.num_heads

    def __call__(self, block: Any, tokens: Tensor) -> Tensor:
        """``[B, T, C]`` tokens entering ``block`` to ``[B, T, width]``."""
        x = block.norm1(tokens) if self.pre_norm else tokens
        attention = block.attn
        split = getattr(attention, f"{self.facet[0]}_proj", None)
        layer = attention.qkv if split is None else split
        start = 0 if split is not None else _ROW[self.facet] * self.width
        bias = self._bias(attention, layer, start)
        if type(layer) is not nn.Linear:
            # Wrapped projections (adapters, quantisation) have no plain weight to slice: run them whole.
            out: Tensor = layer(x)[..., start : start + self.width]
            if layer is attention.qkv and getattr(attention, "q_bias", None) is not None:
                out = out if bias is None else out + bias
            return out.unflatten(-1, (self.heads, -1)).transpose(-1, -2).flatten(-2) if self.interleaved else out
        weight = layer.weight[start : start + self.width]
        if self.interleaved:
            # Permuting C x C weights is cheaper than permuting the tokens, and keeps no copy that could go stale.
            weight = weight.unflatten(0, (self.heads, -1)).transpose(0, 1).flatten(0, 1)
            bias = bias if bias is None else bias.unflatten(0, (self.heads, -1)).t().flatten()
        return F.linear(x, weight, bias)

    def _bias(self, attention: Any, layer: Any, start: int) -> Tensor | None:
        separate: Tensor | None = getattr(attention, f"{self.facet[0]}_bias", None)
        if separate is not None:
            return separate
        bias = getattr(layer, "bias", None)
        return None if bias is None else bias[start : start + self.width]
