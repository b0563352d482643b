"""The operator ``dense_match``: prepares maps, selects a search, splits large key images, and checks mutual matches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import library
from ..nearest.plain import full_matmul_precision, unit_rows
from . import cpu, gpu, plain
from .bilinear import (
    StretchedMap,
    cells_apart,
    index_of,
    points_of,
    power_of_two,
    unique_pixels,
    whole_pixels,
)

library.define(
    "dense_match(Tensor query_map, Tensor key_map, int[] query_size, int[] key_size, Tensor? points, str normalize,"
    " bool mutual, float tolerance=0) -> (Tensor, Tensor, Tensor)"
)

# Key pixels searched together: if the search or its scales store numbers for each pixel, and if not, where the limit is
# that 32 bits number the pixels.
_MOST_SCALED, _MOST_PIXELS = 1 << 24, 1 << 30
# Powers of two: with norms of float32 cells in between, their products, also with scales, stay well within its range.
_LEAST_NORM, _MOST_NORM = -40, 60
# For each dtype: the power of two to which a map's largest number is scaled, so that products stay well within the
# range; and the power of two of the largest such factor.
_RAISED = {torch.float32: (40, 127), torch.float64: (450, 1000)}


def _ordinary(rows: Tensor) -> bool:
    """Whether products of these float32 cells neither overflow nor vanish."""
    # The faster way for each layout.
    norm = torch.linalg.vector_norm(rows, dim=1) if rows.is_contiguous() else (rows * rows).sum(1).sqrt_()
    strange = (norm < 2.0**_LEAST_NORM) | (norm > 2.0**_MOST_NORM)
    if not bool(strange.any()):
        return True
    rest = rows[strange]
    # Zero products are exact, and cells that are not finite are ignored.
    return not bool((torch.isfinite(rest).all(1) & (rest != 0).any(1)).any())


def _in_range(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens times a power of two (exact) that keeps their products in range, and its exponent []."""
    top, most = _RAISED[tokens.dtype]
    exponent = torch.frexp(tokens.nan_to_num(0.0, 0.0, 0.0).abs().amax())[1]
    shift = (top - exponent).clamp_(max=most)
    return tokens * power_of_two(shift).to(tokens.dtype), shift


def stretch(
    cells: Tensor, size: tuple[int, int], normalize: str, native: bool = False, scaled: bool = False
) -> StretchedMap:
    """Prepare the map ``cells [C, h, w]``, float32 or float64, over ``size`` (H, W) pixels.

    ``normalize`` "grid" divides the cells by their norms. ``native`` keeps the memory layout for the native core, which
    normalises the cells itself. For ``scaled`` see :func:`_in_range`.
    """
    grid = (cells.shape[1], cells.shape[2])
    tokens = cells.flatten(1).t()
    if native:
        return StretchedMap(tokens, grid, size, unnormalized=normalize == "grid")
    if normalize == "grid":
        return StretchedMap(unit_rows(tokens).contiguous(), grid, size)
    if not scaled:
        return StretchedMap(tokens.contiguous(), grid, size)
    tokens, exponent = _in_range(tokens.contiguous())
    return StretchedMap(tokens, grid, size, exponent=exponent)


def _stretched(
    maps: Sequence[Tensor], sizes: Sequence[tuple[int, int]], normalize: str, exhaustive: bool, backend: str | None
) -> tuple[StretchedMap, StretchedMap]:
    """Prepare the query's and the key's map ``[C, h, w]``."""
    # On the CPU the values can be inspected without waiting for a device; elsewhere maps are always scaled.
    inspect = backend is None and maps[0].device.type == "cpu" and maps[0].dtype == torch.float32
    native = inspect and not exhaustive and cpu.can_run(maps[0])[0]
    query, key = (stretch(*each, normalize, native, not inspect) for each in zip(maps, sizes, strict=True))
    if normalize == "grid" or not inspect or (_ordinary(query.tokens) and _ordinary(key.tokens)):
        return query, key
    # float64 has room for every product of float32.
    return _stretched([cells.double() for cells in maps], sizes, normalize, exhaustive, backend)


