"""The native core's dense matcher against the exhaustive plain version, on every instruction set that this CPU has."""

from pathlib import Path

import pytest
import torch
from brute_force import DEGENERATE, degenerate_cells
from hypothesis import given, settings
from hypothesis import strategies as st
from map_layouts import laid_out

from lift_fast import _native
from lift_fast.ops.dense_match import bilinear, cpu, op
from lift_fast.ops.nearest.plain import unit_rows

if not _native.can_run()[0]:
    pytest.skip(_native.can_run()[1], allow_module_level=True)

native = _native.require()
ISAS = native.cpu_isas()
ROOT = Path(__file__).resolve().parents[1]


def image(tokens, grid, size):
    return bilinear.StretchedMap(tokens, grid, size)


def exact(query, key, points, per_pixel):
    """Similarities of every pair in float64, [P, H * W], and the scale on which a product of float32 numbers rounds."""
    at = bilinear.pixel_grid(query.size, 0, query.pixels, torch.device("cpu")) if points is None else points
    every = bilinear.pixel_grid(key.size, 0, key.pixels, torch.device("cpu"))
    a = bilinear.sample_bilinear(query.tokens.double(), query.grid, query.size, at)
    b = bilinear.sample_bilinear(key.tokens.double(), key.grid, key.size, every)
    if per_pixel:
        a, b = unit_rows(a), unit_rows(b)
    table = a @ b.T
    scale = 1.0
    for rows in (query.tokens, key.tokens) if not per_pixel else ():
        finite = rows[rows.isfinite().all(1)]
        scale *= float(finite.double().norm(dim=1).max()) if len(finite) else 1.0
    return table.masked_fill(~torch.isfinite(table), -torch.inf), scale


def check(query, key, points, per_pixel, limit=2e-6):
    similarity, index = cpu.match(query, key, points, per_pixel)
    table, scale = exact(query, key, points, per_pixel)
    best = table.amax(1)
    lost = best == -torch.inf
    assert torch.equal(index < 0, lost)
    assert bool((similarity[lost] == -torch.inf).all())
    assert bool((index < key.pixels).all())
    chosen = table[~lost].gather(1, index[~lost, None])[:, 0]
    assert bool((chosen >= best[~lost] - limit * scale).all())
    assert bool((similarity[~lost] - chosen).abs().le(limit * scale).all())


def random_images(generator, grids, sizes, channels):
    tokens = [torch.randn(h * w, channels, generator=generator) for h, w in grids]
    return [image(t, g, s) for t, g, s in zip(tokens, grids, sizes, strict=True)]


