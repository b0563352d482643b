"""``dense_match``'s Triton kernel against every key pixel in float64: on a GPU where there is one, else interpreted."""

import os

import pytest
import torch
from brute_force import DEGENERATE, check_projections, check_spans, degenerate_map, pixel_similarities

from lift_fast import dense_match, devices
from lift_fast.ops.dense_match import gpu as dense_match_gpu
from lift_fast.ops.dense_match import op
from lift_fast.ops.dense_match.bilinear import StretchedMap
from lift_fast.ops.nearest.plain import full_matmul_precision

pytest.importorskip("triton")
from lift_fast.kernels import dense_match as kernel

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 before Triton is imported", allow_module_level=True)

numeric = pytest.mark.numeric("dense_match")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Of NumPy, which the interpreter computes with.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]


def maps(channels, query_grid, key_grid):
    seed = int(torch.randint(1 << 30, ()))
    torch.manual_seed(seed)
    print("seed", seed)
    return torch.randn(channels, *query_grid), torch.randn(channels, *key_grid)


def run(query_map, key_map, query_size, key_size, normalize="grid", points=None):
    query, key = (
        op.stretch(cells.to(DEVICE), size, normalize, scaled=normalize == "pixel")
        for cells, size in ((query_map, query_size), (key_map, key_size))
    )
    assert dense_match_gpu.fits(query, key)[0]
    at = None if points is None else points.to(DEVICE)
    with full_matmul_precision():
        return [part.cpu() for part in dense_match_gpu.match(query, key, at, normalize == "pixel", "triton")]


def check(query_map, key_map, query_size, key_size, normalize="grid", points=None):
    similarity, index = run(query_map, key_map, query_size, key_size, normalize, points)
    values, tie = pixel_similarities(query_map, key_map, query_size, key_size, normalize)
    if points is not None:
        rows = points[:, 1] * query_size[1] + points[:, 0]
        values, tie = values[rows], tie[rows]
    lost = values.amax(1) == -torch.inf
    assert torch.equal(index == -1, lost)
    assert bool((similarity[lost] == -torch.inf).all())
    values, tie, index, similarity = values[~lost], tie[~lost], index[~lost], similarity[~lost]
    found, rounding = (part.gather(1, index[:, None])[:, 0] for part in (values, tie))
    assert bool((found + rounding >= (values - tie).amax(1)).all())
    assert bool(((similarity.double() - found).abs() <= rounding).all())


@numeric
@pytest.mark.parametrize("normalize", ["grid", "pixel", "none"])
@pytest.mark.parametrize(
    ("query_grid", "key_grid", "query_size", "key_size"),
    [
        ((3, 2), (2, 4), (13, 7), (11, 19)),
        ((1, 1), (3, 2), (3, 5), (7, 6)),
        ((2, 3), (1, 1), (5, 4), (5, 7)),
        # Fewer pixels than cells.
        ((5, 4), (4, 7), (3, 2), (2, 11)),
    ],
    ids=str,
)
def test_against_brute_force(query_grid, key_grid, query_size, key_size, normalize):
    check(*maps(7, query_grid, key_grid), query_size, key_size, normalize)


@numeric
@pytest.mark.parametrize("normalize", ["grid", "pixel"])
def test_points(normalize):
    query_map, key_map = maps(5, (3, 4), (4, 3))
    points = torch.stack([torch.randint(37, (7,)), torch.randint(29, (7,))], dim=1)
    points[0] = torch.tensor([36, 28])
    points[1] = 0
    check(query_map, key_map, (29, 37), (23, 31), normalize, points)


@numeric
def test_many_points_are_looked_up():
    query_map, key_map = maps(3, (1, 2), (2, 2))
    points = torch.stack([torch.randint(5, (40,)), torch.randint(4, (40,))], dim=1)
    check(query_map, key_map, (4, 5), (5, 6), "pixel", points)


@numeric
@pytest.mark.parametrize("normalize", ["grid", "pixel"])
def test_bands_and_chunks(normalize, monkeypatch):
    """Tables of a part of the query image, and key images with more patches than a program keeps at one time."""
    monkeypatch.setattr(dense_match_gpu, "_TABLE_BUDGET", 4 * 20 * 4)
    monkeypatch.setattr(kernel, "_CHUNK", 16)
    query_map, key_map = maps(3, (3, 2), (5, 4))
    check(query_map, key_map, (5, 4), (9, 10), normalize)
    points = torch.tensor([[3, 4], [0, 0], [3, 3], [1, 2], [2, 2]])
    check(query_map, key_map, (5, 4), (9, 10), normalize, points)


