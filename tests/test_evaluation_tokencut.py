"""TokenCut against the dense generalised eigensolver and a flood fill written out."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lift_fast import _native
from lift_fast.evaluation.bit_graph import BitGraph
from lift_fast.evaluation.tokencut import NotFiniteError, second_eigenvector, similarity_graph, tokencut

EPS = 1e-5
SOLVERS = ("lanczos", "dense")


pytestmark = pytest.mark.usefixtures("one_thread")


def planted(h, w, seed, channels=24, noise=0.35):
    """[h * w, C] features of a rectangle on a ground that drifts, and the rectangle (top, left, bottom, right)."""
    generator = torch.Generator().manual_seed(seed)
    top, left = (int(torch.randint(0, max(1, n // 2), (), generator=generator)) for n in (h, w))
    box = (top, left, top + max(2, h // 3), left + max(2, w // 3))
    ground = F.interpolate(torch.randn(1, channels, 2, 2, generator=generator), size=(h, w), mode="bilinear")[0]
    maps = 0.4 * ground + torch.randn(channels, 1, 1, generator=generator)
    maps[:, box[0] : box[2], box[1] : box[3]] = torch.randn(channels, 1, 1, generator=generator)
    maps = maps + noise * torch.randn(channels, h, w, generator=generator)
    return maps.flatten(1).T.contiguous(), box


def published(features, grid, tau):
    """Eigenvector and box as the protocol says, with dense matrices and the dense generalised problem."""
    unit = F.normalize(features.double(), dim=1)
    weights = (unit @ unit.T > tau).double().clamp_min(EPS)
    weights = torch.maximum(weights.tril(), weights.tril().T)
    degree = weights.sum(1)
    # (D - W) x = lambda D x by Cholesky: D = L L^T, L^-1 (D - W) L^-T y = lambda y, x = L^-T y.
    lower = torch.linalg.cholesky(torch.diag(degree))
    inverse = torch.linalg.inv(lower)
    values, vectors = torch.linalg.eigh(inverse @ (torch.diag(degree) - weights) @ inverse.T)
    x = (inverse.T @ vectors)[:, 1].numpy()
    seed = int(np.argmax(np.abs(x)))
    side = x > x.mean()
    if not side[seed]:
        side = ~side
    mask = flood(side.reshape(grid), divmod(seed, grid[1]))
    ys, xs = zip(*mask, strict=True)
    return x, values[1].item(), degree.numpy(), (min(ys), min(xs), max(ys) + 1, max(xs) + 1)


def flood(side, start):
    """Cells reached from ``start``, by a stack."""
    found, waiting = {start}, [start]
    while waiting:
        y, x = waiting.pop()
        for near in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
            inside = 0 <= near[0] < side.shape[0] and 0 <= near[1] < side.shape[1]
            if inside and side[near] and near not in found:
                found.add(near)
                waiting.append(near)
    return found


def angle(x, y, degree):
    """Between two vectors in the D inner product, whatever their signs; 0 where they are one."""
    x, y = (v / math.sqrt((v * degree) @ v) for v in (x, y))
    return min(np.sqrt(((x - s * y) ** 2 * degree).sum()) for s in (1, -1))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("grid", [(12, 17), (19, 7), (23, 23), (1, 61)])
def test_agrees_with_the_dense_generalised_eigensolver(grid, seed):
    features, _ = planted(*grid, seed)
    expected, value, degree, cells = published(features, grid, 0.2)
    graph = similarity_graph(features, 0.2)
    for solver in SOLVERS:
        pair = second_eigenvector(graph, solver=solver)
        assert pair.solver == solver
        assert not pair.degenerate
        assert angle(pair.vector.numpy(), expected, degree) < 1e-7
        assert pair.value == pytest.approx(value, abs=1e-12)
        assert ((pair.vector.numpy() ** 2) * degree).sum() == pytest.approx(1)
    result = tokencut(features, grid)
    assert result.cells == cells
    at_seed = result.eigenvector[result.seed]
    assert at_seed > 0
    assert at_seed == pytest.approx(np.abs(result.eigenvector).max(), rel=1e-6)
    assert result.component[result.seed]
    assert (result.foreground | ~result.component).all()


@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_the_published_call(seed):
    linalg, ndimage = pytest.importorskip("scipy.linalg"), pytest.importorskip("scipy.ndimage")
    grid = (20, 26)
    features, _ = planted(*grid, seed)
    # The published sequence of calls, float32 cosines included.
    unit = F.normalize(features, p=2)
    weights = np.where((unit @ unit.T).numpy() > 0.2, 1.0, EPS)
    degree = weights.sum(1)
    x = linalg.eigh(np.diag(degree) - weights, np.diag(degree), subset_by_index=[1, 2])[1][:, 0]
    side = x > x.mean()
    seed_token = np.argmax(np.abs(x))
    side = side if side[seed_token] else ~side
    labels, _ = ndimage.label(side.reshape(grid).astype(float))
    ys, xs = np.where(labels == labels[np.unravel_index(seed_token, grid)])
    result = tokencut(features, grid)
    assert angle(result.eigenvector.ravel(), x, degree) < 1e-4
    assert result.cells == (ys.min(), xs.min(), ys.max() + 1, xs.max() + 1)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("grid", [(16, 16), (21, 34)])
def test_finds_a_planted_object(grid, seed):
    features, box = planted(*grid, seed, channels=64)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        result = tokencut(features.to(dtype), grid, tau=0.3)
        # The cut tells two regions apart; the ground, larger, has the smaller entries.
        assert result.cells == box


def test_many_tokens_against_the_dense_solver():
    # No multiple of a word or a panel.
    grid = (29, 31)
    features, _ = planted(*grid, 0)
    graph = similarity_graph(features, 0.2)
    fast, slow = (second_eigenvector(graph, solver=solver) for solver in SOLVERS)
    degree = ((1 - EPS) * graph.degree.double() + EPS * graph.count).numpy()
    assert angle(fast.vector.numpy(), slow.vector.numpy(), degree) < 1e-7
    assert fast.gap == pytest.approx(slow.gap, rel=0.5)
    assert fast.products < 400


def test_sign_and_order_do_not_matter():
    grid = (15, 18)
    features, _ = planted(*grid, 3)
    result = tokencut(features, grid)
    flipped = tokencut(features.view(*grid, -1).flip(1).reshape(len(features), -1), grid)
    top, left, bottom, right = result.cells
    assert flipped.cells == (top, grid[1] - right, bottom, grid[1] - left)


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (3, 4)])
def test_all_alike_gives_the_whole_grid(size):
    for features in (torch.ones(size[0] * size[1], 5), torch.eye(size[0] * size[1])):
        result = tokencut(features, size)
        assert result.cells == (0, 0, *size)
        assert result.degenerate
        assert result.component.all()


def test_tokens_without_features_join_nothing():
    # Zero vectors have no direction: F.normalize leaves them zero, as in the published code.
    result = tokencut(torch.zeros(12, 5), (3, 4))
    assert result.degenerate
    assert result.cells == (0, 0, 3, 4)


@pytest.mark.parametrize("side", [6, 16])
def test_two_components(side):
    features = torch.zeros(side, side, 2)
    features[..., 0] = 1
    features[1:4, 2:5] = torch.tensor([0.0, 1.0])
    result = tokencut(features.view(-1, 2), (side, side))
    # The smaller one holds the larger entries.
    assert result.cells == (1, 2, 4, 5)
    assert result.component.sum() == 9
    assert not result.degenerate
    # By hand: x is constant on either part, and orthogonal to 1 in D.
    inside, outside = 9, side * side - 9
    weight = [inside * (inside + EPS * outside), outside * (outside + EPS * inside)]
    ratio = result.eigenvector[0, 0] / result.eigenvector[1, 2]
    assert ratio == pytest.approx(-weight[0] / weight[1], rel=1e-9)


@pytest.mark.parametrize("solver", SOLVERS)
def test_several_eigenvectors_of_one_eigenvalue_are_noticed(solver):
    # Three blocks of one size: any vector that is constant on blocks and sums to zero is an eigenvector.
    count = 60
    features = torch.eye(3).repeat_interleave(count // 3, 0)
    graph = similarity_graph(features, 0.2)
    pair = second_eigenvector(graph, solver=solver)
    assert pair.degenerate
    assert pair.gap == 0
    by_block = pair.vector.view(3, -1)
    assert (by_block.std(1) < 1e-9).all()
    assert by_block.sum().abs() < 1e-9
    # Both solvers take the same representative.
    other = second_eigenvector(graph, solver=SOLVERS[1 - SOLVERS.index(solver)])
    assert angle(pair.vector.numpy(), other.vector.numpy(), np.ones(count)) < 1e-9


def test_of_several_isolated_tokens_the_first_is_the_seed():
    features, _ = planted(14, 14, 0, channels=40)
    features = torch.cat([features, torch.zeros(196, 3)], 1)
    for i, token in enumerate((5, 100, 171)):
        features[token] = 0
        features[token, 40 + i] = 1
    result = tokencut(features, (14, 14))
    # All three have the same entry, up to rounding.
    assert result.seed == (0, 5)
    assert result.cells == (0, 5, 1, 6)
    assert result.foreground.sum() == 3


def test_lanczos_that_does_not_converge_falls_back(monkeypatch):
    monkeypatch.setattr("lift_fast.evaluation.tokencut._MOST_STEPS", 3)
    features, _ = planted(12, 12, 0)
    graph = similarity_graph(features, 0.2)
    assert second_eigenvector(graph).solver == "dense"
    with pytest.raises(ArithmeticError, match="3 steps"):
        second_eigenvector(graph, solver="lanczos")


def test_box_in_pixels():
    features = torch.zeros(4, 6, 2)
    features[..., 0] = 1
    features[2:, 3:] = torch.tensor([0.0, 1.0])
    result = tokencut(features.view(-1, 2), (4, 6))
    assert result.cells == (2, 3, 4, 6)
    assert result.box((64, 96)) == (48, 32, 96, 64)
    # Padded at the right and the bottom: the box ends with the image.
    assert result.box((60, 90), (0, 0, 64, 96)) == (48, 32, 90, 60)
    # Cells that begin inside the image, as those of overlapping patches do.
    assert result.box((64, 96), (4, 6, 40, 60)) == (36, 24, 66, 44)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 130, 515])
def test_graph_of_bits(count, native):
    if native and not _native.can_run()[0]:
        pytest.skip(_native.can_run()[1])
    similarity = torch.randn(count, count, generator=torch.Generator().manual_seed(count))
    similarity[0, 0] = math.nan
    expected = (similarity > 0.3).tril()
    expected = expected | expected.T
    graph = BitGraph(count, native=native)
    for start in range(0, count, 128):
        stop = min(start + 128, count)
        graph.set_rows(start, similarity[start:stop, :stop].contiguous(), 0.3)
    graph.close()
    assert torch.equal(graph.dense(), expected.double())
    assert torch.equal(graph.degree, expected.sum(1))
    assert torch.equal(graph.diagonal(), expected.diagonal().long())
    assert graph.has_edges() == bool(expected.tril(-1).any())
    vector = torch.randn(count, dtype=torch.float64)
    torch.testing.assert_close(graph.multiply(vector), expected.double() @ vector, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("count", [5, 64, 4099])
def test_native_products_on_every_instruction_set(count, threads):
    if not _native.can_run()[0]:
        pytest.skip(_native.can_run()[1])
    native = _native.require()
    words = (count + 63) // 64
    dense = torch.zeros(64 * words, 64 * words, dtype=torch.bool)
    dense[:count, :count] = torch.rand(count, count) < 0.4
    shifts = torch.arange(64)
    bits = (dense.view(64 * words, words, 64).long() << shifts).sum(2)
    vector = torch.randn(count, dtype=torch.float64)
    expected = dense[:count, :count].double() @ vector
    for isa in native.cpu_isas():
        out = torch.full((count + 2,), math.nan, dtype=torch.float64)
        native.bit_matrix_multiply_f64(bits.data_ptr(), count, vector.data_ptr(), out[1:].data_ptr(), threads, isa)
        assert out[0].isnan()
        assert out[-1].isnan()
        torch.testing.assert_close(out[1:-1], expected, rtol=1e-12, atol=1e-9)


def test_native_refuses_what_does_not_fit():
    if not _native.can_run()[0]:
        pytest.skip(_native.can_run()[1])
    native = _native.require()
    room = torch.zeros(64 * 64, dtype=torch.int64)
    for start, rows, n in ((1, 1, 64), (-64, 1, 64), (0, 65, 64), (0, 0, 64), (0, 1, 0), (0, 1, 1 << 40)):
        with pytest.raises(ValueError, match="bit_matrix"):
            native.bit_matrix_set_rows_f32(room.data_ptr(), start, rows, n, 0.0, room.data_ptr(), 1)
    for arguments in ((0, 4, room.data_ptr(), room.data_ptr(), 1), (room.data_ptr(), 4, room.data_ptr(), 0, 1)):
        with pytest.raises(ValueError, match="null"):
            native.bit_matrix_multiply_f64(*arguments)
    with pytest.raises(ValueError, match="threads"):
        native.bit_matrix_multiply_f64(room.data_ptr(), 4, room.data_ptr(), room.data_ptr(), 0)


def test_bad_input_is_refused():
    good = torch.randn(6, 3)
    for features, grid, options, message in (
        (good, (2, 2), {}, "2 x 2"),
        (good[None], (2, 3), {}, "class token"),
        (good[:, :0], (2, 3), {}, "C >= 1"),
        (good.clone().fill_(math.nan), (2, 3), {}, "NaN"),
        (good, (2, 3), {"eps": 0.0}, "eps"),
        (good, (2, 3), {"tau": math.inf}, "tau"),
    ):
        with pytest.raises(ValueError, match=message):
            tokencut(features, grid, **options)
    with pytest.raises(TypeError, match="floating point"):
        tokencut(torch.ones(6, 3, dtype=torch.int64), (2, 3))
    with pytest.raises(ValueError, match="at least 2"):
        second_eigenvector(similarity_graph(torch.ones(1, 2), 0.2))
    with pytest.raises(ValueError, match="solver"):
        second_eigenvector(similarity_graph(torch.ones(3, 2), 0.2), solver="arpack")


def test_graph_refuses_rows_out_of_turn():
    graph = BitGraph(100)
    with pytest.raises(ValueError, match="expected rows from 0"):
        graph.set_rows(64, torch.zeros(36, 100), 0.0)
    with pytest.raises(ValueError, match="float32"):
        graph.set_rows(0, torch.zeros(64, 64, dtype=torch.float64), 0.0)
    with pytest.raises(ValueError, match="0 of 100"):
        graph.close()
    with pytest.raises(ValueError, match="float64"):
        graph.multiply(torch.zeros(100))
    with pytest.raises(ValueError, match="at least one node"):
        BitGraph(0)


@pytest.mark.parametrize(
    ("dtype", "exponent"),
    [
        *((torch.float32, e) for e in (-110, -66, 40, 63, 120)),
        *((torch.bfloat16, e) for e in (-110, -66, 63, 120)),
        *((torch.float64, e) for e in (-960, -130, 510, 1010)),
    ],
)
def test_the_length_of_features_does_not_count(dtype, exponent):
    # Powers of two change no bit of what the format holds.
    features = planted(9, 11, 4)[0].to(dtype)
    expected = tokencut(features, (9, 11))
    assert not expected.degenerate
    factor = 2.0**exponent
    found = tokencut((features.double() * factor).to(dtype), (9, 11))
    assert found.cells == expected.cells
    assert np.array_equal(found.eigenvector, expected.eigenvector)


@pytest.mark.parametrize("factor", [1e19, 1e-20, 1e37, 1e-37])
def test_cosines_of_large_and_small_features_are_those_of_float64(factor):
    features = planted(8, 8, 2)[0] * factor
    unit = features.double() / features.double().norm(dim=1, keepdim=True)
    assert torch.equal(similarity_graph(features, 0.2).dense(), (unit @ unit.T > 0.2).double())
    # Rows of very different lengths are alike if their directions are.
    mixed = (features.double() / factor * torch.logspace(-6, 6, 64)[:, None]).float()
    assert torch.equal(similarity_graph(mixed, 0.2).dense(), (unit @ unit.T > 0.2).double())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_cell_that_is_not_finite_is_refused(value):
    features = planted(6, 6, 0)[0]
    features[7, 3] = value
    for dtype in (torch.float32, torch.float16, torch.float64):
        with pytest.raises(NotFiniteError, match="NaN or infinity"):
            tokencut(features.to(dtype), (6, 6))


def test_forms_without_values_in_memory_are_refused():
    features = planted(6, 6, 0)[0]
    for form, error in ((features.to_sparse(), TypeError), (features.to("meta"), ValueError)):
        with pytest.raises(error, match=r"features .* (layout torch\.sparse_coo|device meta)"):
            tokencut(form, (6, 6))
    eight = features.to(torch.float8_e5m2)
    assert tokencut(eight, (6, 6)).cells == tokencut(eight.float(), (6, 6)).cells
    # The negative bit is not lost on the way to the native code.
    other = torch.complex(torch.zeros_like(features), -features).conj().imag
    assert other.is_neg()
    assert np.array_equal(tokencut(other, (6, 6)).eigenvector, tokencut(features, (6, 6)).eigenvector)
