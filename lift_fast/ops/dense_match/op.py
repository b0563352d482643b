"""``dense_match``: matches the pixels of one picture to all pixels of another, from coarse descriptor maps.

Bilinear interpolation commutes with the dot product: the similarities of one query descriptor to all key pixels are
the bilinear enlargement of its similarities to the coarse key cells, so pixel descriptors are never formed. And a
bilinear patch never exceeds its four corners, so only patches with a corner above the best value can hold the match.
The native core goes further on the CPU: it interpolates on the query's side too, bounds all query pixels between four
cells at once, and looks only at a patch's four outermost pixels, one of which is its largest. The kernels on the GPU
do the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ... import _env, _native, devices, memory
from .. import library
from ..nearest.plain import NORM_FLOOR, full_matmul_precision, unit_rows

library.define(
    "dense_match(Tensor query_map, Tensor key_map, int[] query_size, int[] key_size, Tensor? points, str normalize,"
    " bool mutual) -> (Tensor, Tensor, Tensor)"
)

# Bytes of similarities that exist at one time; small enough to stay in a processor's cache.
_BUDGET = 4 << 20
# Bytes of the native core's table of cell similarities.
_TABLE_BUDGET = 64 << 20
# Points that the native way takes together; beside its table it needs about 100 bytes for each.
_MOST_POINTS = 1 << 20
# How many of the most promising patches to evaluate before the bound is checked, for the queries still open. About 4
# patches per query can hold the match on real photographs; flat similarities need more.
_STAGES = (8, 64, 512)


# Key pixels that are searched together where the search, or its scales, needs numbers for each; and where it does not,
# pixels that 32 bits still number.
_MOST_SCALED, _MOST_PIXELS = 1 << 24, 1 << 30
# Powers of two: norms of cells in float32 whose products, and theirs with scales, stay clear of the ends of its range.
_LEAST_NORM, _MOST_NORM = -40, 60
# Of each dtype, to which power of two the largest number of a map is brought, so that products stay clear of both ends;
# and the largest factor for that.
_RAISED = {torch.float32: (40, 127), torch.float64: (450, 1000)}


class Axis(NamedTuple):
    """Bilinear interpolation along one axis: pixel = cell[low] + weight * (cell[high] - cell[low]).

    A cell of weight zero is none of a pixel's: where weight is 0, high is low.
    """

    low: Tensor
    high: Tensor
    weight: Tensor


def bilinear_axis(position: Tensor, cells: int, pixels: int, dtype: torch.dtype) -> Axis:
    """The rule of ``torch.nn.functional.interpolate``, align_corners=False: pixel centres, clamped at the border."""
    # Times 2 * pixels and so in whole numbers, which tell exactly where a pixel has a cell's centre.
    whole = 2 * pixels
    source = ((2 * position + 1) * cells - pixels).clamp_(0, whole * (cells - 1))
    low = torch.div(source, whole, rounding_mode="floor")
    rest = source - low * whole
    return Axis(low, low + (rest > 0), (rest.double() / whole).to(dtype))


def _inverse_norms(rows: Tensor) -> Tensor | None:
    """1 / max(norm, 1e-12) of ``rows [n, C]``; None where squares pass the range of their dtype."""
    # Faster than vector_norm, which reads a map across its layout.
    square = (rows * rows).sum(1)
    return None if bool(torch.isinf(square).any()) else square.sqrt_().clamp_min_(NORM_FLOOR).reciprocal_()


def _unit_rows(rows: Tensor) -> Tensor:
    """:func:`unit_rows` with the norm in the dtype of ``rows`` where that has the range."""
    inverse = _inverse_norms(rows)
    return unit_rows(rows) if inverse is None else rows * inverse[:, None]


def sample_bilinear(tokens: Tensor, grid: tuple[int, int], size: tuple[int, int], points: Tensor) -> Tensor:
    """Bilinear interpolation of a map at pixels.

    Args:
        tokens: ``[h * w, C]``, row-major cells of the map.
        grid: ``(h, w)``.
        size: ``(H, W)``, pixels over which the map is stretched.
        points: ``[P, 2]`` int64, (x, y) pixels.

    Returns:
        ``[P, C]``.
    """

    def cell(row: Tensor, column: Tensor) -> Tensor:
        return tokens[row * grid[1] + column]

    x = bilinear_axis(points[:, 0], grid[1], size[1], tokens.dtype)
    y = bilinear_axis(points[:, 1], grid[0], size[0], tokens.dtype)
    weight = x.weight[:, None]
    top = torch.lerp(cell(y.low, x.low), cell(y.low, x.high), weight)
    bottom = torch.lerp(cell(y.high, x.low), cell(y.high, x.high), weight)
    return torch.lerp(top, bottom, y.weight[:, None])


def pixel_grid(size: tuple[int, int], start: int, stop: int, device: torch.device) -> Tensor:
    """The pixels ``start .. stop - 1`` of a picture in row-major order as ``[stop - start, 2]`` int64 (x, y)."""
    position = torch.arange(start, stop, device=device)
    return torch.stack([position % size[1], position // size[1]], dim=1)


def whole_pixels(points: Tensor, size: tuple[int, int]) -> Tensor:
    """Round (x, y) ``points [..., 2]`` down to int64 pixels.

    Raises:
        ValueError: if one lies outside the picture of ``size`` (H, W), or is NaN.
    """
    pixels = points.floor() if points.is_floating_point() else points
    if pixels.device.type == "cpu" and pixels.numel():
        # Two reductions tell that all is well, as a rule; NaN passes through them and fails.
        least, most = (part.tolist() for part in torch.aminmax(pixels.reshape(-1, 2), dim=0))
        if least[0] >= 0 and least[1] >= 0 and most[0] < size[1] and most[1] < size[0]:
            return pixels.long()
    limit = torch.tensor([size[1], size[0]], device=points.device)
    # Written so that NaN fails too.
    outside = ~((pixels >= 0) & (pixels < limit)).all(-1)
    if bool(outside.any()):
        raise ValueError(
            f"points must lie inside the query picture of (H, W) = {tuple(size)}: 0 <= x < W and 0 <= y < H; "
            f"{int(outside.sum())} of {outside.numel()} do not, the first is {points[outside][0].tolist()}"
        )
    return pixels.long()


def _power_of_two(exponent: Tensor) -> Tensor:
    """float64, from its bits, for no library promises exact powers; exponents of up to 1000 in size."""
    return ((exponent.long() + 1023) << 52).view(torch.float64)


class Picture(NamedTuple):
    """One picture's descriptors: ``tokens [h * w, C]`` on ``grid`` (h, w), stretched over ``size`` (H, W) pixels."""

    tokens: Tensor
    grid: tuple[int, int]
    size: tuple[int, int]
    unnormalized: bool = False
    """The cells have yet to be divided by their norms; the native core does so with those that it needs."""
    exponent: Tensor | None = None
    """[] int, where the tokens are the map times 2 to that power."""
    part: tuple[int, int] | None = None
    """Rows of pixels ``[begin, end)`` that are looked at as keys; None for all of them."""

    @property
    def rows(self) -> tuple[int, int]:
        return self.part or (0, self.size[0])

    @property
    def pixels(self) -> int:
        """Pixels that are looked at."""
        begin, end = self.rows
        return (end - begin) * self.size[1]

    @property
    def norm_floor(self) -> float | Tensor:
        if self.exponent is None:
            return NORM_FLOOR
        return NORM_FLOOR * _power_of_two(self.exponent)

    def arguments(self) -> tuple[int, int, int, tuple[int, int], bool]:
        """The map as the native core takes it."""
        return _native.address(self.tokens), self.tokens.stride(1), self.tokens.stride(0), self.grid, self.unnormalized

    def axes(self) -> tuple[Axis, Axis]:
        device, dtype = self.tokens.device, self.tokens.dtype
        y, x = (
            bilinear_axis(torch.arange(*rows, device=device), cells, n, dtype)
            for rows, cells, n in zip((self.rows, (0, self.size[1])), self.grid, self.size, strict=True)
        )
        return y, x

    def descriptors(self, points: Tensor, unit: bool) -> Tensor:
        """``[P, C]`` of (x, y) ``points [P, 2]``; divided by their norms if ``unit``."""
        rows = sample_bilinear(self.tokens, self.grid, self.size, points)
        if not unit:
            return rows
        norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float64).clamp_min(self.norm_floor)
        return (rows / norm).to(rows.dtype)

    def inverse_norms(self) -> Tensor:
        """``[H, W]``, of the rows that are looked at: :class:`Norms` of every pixel."""
        return Norms(self).of_all()


