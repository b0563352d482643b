"""The geometry of ``dense_match``: bilinear interpolation of descriptor maps, and strips of their pixels."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ... import memory
from ...kernels.strips import Scales, Strips
from ..nearest.plain import NORM_FLOOR

# Pixels of an image for which marks are kept, nine bytes each; more are sorted.
_MOST_MARKED = 1 << 24


class Axis(NamedTuple):
    """Bilinear interpolation along one axis: pixel = cell[low] + weight * (cell[high] - cell[low]).

    Where weight is 0, high equals low: a cell of weight zero does not count as one of the pixel's cells.
    """

    low: Tensor
    high: Tensor
    weight: Tensor


def bilinear_axis(position: Tensor, cells: int, pixels: int, dtype: torch.dtype) -> Axis:
    """The rule of ``torch.nn.functional.interpolate``, align_corners=False: pixel centres, clamped at the border."""
    # In units of 1 / (2 * pixels), integers, so that pixels at the centre of a cell are found exactly.
    whole = 2 * pixels
    source = ((2 * position + 1) * cells - pixels).clamp_(0, whole * (cells - 1))
    low = torch.div(source, whole, rounding_mode="floor")
    rest = source - low * whole
    return Axis(low, low + (rest > 0), (rest.double() / whole).to(dtype))


def axes_at(points: Tensor, grid: tuple[int, int], size: tuple[int, int], dtype: torch.dtype) -> tuple[Axis, Axis]:
    """Along y and along x, of (x, y) ``points [P, 2]`` on a map of ``grid`` (h, w) over ``size`` (H, W) pixels."""
    y = bilinear_axis(points[:, 1], grid[0], size[0], dtype)
    return y, bilinear_axis(points[:, 0], grid[1], size[1], dtype)


def sample_bilinear(tokens: Tensor, grid: tuple[int, int], size: tuple[int, int], points: Tensor) -> Tensor:
    """``[P, C]`` at (x, y) pixels ``points [P, 2]`` int64: ``tokens [h * w, C]`` on ``grid`` over ``size`` pixels."""

    def cell(row: Tensor, column: Tensor) -> Tensor:
        return tokens[row * grid[1] + column]

    y, x = axes_at(points, grid, size, tokens.dtype)
    weight = x.weight[:, None]
    top = torch.lerp(cell(y.low, x.low), cell(y.low, x.high), weight)
    bottom = torch.lerp(cell(y.high, x.low), cell(y.high, x.high), weight)
    return torch.lerp(top, bottom, y.weight[:, None])


def points_of(index: Tensor, size: tuple[int, int]) -> Tensor:
    """(x, y) ``[..., 2]`` of pixels by their row-major ``index [...]``."""
    row = index // size[1]
    return torch.stack([index - row * size[1], row], dim=-1)


def index_of(points: Tensor, size: tuple[int, int]) -> Tensor:
    """Row-major index ``[...]`` of (x, y) ``points [..., 2]``."""
    return points[..., 1] * size[1] + points[..., 0]


def cells_apart(a: Tensor, b: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Distance ``[...]`` float32 between (x, y) pixels ``[..., 2]``, in cells of a map of ``grid`` over ``size``."""
    cells = vector(grid[1] / size[1], grid[0] / size[0], torch.float32, a.device)
    return torch.linalg.vector_norm((a - b) * cells, dim=-1)


