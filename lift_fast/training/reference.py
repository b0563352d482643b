"""LiFT's objective as in the published training: reference of the tests, baseline of the benchmarks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lift_fast.backbones import extract_hooked
from lift_fast.lift import LiFT


class PlainObjective(nn.Module):
    """Three passes of the whole backbone with a hook, LiFT's plain graph, the loss on permuted copies.

    Args:
        model: timm VisionTransformer in evaluation mode that accepts any size.
        lift: with ``pre_shape=False, post_shape=False``.
        loss: ``"cosine"``, ``"l1"`` or ``"l2"``.
        layer: index of the block.
        facet: ``"key"``, ``"query"`` or ``"value"``.
    """

    def __init__(self, model: nn.Module, lift: LiFT, loss: str = "cosine", layer: int = -1, facet: str = "key") -> None:
        super().__init__()
        self.model, self.lift, self.layer, self.facet = model, lift, layer, facet
        self.loss = {"cosine": nn.CosineEmbeddingLoss, "l1": nn.L1Loss, "l2": nn.MSELoss}[loss]()

    def forward(self, imgs: Tensor) -> Tensor:
        """``[B, 3, S, S]`` normalised images to the two terms ``[2]``."""
        half, quarter = imgs[:, :, ::2, ::2], imgs[:, :, ::4, ::4]
        with torch.no_grad():
            features, half_features, quarter_features = (self._features(x) for x in (imgs, half, quarter))
        first = self._distance(self.lift(half, half_features), features)
        second = self._distance(self.lift(quarter, quarter_features), half_features)
        return torch.stack([first, second])

    def _features(self, imgs: Tensor) -> Tensor:
        tokens = extract_hooked(self.model, imgs, self.layer, self.facet)
        heads = self.model.blocks[self.layer].attn.num_heads  # type: ignore[index,union-attr]
        # The published extractor makes the head the innermost dimension.
        tokens = tokens.unflatten(2, (heads, -1)).permute(0, 1, 3, 2).flatten(2)
        patch = self.lift.patch_size
        return tokens.transpose(1, 2).reshape(len(imgs), -1, imgs.shape[2] // patch, imgs.shape[3] // patch)

    def _distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        if isinstance(self.loss, nn.CosineEmbeddingLoss):
            prediction, target = (x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]) for x in (prediction, target))
            return self.loss(prediction, target, prediction.new_ones(len(prediction)))
        return self.loss(prediction, target)


class PlainStep:
    """One step of the plain loop.

    Args:
        objective: a :class:`PlainObjective`.
        mean, std: normalisation of the backbone.
        learning_rate: of Adam.
        dtype: unless float32, everything runs under ``torch.autocast`` of it.
    """

    def __init__(
        self,
        objective: PlainObjective,
        mean: Sequence[float],
        std: Sequence[float],
        learning_rate: float = 1e-3,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.objective, self.dtype = objective, dtype
        self.optimizer = torch.optim.Adam(objective.lift.parameters(), lr=learning_rate)
        self.mean, self.std = (
            torch.tensor(values, dtype=torch.float32, device="cpu").view(1, 3, 1, 1) for values in (mean, std)
        )

    def __call__(self, pixels: Tensor) -> Tensor:
        """``[B, 3, S, S]`` uint8 images to the two terms of the loss before the step, ``[2]``."""
        imgs = (pixels.float() / 255 - self.mean.to(pixels.device)) / self.std.to(pixels.device)
        with torch.autocast(pixels.device.type, self.dtype, enabled=self.dtype != torch.float32):
            losses: Tensor = self.objective(imgs)
        losses.sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return losses.detach()
