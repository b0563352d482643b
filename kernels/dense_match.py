"""``dense_match`` on the GPU: all query pixels between the same four cells search the key image together.

Similarities of pixels are bilinear in both images' cells, so those of the four query cells to a patch's four corners
bound every pixel of the group against every pixel of the patch. A program visits patches by descending bound until no
pixel can gain. It reads a table of cell similarities, which the caller computes.

With scales these are cosines, up to the query's norm: none in a patch exceeds the length of the query's projection onto
the span of its corners. That bound is much tighter, and a patch's pixels are only compared where it allows.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import memory
from . import launch
from .strips import SPAN, Band, Scales, Strips
from .tiles import cdiv, next_power_of_2

# Larger than every pixel's number.
NONE = tl.constexpr(0x7FFFFFFF)
_INFINITY = tl.constexpr(float("inf"))
# Rounding may lift a value above its corners: three interpolations, a scale, and the bound's own.
SLACK = 16 * 2.0**-23
# Below this the squares of values would leave the range of float32.
_LEAST_LENGTH = tl.constexpr(1e-15)
# As in csrc/dense_match_span.hpp, of the largest square of a norm: what float64 may round, and the least part of a
# corner that counts as a direction of its own.
_GRAM_ROUNDING = tl.constexpr(2.0**-40)
_LEAST_PIVOT = tl.constexpr(2.0**-36)
_EPSILON = tl.constexpr(2.0**-23)
_SPAN = tl.constexpr(SPAN)
# Patches whose bounds a program keeps at one time.
_CHUNK = 4096
# Patches whose spans a program computes.
_SPAN_BLOCK = 128


@triton.jit
def _pivot(square, most):
    """1 / the length of a corner's part at right angles to those before it, 0 if it adds no direction of its own."""
    spans = square > most * _LEAST_PIVOT
    return spans, tl.where(spans, 1.0 / tl.sqrt(tl.where(spans, square, 1.0)), 0.0)


@triton.jit
def _lost(spans, inverse, row, high):
    return tl.where(spans, tl.abs(inverse) * (6.0 * _EPSILON), high * tl.abs(row))


@triton.jit
def _left_out(spans, square, most, high):
    return tl.where(spans, 0.0, tl.sqrt(tl.maximum(square, 0.0) + most * (2.0 * _GRAM_ROUNDING)) * high)