def vector(x: float, y: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``[2]`` of x and y. A copy from the host would wait for a GPU, and break the recording of a CUDA graph."""
    both = memory.empty(2, dtype=dtype, device=device)
    both[0].fill_(x)
    both[1].fill_(y)
    return both


def unique_pixels(index: Tensor, pixels: int) -> tuple[Tensor, Tensor]:
    """The pixels in ``index [P]``, each once, ascending; and the place of each one of ``index`` among them, or -1.

    ``index`` numbers ``pixels`` pixels; -1 is none.
    """
    if pixels > _MOST_MARKED:
        named, place = torch.unique(index, return_inverse=True)
        none = int(len(named) > 0 and named[0] < 0)
        return named[none:], place - none
    named = torch.zeros(pixels + 1, dtype=torch.bool, device=index.device)
    # The last place is for -1.
    named[index] = True
    named[pixels] = False
    place = named.cumsum(0) - 1
    place[pixels] = -1
    return named.nonzero().flatten(), place[index]


def pixel_grid(size: tuple[int, int], start: int, stop: int, device: torch.device) -> Tensor:
    """The pixels ``start .. stop - 1`` of an image in row-major order as ``[stop - start, 2]`` int64 (x, y)."""
    return points_of(torch.arange(start, stop, device=device), size)


def whole_pixels(points: Tensor, size: tuple[int, int]) -> Tensor:
    """Round (x, y) ``points [..., 2]`` down to int64 pixels; ValueError if one is outside ``size`` (H, W) or NaN."""
    pixels = points.floor() if points.is_floating_point() else points
    if pixels.device.type == "cpu" and pixels.numel():
        # The fast path: two reductions. NaN propagates through them and fails the comparison.
        least, most = (part.tolist() for part in torch.aminmax(pixels.reshape(-1, 2), dim=0))
        if least[0] >= 0 and least[1] >= 0 and most[0] < size[1] and most[1] < size[0]:
            return pixels.long()
    limit = torch.tensor([size[1], size[0]], device=points.device)
    # Written so that NaN fails too.
    outside = ~((pixels >= 0) & (pixels < limit)).all(-1)
    if bool(outside.any()):
        raise ValueError(
            f"points must lie inside the query image of (H, W) = {tuple(size)}: 0 <= x < W and 0 <= y < H; "
            f"{int(outside.sum())} of {outside.numel()} do not, the first is {points[outside][0].tolist()}"
        )
    return pixels.long()


# A few KB each. Captured CUDA graphs read them, so they must stay cached as long as a graph may be replayed.
@lru_cache(maxsize=4096)
def cut_strips(
    cells: int, pixels: int, device: torch.device, part: tuple[int, int] | None = None, joined: bool = False
) -> Strips:
    """Strips of one axis of an image, or of its pixels ``[begin, end)``, on a device.

    ``joined`` merges strips of a single cell into the next strip, which halves their number for odd enlargements. Their
    pixels give the far cell weight zero, which adds nothing if that cell is finite.
    """
    begin, end = part or (0, pixels)
    rule = bilinear_axis(torch.arange(begin, end, device="cpu"), cells, pixels, torch.float32)
    high = (rule.low + 1).clamp_(max=cells - 1) if joined else rule.high
    _, count = torch.unique_consecutive(rule.low + high, return_counts=True)
    stop = count.cumsum(0)
    start = stop - count
    parts = (rule.low[start].int(), high[start].int(), torch.cat([start, stop[-1:]]).int(), rule.weight.contiguous())
    return Strips(cells, end - begin, *(one.to(device) for one in parts), int(count.max()))


def scales_of(inverse: Tensor, strips: tuple[Strips, Strips]) -> Scales:
    """The inverse norms ``[H, W]`` of an image's pixels, and their range in each patch."""
    rows = high = low = inverse
    for dim in (1, 0):
        axis = strips[dim]
        at = axis.members().flatten()
        high = high.index_select(dim, at).unflatten(dim, (axis.count, axis.longest)).amax(dim + 1)
        low = low.index_select(dim, at).unflatten(dim, (axis.count, axis.longest)).amin(dim + 1)
        rows = high if dim == 1 else rows
    # NaN next to cells that are not finite.
    largest = inverse.nan_to_num(0.0, posinf=0.0).max().view(1)
    return Scales(inverse.flatten(), high.flatten(), low.flatten(), largest, rows.flatten())


def power_of_two(exponent: Tensor) -> Tensor:
    """2 to the ``exponent`` of at most 1000 in size, float64; from its bits, since no library promises exact powers."""
    return ((exponent.long() + 1023) << 52).view(torch.float64)


class StretchedMap(NamedTuple):
    """An image's descriptors: ``tokens [h * w, C]`` on ``grid`` (h, w), stretched over ``size`` (H, W) pixels."""

    tokens: Tensor
    grid: tuple[int, int]
    size: tuple[int, int]
    unnormalized: bool = False
    """The cells are not yet divided by their norms; the native core divides those that it needs."""
    exponent: Tensor | None = None
    """[] int: the tokens are the map times 2 to this power."""
    part: tuple[int, int] | None = None
    """Rows of pixels ``[begin, end)`` to search as keys; None for all."""

    @property
    def rows(self) -> tuple[int, int]:
        return self.part or (0, self.size[0])

    @property
    def pixels(self) -> int:
        """Number of pixels to search."""
        begin, end = self.rows
        return (end - begin) * self.size[1]

    @property
    def norm_floor(self) -> float | Tensor:
        return NORM_FLOOR if self.exponent is None else NORM_FLOOR * power_of_two(self.exponent)

    def axes(self) -> tuple[Axis, Axis]:
        """Interpolation along y and x of the pixels to search."""
        device, dtype = self.tokens.device, self.tokens.dtype
        y, x = (
            bilinear_axis(torch.arange(*rows, device=device), cells, n, dtype)
            for rows, cells, n in zip((self.rows, (0, self.size[1])), self.grid, self.size, strict=True)
        )
        return y, x

    def strips(self, joined: bool = False) -> tuple[Strips, Strips]:
        """:func:`cut_strips` along y and x of the pixels to search."""
        device = self.tokens.device
        y = cut_strips(self.grid[0], self.size[0], device, self.part, joined)
        return y, cut_strips(self.grid[1], self.size[1], device, None, joined)

    def descriptors(self, points: Tensor, unit: bool) -> Tensor:
        """Descriptors ``[P, C]`` of (x, y) ``points [P, 2]``; with ``unit`` divided by their norms."""
        rows = sample_bilinear(self.tokens, self.grid, self.size, points)
        if not unit:
            return rows
        norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float64).clamp_min(self.norm_floor)
        return (rows / norm).to(rows.dtype)

    def inverse_norms(self) -> Tensor:
        """Inverse norms ``[H, W]`` of the rows to search."""
        return Norms(self).of_all()


