"""``dense_match`` in plain PyTorch: the exhaustive definition, and the same result from the patches that can win."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import memory
from .bilinear import StretchedMap, pixel_grid, scales_of

# Bytes of similarities at one time; small enough to stay in a processor's cache.
_BUDGET = 4 << 20
# Numbers of most promising patches to evaluate, stage by stage, for the queries whose match is not yet proven. About 4
# patches per query can hold the match on real photographs; flat similarities need more.
_STAGES = (8, 64, 512)


def match(
    query: StretchedMap, key: StretchedMap, points: Tensor | None, per_pixel: bool, exhaustive: bool = False
) -> tuple[Tensor, Tensor]:
    """Similarity ``[P]`` and key pixel index ``[P]`` of ``points [P, 2]``, -inf and -1 without a match.

    ``points`` None matches every pixel; ``per_pixel`` divides descriptors by their norms. The index counts from the
    first key pixel to search. Every backend returns the same.
    """
    search = match_exhaustive if exhaustive else match_bounded
    inverse_norms = key.inverse_norms() if per_pixel else None
    count = query.pixels if points is None else len(points)
    # Query pixels whose descriptors exist at one time.
    step = max(1, 4 * _BUDGET // (query.tokens.shape[1] * query.tokens.element_size()))
    similarity = memory.new_empty(query.tokens, count)
    index = memory.empty(count, dtype=torch.int64, device=similarity.device)
    for start in range(0, count, step):
        part = slice(start, min(start + step, count))
        at = pixel_grid(query.size, part.start, part.stop, query.tokens.device) if points is None else points[part]
        similarity[part], index[part] = search(query.descriptors(at, per_pixel), key, inverse_norms)
    return similarity, index


def match_exhaustive(descriptors: Tensor, key: StretchedMap, inverse_norms: Tensor | None) -> tuple[Tensor, Tensor]:
    """Every key pixel for every query: ``[P, C]`` to similarity [P] and pixel index [P] or -1."""
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
        # ``max`` returns the first of equal values: the lowest row-major pixel.
        best, position = values.max(1)
        similarity.append(best)
        index.append(position)
    best = torch.cat(similarity)
    return best, torch.where(best == -torch.inf, -1, torch.cat(index))


def match_bounded(descriptors: Tensor, key: StretchedMap, inverse_norms: Tensor | None) -> tuple[Tensor, Tensor]:
    """:func:`match_exhaustive` from the patches that can win; exhaustive only where the bound proves nothing."""
    patches = _Patches(key, inverse_norms)
    pixels_per_patch = patches.row_pixels.shape[1] * patches.column_pixels.shape[1]
    best = memory.new_empty(descriptors, descriptors.shape[0])
    best_index = memory.empty(descriptors.shape[0], dtype=torch.int64, device=descriptors.device)
    still_open = torch.arange(descriptors.shape[0], device=descriptors.device)
    # Bounds with the smallest norm of a patch are loose: later stages would prove little more than the first.
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


class _Patches:
    """The key image cut into patches: the pixels that share their four corner cells, padded to one rectangle."""

    def __init__(self, key: StretchedMap, inverse_norms: Tensor | None) -> None:
        self.key = key
        strips = key.strips()
        self.rows, self.columns = (axis._replace(low=axis.low.long(), high=axis.high.long()) for axis in strips)
        self.row_pixels, self.column_pixels = (axis.members() for axis in strips)
        y, x = key.axes()
        self.row_weights, self.column_weights = y.weight[self.row_pixels], x.weight[self.column_pixels]
        self.scales = None if inverse_norms is None else scales_of(inverse_norms, strips)

    def match(self, descriptors: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Similarity and pixel index of the best pixel in the ``count`` most promising patches; whether proven."""
        coarse = descriptors @ self.key.tokens.t()
        coarse.masked_fill_(~torch.isfinite(coarse), torch.nan)
        maps = coarse.unflatten(1, self.key.grid)
        # A corner that is not finite spoils every pixel of its patch, so only finite patches need a bound.
        tall = torch.maximum(maps[:, self.rows.low], maps[:, self.rows.high])
        bound = torch.maximum(tall[:, :, self.columns.low], tall[:, :, self.columns.high]).flatten(1)
        if self.scales is not None:
            bound = torch.where(bound > 0, bound * self.scales.high, bound * self.scales.low)
        bound = bound.nan_to_num_(-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        # Interpolation rounds: a value may exceed its corners by a few units in the last place.
        slack = 8 * torch.finfo(bound.dtype).eps * bound.abs().amax(1).clamp_max(torch.finfo(bound.dtype).max)
        top, patch = bound.topk(min(count + 1, bound.shape[1]), dim=1)
        patch = patch[:, :count]
        values, pixel = self._evaluate(coarse, patch // self.columns.count, patch % self.columns.count)
        best = values.amax(1)
        index = torch.where(values == best[:, None], pixel, self.key.pixels).amin(1)
        proven = top[:, count] + slack < best if bound.shape[1] > count else torch.ones_like(best, dtype=torch.bool)
        return best, torch.where(best == -torch.inf, -1, index), proven

    def _evaluate(self, coarse: Tensor, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
        """Values at all pixels of the patches ``row, column [P, T]``, from ``coarse [P, h * w]``, and their indices."""
        width = self.key.grid[1]

        def corner(y: Tensor, x: Tensor) -> Tensor:
            return coarse.gather(1, y[row] * width + x[column])[..., None, None]

        x, y = self.column_weights[column][..., None, :], self.row_weights[row][..., :, None]
        top = torch.lerp(corner(self.rows.low, self.columns.low), corner(self.rows.low, self.columns.high), x)
        bottom = torch.lerp(corner(self.rows.high, self.columns.low), corner(self.rows.high, self.columns.high), x)
        values = torch.lerp(top, bottom, y)
        pixel = self.row_pixels[row][..., :, None] * self.key.size[1] + self.column_pixels[column][..., None, :]
        if self.scales is not None:
            values = values * self.scales.pixel[pixel]
        return values.masked_fill_(~torch.isfinite(values), -torch.inf).flatten(1), pixel.flatten(1)
