"""Compute one facet (query, key or value) of one attention block, without the rest of the block."""

from __future__ import annotations

from collections.abc import Callable
from threading import get_ident
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..untouched import is_original, is_untouched

FACETS = ("key", "query", "value", "token", "final")
HEAD_ORDERS = ("concatenated", "interleaved")
_ROW = {"query": 0, "key": 1, "value": 2}

# LayerNorm precedes attention (pre-norm), or follows it (post-norm).
_PRE_NORM_BLOCKS = frozenset({"Block", "EvaBlock"})
_POST_NORM_BLOCKS = frozenset({"ResPostBlock", "EvaBlockPostNorm"})


class FacetProjection:
    """Computes q, k or v of a timm block from the block's input tokens.

    The value is the output of the linear projection with its bias, before any q/k normalisation and rotary position
    embedding.

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
        self.row = _ROW[facet]
        self.interleaved = interleaved
        self.pre_norm = kind in _PRE_NORM_BLOCKS
        if split is not None:
            self.width = _width(split, attention)
            heads = getattr(attention, "num_heads", 1)
            self.heads = heads if facet == "query" else getattr(attention, "num_kv_heads", heads)
        else:
            self.width = _width(fused, attention, 3)
            self.heads = attention.num_heads

    def __call__(self, block: Any, tokens: Tensor, prefix: int, run: Callable[[], Any]) -> Tensor:
        """``[B, prefix + T, C]`` tokens entering ``block`` to ``[B, T, width]``.

        If the block or its attention is hooked, overridden or replaced, ``run()`` runs the whole block and hooks read
        the output of its projection.

        Raises:
            ValueError: if such a block does not call its projection or its attention exactly once.
        """
        attention = getattr(block, "attn", None)
        if (
            type(block).__name__ in _PRE_NORM_BLOCKS | _POST_NORM_BLOCKS
            and isinstance(attention, nn.Module)
            and is_original(block)
            and is_original(attention)
            and is_untouched(block, attention)
        ):
            return self._project(block.norm1 if self.pre_norm else None, attention, tokens, prefix)
        return self._order(self._seen(block, attention, run)[:, prefix:])

    def _project(self, norm: nn.Module | None, attention: Any, tokens: Tensor, prefix: int) -> Tensor:
        split = getattr(attention, f"{self.facet[0]}_proj", None)
        layer = attention.qkv if split is None else split
        start = 0 if split is not None else self.row * self.width
        plain = type(layer) is nn.Linear and is_untouched(layer)
        if not plain or not (norm is None or (isinstance(norm, nn.LayerNorm) and is_untouched(norm))):
            # Adapters, quantisation or hooks may use all tokens and more than the weight.
            x = tokens if norm is None else norm(tokens)
            return self._order(self._rows(attention, layer, layer(x), start)[:, prefix:])
        tokens = tokens[:, prefix:]
        x = tokens if norm is None else norm(tokens)
        bias = self._bias(attention, layer, start)
        weight = layer.weight[start : start + self.width]
        if self.interleaved:
            # Permuting C x C weights is cheaper than permuting the tokens and needs no cached copy.
            weight = weight.unflatten(0, (self.heads, -1)).transpose(0, 1).flatten(0, 1)
            bias = bias if bias is None else bias.unflatten(0, (self.heads, -1)).t().flatten()
        return F.linear(x, weight, bias)

    def _rows(self, attention: Any, layer: Any, projected: Tensor, start: int) -> Tensor:
        """This facet of the full output of ``layer``, with the bias that EVA's attention adds separately."""
        out = projected[..., start : start + self.width]
        if layer is attention.qkv and getattr(attention, "q_bias", None) is not None:
            bias = self._bias(attention, layer, start)
            return out if bias is None else out + bias
        return out

    def _seen(self, block: Any, attention: Any, run: Callable[[], Any]) -> Tensor:
        split = getattr(attention, f"{self.facet[0]}_proj", None)
        layer: Any = getattr(attention, "qkv", None) if split is None else split
        if not isinstance(attention, nn.Module) or not isinstance(layer, nn.Module):
            raise ValueError(
                f"facet {self.facet!r} cannot be read from the {type(block).__name__} now in the model: "
                "it has no attn with a qkv or q_proj/k_proj/v_proj layer; use facet='token'"
            )
        thread, entered, left = get_ident(), [], []

        def keep_input(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if get_ident() == thread:
                entered.append(args[0] if args else kwargs["x"])

        def keep_output(module: Any, args: Any, out: Tensor) -> None:
            if get_ident() == thread:
                # A copy, because EVA's attention adds the bias in place.
                left.append(out.clone())

        handles = (
            attention.register_forward_pre_hook(keep_input, with_kwargs=True),
            layer.register_forward_hook(keep_output),
        )
        try:
            run()
        finally:
            for handle in handles:
                handle.remove()
        if not left and len(entered) == 1:
            # EVA's attention may use the weight of its projection without calling it.
            left.append(layer(entered[0]))
        if len(left) != 1:
            raise ValueError(
                f"facet {self.facet!r} cannot be read: the edited block calls its projection {len(left)} times and its "
                f"attention {len(entered)} times instead of once; use facet='token'"
            )
        return self._rows(attention, layer, left[0], 0 if split is not None else self.row * self.width)

    def _order(self, out: Tensor) -> Tensor:
        return out.unflatten(-1, (self.heads, -1)).transpose(-1, -2).flatten(-2) if self.interleaved else out

    def _bias(self, attention: Any, layer: Any, start: int) -> Tensor | None:
        separate: Tensor | None = getattr(attention, f"{self.facet[0]}_bias", None)
        if separate is not None:
            return separate
        bias = getattr(layer, "bias", None)
        return None if bias is None else bias[start : start + self.width]


def _width(layer: Any, attention: Any, parts: int = 1) -> int:
    # An adapter around the layer may lack out_features.
    wide = getattr(layer, "out_features", None)
    return int(attention.num_heads * attention.head_dim if wide is None else wide // parts)
