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
