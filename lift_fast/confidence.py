"""Confidence of matches: how well each one agrees with the matches around it.

Right matches of neighbouring pixels lie beside each other; wrong ones point anywhere. So around each cell an affine map
is fitted to the matches of the cells in a window, by iteratively reweighted least squares: each match has a weight that
falls with its residual, on a scale that shrinks from many cells to half a cell. A match is trusted if it lies where the
map of its cell puts it, and if many others of the window do.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Chosen on photographs under known homographies, see docs/matching.md. Radius of the window, first and last scale of
# the residuals, all in cells, and the number of fits.
_RADIUS, _FIRST, _LAST, _FITS = 6, 8.0, 0.4, 8
# Added to the variances (in cells squared) of the positions in a window: the slopes of a few matches are not believed.
_RIDGE = 1.0
# Confidence is the product of two curves that were fitted to the share of matches within three eighths of a cell: half
# at a squared residual of _NEAR, and half at a support of _SUPPORT.
_NEAR, _SUPPORT = 0.17, 0.05


class LocalMaps:
    """Affine maps from A to B, one for each cell of A, fitted to the matches of the cells around it.

    Args:
        at, to: ``[h, w, 2]`` (x, y): a pixel of A for each cell, close to its centre, and its match in B. All positions
            in cells.
        weight: ``[h, w]``, from 0 to 1: trust before the fit; 0 without a match.
    """

    def __init__(self, at: Tensor, to: Tensor, weight: Tensor) -> None:
        at, to, start = (value.to(torch.float64) for value in (at, to, weight))
        moved = torch.where((start > 0)[..., None], to - at, 0)
        rows, columns = (_window_sums(n, at) for n in start.shape)
        x, y = at.unbind(-1)
        u, v = moved.unbind(-1)
        terms = torch.stack([torch.ones_like(x), x, y, u, v, x * x, x * y, y * y, x * u, y * u, x * v, y * v])
        cells = rows.sum(1)[:, None] * columns.sum(0)
        weight = start
        for fit in range(_FITS):
            total, *means = rows @ (terms * weight) @ columns
            x, y, u, v, xx, xy, yy, xu, yu, xv, yv = (mean / total.clamp_min(1e-12) for mean in means)
            # A ridge in place of the singular covariance of few or collinear positions.
            xx, xy, yy = xx - x * x + _RIDGE, xy - x * y, yy - y * y + _RIDGE
            slopes = [
                ((yy * a - xy * b) / (xx * yy - xy * xy), (xx * b - xy * a) / (xx * yy - xy * xy))
                for a, b in ((xu - x * u, yu - y * u), (xv - x * v, yv - y * v))
            ]
            # Displacements at the origin, and their slopes: pixels of A that lie outside their window count too.
            moves = [(mean - a * x - b * y, a, b) for mean, (a, b) in zip((u, v), slopes, strict=True)]
            self.maps = torch.stack([term for move in moves for term in move])
            scale = _FIRST * (_LAST / _FIRST) ** (fit / (_FITS - 1))
            weight = start * torch.exp(_squared_residual(self.maps, at, to) * (-0.5 / scale**2))
        self.support = rows @ weight @ columns / cells

    def confidence(self, at: Tensor, to: Tensor) -> Tensor:
        """``[...]`` float32 from 0 to 1, for matches ``at``, ``to [..., 2]``, in cells."""
        height, width = self.support.shape
        column, row = at.floor().long().unbind(-1)
        cell = (row.clamp(0, height - 1) * width + column.clamp(0, width - 1)).flatten()
        maps = self.maps.flatten(1).to(torch.float32).index_select(1, cell).view(6, *at.shape[:-1])
        support = (self.support.square() / (self.support.square() + _SUPPORT**2)).flatten().to(torch.float32)
        near = 1 / (1 + (_squared_residual(maps, at, to) / _NEAR).square())
        return near * support.index_select(0, cell).view(at.shape[:-1])


def _squared_residual(maps: Tensor, at: Tensor, to: Tensor) -> Tensor:
    """``[...]``: squared distance of ``to [..., 2]`` from where the affine ``maps [6, ...]`` take ``at``."""
    x, y = at.unbind(-1)
    u, ux, uy, v, vx, vy = maps
    return (x + u + ux * x + uy * y - to[..., 0]).square() + (y + v + vx * x + vy * y - to[..., 1]).square()


def _window_sums(count: int, like: Tensor) -> Tensor:
    """``[count, count]``: times a vector, the sum over the window about each entry."""
    index = torch.arange(count, device=like.device)
    return ((index[:, None] - index).abs() <= _RADIUS).to(like.dtype)