@numeric
@pytest.mark.parametrize("normalize", ["grid", "pixel", "none"])
def test_flat_images_go_to_the_first_pixel(normalize):
    query_map, key_map = maps(4, (2, 2), (3, 2))
    # Products without rounding, because a matrix product of equal columns may differ in the last bit.
    key_map = torch.zeros_like(key_map)
    key_map[0] = 1
    similarity, index = run(query_map, key_map, (4, 5), (7, 6), normalize)
    values, _ = pixel_similarities(query_map, key_map, (4, 5), (7, 6), normalize)
    torch.testing.assert_close(similarity.double(), values.amax(1), rtol=0, atol=1e-5)
    assert bool((index == 0).all())


@numeric
@pytest.mark.parametrize("normalize", ["grid", "pixel", "none"])
@pytest.mark.parametrize("sizes", [((7, 8), (9, 7)), ((9, 3), (3, 4))], ids=str)
def test_cells_that_are_not_finite(sizes, normalize):
    """In every row and column, with pixels at the centres of cells and without."""
    query_map, key_map = maps(4, (3, 3), (3, 4))
    query_map[1, 0, 2] = torch.nan
    key_map[0, 2, 1] = torch.inf
    query_map[:, 2, 0] = 0
    key_map[:, 0, 3] = 0
    check(query_map, key_map, *sizes, normalize)
    query_map[1, 1, 0] = key_map[0, 1, 2] = -torch.inf
    check(query_map, key_map, *sizes, normalize, torch.tensor([[0, 0], [2, 1]]))
    key_map[0] = torch.nan
    assert bool((run(query_map, key_map, (3, 2), (4, 3), normalize)[1] == -1).all())


@numeric
@pytest.mark.parametrize("scale", [1e-15, 1e19, 3e38])
def test_cosines_of_every_magnitude(scale):
    query_map, key_map = (part.clamp(-1, 1) for part in maps(4, (2, 3), (3, 2)))
    query_map[:, 1, 1] *= 1e-3
    similarity, index = run(query_map * scale, key_map * scale, (5, 4), (6, 3), "pixel")
    # Cells and pixels with a norm below 1e-12 are divided by 1e-12.
    values = pixel_similarities(query_map * scale, key_map * scale, (5, 4), (6, 3), "pixel")[0]
    rounding = 2e-5 * float(values.abs().amax())
    torch.testing.assert_close(similarity.double(), values.amax(1), rtol=0, atol=rounding)
    assert bool((values.gather(1, index[:, None])[:, 0] >= values.amax(1) - rounding).all())


@numeric
@pytest.mark.parametrize("kind", DEGENERATE)
def test_projections_change_no_cosine(kind, monkeypatch):
    """They divide by how far a patch's corners lie apart. Without them every patch that its range leaves is visited."""
    seed = int(torch.randint(1 << 30, ()))
    print("seed", seed)
    cells = [degenerate_map(kind, seed + h, 5, h, w) for h, w in ((2, 2), (3, 4))]
    sizes = (3, 4), (7, 9)
    points = torch.tensor([[3, 2], [1, 1]])
    check_projections(run, kernel, monkeypatch, cells, sizes, points)


@numeric
def test_patches_without_projections_are_passed_over(monkeypatch):
    """After its first matches a search looks nowhere else if all spans are zero."""
    arguments = *maps(6, (2, 2), (4, 5)), (5, 7), (11, 13), "pixel"
    right = run(*arguments)[0]
    spans = kernel.spans
    monkeypatch.setattr(kernel, "spans", lambda *arguments: spans(*arguments).zero_())
    wrong = run(*arguments)[0]
    assert bool((wrong <= right).all())
    assert not torch.equal(wrong, right)


@numeric
def test_spans_have_the_lengths_of_projections():
    image = StretchedMap(torch.randn(12, 6).to(DEVICE), (3, 4), (17, 29))
    spans = dense_match_gpu._Cosines(image, "triton").scales(image.strips()).spans
    check_spans(spans.cpu(), image._replace(tokens=image.tokens.cpu()))


def test_bands_cover_every_strip_once():
    for rows in (4, 5, 9, 30, 1000):
        for grid, size in (((5, 7), (13, 40)), ((9, 3), (4, 2)), ((1, 6), (7, 7))):
            image = StretchedMap(torch.zeros(grid[0] * grid[1], 1), grid, size)
            y, x = image.strips()
            seen = torch.zeros(y.count, x.count, dtype=torch.int32)
            for band, bottom, right in dense_match_gpu._bands(image, rows):
                seen[slice(*band.strips_y), slice(*band.strips_x)] += 1
                assert (bottom - band.top) * band.width <= rows
                assert band.left + band.width == right
                assert int(y.high[band.strips_y[1] - 1]) < bottom
                assert int(x.high[band.strips_x[1] - 1]) < right
            assert bool((seen == 1).all())


