"""The cells that a pixel uses, and every magnitude: ``dense_match`` against explicit interpolation in float64."""

import math
from fractions import Fraction

import pytest
import torch

from lift_fast import dense_match
from lift_fast.ops.dense_match import op


def axis_share(cells, pixels, pixel):
    """The cells of an axis that a pixel uses: {cell: weight}, exact."""
    at = min(max((pixel + Fraction(1, 2)) * Fraction(cells, pixels) - Fraction(1, 2), Fraction(0)), Fraction(cells - 1))
    low = math.floor(at)
    return {cell: float(w) for cell, w in ((low, 1 - (at - low)), (low + 1, at - low)) if w > 0}


def shares(cells, pixels):
    """``[pixels, cells]`` float64."""
    found = torch.zeros(pixels, cells, dtype=torch.float64)
    for pixel in range(pixels):
        for cell, weight in axis_share(cells, pixels, pixel).items():
            found[pixel, cell] = weight
    return found


def descriptors(cells, size, normalize):
    """``[C, h, w]`` to ``[H * W, C]`` float64; NaN where a pixel uses a cell that is not finite."""
    cells = cells.double()
    bad = ~torch.isfinite(cells).all(0)
    cells = torch.where(bad, 0.0, cells)
    if normalize == "grid":
        # In two steps, so that no square leaves the range.
        largest = cells.abs().amax(0).clamp_min(1e-300)
        norm = (cells / largest).norm(dim=0) * largest
        cells = torch.where(norm > 1e-12, cells / largest / (cells / largest).norm(dim=0), cells / 1e-12)
    down, right = (shares(n, pixels) for n, pixels in zip(cells.shape[1:], size, strict=True))
    rows = torch.einsum("ij,kl,cjl->ikc", down, right, cells).flatten(0, 1)
    touched = torch.einsum("ij,kl,jl->ik", (down > 0).double(), (right > 0).double(), bad.double()).flatten()
    rows[touched > 0] = math.nan
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
    rows, columns = {0, min(1, h - 1), max(h - 2, 0), h - 1}, {0, min(1, w - 1), max(w - 2, 0), w - 1}
    for y, x in [*((y, w // 2) for y in sorted(rows)), *((h // 2, x) for x in sorted(columns))]:
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
    # Few points run on another path than many.
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
    touched = (shares(7, 28)[:, 3, None] > 0) & (shares(7, 28)[:, 5] > 0)
    assert torch.equal(result.valid[0], ~touched.flatten())


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
    # Norms below 1e-12 count as 1e-12, which makes similarities smaller by that ratio.
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
        for step in (exponent // 2, exponent // 2, exponent - exponent // 2, exponent - exponent // 2):
            chosen = torch.ldexp(chosen, torch.tensor(step))
        expected = chosen.to(result.similarity.dtype)
        assert torch.equal(result.similarity[0].isinf(), expected.isinf())
        least = torch.finfo(expected.dtype).tiny
        torch.testing.assert_close(result.similarity[0], expected, rtol=1e-4, atol=least)


@pytest.mark.parametrize("native", ["plain", "native"])
@pytest.mark.parametrize("normalize", ["grid", "pixel", None])
@pytest.mark.parametrize(("dtype", "large"), [(torch.float32, 1e15), (torch.float32, 1e19), (torch.float64, 1e160)])
def test_a_cell_of_another_magnitude(dtype, large, normalize, native, monkeypatch):
    """One cell of 1e19 among ones; pixels that do not use it keep every digit."""
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


def similarity_at(query_map, key_map, query_size, key_size, points, pixels):
    """``[P, N]`` in float64 of single pixels, (x, y) in both images."""

    def rows(cells, size, at):
        cells = cells.double() / cells.double().norm(dim=0)
        found = []
        for x, y in at.tolist():
            down, right = axis_share(cells.shape[1], size[0], y), axis_share(cells.shape[2], size[1], x)
            found.append(sum(v * w * cells[:, i, j] for i, v in down.items() for j, w in right.items()))
        return torch.stack(found)

    return rows(query_map, query_size, points) @ rows(key_map, key_size, pixels).T


@pytest.mark.parametrize("native", ["plain", "native"])
@pytest.mark.parametrize("normalize", ["grid", "pixel", None])
@pytest.mark.parametrize("most", [1, 3 * 23, 4 * 23 + 1])
def test_key_images_in_parts(most, normalize, native, monkeypatch):
    """Rows of pixels that are searched one after the other; ties and NaN across their borders."""
    monkeypatch.setenv("LIFT_FAST_DISABLE_NATIVE", str(int(native == "plain")))
    generator = torch.Generator().manual_seed(8)
    query_map, key_map = torch.randn(5, 4, 3, generator=generator), torch.randn(5, 5, 4, generator=generator)
    key_map[:, 3] = key_map[:, 2]
    key_map[1, 2, 3] = query_map[0, 1, 1] = math.nan
    for points in (None, torch.tensor([[[0, 0], [12, 16], [5, 9]]])):
        whole, parts = [], []
        for found, limit in ((whole, 1 << 30), (parts, most)):
            monkeypatch.setattr(op, "_MOST_PIXELS", limit)
            monkeypatch.setattr(op, "_MOST_SCALED", limit)
            arguments = query_map[None], key_map[None], (17, 13), (31, 23)
            found.append(dense_match(*arguments, points=points, normalize=normalize, mutual=True))
        for one, other in zip(whole[0], parts[0], strict=True):
            assert torch.equal(one, other)
        check(query_map, key_map, (17, 13), (31, 23), normalize, points, tie=2e-4)


@pytest.mark.parametrize("normalize", ["grid", None])
def test_more_pixels_than_32_bits_number(normalize):
    side = 46341
    generator = torch.Generator().manual_seed(9)
    small, large = torch.randn(4, 3, 3, generator=generator), torch.randn(4, 3, 2, generator=generator)
    small, large = small / small.norm(dim=0), large / large.norm(dim=0)
    sizes = (20, 20), (side, side)
    points = torch.tensor([[0, 0], [5, 7], [19, 19], [10, 13]])
    result = dense_match(small[None], large[None], *sizes, points=points[None], normalize=normalize)
    # Within a patch a bilinear function is largest at an outermost pixel: those on either side of each centre.
    outer = []
    for cells in large.shape[1:]:
        centres = (math.floor((c + 0.5) * side / cells - 0.5) for c in range(cells))
        outer.append([0, side - 1, *(c + d for c in centres for d in (-1, 0, 1))])
    pixels = torch.cartesian_prod(torch.tensor(outer[1]), torch.tensor(outer[0]))
    table = similarity_at(small, large, *sizes, points, pixels)
    chosen = similarity_at(small, large, *sizes, points, result.xy[0]).diagonal()
    torch.testing.assert_close(result.similarity[0].double(), table.amax(1), rtol=0, atol=1e-6)
    torch.testing.assert_close(chosen, table.amax(1), rtol=0, atol=1e-6)
    # The other direction: an image of so many query pixels, which contain the match back.
    far = torch.tensor([[0, 0], [side - 1, side - 1], [15000, 40000]])
    result = dense_match(large[None], small[None], *sizes[::-1], points=far[None], normalize=normalize, mutual=True)
    here = torch.cartesian_prod(torch.arange(20), torch.arange(20))
    table = similarity_at(large, small, *sizes[::-1], far, here)
    torch.testing.assert_close(result.similarity[0].double(), table.amax(1), rtol=0, atol=1e-6)
    back = similarity_at(small, large, *sizes, result.xy[0], pixels).amax(1)
    # Beyond the outermost centres the first pixel wins.
    leads_back = (result.similarity[0] >= back - 1e-6) & torch.tensor([True, False, False])
    assert torch.equal(result.valid[0], leads_back)
    with pytest.raises(ValueError, match=r"query_size \(46341, 46341\) has 2\^31 pixels or more"):
        dense_match(large[None], small[None], *sizes[::-1], normalize=normalize)
