"""A plain Vision Transformer in pure PyTorch, for the official backbones: importing timm takes seconds.

Modules, state dict and results are those of timm's ``VisionTransformer`` without a classifier.

Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, in DINO's and timm's form: LayerNorm before
attention and MLP, a class token, learned position embeddings that include it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .position import Grid, timm_rule

_EPSILON = 1e-6


class PatchEmbed(nn.Module):
    """``[B, 3, H, W]`` images to ``[B, h, w, C]``: a convolution whose stride is its size."""

    def __init__(self, width: int, patch_size: int, grid: Grid) -> None:
        super().__init__()
        self.patch_size = (patch_size, patch_size)
        self.grid_size = grid
        self.proj = nn.Conv2d(3, width, patch_size, stride=patch_size)
        self.norm = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.proj(x).permute(0, 2, 3, 1))
        return out


class Attention(nn.Module):
    """Multi-head self-attention. Options of timm's class that plain networks leave out are identities here."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.head_dim = width // heads
        self.fused_attn = True
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm, self.k_norm, self.norm = nn.Identity(), nn.Identity(), nn.Identity()
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        batch, count, width = x.shape
        qkv = self.qkv(x).view(batch, count, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        mixed = F.scaled_dot_product_attention(self.q_norm(query), self.k_norm(key), value)
        mixed = self.norm(mixed.transpose(1, 2).reshape(batch, count, width))
        out: Tensor = self.proj_drop(self.proj(mixed))
        return out


class Mlp(nn.Module):
    """Two linear layers with GELU between them, four times as wide."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.act = nn.GELU()
        self.drop1, self.norm = nn.Identity(), nn.Identity()
        self.fc2 = nn.Linear(4 * width, width)
        self.drop2 = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))
        return out


class Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm and added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=_EPSILON)
        self.attn = Attention(width, heads)
        self.ls1, self.drop_path1 = nn.Identity(), nn.Identity()
        self.norm2 = nn.LayerNorm(width, eps=_EPSILON)
        self.mlp = Mlp(width)
        self.ls2, self.drop_path2 = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        out: Tensor = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return out


class VisionTransformer(nn.Module):
    """``[B, 3, H, W]`` images of whole patches to ``[B, C]``, the normalised class token.

    Args:
        width: C, a multiple of ``heads``.
        depth: blocks.
        heads: of the attention.
        patch_size: pixels of a patch along one side.
        grid: (h, w) of the position embeddings; other grids resample them.
    """

    num_prefix_tokens = 1
    no_embed_class = False

    def __init__(self, width: int, depth: int, heads: int, patch_size: int, grid: Grid) -> None:
        super().__init__()
        self.embed_dim = width
        self.patch_embed = PatchEmbed(width, patch_size, grid)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid[0] * grid[1], width))
        self.pos_drop, self.norm_pre = nn.Identity(), nn.Identity()
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=_EPSILON)

    def _pos_embed(self, x: Tensor) -> Tensor:
        position = timm_rule(self.pos_embed[:, 1:], self.patch_embed.grid_size, (x.shape[1], x.shape[2]))
        tokens = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x.flatten(1, 2)), dim=1)
        out: Tensor = self.pos_drop(tokens + torch.cat((self.pos_embed[:, :1], position), dim=1))
        return out

    def forward_features(self, imgs: Tensor) -> Tensor:
        """``[B, 1 + h * w, C]``: class token and patch tokens, normalised."""
        x = self.norm_pre(self._pos_embed(self.patch_embed(imgs)))
        out: Tensor = self.norm(self.blocks(x))
        return out

    def forward(self, imgs: Tensor) -> Tensor:
        return self.forward_features(imgs)[:, 0]