sides = st.integers(1, 7)
pixels = st.integers(1, 40)


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=60, deadline=None)
@given(
    grids=st.tuples(st.tuples(sides, sides), st.tuples(sides, sides)),
    sizes=st.tuples(st.tuples(pixels, pixels), st.tuples(pixels, pixels)),
    channels=st.sampled_from((2, 9)),
    seed=st.integers(0, 1 << 30),
)
def test_equals_brute_force(isa, grids, sizes, channels, seed):
    generator = torch.Generator().manual_seed(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIFT_FAST_CPU_ISA", isa)
        query, key = random_images(generator, grids, sizes, channels)
        check(query, key, None, False)
        # Few points take the other path: similarities of their own descriptors.
        few = bilinear.pixel_grid(query.size, 0, min(3, query.pixels), torch.device("cpu")).flip(0)
        check(query, key, few, False)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("per_pixel", [False, True])
def test_large_enough_to_skip_patches(isa, per_pixel, monkeypatch):
    monkeypatch.setenv("LIFT_FAST_CPU_ISA", isa)
    # Strips of more and of fewer pixels than a vector, and images smaller than their map.
    for sizes in (((61, 50), (70, 83)), ((40, 40), (17, 400)), ((33, 21), (9, 7))):
        query, key = random_images(torch.Generator().manual_seed(1), ((16, 24), (20, 19)), sizes, 16)
        check(query, key, None, per_pixel, 2e-5 if per_pixel else 2e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", DEGENERATE)
@pytest.mark.parametrize("channels", [1, 2, 3, 40])
def test_cosines_of_degenerate_maps(kind, channels, isa, monkeypatch):
    """The bounds divide by how far a patch's corners lie apart."""
    monkeypatch.setenv("LIFT_FAST_CPU_ISA", isa)
    generator = torch.Generator().manual_seed(channels)
    grids, sizes = ((7, 21), (6, 19)), ((33, 64), (31, 77))
    query, key = (
        image(degenerate_cells(kind, generator, h * w, channels).contiguous(), (h, w), size)
        for (h, w), size in zip(grids, sizes, strict=True)
    )
    similarity, index = cpu.match(query, key, None, True)
    table, _ = exact(query, key, None, True)
    assert bool((index >= 0).all())
    chosen = table.gather(1, index[:, None])[:, 0]
    # Where cells nearly cancel, a cosine is only as good as float32 sums of long cells.
    lengths = []
    for m in (query, key):
        at = bilinear.pixel_grid(m.size, 0, m.pixels, index.device)
        rows = bilinear.sample_bilinear(m.tokens.double(), m.grid, m.size, at)
        lengths.append(rows.norm(dim=1).clamp_min(1e-12))
    longest = [float(m.tokens.double().norm(dim=1).max()) for m in (query, key)]
    room = 4e-6 * (longest[0] / lengths[0]) * (longest[1] / lengths[1][index])
    sure = room < 1e-3
    assert bool(((similarity - chosen).abs() <= room)[sure].all())
    best = table - 4e-6 * (longest[0] / lengths[0])[:, None] * (longest[1] / lengths[1])[None]
    assert bool((chosen + room >= best.amax(1))[sure].all())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("per_pixel", [False, True])
def test_a_floor_changes_nothing(per_pixel, isa, monkeypatch):
    """Neither one just below the match nor one that no match reaches."""
    monkeypatch.setenv("LIFT_FAST_CPU_ISA", isa)
    query, key = random_images(torch.Generator().manual_seed(5), ((6, 9), (8, 21)), ((31, 40), (50, 81)), 8)
    search = cpu._Search.of(query, key, per_pixel)
    similarity, index = search.match(None)
    for floor in (similarity - 1e-5, similarity.clone(), similarity + 1, torch.full_like(similarity, torch.nan)):
        ours = search.match(None, floor)
        assert torch.equal(ours[0], similarity)
        assert torch.equal(ours[1], index)


@pytest.mark.parametrize("isa", ISAS)
def test_the_result_does_not_depend_on_threads_or_bands(isa, monkeypatch):
    monkeypatch.setenv("LIFT_FAST_CPU_ISA", isa)
    query, key = random_images(torch.Generator().manual_seed(2), ((9, 11), (12, 7)), ((50, 60), (70, 40)), 8)
    expected = cpu.match(query, key, None, False)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            for ours, theirs in zip(cpu.match(query, key, None, False), expected, strict=True):
                assert torch.equal(ours, theirs)
    finally:
        torch.set_num_threads(threads)
    # One or two rows of query cells at a time; products of another shape may round in another way.
    for budget in (1, 4 * 84 * 11 * 3):
        monkeypatch.setattr(cpu, "_TABLE_BUDGET", budget)
        similarity, index = cpu.match(query, key, None, False)
        torch.testing.assert_close(similarity, expected[0], rtol=0, atol=1e-5)
        assert float((index != expected[1]).float().mean()) < 1e-2


@pytest.mark.parametrize("isa", ISAS)
def test_more_points_than_are_grouped_at_one_time(isa, monkeypatch):
    """More than 2^20, of an image and as a list; each is matched as it is alone."""
    monkeypatch.setenv("LIFT_FAST_CPU_ISA", isa)
    sizes = (1033, 1021), (97, 64)
    query, key = random_images(torch.Generator().manual_seed(6), ((9, 8), (7, 6)), sizes, 8)
    similarity, index = cpu.match(query, key, None, False)
    some = torch.randperm(query.pixels)[:70]
    few = cpu.match(query, key, bilinear.points_of(some, query.size), False)
    check(query, key, bilinear.points_of(some, query.size), False)
    torch.testing.assert_close(similarity[some], few[0], rtol=0, atol=1e-5)
    order = torch.randint(query.pixels, ((1 << 20) + 5000,))
    listed = cpu.match(query, key, bilinear.points_of(order, query.size), False)
    assert torch.equal(listed[0], similarity[order])
    assert torch.equal(listed[1], index[order])


@pytest.mark.parametrize("isa", ISAS)
def test_equal_similarities_go_to_the_lowest_pixel(isa, monkeypatch):
    monkeypatch.setenv("LIFT_FAST_CPU_ISA", isa)
    ones, more = torch.ones(35, 1), torch.ones(12, 1)
    query, key = image(more, (3, 4), (20, 30)), image(ones, (5, 7), (40, 30))
    for points in (None, torch.tensor([[29, 19], [0, 0]])):
        similarity, index = cpu.match(query, key, points, False)
        assert bool((index == 0).all())
        assert bool((similarity == 1).all())
    # A plateau inside: the first pixel beyond the centre of cell (1, 1).
    cells = torch.zeros(4, 4)
    cells[1:3, 1:3] = 1
    query, key = image(torch.ones(1, 1), (1, 1), (1, 1)), image(cells.view(16, 1), (4, 4), (16, 16))
    assert cpu.match(query, key, None, False)[1].tolist() == [6 * 16 + 6]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("per_pixel", [False, True])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_cells_that_are_not_finite_take_no_part(poison, per_pixel, isa, monkeypatch):
    monkeypatch.setenv("LIFT_FAST_CPU_ISA", isa)
    query, key = random_images(torch.Generator().manual_seed(3), ((6, 5), (7, 6)), ((30, 20), (41, 37)), 5)
    query.tokens[7, 2] = key.tokens[20, 1] = poison
    check(query, key, None, per_pixel, 1e-4 if per_pixel else 2e-6)
    key.tokens[:] = poison
    similarity, index = cpu.match(query, key, None, per_pixel)
    assert bool((index == -1).all())
    assert bool((similarity == -torch.inf).all())


@pytest.mark.parametrize("scale", [1e-25, 1e-13, 1e15, 1e25])
def test_magnitudes(scale):
    maps = torch.randn(2, 1, 6, 5, 7, generator=torch.Generator().manual_seed(4))
    size = [23, 31]
    expected = op.dense_match(*maps, size, size, None, "grid", False, exhaustive=True)
    for points in (None, torch.tensor([[[3, 4], [30, 22]]])):
        ours = op.dense_match(*(maps * scale), size, size, points, "grid", False)
        reference = op.dense_match(*(maps * scale), size, size, points, "grid", False, exhaustive=True)
        torch.testing.assert_close(ours[0], reference[0], rtol=2e-6, atol=2e-6 if scale > 1e-12 else 1e-30)
    if scale > 1e-12:
        torch.testing.assert_close(op.dense_match(*(maps * scale), size, size, None, "grid", False)[0], expected[0])


def axis(cells=3, pixels=9, low=(0, 1, 2), high=(1, 2, 2), first=(0, 3, 6, 9)):
    tensors = [torch.tensor(part, dtype=torch.int32) for part in (low, high, first)]
    return (cells, pixels, len(low), *tensors, torch.rand(pixels))


def call(**changes):
    """A search of four points; tensors in place of addresses."""
    points = torch.tensor([[0, 0], [8, 8], [4, 2], [3, 7]])
    arguments = {
        "table": torch.randn(9, 9),
        "rows": 3,
        "top": 0,
        "end": 3,
        "query_y": axis(),
        "query_x": axis(),
        "points": points,
        "count": 4,
        "floor": 0,
        "y": axis(),
        "x": axis(),
        "scale": torch.rand(9, 9),
        "gram": torch.rand(5, 9).double(),
        "query_inverse": torch.rand(9, 9),
        "query_gram": torch.rand(5, 9).double(),
        "similarity": torch.zeros(81),
        "index": torch.zeros(81, dtype=torch.int64),
        "threads": 1,
        **changes,
    }

    def address(part):
        if isinstance(part, tuple):
            return tuple(map(address, part))
        return part.data_ptr() if isinstance(part, torch.Tensor) else part

    native.dense_match_f32(**{name: address(part) for name, part in arguments.items()})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"isa": "sse9"}, "sse9"),
        ({"threads": 0}, "threads"),
        ({"count": -1}, "negative"),
        ({"rows": 0}, "rows of cells"),
        ({"rows": 4}, "rows of cells"),
        ({"rows": 2}, "lacks rows"),
        ({"top": -1}, "rows of cells"),
        ({"end": 4}, "rows of cells"),
        ({"top": 1, "rows": 1, "end": 2}, "lacks rows"),
        ({"points": torch.tensor([[0, 0], [9, 8], [4, 2], [3, 7]])}, "inside the image"),
        ({"points": torch.tensor([[0, 0], [8, -1], [4, 2], [3, 7]])}, "inside the image"),
        ({"points": 0}, "every pixel"),
        ({"scale": 0}, "go together"),
        ({"gram": 0}, "do not matter"),
        ({"query_gram": 0}, "go together"),
        ({"query_inverse": 0}, "go together"),
        ({"scale": 0, "gram": 0}, "do not matter"),
        ({"scale": 0, "query_gram": 0, "query_inverse": 0}, "go together"),
        ({"table": 0}, "null"),
        ({"index": 0}, "null"),
        ({"y": (1, 2)}, "an axis is"),
        ({"x": axis(high=(1, 2, 3))}, "a cell that does not exist"),
        ({"query_x": axis(low=(-1, 1, 2))}, "a cell that does not exist"),
        ({"y": axis(first=(0, 3, 3, 9))}, "strips must ascend"),
        ({"query_y": axis(first=(1, 3, 6, 9))}, "cover the pixels"),
        ({"y": axis(first=(0, 3, 6, 8))}, "cover the pixels"),
        ({"y": axis(cells=0)}, "needs cells"),
    ],
)
def test_bad_arguments_are_refused(changes, message):
    call()
    with pytest.raises(ValueError, match=message):
        call(**changes)