@triton.jit
def spans_kernel(
    gram, y_low, y_high, x_low, x_high, scale_high, spans_out, width, cells, strips_x, patches,
    BLOCK: tl.constexpr
):  # fmt: skip
    """As ``span_of`` in csrc/dense_match_span.hpp."""
    patch = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = patch < patches
    strip_y, strip_x = patch // strips_x, patch % strips_x
    near_y = tl.load(y_low + strip_y, mask=inside, other=0) * width
    far_y = tl.load(y_high + strip_y, mask=inside, other=0) * width
    near_x = tl.load(x_low + strip_x, mask=inside, other=0)
    far_x = tl.load(x_high + strip_x, mask=inside, other=0)
    a, b, d, e = near_y + near_x, near_y + far_x, far_y + near_x, far_y + far_x
    # Each product lies with the cell that it begins at. Where a patch has one row or column of cells, corners coincide.
    below, across = near_y != far_y, near_x != far_x
    right, down = tl.where(across, cells, 0), tl.where(below, 2 * cells, 0)
    ae_of = tl.where(below & across, 3 * cells, right + down) + a
    bd_of = tl.where(below & across, 4 * cells, right + down) + tl.where(below, b, a)
    aa, bb = tl.load(gram + a, mask=inside, other=1.0), tl.load(gram + b, mask=inside, other=1.0)
    dd, ee = tl.load(gram + d, mask=inside, other=1.0), tl.load(gram + e, mask=inside, other=1.0)
    ab, de = tl.load(gram + right + a, mask=inside, other=1.0), tl.load(gram + right + d, mask=inside, other=1.0)
    ad, be = tl.load(gram + down + a, mask=inside, other=1.0), tl.load(gram + down + b, mask=inside, other=1.0)
    ae, bd = tl.load(gram + ae_of, mask=inside, other=1.0), tl.load(gram + bd_of, mask=inside, other=1.0)
    high = tl.load(scale_high + patch, mask=inside, other=1.0).to(tl.float64)
    most = tl.maximum(tl.maximum(aa, bb), tl.maximum(dd, ee))
    room = most * _GRAM_ROUNDING

    # Products of a, b - a, d - a and (e - d) - (b - a).
    with_a, with_b, with_d = aa - ab - ad + ae, ab - bb - bd + be, ad - bd - dd + de
    g_10, g_20, g_21 = ab - aa, ad - aa, bd - ab - ad + aa
    g_31, g_32 = with_b - with_a, with_d - with_a
    square_0, square_1, square_2 = aa - room, aa - 2.0 * ab + bb - room, aa - 2.0 * ad + dd - room
    square_3 = with_a - with_b - with_d + (ae - be - de + ee) - room

    spans_0, i_00 = _pivot(square_0, most)
    f_10 = i_00 * g_10
    square_1 -= f_10 * f_10
    spans_1, i_11 = _pivot(square_1, most)
    row_10 = -f_10 * i_00
    i_10 = row_10 * i_11
    f_20 = i_00 * g_20
    f_21 = i_11 * (g_21 - f_20 * f_10)
    square_2 -= f_20 * f_20 + f_21 * f_21
    spans_2, i_22 = _pivot(square_2, most)
    row_20, row_21 = -f_20 * i_00 - f_21 * i_10, -f_21 * i_11
    i_20, i_21 = row_20 * i_22, row_21 * i_22
    f_30 = i_00 * with_a
    f_31 = i_11 * (g_31 - f_30 * f_10)
    f_32 = i_22 * (g_32 - f_30 * f_20 - f_31 * f_21)
    square_3 -= f_30 * f_30 + f_31 * f_31 + f_32 * f_32
    spans_3, i_33 = _pivot(square_3, most)
    row_30 = -f_30 * i_00 - f_31 * i_10 - f_32 * i_20
    row_31, row_32 = -f_31 * i_11 - f_32 * i_21, -f_32 * i_22
    i_30, i_31, i_32 = row_30 * i_33, row_31 * i_33, row_32 * i_33

    lost_0 = _lost(spans_0, i_00, 1.0, high) + _lost(spans_1, i_10, row_10, high)
    lost_0 += _lost(spans_2, i_20, row_20, high) + _lost(spans_3, i_30, row_30, high)
    lost_1 = _lost(spans_1, i_11, 1.0, high) + _lost(spans_2, i_21, row_21, high) + _lost(spans_3, i_31, row_31, high)
    lost_2 = _lost(spans_2, i_22, 1.0, high) + _lost(spans_3, i_32, row_32, high)
    lost_3 = _lost(spans_3, i_33, 1.0, high)
    stretch = (
        _left_out(spans_0, square_0, most, high) + (1.0 + 4.0 * _EPSILON) + _left_out(spans_1, square_1, most, high)
    )
    stretch += _left_out(spans_2, square_2, most, high) + _left_out(spans_3, square_3, most, high)
    to = spans_out + patch * _SPAN
    tl.store(to, (i_00 * stretch).to(tl.float32), mask=inside)
    tl.store(to + 1, (i_10 * stretch).to(tl.float32), mask=inside)
    tl.store(to + 2, (i_11 * stretch).to(tl.float32), mask=inside)
    tl.store(to + 3, (i_20 * stretch).to(tl.float32), mask=inside)
    tl.store(to + 4, (i_21 * stretch).to(tl.float32), mask=inside)
    tl.store(to + 5, (i_22 * stretch).to(tl.float32), mask=inside)
    tl.store(to + 6, (i_30 * stretch).to(tl.float32), mask=inside)
    tl.store(to + 7, (i_31 * stretch).to(tl.float32), mask=inside)
    tl.store(to + 8, (i_32 * stretch).to(tl.float32), mask=inside)
    tl.store(to + 9, (i_33 * stretch).to(tl.float32), mask=inside)
    tl.store(to + 10, (lost_0 * stretch).to(tl.float32), mask=inside)
    tl.store(to + 11, (lost_1 * stretch).to(tl.float32), mask=inside)
    tl.store(to + 12, (lost_2 * stretch).to(tl.float32), mask=inside)
    tl.store(to + 13, (lost_3 * stretch).to(tl.float32), mask=inside)