class Norms:
    """What the interpolated descriptor of a pixel is multiplied by to have length one.

    The squared norm is bilinear in each of its two factors, so it follows from the products of neighbouring cells; in
    float64, for cells that nearly cancel.
    """

    def __init__(self, picture: Picture) -> None:
        self.picture = picture
        grid = picture.grid
        # With channels side by side, which the sums run over.
        cells = picture.tokens.contiguous().double().unflatten(0, grid)

        def products(down: int, right: int) -> Tensor:
            """[h, w]: each cell times the one so far away, itself at the border."""
            rows = (torch.arange(grid[0], device=cells.device) + down).clamp_(max=grid[0] - 1)
            columns = (torch.arange(grid[1], device=cells.device) + right).clamp_(0, grid[1] - 1)
            return (cells * (cells[rows][:, columns] if down or right else cells)).sum(-1)

        self.own, self.right, self.down = products(0, 0), products(0, 1), products(1, 0)
        self.diagonal, self.back = products(1, 1), products(1, -1)

    @staticmethod
    def _between(weight: Tensor, near: Tensor, product: Tensor, far: Tensor) -> Tensor:
        """Squares between two cells, from theirs and twice their product; without weight the far one has no part."""
        square = (1 - weight) ** 2 * near + (1 - weight) * weight * product + weight**2 * far
        return torch.where(weight == 0, near, square)

    def _inverse(self, square: Tensor) -> Tensor:
        norm = square.clamp_min(0).sqrt().clamp_min(self.picture.norm_floor)
        return norm.reciprocal().to(self.picture.tokens.dtype)

    def of_all(self) -> Tensor:
        """``[H, W]``, of the rows that are looked at."""
        y, x = self.picture.axes()
        w, v = x.weight.double(), y.weight.double()[:, None]
        # Along x first: the squares of a row's descriptors, and twice their products with the row below.
        square = self._between(w, self.own[:, x.low], 2 * self.right[:, x.low], self.own[:, x.high])
        across = self.diagonal[:, x.low] + self.back[:, x.high]
        mixed = self._between(w, self.down[:, x.low], across, self.down[:, x.high])
        return self._inverse(self._between(v, square[y.low], 2 * mixed[y.low], square[y.high]))

    def of_points(self, points: Tensor) -> Tensor:
        """``[P]`` of (x, y) ``points [P, 2]``."""
        grid, size, dtype = self.picture.grid, self.picture.size, self.picture.tokens.dtype
        x = bilinear_axis(points[:, 0], grid[1], size[1], dtype)
        y = bilinear_axis(points[:, 1], grid[0], size[0], dtype)
        w, v = x.weight.double(), y.weight.double()

        def square(row: Tensor) -> Tensor:
            return self._between(w, self.own[row, x.low], 2 * self.right[row, x.low], self.own[row, x.high])

        across = self.diagonal[y.low, x.low] + self.back[y.low, x.high]
        mixed = self._between(w, self.down[y.low, x.low], across, self.down[y.low, x.high])
        return self._inverse(self._between(v, square(y.low), 2 * mixed, square(y.high)))