def norms_call(**changes):
    cells, grams, inverse = torch.randn(9, 4), torch.empty(5, 9).double(), torch.empty(9, 9)
    tensors = axis()
    parts = tuple(part.data_ptr() if isinstance(part, torch.Tensor) else part for part in tensors)
    arguments = {
        "map": cells.data_ptr(),
        "channel_stride": 1,
        "cell_stride": 4,
        "c": 4,
        "y": parts,
        "x": parts,
        "least": 1e-12,
        "gram": grams.data_ptr(),
        "inverse": inverse.data_ptr(),
        "threads": 1,
        **changes,
    }
    native.descriptor_norms_f32(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"isa": "sse9"}, "sse9"),
        ({"threads": 0}, "threads"),
        ({"c": -1}, "channels"),
        ({"map": 0}, "null"),
        ({"gram": 0}, "null"),
        ({"inverse": 0}, "null"),
        ({"cell_stride": -1}, "strides"),
        ({"y": (1, 2)}, "an axis is"),
    ],
)
def test_norms_refuse_bad_arguments(changes, message):
    norms_call()
    with pytest.raises(ValueError, match=message):
        norms_call(**changes)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("grid", "size"), [((1, 1), (3, 4)), ((5, 3), (41, 31)), ((2, 9), (2, 27)), ((7, 7), (7, 7))])