@triton.jit
def _reaches(span, near, right, down, both, bar):
    """Whether a cosine of a patch can exceed ``bar``, by the query's projection onto the span of its corners."""
    first = tl.load(span) * near
    second = tl.load(span + 1) * near + tl.load(span + 2) * right
    third = tl.load(span + 3) * near + tl.load(span + 4) * right + tl.load(span + 5) * down
    fourth = tl.load(span + 6) * near + tl.load(span + 7) * right + tl.load(span + 8) * down + tl.load(span + 9) * both
    square = first * first + second * second + third * third + fourth * fourth
    lost = tl.load(span + 10) * tl.abs(near) + tl.load(span + 11) * tl.abs(right)
    lost += tl.load(span + 12) * tl.abs(down) + tl.load(span + 13) * tl.abs(both)
    least = bar - lost
    # Written so that NaN reaches.
    return ((least > _LEAST_LENGTH) & (square * (1.0 + 16.0 * _EPSILON) < least * least)) == 0


@triton.jit
def _bounds(
    row_0, row_1, row_2, row_3, chunk, y_low, y_high, x_low, x_high, width, strips_y, strips_x, scale_high, scale_low,
    CHUNK: tl.constexpr, POINTS: tl.constexpr
):  # fmt: skip
    """Bounds of a chunk of patches ``[CHUNK]``, -inf for patches that take no part, and their largest magnitude."""
    patch = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = patch < strips_y * strips_x
    strip_y, strip_x = patch // strips_x, patch % strips_x
    near_y = tl.load(y_low + strip_y, mask=inside, other=0) * width
    far_y = tl.load(y_high + strip_y, mask=inside, other=0) * width
    near_x = tl.load(x_low + strip_x, mask=inside, other=0)
    far_x = tl.load(x_high + strip_x, mask=inside, other=0)
    most = tl.full((CHUNK,), -_INFINITY, dtype=tl.float32)
    magnitude = tl.zeros((CHUNK,), dtype=tl.float32)
    # Becomes NaN when a similarity is not finite.
    zero_if_finite = tl.zeros((CHUNK,), dtype=tl.float32)
    # Not unrolled: all loads at once would need too many registers.
    for corner in tl.range(0, 4):
        cell = tl.where(corner < 2, near_y, far_y) + tl.where(corner % 2 == 0, near_x, far_x)
        for side in tl.static_range(4):
            if side == 0 or not POINTS:
                if side == 0:
                    row = row_0
                elif side == 1:
                    row = row_1
                elif side == 2:
                    row = row_2
                else:
                    row = row_3
                value = tl.load(row + cell, mask=inside, other=0.0)
                most = tl.maximum(most, value)
                magnitude = tl.maximum(magnitude, tl.abs(value))
                zero_if_finite += value * 0.0
    if scale_high is not None:
        high = tl.load(scale_high + patch, mask=inside, other=1.0)
        low = tl.load(scale_low + patch, mask=inside, other=1.0)
        most = most * tl.where(most > 0.0, high, low)
    takes_part = inside & (zero_if_finite == 0.0)
    bound = tl.where(takes_part, most, -_INFINITY)
    return bound, tl.max(tl.where(takes_part, magnitude, 0.0), axis=0)


@triton.jit
def _bilinear(a, b, c, d):
    """A bilinear function of the shares (right, down) from its four corners; exact if these are equal."""
    return a, b - a, c - a, (d - c) - (b - a)


