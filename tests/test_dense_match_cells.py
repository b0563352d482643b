"""Which cells a pixel touches, and magnitudes of every kind: ``dense_match`` against float64 with each pixel's cells by hand."""

import math
from fractions import Fraction

import pytest
import torch

from lift_fast import dense_match
from lift_fast.ops import dense_match as op


def shares(cells, pixels):
    """For each pixel of an axis, the cells that have a part in it: {cell: weight}, exactly."""
    found = []
    for pixel in range(pixels):
        at = min(max((pixel + Fraction(1, 2)) * Fraction(cells, pixels) - Fraction(1, 2), Fraction(0)), Fraction(cells - 1))
        low = math.floor(at)
        found.append({cell: float(w) for cell, w in ((low, 1 - (at - low)), (low + 1, at - low)) if w > 0})
    return found


def descriptors(cells, size, normalize):
    """``[C, h, w]`` to ``[H * W, C]`` float64; NaN where a pixel touches what is not finite."""
    cells = cells.double()
    cells = torch.where(torch.isfinite(cells).all(0), cells, math.nan)
    if normalize == "grid":
        # In two steps, so that no square leaves the range.
        largest = cells.abs().amax(0).clamp_min(1e-300)
        norm = (cells / largest).norm(dim=0) * largest
        cells = torch.where(norm > 1e-12, cells / largest / (cells / largest).norm(dim=0), cells / 1e-12)
    rows = []
    for down in shares(cells.shape[1], size[0]):
        for right in shares(cells.shape[2], size[1]):
            rows.append(sum(v * w * cells[:, y, x] for y, v in down.items() for x, w in right.items()))
    rows = torch.stack(rows)
    if normalize == "pixel":
        largest = rows.abs().amax(1, keepdim=True).clamp_min(1e-300)
        unit = (rows / largest).norm(dim=1, keepdim=True)
        rows = torch.where(unit * largest > 1e-12, rows / largest / unit, rows / 1e-12)
    return rows


def check(query_map, key_map, query_size, key_size, normalize, points=None, mutual=False, tie=2e-5, match=dense_match):
    """``[C, h, w]`` maps whose similarities are about one."""
    result = match(
        query_map[None], key_map[None], query_size, key_size, points=points, normalize=normalize, mutual=mutual
    )
    query, key = descriptors(query_map, query_size, normalize), descriptors(key_map, key_size, normalize)
    table = query @ key.T
    table = table.masked_fill(table.isnan(), -math.inf)
    rows = torch.arange(len(table))
    if points is not None:
        rows = points[0, :, 1] * query_size[1] + points[0, :, 0]
    best = table[rows].amax(1)
    lost = best == -math.inf
    x, y = result.xy[0].unbind(1)
    assert torch.equal(x < 0, lost)
    assert torch.equal(y < 0, lost)
    assert bool((result.similarity[0][lost] == -math.inf).all())
    assert not bool(result.valid[0][lost].any())
    found = (y * key_size[1] + x)[~lost]
    chosen, rows = table[rows[~lost], found], rows[~lost]
    assert bool((chosen >= best[~lost] - tie).all())
    assert bool(((result.similarity[0][~lost].double() - chosen).abs() <= tie).all())
    if not mutual:
        assert bool(result.valid[0][~lost].all())
        return lost
    back = table[:, found]
    clear = (back >= back.amax(0) - 2 * tie).sum(0) == 1
    assert torch.equal(result.valid[0][~lost][clear], (back.argmax(0) == rows)[clear])
    return lost


# Odd and even enlargements, whole and broken, one cell, a cell to a pixel, fewer pixels than cells, primes.
SHAPES = [
    ((7, 7), (28, 28), (7, 7), (28, 28)),
    ((5, 4), (15, 20), (3, 5), (21, 15)),
    ((3, 5), (3, 5), (5, 3), (5, 3)),
    ((1, 5), (9, 11), (5, 1), (7, 9)),
    ((6, 7), (3, 2), (7, 5), (3, 4)),
    ((7, 9), (21, 3), (9, 7), (3, 35)),
    ((5, 3), (13, 17), (3, 7), (19, 11)),
]