def test_norms(grid, size, isa, monkeypatch):
    """Of every pixel, in every layout, against the norms of interpolated float64 descriptors."""
    monkeypatch.setenv("LIFT_FAST_CPU_ISA", isa)
    for c in (1, 6, 33):
        cells = torch.randn(grid[0] * grid[1], c)
        # Two neighbours that cancel almost, and a cell that is not finite.
        if len(cells) > 1:
            cells[-1] = -cells[-2] * 1.0001
        for poisoned in (False, True):
            if poisoned:
                cells[0, 0] = torch.nan
            at = bilinear.pixel_grid(size, 0, size[0] * size[1], torch.device("cpu"))
            norm = bilinear.sample_bilinear(cells.double(), grid, size, at).norm(dim=1)
            # Weights are float32, so a norm between cells that cancel is only as good as these.
            room = 1e-6 * norm + 2e-7 * float(cells[1:].double().norm(dim=1).max() if len(cells) > 1 else 1.0)
            for there in laid_out(cells):
                inverse = cpu._scale(image(there, grid, size), True).inverse.flatten()
                finite = norm.isfinite()
                assert torch.equal(inverse.isfinite(), finite)
                assert bool(((1 / inverse.double() - norm).abs() <= room)[finite].all()), (c, there.stride())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("table_bytes", [0, 3 * 4 * 63, 1 << 20])