@triton.jit
def _corner(row_0, row_1, row_2, row_3, cell, right, down, both):
    """Similarities of a group's pixels to one key cell."""
    near, along, across, mixed = _bilinear(
        tl.load(row_0 + cell), tl.load(row_1 + cell), tl.load(row_2 + cell), tl.load(row_3 + cell)
    )
    return near + along * right + across * down + mixed * both


@triton.jit
def _better(value, pixel, best, index):
    """The better of two matches, the lower pixel among equals; an infinite value takes no part."""
    wins = ((value > best) | ((value == best) & (pixel < index))) & (tl.abs(value) < _INFINITY)
    return tl.where(wins, value, best), tl.where(wins, pixel, index)


@triton.jit
def _visit(
    row_0, row_1, row_2, row_3, patch, right, down, both, best, index, y_low, y_high, y_first, y_weight, x_low, x_high,
    x_first, x_weight, width, pixels_x, strips_x, scale, spans, slack, KEYS: tl.constexpr
):  # fmt: skip
    """Look for better matches of the group's pixels in one patch."""
    strip_y, strip_x = patch // strips_x, patch % strips_x
    near_y, far_y = tl.load(y_low + strip_y) * width, tl.load(y_high + strip_y) * width
    near_x, far_x = tl.load(x_low + strip_x), tl.load(x_high + strip_x)
    near, along, across, mixed = _bilinear(
        _corner(row_0, row_1, row_2, row_3, near_y + near_x, right, down, both),
        _corner(row_0, row_1, row_2, row_3, near_y + far_x, right, down, both),
        _corner(row_0, row_1, row_2, row_3, far_y + near_x, right, down, both),
        _corner(row_0, row_1, row_2, row_3, far_y + far_x, right, down, both),
    )
    first_y, end_y = tl.load(y_first + strip_y), tl.load(y_first + strip_y + 1)
    first_x, end_x = tl.load(x_first + strip_x), tl.load(x_first + strip_x + 1)
    if scale is None:
        # Linear in each direction: one of the four outermost pixels is the largest.
        for end in tl.static_range(4):
            y = first_y if end < 2 else end_y - 1
            x = first_x if end % 2 == 0 else end_x - 1
            share_y, share_x = tl.load(y_weight + y), tl.load(x_weight + x)
            value = (near + across * share_y) + (along + mixed * share_y) * share_x
            best, index = _better(value, y * pixels_x + x, best, index)
    else:
        across_x = end_x - first_x
        reaches = _reaches(spans + patch.to(tl.int64) * _SPAN, near, along, across, mixed, best - slack)
        count = tl.where(tl.max(reaches.to(tl.int32), axis=0) > 0, (end_y - first_y) * across_x, 0)
        lane = tl.arange(0, KEYS)
        for start in tl.range(0, count, KEYS):
            inside = start + lane < count
            y, x = first_y + (start + lane) // across_x, first_x + (start + lane) % across_x
            share_y = tl.load(y_weight + y, mask=inside, other=0.0)[None, :]
            share_x = tl.load(x_weight + x, mask=inside, other=0.0)[None, :]
            factor = tl.load(scale + y * pixels_x + x, mask=inside, other=1.0)[None, :]
            value = (near[:, None] + across[:, None] * share_y) + (along[:, None] + mixed[:, None] * share_y) * share_x
            value = value * factor
            value = tl.where(inside[None, :] & (tl.abs(value) < _INFINITY), value, -_INFINITY)
            most = tl.max(value, axis=1)
            pixel = tl.min(tl.where(value == most[:, None], (y * pixels_x + x)[None, :], NONE), axis=1)
            best, index = _better(most, pixel, best, index)
    return best, index


