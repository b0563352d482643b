"""A few points in the native core: their descriptors, and the products of these with all cells of a map."""

import pytest
import torch
from map_layouts import laid_out

from lift_fast import _native, memory
from lift_fast.ops.dense_match import bilinear
from lift_fast.ops.nearest.plain import unit_rows

if not _native.can_run()[0]:
    pytest.skip(_native.can_run()[1], allow_module_level=True)

native = _native.require()
ISAS = native.cpu_isas()


def map_sample(image, points, normalize):
    """The first step of matching a few points: their descriptors ``[P, C]``."""
    cells, points = image.tokens, points.contiguous()
    descriptors = memory.new_empty(cells, (len(points), cells.shape[1]))
    native.map_sample_f32(
        points.data_ptr(),
        cells.data_ptr(),
        cells.stride(1),
        cells.stride(0),
        *descriptors.shape,
        image.grid,
        image.size,
        image.unnormalized,
        normalize,
        descriptors.data_ptr(),
        torch.get_num_threads(),
    )
    return descriptors


def map_products(descriptors, cells, normalize, isa):
    """The second step: products ``[P, n]`` with the cells ``[n, C]``, which may lie in either order."""
    if 1 not in cells.stride() or 0 in cells.stride():
        cells = cells.contiguous()
    table = memory.new_empty(descriptors, (len(descriptors), len(cells)))
    native.map_products_f32(
        descriptors.data_ptr(),
        cells.data_ptr(),
        cells.stride(1),
        cells.stride(0),
        *descriptors.shape,
        len(cells),
        normalize,
        table.data_ptr(),
        torch.get_num_threads(),
        isa,
    )
    return table


@pytest.mark.parametrize("unnormalized", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("grid", "size"), [((1, 1), (3, 4)), ((5, 3), (40, 31)), ((2, 9), (2, 1)), ((7, 7), (7, 7))])
def test_map_sample(grid, size, normalize, unnormalized):
    for c in (1, 6, 33):
        for scale in (1e-14, 1.0, 1e25):
            cells = torch.randn(grid[0] * grid[1], c) * scale
            at = bilinear.pixel_grid(size, 0, size[0] * size[1], torch.device("cpu"))
            at = at[torch.randperm(len(at))]
            exact = unit_rows(cells.double()) if unnormalized else cells.double()
            expected = bilinear.sample_bilinear(exact, grid, size, at)
            # Interpolation rounds on the scale of the longest cell; normalising magnifies that where cells cancel.
            limit = torch.full((len(at), 1), 4e-7 * float(exact.norm(dim=1).max()), dtype=torch.float64)
            if normalize:
                limit /= expected.norm(dim=1, keepdim=True).clamp_min(1e-12)
                expected = unit_rows(expected)
            for there in laid_out(cells):
                ours = map_sample(bilinear.StretchedMap(there, grid, size, unnormalized), at, normalize)
                assert bool(((ours.double() - expected).abs() <= limit).all()), (c, scale, there.stride())


def test_map_sample_of_cells_that_are_not_finite():
    cells = torch.randn(12, 4)
    cells[5, 2], cells[11, 0] = torch.nan, torch.inf
    at = bilinear.pixel_grid((9, 8), 0, 72, torch.device("cpu"))
    for unnormalized in (True, False):
        ours = map_sample(bilinear.StretchedMap(cells, (3, 4), (9, 8), unnormalized), at, False)
        plain = bilinear.sample_bilinear(unit_rows(cells) if unnormalized else cells, (3, 4), (9, 8), at)
        assert torch.equal(ours.isfinite().all(1), plain.isfinite().all(1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": -1}, "negative"),
        ({"grid": (0, 2)}, "sides"),
        ({"size": (4, 0)}, "sides"),
        ({"size": (3, 4)}, "inside the image"),
        ({"size": (4, 3)}, "inside the image"),
        ({"map": 0}, "null"),
        ({"points": 0}, "null"),
        ({"cell_stride": -1}, "strides"),
        ({"threads": 0}, "threads"),
    ],
)
def test_map_sample_refuses_bad_arguments(changes, message):
    points, cells, descriptors = torch.tensor([[3, 3], [0, 0]]), torch.randn(4, 3), torch.empty(2, 3)
    arguments = {
        "points": points.data_ptr(),
        "map": cells.data_ptr(),
        "channel_stride": 1,
        "cell_stride": 3,
        "count": 2,
        "c": 3,
        "grid": (2, 2),
        "size": (4, 4),
        "normalize_cells": True,
        "normalize_result": True,
        "descriptors": descriptors.data_ptr(),
        "threads": 1,
    }
    native.map_sample_f32(**arguments)
    with pytest.raises(ValueError, match=message):
        native.map_sample_f32(**{**arguments, **changes})


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("count", [1, 5, 8, 13])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.usefixtures("one_thread")
def test_map_products(normalize, count, isa):
    for c in (0, 1, 3, 16, 37, 193):
        for n in (1, 4, 63, 65, 131, 259):
            descriptors, cells = torch.randn(count, c), torch.randn(n, c)
            exact = cells.double()
            if normalize:
                exact = unit_rows(exact)
            expected = descriptors.double() @ exact.T
            limit = (c + 8) * 6e-8 * max(1e-30, float(descriptors.double().norm(dim=1).max() * exact.norm(dim=1).max()))
            for cells_there in laid_out(cells):
                table = map_products(descriptors, cells_there, normalize, isa)
                assert float((table.double() - expected).abs().max()) <= limit, (c, n, cells_there.stride())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("scale", [1e-30, 1e-13, 1e18, 1e30])
def test_map_products_normalizes_every_magnitude(scale, isa):
    descriptors, cells = torch.randn(3, 24), torch.randn(70, 24).clamp(-3, 3) * scale
    cells[5], cells[6, 3], cells[7, 2] = 0, torch.nan, torch.inf
    expected = descriptors.double() @ unit_rows(cells.double()).T
    for cells_there in laid_out(cells):
        table = map_products(descriptors, cells_there, True, isa)
        assert bool((table[:, 5] == 0).all())
        assert bool(table[:, 6:8].isnan().all())
        torch.testing.assert_close(table.double(), expected, rtol=0, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": -1}, "negative"),
        ({"cells": 2**31}, "at most"),
        ({"threads": 0}, "threads"),
        ({"map": 0}, "null"),
        ({"channel_stride": 2}, "stride"),
        ({"channel_stride": 3}, "stride"),
        ({"cell_stride": 7}, "stride"),
        ({"cell_stride": -4}, "stride"),
        ({"isa": "sse9"}, "sse9"),
    ],
)
def test_map_products_refuses_bad_arguments(changes, message):
    descriptors, cells, table = torch.randn(2, 3), torch.randn(3, 4), torch.empty(2, 4)
    arguments = {
        "descriptors": descriptors.data_ptr(),
        "map": cells.data_ptr(),
        "channel_stride": 4,
        "cell_stride": 1,
        "count": 2,
        "c": 3,
        "cells": 4,
        "normalize": True,
        "table": table.data_ptr(),
        "threads": 1,
    }
    native.map_products_f32(**arguments)
    with pytest.raises(ValueError, match=message):
        native.map_products_f32(**{**arguments, **changes})
