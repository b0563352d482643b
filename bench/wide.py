"""ViT-S/16 and its LiFT with the demonstration pair's features.

Published weights do not ship with this package, and the time of exact matching depends on what the features are like:
those of random weights hardly differ, which takes several times as long. So the demonstration's networks are written
into networks of the published sizes, which then do all of their own work.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lift_fast import ViTLiFTExtractor, load_backbone, load_lift
from lift_fast.demonstration import BACKBONE, LIFT


@torch.no_grad()
def vit_s(dtype: torch.dtype, device: torch.device | str = "cpu", **options: Any) -> ViTLiFTExtractor:
    """ViT-S/16, keys of the last block, heads concatenated, with LiFT: the same cosines as the demonstration pair."""
    options = {"head_order": "concatenated", "random_weights": True, "random_lift": True, "silent": True, **options}
    wide = ViTLiFTExtractor("dino_vits16", device="cpu", **options)
    narrow = load_backbone(BACKBONE)
    _write_backbone(wide.backbone.model, narrow.model)
    _write_lift(wide.lift, load_lift(LIFT, patch_size=16), heads=narrow.model.blocks[0].attn.num_heads)
    return wide.to(device, dtype)


def _write_backbone(wide: Any, narrow: Any) -> None:
    """Both halves of the channels hold the narrow network, so that means and variances are its own."""
    wide.patch_embed.proj.weight.copy_(narrow.patch_embed.proj.weight.repeat(2, 1, 1, 1))
    wide.patch_embed.proj.bias.copy_(narrow.patch_embed.proj.bias.repeat(2))
    wide.cls_token.copy_(narrow.cls_token.repeat(1, 1, 2))
    wide.pos_embed.copy_(narrow.pos_embed.repeat(1, 1, 2))
    blocks = list(wide.blocks)
    for block in blocks[: len(blocks) - len(narrow.blocks)]:
        # These add nothing.
        for layer in (block.attn.proj, block.mlp.fc2):
            layer.weight.zero_()
            layer.bias.zero_()
    for block, other in zip(blocks[-len(narrow.blocks) :], narrow.blocks, strict=True):
        for name in ("norm1", "norm2"):
            for part in ("weight", "bias"):
                getattr(getattr(block, name), part).copy_(getattr(getattr(other, name), part).repeat(2))
        _write_twice(block.attn.qkv, other.attn.qkv, parts=3)
        for layer, source in ((block.attn.proj, other.attn.proj), (block.mlp.fc1, other.mlp.fc1)):
            _write_twice(layer, source)
        _write_twice(block.mlp.fc2, other.mlp.fc2)


def _write_twice(wide: Any, narrow: Any, parts: int = 1) -> None:
    """Each of the ``parts`` of a layer's outputs by two blocks on the diagonal."""
    weights = [torch.block_diag(part, part) for part in narrow.weight.chunk(parts)]
    wide.weight.copy_(torch.cat(weights))
    wide.bias.copy_(torch.cat([part.repeat(2) for part in narrow.bias.chunk(parts)]))


def _write_lift(wide: nn.Module, narrow: nn.Module, heads: int) -> None:
    """The first channels of each layer; weights of the others are zero."""
    state = narrow.state_dict()
    channels, image = narrow.in_channels, state["image_convs_2.0.weight"].shape[0]
    # The demonstration's LiFT takes the heads interleaved.
    order = torch.arange(channels).view(-1, heads).T.flatten()
    state["up1.up.weight"] = torch.cat([state["up1.up.weight"][:channels][order], state["up1.up.weight"][channels:]])
    found = wide.state_dict()
    for name, value in found.items():
        source = state[name]
        if name in ("up1.up.weight", "up1.conv_1.double_conv.0.weight"):
            # Behind the features stand the image's channels.
            axis = 0 if "up.weight" in name else 1
            features = source.shape[axis] - image
            value.zero_()
            for part, start in ((source.narrow(axis, 0, features), 0), (source.narrow(axis, features, image), -image)):
                start %= value.shape[axis]
                _first(value.narrow(axis, start, part.shape[axis]), part)
        elif "running_var" in name:
            _first(value.fill_(1), source)
        elif value.dim() == 0:
            value.copy_(source)
        else:
            _first(value.zero_(), source)
    wide.load_state_dict(found)


def _first(into: Tensor, source: Tensor) -> None:
    into[tuple(slice(n) for n in source.shape)].copy_(source)