def test_points_in_portions_and_in_every_layout(table_bytes, isa, monkeypatch):
    monkeypatch.setenv("LIFT_FAST_CPU_ISA", isa)
    monkeypatch.setattr(cpu, "_TABLE_BUDGET", table_bytes)
    sizes = (41, 30), (23, 37)
    tokens = torch.randn(56, 19), torch.randn(63, 19)
    points = torch.stack([torch.randint(30, (11,)), torch.randint(41, (11,))], dim=1)
    for unnormalized in (True, False):
        query, key = (
            bilinear.StretchedMap(t, g, s, unnormalized)
            for t, g, s in zip(tokens, ((8, 7), (7, 9)), sizes, strict=True)
        )
        given = [p._replace(tokens=unit_rows(p.tokens) if unnormalized else p.tokens) for p in (query, key)]
        table, scale = exact(*given, points, False)
        for query_tokens, key_tokens in zip(laid_out(tokens[0]), laid_out(tokens[1]), strict=True):
            similarity, index = cpu.match(
                query._replace(tokens=query_tokens), key._replace(tokens=key_tokens), points.flip(0), False
            )
            # Pixels beyond the outermost cells tie, so the index is checked by what it leads to.
            chosen = table.flip(0).gather(1, index[:, None])[:, 0]
            torch.testing.assert_close(similarity.double(), table.flip(0).amax(1), rtol=0, atol=2e-6 * scale)
            torch.testing.assert_close(similarity.double(), chosen, rtol=0, atol=2e-6 * scale)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": -1}, "points"),
        ({"c": 2**31}, "channels"),
        ({"points": 0}, "null"),
        ({"index": 0}, "null"),
        ({"size": (3, 4)}, "inside the image"),
        ({"key": (0, 1, 3, (2, 2), True)}, "null"),
        ({"key": (1, 1, 3, (2, 3), True)}, "axes"),
        ({"key": (1, 1, 3, (0, 2), True)}, "cells"),
        ({"key": (1, 1, 3)}, "a map is"),
        ({"query": (0, 1, 3, (2, 2), True)}, "null"),
        ({"table_bytes": -1}, "table_bytes"),
        ({"threads": 0}, "threads"),
        ({"isa": "sse9"}, "sse9"),
    ],
)
def test_points_refuse_bad_arguments(changes, message):
    points, cells, similarity, index = (
        torch.tensor([[3, 3], [0, 0]]),
        torch.randn(4, 3),
        torch.empty(2),
        torch.empty(2).long(),
    )
    axis = bilinear.cut_strips(2, 4, torch.device("cpu")).arguments()
    arguments = {
        "points": points.data_ptr(),
        "count": 2,
        "c": 3,
        "query": (cells.data_ptr(), 1, 3, (2, 2), True),
        "key": (cells.data_ptr(), 1, 3, (2, 2), True),
        "size": (4, 4),
        "normalize": False,
        "y": axis,
        "x": axis,
        "scale": 0,
        "gram": 0,
        "similarity": similarity.data_ptr(),
        "index": index.data_ptr(),
        "table_bytes": 0,
        "threads": 1,
    }
    native.dense_match_points_f32(**arguments)
    with pytest.raises(ValueError, match=message):
        native.dense_match_points_f32(**{**arguments, **changes})
