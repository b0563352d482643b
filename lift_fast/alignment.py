"""Refinement of a homography: the descriptor maps themselves are aligned, as Lucas and Kanade (1981) align images."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from . import memory

Array = npt.NDArray[np.float64]

# Steps, and the distance in cells over which slopes of the map are taken.
_STEPS, _REACH = 12, 0.375
# Fewest cells that are aligned, and the distance from B's border within which they are left out.
_LEAST, _BORDER = 32, 0.5
# Steps end when they change no entry by more (in half sides), and a mean cosine may fall by this much.
_SMALL, _LOSS = 1e-3, 0.02


def mean_cosine(map_a: Tensor, map_b: Tensor, homography: Array) -> float:
    """Mean cosine of the descriptors that a homography lays upon each other; -1 if they hardly overlap.

    Args:
        map_a, map_b: ``[1, C, h, w]``.
        homography: ``[3, 3]``, from (x, y, 1) in cells of A to cells of B; the first cell's centre is (0.5, 0.5).
    """
    query, at = _queries(map_a)
    to, inside = _projected(at, homography, map_b)
    cosines = (query * _sampled(map_b, to[None])[0]).sum(0)
    inside &= cosines.isfinite()
    return float(cosines[inside].mean()) if int(inside.sum()) >= _LEAST else -1.0


def align(map_a: Tensor, map_b: Tensor, homography: Array, use: Tensor) -> Array:
    """Refine a homography (as :func:`mean_cosine`) that is right to within a cell or two.

    Gauss-Newton steps on the squared differences of the unit descriptors of A's cells and of those that the homography
    leads to, each weighted by ``exp(-difference / median)``.

    Args:
        use: ``[h, w]`` bool: cells of A to align; others may belong to another surface.

    Returns:
        The refined homography, or the given one if there is too little to align or the steps do not converge.
    """
    query, at = _queries(map_a)
    use = use.flatten().to(at.device)
    # Centred and scaled positions, for the condition of the normal equations.
    frames = [_frame(m.shape[-1], m.shape[-2]) for m in (map_a, map_b)]
    scale_b = 2 / max(map_b.shape[-2:])
    current = frames[1] @ homography @ np.linalg.inv(frames[0])
    reach = torch.tensor([[0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]], dtype=at.dtype, device=at.device) * _REACH
    here = torch.cat([at, memory.full((len(at), 1), 1.0, dtype=at.dtype, device=at.device)], 1)
    here = here @ torch.from_numpy(frames[0]).to(at).T
    for _ in range(_STEPS):
        if not np.isfinite(current).all() or abs(current[2, 2]) < 1e-6:
            return homography
        current = current / current[2, 2]
        to, inside = _projected(at, np.linalg.inv(frames[1]) @ current @ frames[0], map_b)
        centre, right, left, below, above = _sampled(map_b, to + reach[:, None])
        slopes = (right - left) / (2 * _REACH * scale_b), (below - above) / (2 * _REACH * scale_b)
        missing = query - centre
        squared = missing.square().sum(0)
        inside &= use & squared.isfinite() & (slopes[0] + slopes[1]).isfinite().all(0)
        if int(inside.sum()) < _LEAST:
            return homography
        weight = torch.exp(-squared[inside] / squared[inside].median().clamp_min(1e-12))
        xs, ys, missing = slopes[0][:, inside], slopes[1][:, inside], missing[:, inside]
        place = here[inside].to(torch.float64)
        w = place @ torch.from_numpy(current[2]).to(place)
        u, v = (place @ torch.from_numpy(current[row]).to(place) / w for row in (0, 1))
        place = place / w[:, None]
        none = torch.zeros_like(place)
        by_x = torch.cat([place, none, -u[:, None] * place[:, :2]], 1)
        by_y = torch.cat([none, place, -v[:, None] * place[:, :2]], 1)

        def summed(one: Tensor, two: Tensor, weight: Tensor = weight) -> Tensor:
            return ((one * two).sum(0) * weight).to(torch.float64)[:, None]

        xx, xy, yy = summed(xs, xs), summed(xs, ys), summed(ys, ys)
        normal = by_x.T @ (xx * by_x + xy * by_y) + by_y.T @ (xy * by_x + yy * by_y)
        target = by_x.T @ summed(xs, missing) + by_y.T @ summed(ys, missing)
        size = normal.diagonal().clamp_min(1e-12).rsqrt()
        damped = (size[:, None] * normal * size).cpu().numpy() + 1e-5 * np.eye(8)
        step = size.cpu().numpy() * np.linalg.solve(damped, (size * target[:, 0]).cpu().numpy())
        current = current + np.append(step, 0).reshape(3, 3)
        if np.abs(step).max() < _SMALL:
            break
    refined: Array = np.linalg.inv(frames[1]) @ current @ frames[0]
    if not np.isfinite(refined).all():
        return homography
    # The overlap changes with the homography, so slightly less is no failure.
    failed = mean_cosine(map_a, map_b, refined) < mean_cosine(map_a, map_b, homography) - _LOSS
    return homography if failed else refined


def _queries(map_a: Tensor) -> tuple[Tensor, Tensor]:
    """Unit descriptors ``[C, h * w]`` of A's cells and their centres ``[h * w, 2]``, float32."""
    height, width = map_a.shape[-2:]
    rows, columns = (torch.arange(n, dtype=torch.float32, device=map_a.device) + 0.5 for n in (height, width))
    at = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1).view(-1, 2)
    return F.normalize(map_a[0].to(torch.float32).flatten(1), dim=0), at


def _projected(at: Tensor, homography: Array, map_b: Tensor) -> tuple[Tensor, Tensor]:
    """Positions ``[N, 2]`` in B, and which of them lie in it."""
    matrix = torch.from_numpy(homography / np.abs(homography).max()).to(at.device, torch.float64)
    to = at.to(torch.float64) @ matrix[:, :2].T + matrix[:, 2]
    front = to[:, 2] > 0 if float(to[:, 2].median()) > 0 else to[:, 2] < 0
    to = torch.where(front[:, None], to[:, :2] / to[:, 2:], -1.0)
    most = to.new_tensor([map_b.shape[-1] - _BORDER, map_b.shape[-2] - _BORDER])
    inside = ((to >= _BORDER) & (to <= most)).all(1)
    return torch.where(inside[:, None], to, _BORDER).to(torch.float32), inside


def _sampled(map_b: Tensor, to: Tensor) -> Tensor:
    """Unit descriptors ``[K, C, N]`` at positions ``[K, N, 2]``, interpolated bilinearly."""
    size = to.new_tensor([map_b.shape[-1], map_b.shape[-2]])
    found = F.grid_sample(
        map_b.to(torch.float32), (to / size * 2 - 1)[None], align_corners=False, padding_mode="border"
    )
    return F.normalize(found[0].transpose(0, 1), dim=1)


def _frame(width: int, height: int) -> Array:
    """``[3, 3]``: cells to positions of about -1 to 1."""
    scale = 2 / max(width, height)
    return np.array([[scale, 0, -scale * width / 2], [0, scale, -scale * height / 2], [0, 0, 1.0]])
