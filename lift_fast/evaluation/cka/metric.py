"""Linear CKA between two sets of features, at once or in parts, and features read at a lattice of positions."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lift_fast.evaluation.methods import Features


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear centred kernel alignment of two sets of features of the same positions.

    ``|Y^T X|^2 / (|X^T X| |Y^T Y|)`` in Frobenius norms, columns centred (Kornblith et al., "Similarity of Neural
    Network Representations Revisited", ICML 2019): the plain, biased estimator. It does not change if either side is
    turned or scaled. Computed in float64 from C x C or N x N products, whichever is smaller.

    Returns:
        0 to 1; NaN if one side is constant.

    Raises:
        ValueError: unless both are finite and ``[N, C1]`` and ``[N, C2]``.
    """
    _check_pair(x, y)
    # CKA does not depend on scale, but fourth powers would overflow even float64.
    x, y = (each.double() / (float(each.abs().max()) or 1.0) for each in (x, y))
    x, y = x - x.mean(0), y - y.mean(0)
    if len(x) <= max(x.shape[1], y.shape[1]):
        gram_x, gram_y = x @ x.T, y @ y.T
        cross = float((gram_x * gram_y).sum())
        own = float(gram_x.norm()) * float(gram_y.norm())
    else:
        cross = float((y.T @ x).square().sum())
        own = float((x.T @ x).norm()) * float((y.T @ y).norm())
    return _ratio(cross, own)


class StreamingCKA:
    """:func:`linear_cka` over positions that come in parts, of many images, in memory of C x C."""

    def __init__(self) -> None:
        self.count = 0
        self._origin: tuple[Tensor, ...] = ()
        self._sums: list[Tensor] = []
        self._products: list[Tensor] = []

    def update(self, x: Tensor, y: Tensor) -> None:
        """Add positions, ``[N, C1]`` and ``[N, C2]``; raises as :func:`linear_cka`, and if channels change."""
        _check_pair(x, y)
        x, y = x.double(), y.double()
        if not self._sums:
            # Far from zero, sums of squares lose the digits that centring needs; any point near the data is an origin.
            self._origin = x.mean(0), y.mean(0)
            shapes = ((x.shape[1],) * 2, (y.shape[1],) * 2, (y.shape[1], x.shape[1]))
            self._products = [torch.zeros(shape, dtype=torch.float64, device=x.device) for shape in shapes]
            self._sums = [torch.zeros_like(origin) for origin in self._origin]
        if (x.shape[1], y.shape[1]) != (len(self._sums[0]), len(self._sums[1])):
            raise ValueError(
                f"expected {len(self._sums[0])} and {len(self._sums[1])} channels as before, got {x.shape[1]} and "
                f"{y.shape[1]}"
            )
        x, y = (each - origin.to(each.device) for each, origin in zip((x, y), self._origin, strict=True))
        self.count += len(x)
        for total, part in zip(self._sums, (x, y), strict=True):
            total += part.sum(0).to(total.device)
        for total, (a, b) in zip(self._products, ((x, x), (y, y), (y, x)), strict=True):
            total += (a.T @ b).to(total.device)

    def state(self) -> dict[str, Any]:
        """The values that :meth:`restore` needs: plain values and tensors on the CPU."""
        if not self.count:
            return {"count": 0}
        parts = {"origin": self._origin, "sums": self._sums, "products": self._products}
        return {"count": self.count, **{name: [t.cpu().clone() for t in part] for name, part in parts.items()}}

    def restore(self, state: dict[str, Any]) -> None:
        """Resume from the :meth:`state` of another."""
        self.count = state["count"]
        if self.count:
            self._origin = tuple(state["origin"])
            self._sums, self._products = list(state["sums"]), list(state["products"])

    def value(self) -> float:
        """Linear CKA of all positions so far; NaN without any."""
        if self.count == 0:
            return math.nan
        sum_x, sum_y = self._sums
        centred = [
            product - torch.outer(a, b) / self.count
            for product, (a, b) in zip(self._products, ((sum_x, sum_x), (sum_y, sum_y), (sum_y, sum_x)), strict=True)
        ]
        own_x, own_y, cross = (float(part.norm()) for part in centred)
        return _ratio(cross**2, own_x * own_y)


def _ratio(cross: float, own: float) -> float:
    return cross / own if own > 0 else math.nan


def _check_pair(x: Tensor, y: Tensor) -> None:
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or 0 in x.shape or 0 in y.shape:
        raise ValueError(
            f"expected [N, C1] and [N, C2] of the same N positions, got {list(x.shape)} and {list(y.shape)}"
        )
    if not (bool(torch.isfinite(x).all()) and bool(torch.isfinite(y).all())):
        raise ValueError("features hold NaN or infinity")


def sample(features: Features, positions: Tensor, size: tuple[int, int]) -> Tensor:
    """Features at positions of the image, bilinear between cells' centres, constant beyond the outermost centres.

    Args:
        features: a map ``[1, C, h, w]`` and the pixels that it covers.
        positions: ``[h', w', 2]`` (x, y) as shares of the image's width and height, 0 to 1.
        size: (height, width) of the image from which the map was made.

    Returns:
        ``[h' * w', C]`` float64.
    """
    maps, (top, left, height, width) = features
    x = (positions[..., 0] * size[1] - left) / width
    y = (positions[..., 1] * size[0] - top) / height
    at = torch.stack([2 * x - 1, 2 * y - 1], dim=-1).to(maps.device, torch.float64)
    found = F.grid_sample(maps.double(), at[None], mode="bilinear", padding_mode="border", align_corners=False)
    return found[0].flatten(1).T


def centres(rows: int, columns: int) -> Tensor:
    """[rows, columns, 2] centres (x, y) of a grid of cells over an image, as shares of its sides."""
    y, x = ((torch.arange(n, dtype=torch.float64, device="cpu") + 0.5) / n for n in (rows, columns))
    return torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1)