@triton.jit
def match_kernel(
    table,
    query_y_low,
    query_y_high,
    query_y_first,
    query_y_weight,
    query_x_low,
    query_x_high,
    query_x_first,
    query_x_weight,
    y_low,
    y_high,
    y_first,
    y_weight,
    x_low,
    x_high,
    x_first,
    x_weight,
    scale,
    scale_high,
    scale_low,
    scale_largest,
    spans,
    similarity_out,
    index_out,
    query_pixels_x,
    table_top,
    table_left,
    table_width,
    first_strip_y,
    first_strip_x,
    strips_across,
    portions,
    width,
    cells,
    pixels_x,
    strips_y,
    strips_x,
    POINTS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    SLACK: tl.constexpr,
):
    lane = tl.arange(0, QUERIES)
    number = tl.program_id(0)
    if POINTS:
        row_0 = table + number.to(tl.int64) * cells
        row_1, row_2, row_3 = row_0, row_0, row_0
        exists = lane == 0
        out = number + lane.to(tl.int64)
        right = tl.zeros((QUERIES,), dtype=tl.float32)
        down = right
    else:
        group = number // portions
        strip_y, strip_x = first_strip_y + group // strips_across, first_strip_x + group % strips_across
        start_y, start_x = tl.load(query_y_first + strip_y), tl.load(query_x_first + strip_x)
        across = tl.load(query_x_first + strip_x + 1) - start_x
        count = (tl.load(query_y_first + strip_y + 1) - start_y) * across
        own = (number % portions) * QUERIES + lane
        exists = own < count
        y, x = start_y + own // across, start_x + own % across
        right = tl.load(query_x_weight + x, mask=exists, other=0.0)
        down = tl.load(query_y_weight + y, mask=exists, other=0.0)
        out = y.to(tl.int64) * query_pixels_x + x
        near_y = (tl.load(query_y_low + strip_y) - table_top) * table_width
        far_y = (tl.load(query_y_high + strip_y) - table_top) * table_width
        near_x, far_x = tl.load(query_x_low + strip_x) - table_left, tl.load(query_x_high + strip_x) - table_left
        row_0 = table + (near_y + near_x).to(tl.int64) * cells
        row_1 = table + (near_y + far_x).to(tl.int64) * cells
        row_2 = table + (far_y + near_x).to(tl.int64) * cells
        row_3 = table + (far_y + far_x).to(tl.int64) * cells
    both = right * down
    # Lanes without a pixel have a best value that no bound reaches.
    best = tl.where(exists, -_INFINITY, _INFINITY)
    index = tl.full((QUERIES,), NONE, dtype=tl.int32)

    # Short strips leave their last portions empty.
    chunks = tl.where(tl.max(exists.to(tl.int32), axis=0) > 0, CHUNKS, 0)
    magnitude = 0.0
    top, first = -_INFINITY, 0
    bound = tl.full((CHUNK,), -_INFINITY, dtype=tl.float32)
    lanes = tl.arange(0, CHUNK)
    for chunk in tl.range(0, chunks):
        bound, largest = _bounds(
            row_0, row_1, row_2, row_3, chunk, y_low, y_high, x_low, x_high, width, strips_y, strips_x, scale_high,
            scale_low, CHUNK, POINTS
        )  # fmt: skip
        magnitude = tl.maximum(magnitude, largest)
        most = tl.max(bound, axis=0)
        if most > top:
            top = most
            first = chunk * CHUNK + tl.min(tl.where(bound == most, lanes, CHUNK), axis=0)
    slack = magnitude * SLACK
    if scale is not None:
        slack = slack * tl.load(scale_largest)
    if CHUNKS > 1 and top > -_INFINITY:
        # The most promising patch first: few patches of the earlier chunks then remain.
        best, index = _visit(
            row_0, row_1, row_2, row_3, first, right, down, both, best, index, y_low, y_high, y_first, y_weight, x_low,
            x_high, x_first, x_weight, width, pixels_x, strips_x, scale, spans, slack, KEYS
        )  # fmt: skip
    for chunk in tl.range(0, chunks):
        if CHUNKS > 1:
            bound, _ = _bounds(
                row_0, row_1, row_2, row_3, chunk, y_low, y_high, x_low, x_high, width, strips_y, strips_x, scale_high,
                scale_low, CHUNK, POINTS
            )  # fmt: skip
        most = tl.max(bound, axis=0)
        # Each visit removes a patch, so this ends on flat images too; an equal bound may hold a lower pixel.
        while (most > -_INFINITY) & (most + slack >= tl.min(best, axis=0)):
            at = tl.min(tl.where(bound == most, lanes, CHUNK), axis=0)
            best, index = _visit(
                row_0, row_1, row_2, row_3, chunk * CHUNK + at, right, down, both, best, index, y_low, y_high, y_first,
                y_weight, x_low, x_high, x_first, x_weight, width, pixels_x, strips_x, scale, spans, slack, KEYS
            )  # fmt: skip
            bound = tl.where(lanes == at, -_INFINITY, bound)
            most = tl.max(bound, axis=0)
    tl.store(similarity_out + out, best, mask=exists)
    tl.store(index_out + out, tl.where(index == NONE, -1, index).to(tl.int64), mask=exists)


