"""The patch embedding of a timm model at any size and stride."""

from __future__ import annotations

import copy
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..untouched import is_original, is_untouched
from .position import Grid


def weight_of(embed: Any) -> Tensor:
    """A parameter with the device and dtype of the patch projection."""
    weight: Tensor | None = getattr(embed, "proj", embed)._parameters.get("weight")
    # A parametrised, pruned or replaced projection has no such parameter.
    return weight if weight is not None else next(embed.parameters())


def embed(module: Any, imgs: Tensor, stride: int, grid: Grid) -> Tensor:
    """``[B, 3, H, W]`` images to ``[B, h * w, C]`` patch tokens on ``grid``.

    If the patch embedding or its projection is hooked, overridden or replaced, the module itself is called.

    Raises:
        ValueError: if that ignores ``stride`` and returns another grid.
    """
    projection = getattr(module, "proj", None)
    if (
        type(projection) is nn.Conv2d
        and projection.padding == (0, 0)
        and projection.dilation == (1, 1)
        and is_original(module)
        and isinstance(module.norm, (nn.Identity, nn.LayerNorm))
        and is_untouched(module, projection, module.norm)
    ):
        x = F.conv2d(imgs, projection.weight, projection.bias, stride=stride)
        normed: Tensor = module.norm(x.flatten(2).transpose(1, 2))
        return normed

    size = module.patch_size[0] if hasattr(module, "patch_size") else stride
    # Crop to whole patches, or the module would refuse or pad the rest.
    imgs = imgs[..., : (grid[0] - 1) * stride + size, : (grid[1] - 1) * stride + size]
    out: Tensor = _for(module, tuple(imgs.shape[2:]), stride)(imgs)
    if out.dim() == 4:
        # Channels last, as in timm's models for any size.
        out = out.flatten(1, 2)
    if out.dim() != 3 or out.shape[1] != grid[0] * grid[1]:
        raise ValueError(
            f"the edited patch embedding gives {list(out.shape)} where stride {stride} needs "
            f"{grid[0]} x {grid[1]} patches; use the stride that the model was built for"
        )
    return out


def _for(module: Any, size: tuple[int, ...], stride: int) -> Any:
    """``module`` if it accepts images of ``size`` at ``stride``, else a shallow copy that does."""
    projection = getattr(module, "proj", None)
    strides = isinstance(projection, nn.Conv2d) and projection.stride != (stride, stride)
    sized = getattr(module, "img_size", None) not in (None, size)
    padded = getattr(module, "dynamic_img_pad", False)
    if not (strides or sized or padded):
        return module
    twin = copy.copy(module)
    if sized:
        twin.img_size = None
    if padded:
        twin.dynamic_img_pad = False
    if strides:
        other: Any = copy.copy(projection)
        other.stride = (stride, stride)
        twin.__dict__["_modules"] = {**module._modules, "proj": other}
    return twin