def spoiled(shape, generator):
    """A map with each of its outer rows and columns spoiled at one cell in turn, then two anywhere."""
    h, w = shape
    for y, x in {(0, w // 2), (h - 1, w // 2), (h // 2, 0), (h // 2, w - 1), (min(1, h - 1), w // 2), (max(h - 2, 0), w - 1),
                 (h // 2, max(w - 2, 0)), (h // 2, min(1, w - 1))}:  # fmt: skip
        cells = torch.randn(6, h, w, generator=generator)
        cells[2, y, x] = math.nan if (y + x) % 2 else math.inf
        yield cells
    cells = torch.randn(6, h, w, generator=generator)
    for _ in range(2):
        y, x, c = (int(torch.randint(n, (), generator=generator)) for n in (h, w, 6))
        cells[c, y, x] = -math.inf
    yield cells


@pytest.mark.parametrize("native", ["plain", "native"])
@pytest.mark.parametrize("normalize", ["grid", "pixel", None])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_pixel_touches_the_cells_that_have_weight(shape, normalize, native, monkeypatch):
    monkeypatch.setenv("LIFT_FAST_DISABLE_NATIVE", str(int(native == "plain")))
    query_grid, query_size, key_grid, key_size = shape
    generator = torch.Generator().manual_seed(5)
    # Few points take another way than many.
    few = torch.tensor([[[x, y] for y in {0, query_size[0] - 1} for x in {0, query_size[1] // 2, query_size[1] - 1}]])
    tie = 2e-5 if normalize != "pixel" else 2e-4
    for query_map in spoiled(query_grid, generator):
        key_map = torch.randn(6, *key_grid, generator=generator)
        check(query_map, key_map, query_size, key_size, normalize, mutual=True, tie=tie)
        check(query_map, key_map, query_size, key_size, normalize, few, tie=tie)
        check(key_map, query_map, key_size, query_size, normalize, tie=tie)
    for key_map in spoiled(key_grid, generator):
        check(query_map, key_map, query_size, key_size, normalize, few, mutual=True, tie=tie)


def test_no_match_of_similarity_nan():
    torch.manual_seed(0)
    query_map, key_map = torch.randn(1, 24, 7, 7), torch.randn(1, 24, 7, 7)
    query_map[0, :, 3, 5] = math.nan
    result = dense_match(query_map, key_map, (28, 28), (28, 28), normalize="pixel")
    assert not bool((result.valid & result.similarity.isnan()).any())
    touched = [3 in down and 5 in right for down in shares(7, 28) for right in shares(7, 28)]
    assert torch.equal(result.valid[0], ~torch.tensor(touched))


LIMITS = {dtype: torch.finfo(dtype).max for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)}
SCALES = [
    *((torch.float32, scale) for scale in (1e-37, 1e-20, 1e-13, 1e18, 1e19, LIMITS[torch.float32])),
    *((torch.bfloat16, scale) for scale in (1e-20, 1e19, LIMITS[torch.bfloat16])),
    *((torch.float16, scale) for scale in (1e-6, LIMITS[torch.float16])),
    *((torch.float64, scale) for scale in (1e-300, 1e-20, 1e19, 1e160, LIMITS[torch.float64])),
]
FEW = torch.tensor([[[0, 0], [7, 3], [10, 12]]])


def scaled_maps(dtype, scale):
    """Elements of up to ``scale``, with a smaller cell and a zero one."""
    generator = torch.Generator().manual_seed(6)
    maps = []
    for grid in ((4, 5), (5, 3)):
        cells = torch.rand(6, *grid, generator=generator, dtype=torch.float64) * 2 - 1
        cells = cells / cells.abs().amax()
        cells[:, 1, 2] *= 2.0**-10
        cells[:, 3, 0] = 0
        maps.append((cells * scale).to(dtype))
    return maps


@pytest.mark.parametrize("native", ["plain", "native"])
@pytest.mark.parametrize("normalize", ["grid", "pixel"])
@pytest.mark.parametrize(("dtype", "scale"), SCALES, ids=str)
def test_cosines_of_every_magnitude(dtype, scale, normalize, native, monkeypatch):
    monkeypatch.setenv("LIFT_FAST_DISABLE_NATIVE", str(int(native == "plain")))
    query_map, key_map = scaled_maps(dtype, scale)
    # Norms below 1e-12 are taken for that: similarities are as much smaller.
    tie = 2e-5 * min(1.0, scale * 1e12) ** 2
    for points in (None, FEW):
        check(query_map, key_map, (13, 11), (9, 14), normalize, points, mutual=True, tie=max(tie, 1e-44))


@pytest.mark.parametrize("native", ["plain", "native"])
@pytest.mark.parametrize(("dtype", "scale"), SCALES, ids=str)
def test_products_of_every_magnitude(dtype, scale, native, monkeypatch):
    monkeypatch.setenv("LIFT_FAST_DISABLE_NATIVE", str(int(native == "plain")))
    maps = scaled_maps(dtype, scale)
    # The same in the middle of the range: a power of two changes no digit.
    exponent = math.frexp(scale)[1]
    middle = [torch.ldexp(cells.double(), torch.tensor(-exponent // 2)) for cells in maps]
    middle = [torch.ldexp(cells, torch.tensor(-exponent - -exponent // 2)) for cells in middle]
    query, key = (descriptors(cells, size, None) for cells, size in zip(middle, ((13, 11), (9, 14)), strict=True))
    for points in (None, FEW):
        rows = slice(None) if points is None else points[0, :, 1] * 11 + points[0, :, 0]
        table = (query @ key.T)[rows]
        result = dense_match(maps[0][None], maps[1][None], (13, 11), (9, 14), normalize=None, points=points)
        assert bool(result.valid.all())
        x, y = result.xy[0].unbind(1)
        chosen = table.gather(1, (y * 14 + x)[:, None])[:, 0]
        assert bool((chosen >= table.amax(1) - 1e-5).all())
        for _ in range(4):
            chosen = torch.ldexp(chosen, torch.tensor(exponent // 2 if _ % 2 else exponent - exponent // 2))
        expected = chosen.to(result.similarity.dtype)
        assert torch.equal(result.similarity[0].isinf(), expected.isinf())
        least = torch.finfo(expected.dtype).tiny
        torch.testing.assert_close(result.similarity[0], expected, rtol=1e-4, atol=least)


@pytest.mark.parametrize("native", ["plain", "native"])
@pytest.mark.parametrize("normalize", ["grid", "pixel", None])
@pytest.mark.parametrize(("dtype", "large"), [(torch.float32, 1e15), (torch.float32, 1e19), (torch.float64, 1e160)])
def test_a_cell_of_another_magnitude(dtype, large, normalize, native, monkeypatch):
    """One cell of 1e19 among ones; pixels that it has no part in keep every digit."""
    monkeypatch.setenv("LIFT_FAST_DISABLE_NATIVE", str(int(native == "plain")))
    generator = torch.Generator().manual_seed(7)
    query_map, key_map = (torch.randn(6, *grid, generator=generator, dtype=dtype) for grid in ((4, 5), (5, 3)))
    query_map[:, 2, 1] *= large
    key_map[:, 1, 1] *= large
    for points in (None, FEW):
        if normalize is not None:
            check(query_map, key_map, (13, 11), (9, 14), normalize, points, tie=2e-4)
            continue
        result = dense_match(query_map[None], key_map[None], (13, 11), (9, 14), normalize=None, points=points)
        query, key = descriptors(query_map, (13, 11), None), descriptors(key_map, (9, 14), None)
        rows = slice(None) if points is None else points[0, :, 1] * 11 + points[0, :, 0]
        table, tie = (query @ key.T)[rows], (2e-5 * query.norm(dim=1)[:, None] * key.norm(dim=1))[rows]
        x, y = result.xy[0].unbind(1)
        found = (y * 14 + x)[:, None]
        chosen, rounding = table.gather(1, found)[:, 0], tie.gather(1, found)[:, 0]
        assert bool((chosen + rounding >= (table - tie).amax(1)).all())
        error = (result.similarity[0].double() - chosen).abs()
        inside = chosen.abs() < torch.finfo(result.similarity.dtype).max
        assert bool((error <= rounding)[inside].all())
        assert bool(result.similarity[0][~inside].isinf().all())
        assert bool(result.valid.all())