def test_what_it_leaves_to_others():
    image = StretchedMap(torch.zeros(6, 2), (2, 3), (5, 5))
    assert "float64" in dense_match_gpu.fits(image._replace(tokens=image.tokens.double()), image)[1]
    assert "2^31" in dense_match_gpu.fits(image, image._replace(size=(1 << 16, 1 << 15)))[1]
    assert "not on a CUDA device" in dense_match_gpu.can_run(image, image)[1]


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
class TestOnAGpu:
    @pytest.mark.parametrize("normalize", ["grid", "pixel", "none"])
    @pytest.mark.parametrize(
        ("grid", "other", "size", "other_size"),
        [((14, 11), (13, 17), (97, 80), (101, 131)), ((28, 28), (3, 2), (120, 77), (90, 200))],
        ids=str,
    )
    def test_large(self, grid, other, size, other_size, normalize):
        check(*maps(32, grid, other), size, other_size, normalize)

    @pytest.mark.parametrize("normalize", ["grid", "pixel"])
    def test_more_patches_than_a_chunk(self, normalize):
        query_map, key_map = maps(16, (40, 31), (90, 100))
        points = torch.stack([torch.randint(310, (50,)), torch.randint(400, (50,))], dim=1)
        similarity, index = run(query_map, key_map, (400, 310), (700, 1100), normalize)
        some, at = run(query_map, key_map, (400, 310), (700, 1100), normalize, points)
        rows = points[:, 1] * 310 + points[:, 0]
        torch.testing.assert_close(some, similarity[rows], rtol=0, atol=1e-5)
        assert float((at == index[rows]).float().mean()) > 0.9

    @pytest.mark.parametrize("normalize", ["grid", "pixel"])
    @pytest.mark.parametrize("backend", ["cuda", "triton"])
    def test_operator(self, backend, normalize):
        runs, reason = devices.cuda_runs(DEVICE)
        if backend == "cuda" and not runs:
            pytest.skip(reason)
        query_map, key_map = (part[None].to(DEVICE) for part in maps(64, (28, 28), (28, 28)))
        arguments = query_map, key_map, [224, 224], [224, 224], None, normalize, True
        ours = op.dense_match(*arguments, backend=backend)
        plain = op.dense_match(*arguments, exhaustive=True)
        torch.testing.assert_close(ours[0], plain[0], rtol=0, atol=1e-5)
        assert float((ours[1] == plain[1]).float().mean()) > 0.999
        assert float((ours[2] == plain[2]).float().mean()) > 0.999
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = op.dense_match(*arguments, backend=backend)
        graph.replay()
        for part, expected in zip(captured, ours, strict=True):
            assert torch.equal(part, expected)

    @pytest.mark.parametrize("normalize", ["grid", "pixel", None])
    def test_the_package_chooses(self, normalize):
        query_map, key_map = (part[None].to(DEVICE) for part in maps(16, (9, 13), (11, 7)))
        points = torch.stack([torch.randint(70, (1, 40)), torch.randint(50, (1, 40))], dim=2).to(DEVICE)
        for at in (None, points):
            ours = dense_match(query_map, key_map, (50, 70), (60, 44), points=at, normalize=normalize, mutual=True)
            plain = op.dense_match(
                query_map, key_map, [50, 70], [60, 44], at, normalize or "none", True, exhaustive=True
            )
            torch.testing.assert_close(ours.similarity, plain[0], rtol=0, atol=1e-4)
            assert float((ours.xy == plain[1]).float().mean()) > 0.97

    def test_on_another_device(self):
        other = torch.device("cuda", torch.cuda.device_count() - 1)
        runs, reason = devices.cuda_runs(other)
        if torch.cuda.device_count() < 2 or not runs:
            pytest.skip(f"needs two CUDA devices and the native core: {reason}")
        query_map, key_map = (part[None].to(other) for part in maps(8, (5, 6), (7, 4)))
        ours = op.dense_match(query_map, key_map, [20, 30], [25, 31], None, "grid", True, backend="cuda")
        plain = op.dense_match(query_map, key_map, [20, 30], [25, 31], None, "grid", True, exhaustive=True)
        torch.testing.assert_close(ours[0], plain[0], rtol=0, atol=1e-5)
        assert torch.cuda.current_device() == 0
