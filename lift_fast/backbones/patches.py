"""The patch embedding of a timm model at any size and stride."""

from __future__ import annotations

import copy
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..untouched import is_timms, is_untouched
from .position import Grid


def weight_of(embed: Any) -> Tensor:
    """A parameter whose device and dtype are those of the patch projection."""
    weight: Tensor | None = getattr(embed, "proj", embed)._parameters.get("weight")
    # Parametrised, pruned or replaced: the weight is computed, or somewhere else.
    return weight if weight is not None else next(embed.parameters())


def embed(module: Any, imgs: Tensor, stride: int, grid: Grid) -> Tensor:
    """``[B, 3, H, W]`` images to ``[B, h * w, C]`` patch tokens on ``grid``.

    A patch embedding or a projection in it that is hooked, overridden or replaced is called as it is.

    Raises:
        ValueError: if such a one gives another grid, because it takes no notice of ``stride``.
    """
    projection = getattr(module, "proj", None)
    if (
        type(projection) is nn.Conv2d
        and projection.padding == (0, 0)
        and projection.dilation == (1, 1)
        and is_timms(module)
        and isinstance(module.norm, (nn.Identity, nn.LayerNorm))
        and is_untouched(module, projection, module.norm)
    ):
        x = F.conv2d(imgs, projection.weight, projection.bias, stride=stride)
        normed: Tensor = module.norm(x.flatten(2).transpose(1, 2))
        return normed

    size = module.patch_size[0] if hasattr(module, "patch_size") else stride
    # Neither refused nor padded there: pixels beyond the last whole patch are not read.
    imgs = imgs[..., : (grid[0] - 1) * stride + size, : (grid[1] - 1) * stride + size]
    out: Tensor = _for(module, tuple(imgs.shape[2:]), stride)(imgs)
    if out.dim() == 4:
        # Channels last, as timm's models that take any size have it.
        out = out.flatten(1, 2)
    if out.dim() != 3 or out.shape[1] != grid[0] * grid[1]:
        raise ValueError(
            f"the edited patch embedding gives {list(out.shape)} where stride {stride} needs "
            f"{grid[0]} x {grid[1]} patches; such a model runs at the stride that it was built for"
        )
    return out


def _for(module: Any, size: tuple[int, ...], stride: int) -> Any:
    """``module`` itself where it takes images of ``size`` at ``stride``, else a twin of it that does, with the same
    weights and hooks."""
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