def _choose(
    query: StretchedMap, key: StretchedMap, exhaustive: bool, backend: str | None
) -> Callable[..., tuple[Tensor, Tensor]]:
    """A backend's search, with the signature of :func:`.plain.match`."""
    if backend is not None:
        return partial(gpu.match, backend=backend)
    if exhaustive:
        return partial(plain.match, exhaustive=True)
    if cpu.can_run(query.tokens)[0]:
        return cpu.match
    return gpu.match if gpu.can_run(query, key)[0] else plain.match


def _match(
    query: StretchedMap,
    key: StretchedMap,
    points: Tensor | None,
    per_pixel: bool,
    exhaustive: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """Match ``points [P, 2]`` (None: all pixels) of one image; returns similarity [P], pixel index [P] or -1."""
    # Rows of key pixels searched at a time.
    height, width = key.size
    step = max(1, _MOST_PIXELS // width)
    search = _choose(query, key._replace(part=(0, min(step, height))), exhaustive, backend)
    if per_pixel or exhaustive or search is plain.match:
        step = max(1, _MOST_SCALED // width)
    if step >= height:
        return search(query, key, points, per_pixel)
    similarity, index = [], []
    for begin in range(0, height, step):
        part = key._replace(part=(begin, min(begin + step, height)))
        values, found = search(query, part, points, per_pixel)
        similarity.append(values)
        index.append(torch.where(found < 0, found, found + begin * width))
    # ``max`` returns the first of equal values: the lowest pixel.
    best, which = torch.stack(similarity).max(0)
    return best, torch.stack(index).gather(0, which[None])[0]


def _both_ways(
    query: StretchedMap,
    key: StretchedMap,
    points: Tensor | None,
    per_pixel: bool,
    exhaustive: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`_match`, and the query pixel ``[P]`` that is the best one of each match, or -1."""
    chosen = [_choose(*maps, exhaustive, backend) is cpu.match for maps in ((query, key), (key, query))]
    whole = max(query.pixels, key.pixels) <= (_MOST_SCALED if per_pixel else _MOST_PIXELS)
    if all(chosen) and whole and cpu.shares_table(query, key, points):
        return cpu.match_both_ways(query, key, points, per_pixel)
    values, index = _match(query, key, points, per_pixel, exhaustive, backend)
    # Repeated matches cost a GPU less than counting them.
    on_gpu = index.is_cuda or backend is not None
    targets, which = (index.clamp_min(0), None) if on_gpu else unique_pixels(index, key.pixels)
    _, back = _match(key, query, points_of(targets, key.size), per_pixel, exhaustive, backend)
    if which is not None:
        back = back[which] if len(targets) else index
    return values, index, torch.where(index < 0, -1, back)


def _match_mutual(
    query: StretchedMap,
    key: StretchedMap,
    points: Tensor | None,
    per_pixel: bool,
    exhaustive: bool,
    backend: str | None,
    tolerance: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`_match`, and whether each match's own best query pixel is the original one ``[P]``.

    Or at most ``tolerance`` cells away from it.
    """
    on_gpu = backend is not None or (not exhaustive and gpu.can_run(query, key)[0])
    if on_gpu and tolerance == 0 and gpu.checks_mutual(query, key, points, backend):
        return gpu.match_mutual(query, key, points, per_pixel)
    values, index, back = _both_ways(query, key, points, per_pixel, exhaustive, backend)
    start = torch.arange(query.pixels, device=index.device) if points is None else index_of(points, query.size)
    if tolerance == 0:
        return values, index, (back >= 0) & (back == start)
    at = points_of(start, query.size)
    near = cells_apart(points_of(back, query.size), at, query.grid, query.size) <= tolerance
    return values, index, (back >= 0) & near


def dense_match(
    query_map: Tensor,
    key_map: Tensor,
    query_size: list[int],
    key_size: list[int],
    points: Tensor | None,
    normalize: str,
    mutual: bool,
    tolerance: float = 0.0,
    exhaustive: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator; shapes as :func:`lift_fast.dense_match`.

    Args:
        exhaustive: compare every key pixel (reference and baseline).
        backend: "cuda" or "triton" selects that GPU kernel; None the best available one.

    Raises:
        ValueError: for points outside the query image.
        RuntimeError: if ``backend`` cannot run; gives the reason.
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
            maps = query_map[b].to(dtype), key_map[b].to(dtype)
            query, key = _stretched(maps, (query_hw, key_hw), normalize, exhaustive, backend)
            at = None if points is None else points[b]
            if mutual:
                values, index, good = _match_mutual(query, key, at, per_pixel, exhaustive, backend, tolerance)
            else:
                values, index = _match(query, key, at, per_pixel, exhaustive, backend)
                good = index >= 0
            if not per_pixel and query.exponent is not None and key.exponent is not None:
                # In two steps: one factor may overflow although the result does not.
                whole = -(query.exponent + key.exponent)
                half = whole // 2
                values = values.double() * power_of_two(half) * power_of_two(whole - half)
            similarity.append(values.to(dtype))
            indices.append(index)
            valid.append(good)
    index = torch.stack(indices)
    xy = points_of(index, key_hw).masked_fill_((index < 0)[..., None], -1)
    return torch.stack(similarity), xy, torch.stack(valid)


def match_both_ways(
    query_map: Tensor,
    key_map: Tensor,
    query_size: tuple[int, int],
    key_size: tuple[int, int],
    points: Tensor | None,
    normalize: str,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Matches of the query's pixels, and the matches of these, from one table of similarities where that is faster.

    Arguments as :func:`dense_match`, of one image (``B = 1``) and with ``normalize`` "grid" or "pixel". Without
    ``points`` the host never waits for a GPU.

    Returns:
        similarity ``[1, P]``; xy ``[1, P, 2]`` int64 in the key image; and the query pixels ``[1, P, 2]`` that are the
        best ones of those; (-1, -1) where there is none.
    """
    dtype = torch.float64 if query_map.dtype == torch.float64 else torch.float32
    points = None if points is None else whole_pixels(points, query_size)[0]
    with torch.no_grad(), full_matmul_precision():
        maps = query_map.detach()[0].to(dtype), key_map.detach()[0].to(dtype)
        query, key = _stretched(maps, (query_size, key_size), normalize, False, backend)
        similarity, index, back = _both_ways(query, key, points, normalize == "pixel", backend=backend)
    xy, back_xy = (
        points_of(at, size).masked_fill_((at < 0)[..., None], -1)
        for at, size in ((index, key_size), (back, query_size))
    )
    return similarity.to(dtype)[None], xy[None], back_xy[None]


def match_pixels(
    maps: Sequence[Tensor],
    size_a: tuple[int, int],
    size_b: tuple[int, int],
    at: Tensor,
    normalize: str,
    mutual: bool,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Match the (x, y) pixels ``at [..., 2]`` of A to those of B, and back.

    ``maps`` are two of ``[1, C, h, w]`` over ``size_a`` and ``size_b`` (H, W). As many pixels as A has, in two
    dimensions, are all of them in their order; for these the host never waits for a GPU.

    Returns:
        xy ``[..., 2]`` int64, similarity, distance and valid ``[...]``, as :func:`lift_fast.match_images` has them.
    """
    start = at.reshape(1, -1, 2)
    points = None if start.shape[1] == size_a[0] * size_a[1] and at.dim() == 3 else start
    similarity, xy, back = match_both_ways(maps[0], maps[1], size_a, size_b, points, normalize, backend)
    found = xy[..., 0] >= 0
    distance = cells_apart(back, start, (maps[0].shape[2], maps[0].shape[3]), size_a)
    distance = distance.masked_fill(back[..., 0] < 0, torch.inf)
    valid = found & (distance <= 1) if mutual else found
    shape = at.shape[:-1]
    return xy.view(*shape, 2), similarity.to(torch.float32).view(shape), distance.view(shape), valid.view(shape)


def _fake_dense_match(
    query_map: Tensor, key_map: Tensor, query_size: list[int], key_size: list[int], points: Tensor | None, *_: Any
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