def spans(gram: Tensor, strips: tuple[Strips, Strips], high: Tensor) -> Tensor:
    """What bounds the cosines in an image's patches, ``Scales.spans``.

    Args:
        gram: ``[5, h, w]`` float64 contiguous, the products of neighbouring cells in ``Norms.gram``.
        strips: the image's strips along y and x.
        high: ``Scales.high``.
    """
    y, x = strips
    patches = y.count * x.count
    written = memory.new_empty(high, (patches, SPAN))
    launch.run(
        spans_kernel,
        (cdiv(patches, _SPAN_BLOCK),),
        gram,
        y.low,
        y.high,
        x.low,
        x.high,
        high,
        written,
        x.cells,
        y.cells * x.cells,
        x.count,
        patches,
        BLOCK=_SPAN_BLOCK,
        num_warps=4,
    )
    return written


def match(
    table: Tensor,
    key: tuple[Strips, Strips],
    scales: Scales | None,
    similarity: Tensor,
    index: Tensor,
    query: tuple[Strips, Strips] | None = None,
    band: Band | None = None,
) -> None:
    """Write the best key pixel of each query pixel, -1 and -inf where there is none.

    Args:
        table: ``[rows, h * w]`` float32 contiguous, similarities to the key's cells: a row for each point, or for each
            cell of the query's ``band``.
        key: the key image's strips along y and x.
        scales: of the key's pixels, or None for ones.
        similarity, index: float32, int64: ``[points]``, or ``[H * W]`` of the query image, written for the pixels of
        ``band``.
        query, band: None for points.
    """
    y, x = key
    patches = y.count * x.count
    chunk = max(16, min(_CHUNK, next_power_of_2(patches)))
    if query is None or band is None:
        query, band = key, Band((0, 0), (0, 1), 0, 0, 1)
        points, queries, portions, programs = True, 1, 1, table.shape[0]
    else:
        largest = query[0].longest * query[1].longest
        # The outermost strips are longer than the others and take several programs.
        usual = cdiv(query[0].pixels, query[0].cells) * cdiv(query[1].pixels, query[1].cells)
        points, queries = False, min(256, next_power_of_2(min(usual, largest)))
        portions = cdiv(largest, queries)
        programs = portions * (band.strips_y[1] - band.strips_y[0]) * (band.strips_x[1] - band.strips_x[0])
    scale = (None,) * 5
    if scales is not None:
        scale = (scales.pixel, scales.high, scales.low, scales.largest, scales.spans)
    launch.run(
        match_kernel,
        (programs,),
        table,
        *(part for axis in (*query, y, x) for part in (axis.low, axis.high, axis.first, axis.weight)),
        *scale,
        similarity,
        index,
        query[1].pixels,
        band.top,
        band.left,
        band.width,
        band.strips_y[0],
        band.strips_x[0],
        band.strips_x[1] - band.strips_x[0],
        portions,
        x.cells,
        y.cells * x.cells,
        x.pixels,
        y.count,
        x.count,
        POINTS=points,
        QUERIES=queries,
        KEYS=128 if points else 16,
        CHUNK=chunk,
        CHUNKS=cdiv(patches, chunk),
        SLACK=SLACK,
        num_warps=8 if chunk > 2048 else 4,
    )