class Norms:
    """Inverse norms of the interpolated descriptors of pixels.

    The squared norm is bilinear in each of its two factors, so it follows from the products of neighbouring cells; in
    float64, for cells that nearly cancel.
    """

    def __init__(self, stretched: StretchedMap) -> None:
        self.map = stretched
        grid = stretched.grid
        # The sums run over channels, so these must be adjacent.
        cells = stretched.tokens.contiguous().double().unflatten(0, grid)

        def products(down: int, right: int) -> Tensor:
            """[h, w]: each cell times the cell at this offset, clamped at the border."""
            rows = (torch.arange(grid[0], device=cells.device) + down).clamp_(max=grid[0] - 1)
            columns = (torch.arange(grid[1], device=cells.device) + right).clamp_(0, grid[1] - 1)
            return (cells * (cells[rows][:, columns] if down or right else cells)).sum(-1)

        offsets = ((0, 0), (0, 1), (1, 0), (1, 1), (1, -1))
        self.gram = torch.stack([products(*offset) for offset in offsets])
        """[5, h, w] float64: each cell times itself, right, down, diagonal and back"""
        self.own, self.right, self.down, self.diagonal, self.back = self.gram

    def of_all(self) -> Tensor:
        """``[H, W]`` of the rows to search."""
        y, x = self.map.axes()
        # Along x first, for every row of cells.
        square, mixed = self._squares(slice(None), x), self._mixed(slice(None), x)
        return self._inverse(y.weight.double()[:, None], square[y.low], mixed[y.low], square[y.high])

    def of_points(self, points: Tensor) -> Tensor:
        """``[P]`` of (x, y) ``points [P, 2]``."""
        y, x = axes_at(points, self.map.grid, self.map.size, self.map.tokens.dtype)
        return self._inverse(
            y.weight.double(), self._squares(y.low, x), self._mixed(y.low, x), self._squares(y.high, x)
        )

    def _squares(self, row: Tensor | slice, x: Axis) -> Tensor:
        """Squared norms of descriptors on rows of cells."""
        return _between(x.weight.double(), self.own[row, x.low], 2 * self.right[row, x.low], self.own[row, x.high])

    def _mixed(self, row: Tensor | slice, x: Axis) -> Tensor:
        """Products of descriptors on rows of cells with those on the row below."""
        across = self.diagonal[row, x.low] + self.back[row, x.high]
        return _between(x.weight.double(), self.down[row, x.low], across, self.down[row, x.high])

    def _inverse(self, weight: Tensor, near: Tensor, mixed: Tensor, far: Tensor) -> Tensor:
        norm = _between(weight, near, 2 * mixed, far).clamp_min(0).sqrt().clamp_min(self.map.norm_floor)
        return norm.reciprocal().to(self.map.tokens.dtype)


def _between(weight: Tensor, near: Tensor, product: Tensor, far: Tensor) -> Tensor:
    """Squared norms between two cells, from their squares and twice their product; at weight 0 the near one alone."""
    square = (1 - weight) ** 2 * near + (1 - weight) * weight * product + weight**2 * far
    return torch.where(weight == 0, near, square)