def match_exhaustive(descriptors: Tensor, key: Picture, inverse_norms: Tensor | None) -> tuple[Tensor, Tensor]:
    """Plain version, every key pixel for every query: ``[P, C]`` to similarity [P] and pixel index [P] or -1."""
    y, x = key.axes()
    similarity, index = [], []
    for part in descriptors.split(max(1, _BUDGET // (key.pixels * descriptors.element_size()))):
        coarse = (part @ key.tokens.t()).unflatten(1, key.grid)
        values = torch.lerp(coarse[:, :, x.low], coarse[:, :, x.high], x.weight)
        values = torch.lerp(values[:, y.low], values[:, y.high], y.weight[:, None])
        if inverse_norms is not None:
            values *= inverse_norms
        values = values.flatten(1)
        values.masked_fill_(~torch.isfinite(values), -torch.inf)
        # ``max`` promises the first of equal values: the lowest row-major pixel.
        best, position = values.max(1)
        similarity.append(best)
        index.append(position)
    best = torch.cat(similarity)
    return best, torch.where(best == -torch.inf, -1, torch.cat(index))


class _Patches:
    """The key picture cut into patches: the pixels that share their four corner cells, padded to one rectangle."""

    def __init__(self, key: Picture, inverse_norms: Tensor | None) -> None:
        self.key = key
        self.rows, self.row_pixels, self.y = self._cut(key, 0)
        self.columns, self.column_pixels, self.x = self._cut(key, 1)
        self.inverse_norms = None if inverse_norms is None else inverse_norms.flatten()
        if inverse_norms is not None:
            per_patch = inverse_norms[self.row_pixels[:, None, :, None], self.column_pixels[None, :, None, :]]
            self.scale_high, self.scale_low = per_patch.amax((2, 3)).flatten(), per_patch.amin((2, 3)).flatten()

    @staticmethod
    def _cut(key: Picture, axis: int) -> tuple[Axis, Tensor, Axis]:
        """Corner cells of each strip, its pixels ``[strips, longest]`` (the last one repeated), their interpolation."""
        device, rule = key.tokens.device, key.axes()[axis]
        _, count = torch.unique_consecutive(rule.low + rule.high, return_counts=True)
        first = count.cumsum(0) - count
        offset = torch.arange(int(count.max()), device=device)
        at = first[:, None] + torch.minimum(offset[None], count[:, None] - 1)
        return Axis(rule.low[first], rule.high[first], rule.weight[first]), at, Axis(*(part[at] for part in rule))

    def match(self, descriptors: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Similarity and pixel index of the best pixel in the ``count`` most promising patches; whether proven."""
        coarse = descriptors @ self.key.tokens.t()
        coarse.masked_fill_(~torch.isfinite(coarse), torch.nan)
        maps = coarse.unflatten(1, self.key.grid)
        # A corner without value spoils every pixel of its patch, so only sound patches need to be bounded above.
        tall = torch.maximum(maps[:, self.rows.low], maps[:, self.rows.high])
        bound = torch.maximum(tall[:, :, self.columns.low], tall[:, :, self.columns.high]).flatten(1)
        if self.inverse_norms is not None:
            bound = torch.where(bound > 0, bound * self.scale_high, bound * self.scale_low)
        bound = bound.nan_to_num_(-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        # Interpolation rounds: a value may pass its corners by a few units in the last place.
        slack = 8 * torch.finfo(bound.dtype).eps * bound.abs().amax(1).clamp_max(torch.finfo(bound.dtype).max)
        top, patch = bound.topk(min(count + 1, bound.shape[1]), dim=1)
        patch = patch[:, :count]
        row, column = patch // self.columns.low.shape[0], patch % self.columns.low.shape[0]
        values = self._evaluate(coarse, row, column)
        pixel = self.row_pixels[row][..., :, None] * self.key.size[1] + self.column_pixels[column][..., None, :]
        values, pixel = values.flatten(1), pixel.flatten(1)
        best = values.amax(1)
        index = torch.where(values == best[:, None], pixel, self.key.pixels).amin(1)
        proven = top[:, count] + slack < best if bound.shape[1] > count else torch.ones_like(best, dtype=torch.bool)
        return best, torch.where(best == -torch.inf, -1, index), proven

    def _evaluate(self, coarse: Tensor, row: Tensor, column: Tensor) -> Tensor:
        """Interpolate ``coarse [P, h * w]`` at all pixels of the patches ``row, column [P, T]``: ``[P, T, ry, rx]``."""
        width = self.key.grid[1]

        def corner(y: Tensor, x: Tensor) -> Tensor:
            return coarse.gather(1, y[row] * width + x[column])[..., None, None]

        x, y = self.x.weight[column][..., None, :], self.y.weight[row][..., :, None]
        top = torch.lerp(corner(self.rows.low, self.columns.low), corner(self.rows.low, self.columns.high), x)
        bottom = torch.lerp(corner(self.rows.high, self.columns.low), corner(self.rows.high, self.columns.high), x)
        values = torch.lerp(top, bottom, y)
        if self.inverse_norms is not None:
            pixel = self.row_pixels[row][..., :, None] * self.key.size[1] + self.column_pixels[column][..., None, :]
            values = values * self.inverse_norms[pixel]
        return values.masked_fill_(~torch.isfinite(values), -torch.inf)


def match_bounded(descriptors: Tensor, key: Picture, inverse_norms: Tensor | None) -> tuple[Tensor, Tensor]:
    """The result of :func:`match_exhaustive` from the patches that can win; all of them only where the bound fails."""
    patches = _Patches(key, inverse_norms)
    pixels_per_patch = patches.row_pixels.shape[1] * patches.column_pixels.shape[1]
    best = memory.new_empty(descriptors, descriptors.shape[0])
    best_index = memory.empty(descriptors.shape[0], dtype=torch.int64, device=descriptors.device)
    still_open = torch.arange(descriptors.shape[0], device=descriptors.device)
    # Bounds that allow for the smallest norm of a patch are loose: what the first stage leaves open, few more prove.
    for count in _STAGES if inverse_norms is None else _STAGES[:1]:
        if count * pixels_per_patch > key.pixels // 2:
            break
        per_query = (3 * key.tokens.shape[0] + 4 * count * pixels_per_patch) * descriptors.element_size()
        unproven = []
        for part in still_open.split(max(1, 4 * _BUDGET // per_query)):
            best[part], best_index[part], proven = patches.match(descriptors[part], count)
            unproven.append(part[~proven])
        still_open = torch.cat(unproven)
        if not still_open.numel():
            return best, best_index
    best[still_open], best_index[still_open] = match_exhaustive(descriptors[still_open], key, inverse_norms)
    return best, best_index


class _Strips(NamedTuple):
    """One axis of the key picture as the native core takes it: the pixels between the same two cells, or at one."""

    cells: int
    pixels: int
    low: Tensor
    """[strips] int32"""
    high: Tensor
    first: Tensor
    """[strips + 1] int32"""
    weight: Tensor
    """[pixels] float32"""

    def arguments(self) -> tuple[int, ...]:
        strips = self.low.shape[0]
        return (self.cells, self.pixels, strips, *(_native.address(part) for part in self[2:]))


@lru_cache(maxsize=64)
def cut_strips(cells: int, pixels: int, part: tuple[int, int] | None = None, joined: bool = False) -> _Strips:
    """Strips of one axis of a picture, or of the pixels ``[begin, end)`` of it.

    ``joined``: those of a single cell with the one that begins there, fewer by half for odd enlargements. Their pixels
    give the far cell no weight, which adds nothing where that is finite.
    """
    begin, end = part or (0, pixels)
    rule = bilinear_axis(torch.arange(begin, end, device="cpu"), cells, pixels, torch.float32)
    high = (rule.low + 1).clamp_(max=cells - 1) if joined else rule.high
    _, count = torch.unique_consecutive(rule.low + high, return_counts=True)
    stop = count.cumsum(0)
    start = stop - count
    first = torch.cat([start, stop[-1:]]).int()
    return _Strips(cells, end - begin, rule.low[start].int(), high[start].int(), first, rule.weight.contiguous())


class _NativeSearch:
    """The native core's search in one key picture."""

    def __init__(self, key: Picture, per_pixel: bool) -> None:
        self.y = cut_strips(key.grid[0], key.size[0], key.part)
        self.x = cut_strips(key.grid[1], key.size[1])
        self.scale = key.inverse_norms().contiguous() if per_pixel else None

    def __call__(self, table: Tensor, corners: Tensor, start: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Similarity and pixel index of each point.

        Args:
            table: ``[rows, h * w]`` similarities to the key's cells.
            corners: ``[groups, 4]``, rows of the table.
            start: ``[groups + 1]`` int64, where each group's points begin.
            weights: ``[points, 2]``, share of the far corners in x and y.
        """
        table, corners, weights = table.contiguous(), corners.int().contiguous(), weights.float().contiguous()
        similarity = memory.new_empty(table, weights.shape[0])
        index = memory.empty(weights.shape[0], dtype=torch.int64, device="cpu")
        _native.require().dense_match_f32(
            _native.address(table),
            table.shape[0],
            corners.shape[0],
            _native.address(corners),
            _native.address(start),
            _native.address(weights),
            self.y.arguments(),
            self.x.arguments(),
            0 if self.scale is None else _native.address(self.scale),
            _native.address(similarity),
            _native.address(index),
            torch.get_num_threads(),
            _env.cpu_isa(),
        )
        return similarity, index


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """The parts behind each other; a single one as it is, for a few points take no longer than some operators."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def match_native(query: Picture, key: Picture, points: Tensor | None, per_pixel: bool) -> tuple[Tensor, Tensor]:
    """The result of :func:`match_exhaustive` from the native core, float32 on the CPU."""
    search = _NativeSearch(key, per_pixel)
    count = query.pixels if points is None else points.shape[0]
    many = count >= query.tokens.shape[0]
    norms = Norms(query) if per_pixel and many else None
    # Of every pixel at once is the faster way.
    all_norms = norms.of_all().flatten() if norms and points is None and count <= _MOST_SCALED else None
    parts = []
    for start in range(0, max(count, 1), _MOST_POINTS):
        stop = min(start + _MOST_POINTS, count)
        at = pixel_grid(query.size, start, stop, query.tokens.device) if points is None else points[start:stop]
        if not many:
            parts.append(_match_few(search, query, key, at, per_pixel))
            continue
        similarity, index = _match_many(search, query, key, at)
        if norms is not None:
            scale = norms.of_points(at) if all_norms is None else all_norms[start:stop]
            similarity = torch.where(index < 0, similarity, similarity * scale)
        parts.append((similarity, index))
    return _joined([part[0] for part in parts]), _joined([part[1] for part in parts])


def _match_few(
    search: _NativeSearch, query: Picture, key: Picture, at: Tensor, per_pixel: bool
) -> tuple[Tensor, Tensor]:
    """By the similarities of each point's own descriptor, interpolated on the key's side alone."""
    if 1 not in key.tokens.stride() or 0 in key.tokens.stride():
        key = key._replace(tokens=key.tokens.contiguous())
    at = at.contiguous()
    similarity = memory.new_empty(query.tokens, len(at))
    index = memory.empty(len(at), dtype=torch.int64, device="cpu")
    _native.require().dense_match_points_f32(
        _native.address(at),
        len(at),
        query.tokens.shape[1],
        query.arguments(),
        key.arguments(),
        query.size,
        per_pixel,
        search.y.arguments(),
        search.x.arguments(),
        0 if search.scale is None else _native.address(search.scale),
        _native.address(similarity),
        _native.address(index),
        _TABLE_BUDGET,
        torch.get_num_threads(),
        _env.cpu_isa(),
    )
    return similarity, index


def _match_many(search: _NativeSearch, query: Picture, key: Picture, at: Tensor) -> tuple[Tensor, Tensor]:
    """By the similarities of cells, interpolated on both sides; points between the same four query cells together."""
    axis_x = bilinear_axis(at[:, 0], query.grid[1], query.size[1], torch.float32)
    axis_y = bilinear_axis(at[:, 1], query.grid[0], query.size[0], torch.float32)
    width = query.grid[1]
    queries, keys = (_unit_rows(p.tokens) if p.unnormalized else p.tokens for p in (query, key))
    if bool(torch.isfinite(queries.sum())):
        # Points at a cell's centre together with those beyond it: what has no weight adds nothing.
        axis_x, axis_y = (
            axis._replace(high=(axis.low + 1).clamp_(max=cells - 1))
            for axis, cells in ((axis_x, width), (axis_y, query.grid[0]))
        )
    # Rows of cells first; of those with the same low cells, those with the same high ones.
    group, order = torch.sort(
        4 * (axis_y.low * width + axis_x.low) + 2 * (axis_y.high - axis_y.low) + axis_x.high - axis_x.low
    )
    axis_x, axis_y = (Axis(*(part[order] for part in axis)) for axis in (axis_x, axis_y))
    weights = torch.stack([axis_x.weight, axis_y.weight], dim=1)
    similarity = memory.new_empty(query.tokens, len(at))
    index = memory.empty(len(at), dtype=torch.int64, device="cpu")
    # As many rows of query cells at one time as the budget for their similarities allows.
    band = max(1, _TABLE_BUDGET // (4 * keys.shape[0] * width) - 1)
    for top in range(0, query.grid[0], band):
        begin, end = torch.searchsorted(
            group, torch.tensor([4 * width * top, 4 * width * (top + band)], device="cpu")
        ).tolist()
        if begin == end:
            continue
        _, sizes = torch.unique_consecutive(group[begin:end], return_counts=True)
        start = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        leader = begin + start[:-1]
        corners = torch.stack(
            [
                (cell_y[leader] - top) * width + cell_x[leader]
                for cell_y in (axis_y.low, axis_y.high)
                for cell_x in (axis_x.low, axis_x.high)
            ],
            dim=1,
        )
        table = queries[top * width : (top + band + 1) * width] @ keys.t()
        # In the order in which the points came.
        where = order[begin:end]
        similarity[where], index[where] = search(table, corners, start, weights[begin:end])
    return similarity, index


def _fits_native(tokens: Tensor) -> bool:
    return tokens.device.type == "cpu" and tokens.dtype == torch.float32 and devices.native_runs()[0]


def _ordinary(rows: Tensor) -> bool:
    """Whether products of these float32 cells, as they come, neither leave its range nor vanish."""
    # The faster one of each layout.
    norm = torch.linalg.vector_norm(rows, dim=1) if rows.is_contiguous() else (rows * rows).sum(1).sqrt_()
    strange = (norm < 2.0**_LEAST_NORM) | (norm > 2.0**_MOST_NORM)
    if not bool(strange.any()):
        return True
    rest = rows[strange]
    # Zero is zero, and what is not finite takes no part.
    return not bool((torch.isfinite(rest).all(1) & (rest != 0).any(1)).any())


def _in_range(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens times a power of two that keeps their products in range, which changes no digit; its exponent []."""
    top, most = _RAISED[tokens.dtype]
    exponent = torch.frexp(tokens.nan_to_num(0.0, 0.0, 0.0).abs().amax())[1]
    shift = (top - exponent).clamp_(max=most)
    return tokens * _power_of_two(shift).to(tokens.dtype), shift


def _picture(cells: Tensor, size: tuple[int, int], normalize: str, exhaustive: bool, scaled: bool = False) -> Picture:
    """Prepare one map ``[C, h, w]``, cast already; ``scaled``: see :func:`_in_range`."""
    grid = (cells.shape[1], cells.shape[2])
    tokens = cells.flatten(1).t()
    # The native core takes a map as it lies.
    native = not exhaustive and _fits_native(tokens)
    if normalize != "grid":
        if not scaled:
            return Picture(tokens if native else tokens.contiguous(), grid, size)
        tokens, exponent = _in_range(tokens.contiguous())
        return Picture(tokens, grid, size, exponent=exponent)
    if native:
        return Picture(tokens, grid, size, unnormalized=True)
    return Picture(unit_rows(tokens).contiguous(), grid, size)


def _pictures(
    maps: Sequence[Tensor],
    sizes: Sequence[tuple[int, int]],
    normalize: str,
    exhaustive: bool,
    backend: str | None,
) -> tuple[Picture, Picture]:
    """Prepare the query's and the key's map ``[C, h, w]``, cast already."""
    cpu = backend is None and maps[0].device.type == "cpu" and maps[0].dtype == torch.float32
    # The native core on the CPU normalises for itself.
    whole = exhaustive or backend is not None
    query, key = (_picture(*each, normalize, whole, not cpu) for each in zip(maps, sizes, strict=True))
    if normalize == "grid" or not cpu or (_ordinary(query.tokens) and _ordinary(key.tokens)):
        return query, key
    # On the CPU, which may be asked, in float64: that has room for every product of float32.
    return _pictures([cells.double() for cells in maps], sizes, normalize, exhaustive, backend)


def _match(
    query: Picture, key: Picture, points: Tensor | None, per_pixel: bool, exhaustive: bool, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Match ``points [P, 2]`` (None: all pixels) of one picture; returns similarity [P], pixel index [P] or -1."""
    # As many rows of key pixels at one time as can be numbered, or held where the search needs something for each.
    height, width = key.size
    step = max(1, _MOST_PIXELS // width)
    if per_pixel or _searched_by(query, key._replace(part=(0, min(step, height))), exhaustive, backend) == "plain":
        step = max(1, _MOST_SCALED // width)
    if step >= height:
        return _match_part(query, key, points, per_pixel, exhaustive, backend)
    similarity, index = [], []
    for begin in range(0, height, step):
        part = key._replace(part=(begin, min(begin + step, height)))
        values, found = _match_part(query, part, points, per_pixel, exhaustive, backend)
        similarity.append(values)
        index.append(torch.where(found < 0, found, found + begin * width))
    # ``max`` promises the first of equal values: the lowest pixel.
    best, which = torch.stack(similarity).max(0)
    return best, torch.stack(index).gather(0, which[None])[0]


def _searched_by(query: Picture, key: Picture, exhaustive: bool, backend: str | None) -> str:
    """ "native", "gpu" or "plain"."""
    from . import gpu  # it builds on this module

    if backend is not None:
        return "gpu"
    if exhaustive:
        return "plain"
    if _fits_native(query.tokens):
        return "native"
    return "gpu" if gpu.can_run(query, key)[0] else "plain"


def _match_part(
    query: Picture, key: Picture, points: Tensor | None, per_pixel: bool, exhaustive: bool, backend: str | None
) -> tuple[Tensor, Tensor]:
    """:func:`_match` in the part of the key picture; the index counts from its first pixel."""
    from . import gpu

    way = _searched_by(query, key, exhaustive, backend)
    if way == "native":
        return match_native(query, key, points, per_pixel)
    if way == "gpu":
        return gpu.match_gpu(query, key, points, per_pixel, backend)
    search = match_exhaustive if exhaustive else match_bounded
    inverse_norms = key.inverse_norms() if per_pixel else None
    count = query.pixels if points is None else points.shape[0]
    # Descriptors of this many query pixels exist at one time.
    step = max(1, 4 * _BUDGET // (query.tokens.shape[1] * query.tokens.element_size()))
    similarity = memory.new_empty(query.tokens, count)
    index = memory.empty(count, dtype=torch.int64, device=similarity.device)
    for start in range(0, count, step):
        part = slice(start, min(start + step, count))
        at = pixel_grid(query.size, part.start, part.stop, query.tokens.device) if points is None else points[part]
        similarity[part], index[part] = search(query.descriptors(at, per_pixel), key, inverse_norms)
    return similarity, index


def _match_mutual(
    query: Picture, key: Picture, points: Tensor | None, per_pixel: bool, exhaustive: bool, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`_match`, and whether each match's own best query pixel is the one that it came from ``[P]``."""
    from . import gpu

    on_gpu = backend is not None or (not exhaustive and gpu.can_run(query, key)[0])
    if on_gpu and gpu.checks_mutual(query, key, points, backend):
        return gpu.match_mutual(query, key, points, per_pixel)
    values, index = _match(query, key, points, per_pixel, exhaustive, backend)
    there = index.clamp_min(0)
    there = torch.stack([there % key.size[1], there // key.size[1]], dim=1)
    _, back = _match(key, query, there, per_pixel, exhaustive, backend)
    if points is None:
        start = torch.arange(query.pixels, device=index.device)
    else:
        start = points[:, 1] * query.size[1] + points[:, 0]
    return values, index, (index >= 0) & (back == start)


def dense_match(
    query_map: Tensor,
    key_map: Tensor,
    query_size: list[int],
    key_size: list[int],
    points: Tensor | None,
    normalize: str,
    mutual: bool,
    exhaustive: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes as :func:`lift_fast.dense_match`.

    Args:
        exhaustive: look at every key pixel (reference and baseline).
        backend: "cuda" or "triton" for that kernel on the GPU and no other; None for the best there is.

    Raises:
        ValueError: for points outside the query picture.
        RuntimeError: if the kernel that was asked for by name cannot run; says why.
    """
    query_map, key_map = library.resolved(query_map), library.resolved(key_map)
    dtype = torch.float64 if query_map.dtype == torch.float64 else torch.float32
    query_hw, key_hw = (query_size[0], query_size[1]), (key_size[0], key_size[1])
    if points is not None:
        points = whole_pixels(library.resolved(points), query_hw)
    per_pixel = normalize == "pixel"
    similarity, indices, valid = [], [], []
    with full_matmul_precision():
        for b in range(query_map.shape[0]):
            cells = query_map[b].to(dtype), key_map[b].to(dtype)
            query, key = _pictures(cells, (query_hw, key_hw), normalize, exhaustive, backend)
            at = None if points is None else points[b]
            if mutual:
                values, index, good = _match_mutual(query, key, at, per_pixel, exhaustive, backend)
            else:
                values, index = _match(query, key, at, per_pixel, exhaustive, backend)
                good = index >= 0
            if not per_pixel and query.exponent is not None and key.exponent is not None:
                # In two steps, of which neither need leave the range for the result to stay in it.
                whole = -(query.exponent + key.exponent)
                half = whole // 2
                values = values.double() * _power_of_two(half) * _power_of_two(whole - half)
            similarity.append(values.to(dtype))
            indices.append(index)
            valid.append(good)
    index = torch.stack(indices)
    row = index // key_hw[1]
    # Without a match, index -1, both are -1.
    column = torch.where(index < 0, index, index - row * key_hw[1])
    return torch.stack(similarity), torch.stack([column, row], dim=-1), torch.stack(valid)


def _fake_dense_match(
    query_map: Tensor,
    key_map: Tensor,
    query_size: list[int],
    key_size: list[int],
    points: Tensor | None,
    normalize: str,
    mutual: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch = query_map.shape[0]
    count = query_size[0] * query_size[1] if points is None else points.shape[1]
    dtype = torch.float64 if query_map.dtype == torch.float64 else torch.float32
    return (
        query_map.new_empty((batch, count), dtype=dtype),
        query_map.new_empty((batch, count, 2), dtype=torch.int64),
        query_map.new_empty((batch, count), dtype=torch.bool),
    )


library.implement("dense_match", dense_match, fake=_fake_dense_match)
