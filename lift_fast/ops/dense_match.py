"""``dense_match``: matches the pixels of one picture to all pixels of another, from coarse descriptor maps.

Bilinear interpolation commutes with the dot product: the similarities of one query descriptor to all key pixels are
the bilinear enlargement of its similarities to the coarse key cells, so pixel descriptors are never formed. And a
bilinear patch never exceeds its four corners, so only patches with a corner above the best value can hold the match.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import library
from .nearest import NORM_FLOOR, full_matmul_precision, unit_rows

library.define(
    "dense_match(Tensor query_map, Tensor key_map, int[] query_size, int[] key_size, Tensor? points, str normalize,"
    " bool mutual) -> (Tensor, Tensor, Tensor)"
)

# Bytes of similarities that exist at one time; small enough to stay in a processor's cache.
_BUDGET = 4 << 20
# How many of the most promising patches to evaluate before the bound is checked, for the queries still open. About 4
# patches per query can hold the match on real photographs; flat similarities need more.
_STAGES = (8, 64, 512)


class Axis(NamedTuple):
    """Bilinear interpolation along one axis: pixel = cell[low] + weight * (cell[high] - cell[low])."""

    low: Tensor
    high: Tensor
    weight: Tensor


def bilinear_axis(position: Tensor, cells: int, pixels: int, dtype: torch.dtype) -> Axis:
    """The rule of ``torch.nn.functional.interpolate``, align_corners=False: pixel centres, clamped at the border."""
    # In float64: far from the origin float32 would leave the weight only a few correct digits.
    source = ((position.double() + 0.5) * (cells / pixels) - 0.5).clamp_(0, cells - 1)
    low = source.floor().long()
    return Axis(low, (low + 1).clamp_(max=cells - 1), (source - low).to(dtype))


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
    x = bilinear_axis(points[:, 0], grid[1], size[1], tokens.dtype)
    y = bilinear_axis(points[:, 1], grid[0], size[0], tokens.dtype)
    low, high, weight = y.low * grid[1], y.high * grid[1], x.weight[:, None]
    top = torch.lerp(tokens[low + x.low], tokens[low + x.high], weight)
    bottom = torch.lerp(tokens[high + x.low], tokens[high + x.high], weight)
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
    limit = torch.tensor([size[1], size[0]], device=points.device)
    # Written so that NaN fails too.
    outside = ~((pixels >= 0) & (pixels < limit)).all(-1)
    if bool(outside.any()):
        raise ValueError(
            f"points must lie inside the query picture of (H, W) = {tuple(size)}: 0 <= x < W and 0 <= y < H; "
            f"{int(outside.sum())} of {outside.numel()} do not, the first is {points[outside][0].tolist()}"
        )
    return pixels.long()


class Picture(NamedTuple):
    """One picture's descriptors: ``tokens [h * w, C]`` on ``grid`` (h, w), stretched over ``size`` (H, W) pixels."""

    tokens: Tensor
    grid: tuple[int, int]
    size: tuple[int, int]

    @property
    def pixels(self) -> int:
        return self.size[0] * self.size[1]

    def axes(self) -> tuple[Axis, Axis]:
        device, dtype = self.tokens.device, self.tokens.dtype
        y, x = (
            bilinear_axis(torch.arange(n, device=device), cells, n, dtype)
            for cells, n in zip(self.grid, self.size, strict=True)
        )
        return y, x

    def inverse_norms(self) -> Tensor:
        """``[H, W]``: what the interpolated descriptor of each pixel is multiplied by to have length one."""
        step = max(1, _BUDGET // (4 * self.tokens.shape[1] * self.tokens.element_size()))
        norms = []
        for start in range(0, self.pixels, step):
            at = pixel_grid(self.size, start, min(start + step, self.pixels), self.tokens.device)
            norms.append(sample_bilinear(self.tokens, self.grid, self.size, at).norm(dim=1))
        return torch.cat(norms).clamp_min(NORM_FLOOR).reciprocal().view(self.size)


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
        device, cells, pixels = key.tokens.device, key.grid[axis], key.size[axis]
        position = torch.arange(pixels, device=device)
        rule = bilinear_axis(position, cells, pixels, key.tokens.dtype)
        _, count = torch.unique_consecutive(rule.low, return_counts=True)
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
    best = descriptors.new_empty(descriptors.shape[0])
    best_index = torch.empty(descriptors.shape[0], dtype=torch.int64, device=descriptors.device)
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


def _match(
    query: Picture, key: Picture, points: Tensor | None, per_pixel: bool, exhaustive: bool
) -> tuple[Tensor, Tensor]:
    """Match ``points [P, 2]`` (None: all pixels) of one picture; returns similarity [P], pixel index [P] or -1."""
    search = match_exhaustive if exhaustive else match_bounded
    inverse_norms = key.inverse_norms() if per_pixel else None
    count = query.pixels if points is None else points.shape[0]
    # Descriptors of this many query pixels exist at one time.
    step = max(1, 4 * _BUDGET // (query.tokens.shape[1] * query.tokens.element_size()))
    similarity, index = query.tokens.new_empty(count), torch.empty(count, dtype=torch.int64, device=query.tokens.device)
    for start in range(0, count, step):
        part = slice(start, min(start + step, count))
        at = pixel_grid(query.size, part.start, part.stop, query.tokens.device) if points is None else points[part]
        descriptors = sample_bilinear(query.tokens, query.grid, query.size, at)
        if per_pixel:
            descriptors = unit_rows(descriptors)
        similarity[part], index[part] = search(descriptors, key, inverse_norms)
    return similarity, index


def dense_match(
    query_map: Tensor,
    key_map: Tensor,
    query_size: list[int],
    key_size: list[int],
    points: Tensor | None,
    normalize: str,
    mutual: bool,
    exhaustive: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes as :func:`lift_fast.dense_match`; ``exhaustive`` looks at every key pixel (reference and baseline).

    Raises:
        ValueError: for points outside the query picture.
    """
    query_map, key_map = query_map.detach(), key_map.detach()
    dtype = torch.float64 if query_map.dtype == torch.float64 else torch.float32
    query_hw, key_hw = (query_size[0], query_size[1]), (key_size[0], key_size[1])
    query_grid, key_grid = (query_map.shape[2], query_map.shape[3]), (key_map.shape[2], key_map.shape[3])
    if points is not None:
        points = whole_pixels(points, query_hw)
    query_tokens = query_map.flatten(2).transpose(1, 2).to(dtype)
    key_tokens = key_map.flatten(2).transpose(1, 2).to(dtype)
    if normalize == "grid":
        query_tokens, key_tokens = unit_rows(query_tokens), unit_rows(key_tokens)
    per_pixel = normalize == "pixel"
    similarity, indices, valid = [], [], []
    with full_matmul_precision():
        for b in range(query_map.shape[0]):
            query = Picture(query_tokens[b].contiguous(), query_grid, query_hw)
            key = Picture(key_tokens[b].contiguous(), key_grid, key_hw)
            at = None if points is None else points[b]
            values, index = _match(query, key, at, per_pixel, exhaustive)
            good = index >= 0
            if mutual:
                there = index.clamp_min(0)
                there = torch.stack([there % key_hw[1], there // key_hw[1]], dim=1)
                _, back = _match(key, query, there, per_pixel, exhaustive)
                start = (
                    torch.arange(query.pixels, device=index.device) if at is None else at[:, 1] * query_hw[1] + at[:, 0]
                )
                good &= back == start
            similarity.append(values)
            indices.append(index)
            valid.append(good)
    index = torch.stack(indices)
    xy = torch.stack([index % key_hw[1], index // key_hw[1]], dim=-1)
    return torch.stack(similarity), torch.where(index[..., None] < 0, -1, xy), torch.stack(valid)


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
