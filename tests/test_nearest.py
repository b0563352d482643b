"""``nearest`` against a float64 brute force that implements its rules literally."""

import math

import pytest
import torch
from brute_force import in_window, unit
from hypothesis import given, settings
from hypothesis import strategies as st

from lift_fast import Window, nearest
from lift_fast.ops.nearest import plain
from lift_fast.ops.nearest.op import nearest_by
from lift_fast.testing import AWKWARD_COUNTS

TIE = 1e-6


def similarities(query, key, normalize=True, window=None):
    query, key = query.double(), key.double()
    if normalize:
        query, key = unit(query), unit(key)
    table = query @ key.T
    if window is not None:
        radius, query_grid, key_grid = Window(*window)
        table[~in_window((radius, *query_grid, *(key_grid or query_grid)), *table.shape)] = -torch.inf
    return table.masked_fill(~torch.isfinite(table), -torch.inf)


def check(query, key, **options):
    """Compare with brute force; any choice within ``TIE`` of the best is correct, as float32 rounding may decide."""
    result = nearest(query, key, **options)
    k, mutual, ratio = options.get("k", 1), options.get("mutual", False), options.get("ratio")
    table = similarities(query, key, options.get("normalize", True), options.get("window"))
    n, m = table.shape
    assert result.similarity.shape == result.index.shape == (n, k)
    assert result.index.dtype == torch.int64
    assert result.valid.shape == (n,)
    scale = table[torch.isfinite(table)].abs().max().clamp_min(1).item() if torch.isfinite(table).any() else 1.0
    tie = TIE * scale
    ranked = table.sort(dim=1, descending=True, stable=True).values if m else table
    for i in range(n):
        finite = int(torch.isfinite(table[i]).sum())
        found = result.index[i].tolist()
        assert found[finite:] == [-1] * max(0, k - finite)
        assert (result.similarity[i, finite:] == -math.inf).all()
        found = found[:finite]
        assert len(set(found)) == len(found)
        for rank, j in enumerate(found):
            assert 0 <= j < m
            assert abs(table[i, j] - ranked[i, rank]) <= tie
            assert abs(result.similarity[i, rank].double() - table[i, j]) <= tie
            if rank and result.similarity[i, rank - 1] == result.similarity[i, rank]:
                assert found[rank - 1] < j
        expected = finite > 0
        certain = True
        if expected and mutual:
            column = table[:, found[0]]
            expected = expected and column[i] >= column.max() - tie
            rivals = (column >= column.max() - tie).sum() > 1
            certain = certain and not rivals
        if finite > 0 and ratio is not None and finite > 1:
            left, right = 1 - ranked[i, 0], ratio**2 * (1 - ranked[i, 1])
            expected = expected and bool(left <= right)
            certain = certain and abs(left - right) > 4 * tie
        if certain:
            assert bool(result.valid[i]) == bool(expected), (i, found)
    return result


@settings(max_examples=60, deadline=None)
@given(
    n=st.sampled_from(AWKWARD_COUNTS[:9]),
    m=st.sampled_from(AWKWARD_COUNTS[:9]),
    c=st.sampled_from((1, 2, 3, 8, 17)),
    k=st.sampled_from((1, 2, 5, 40)),
    mutual=st.booleans(),
    ratio=st.sampled_from((None, 0.8, 1.0)),
    normalize=st.booleans(),
    seed=st.integers(0, 1 << 30),
)
def test_against_brute_force(n, m, c, k, mutual, ratio, normalize, seed):
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(n, c, generator=generator), torch.randn(m, c, generator=generator)
    check(query, key, k=k, mutual=mutual, ratio=ratio if normalize else None, normalize=normalize)


@settings(max_examples=30, deadline=None)
@given(
    query_grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    key_grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    frames=st.integers(1, 3),
    radius=st.integers(0, 6),
    k=st.sampled_from((1, 4)),
    seed=st.integers(0, 1 << 30),
)
def test_window_against_brute_force(query_grid, key_grid, frames, radius, k, seed):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(math.prod(query_grid), 6, generator=generator)
    key = torch.randn(frames * math.prod(key_grid), 6, generator=generator)
    check(query, key, k=k, window=Window(radius, query_grid, key_grid), mutual=True)


def test_window_on_equal_grids_is_the_chebyshev_neighbourhood():
    features = torch.randn(20, 3)
    result = nearest(features, features, k=9, window=(1, (4, 5)))
    for i in range(20):
        near = {
            y * 5 + x
            for y in range(max(0, i // 5 - 1), min(4, i // 5 + 2))
            for x in range(max(0, i % 5 - 1), min(5, i % 5 + 2))
        }
        assert {j for j in result.index[i].tolist() if j >= 0} == near


@pytest.mark.parametrize("shape", [(131, 97, 384), (64, 257, 33), (1, 1000, 7), (300, 1, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_sizes_and_dtypes(shape, dtype):
    n, m, c = shape
    query, key = torch.randn(n, c, dtype=dtype), torch.randn(m, c, dtype=dtype)
    result = check(query, key, mutual=True, ratio=0.95)
    assert result.similarity.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_tiles_of_the_plain_version_change_nothing(monkeypatch):
    query, key = torch.randn(1, 90, 8), torch.randn(1, 70, 8)
    key[0, 50:] = key[0, :20]
    whole = nearest_by(plain.search, query, key, 5, True, 0.9, None, True)
    monkeypatch.setattr(plain, "PRODUCT_BUDGET", 4 * 70 * 7)
    tiled = nearest_by(plain.search, query, key, 5, True, 0.9, None, True)
    torch.testing.assert_close(tiled[0], whole[0])
    assert torch.equal(tiled[2], whole[2])


def test_native_and_plain_agree():
    query, key = torch.randn(2, 203, 48), torch.randn(2, 117, 48)
    ours = nearest(query, key, mutual=True, ratio=0.9)
    similarity, index, valid = nearest_by(plain.search, query, key, 1, True, 0.9, None, True)
    torch.testing.assert_close(ours.similarity, similarity, rtol=0, atol=1e-6)
    disagree = ours.index != index
    assert (similarity[disagree] - ours.similarity[disagree]).abs().le(TIE).all()
    assert disagree.float().mean() < 0.01
    assert (ours.valid != valid).float().mean() < 0.01


@pytest.mark.parametrize("k", [1, 3])
def test_duplicates_go_to_the_lowest_index(k):
    key = torch.randn(40, 12)
    key[20:] = key[:20]
    query = key[:20] * torch.rand(20, 1).add(0.5)
    result = nearest(query, key, k=k)
    if k == 1:
        assert result.index[:, 0].tolist() == list(range(20))
    else:
        assert result.index[:, :2].tolist() == [[i, i + 20] for i in range(20)]
    # Both directions: of equal queries only the first is mutual.
    both = nearest(torch.cat([query, query]), key, mutual=True)
    assert both.valid[:20].all()
    assert not both.valid[20:].any()


def test_zero_vectors_have_similarity_zero():
    query, key = torch.zeros(2, 4), torch.randn(5, 4)
    result = nearest(query, key)
    assert result.similarity.tolist() == [[0.0], [0.0]]
    assert result.index.tolist() == [[0], [0]]
    key = -torch.ones(3, 4)
    key[1] = 0
    assert nearest(torch.ones(1, 4), key).index.item() == 1


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("normalize", [True, False])
def test_descriptors_that_are_not_finite_take_no_part(poison, k, normalize):
    query, key = torch.randn(6, 5), torch.randn(7, 5)
    query[2, 1] = key[3, 0] = key[0, 4] = poison
    result = nearest(query, key, k=k, mutual=True, normalize=normalize)
    assert result.index[2].tolist() == [-1] * k
    assert (result.similarity[2] == -math.inf).all()
    assert not result.valid[2]
    valid = [0, 1, 3, 4, 5]
    assert not set(result.index[valid].flatten().tolist()) & {0, 3, -1}
    keys = [1, 2, 4, 5, 6]
    expected = nearest(query[valid], key[keys], k=k, mutual=True, normalize=normalize)
    assert torch.equal(torch.tensor(keys)[expected.index], result.index[valid])
    assert torch.equal(expected.valid, result.valid[valid])


def test_all_keys_poisoned():
    result = nearest(torch.randn(3, 2), torch.full((4, 2), math.nan), mutual=True)
    assert (result.index == -1).all()
    assert not result.valid.any()


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e15, 1e30])
def test_magnitude_does_not_matter_to_cosines(scale):
    query, key = torch.randn(9, 6), torch.randn(11, 6)
    expected = nearest(query, key).index
    if scale > 1e-10:
        assert torch.equal(nearest(query * scale, key * scale).index, expected)
    else:
        # Below the norm floor vectors fade to zero, without NaN.
        assert torch.isfinite(nearest(query * scale, key * scale).similarity).all()


def test_batches_broadcast():
    query, key = torch.randn(3, 1, 10, 4), torch.randn(2, 12, 4)
    result = nearest(query, key, k=2, mutual=True)
    assert result.index.shape == (3, 2, 10, 2)
    assert result.valid.shape == (3, 2, 10)
    for i in range(3):
        for j in range(2):
            one = nearest(query[i, 0], key[j], k=2, mutual=True)
            assert torch.equal(result.index[i, j], one.index)
            assert torch.equal(result.valid[i, j], one.valid)


def test_layouts_do_not_matter():
    query, key = torch.randn(5, 20).T, torch.randn(16, 10)[:, ::2]
    expected = nearest(query.contiguous(), key.contiguous())
    result = nearest(query, key)
    assert torch.equal(result.index, expected.index)


def test_empty_sets():
    assert nearest(torch.randn(0, 3), torch.randn(4, 3)).index.shape == (0, 1)
    for dtype, window in ((torch.float32, None), (torch.float32, (1, (1, 2))), (torch.float64, None)):
        sets = torch.randn(2, 3, dtype=dtype), torch.randn(0, 3, dtype=dtype)
        result = nearest(*sets, k=2, mutual=True, window=window)
        assert (result.index == -1).all()
        assert not result.valid.any()
    assert nearest(torch.randn(0, 5, 3), torch.randn(0, 4, 3)).valid.shape == (0, 5)


@pytest.mark.unpoisoned
def test_memory_stays_bounded():
    # The full table of similarities would take 3.6 GB.
    import resource

    query, key = torch.randn(30_000, 8), torch.randn(30_000, 8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    nearest(query[:2000], key, k=2)
    nearest(query, key, mutual=True)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * 1024 < 1 << 30


BAD_CALLS = {
    "list": (TypeError, "query must be a torch.Tensor, got list", lambda q, k: nearest([[1.0]], k)),
    "integers": (TypeError, "int64", lambda q, k: nearest(q.long(), k.long())),
    "dtypes": (TypeError, "one dtype", lambda q, k: nearest(q, k.double())),
    "vector": (ValueError, r"\[\.\.\., N, C\]", lambda q, k: nearest(q[0], k)),
    "channels": (ValueError, "same number of channels", lambda q, k: nearest(q, k[:, :2])),
    "k": (ValueError, "k must be an integer >= 1, got 0", lambda q, k: nearest(q, k, k=0)),
    "k bool": (ValueError, "k must be an integer", lambda q, k: nearest(q, k, k=True)),
    "precision": (ValueError, "exactly", lambda q, k: nearest(q, k, precision="exactly")),
    "ratio": (ValueError, r"\(0, 1\], got 1\.5", lambda q, k: nearest(q, k, ratio=1.5)),
    "ratio of products": (ValueError, "normalize=True", lambda q, k: nearest(q, k, ratio=0.8, normalize=False)),
    "window": (ValueError, "does not hold the 4 queries", lambda q, k: nearest(q, k, window=(1, (3, 3)))),
    "window keys": (ValueError, "whole grids", lambda q, k: nearest(q, k, window=(1, (2, 2), (2, 2)))),
    "radius": (ValueError, "radius", lambda q, k: nearest(q, k, window=(-1, (2, 2)))),
    "batch": (ValueError, "do not broadcast", lambda q, k: nearest(q.expand(2, 4, 3), k.expand(3, 5, 3))),
    "device": (ValueError, "one device", lambda q, k: nearest(q, k.to("meta"))),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_input_is_named(case):
    error, message, call = BAD_CALLS[case]
    with pytest.raises(error, match=message):
        call(torch.randn(4, 3), torch.randn(5, 3))


@pytest.mark.parametrize(
    "options", [(1, False, None, None, True), (3, True, 0.8, None, True), (2, True, None, [1, 2, 2, 3, 2], False)]
)
def test_opcheck(options):
    torch.library.opcheck(torch.ops.lift_fast.nearest.default, (torch.randn(2, 4, 3), torch.randn(2, 6, 3), *options))


def test_compile_full_graph():
    torch._dynamo.reset()
    query, key = torch.randn(8, 3), torch.randn(9, 3)
    compiled = torch.compile(lambda q, k: nearest(q, k, mutual=True, ratio=0.9), fullgraph=True, backend="aot_eager")
    for ours, expected in zip(compiled(query, key), nearest(query, key, mutual=True, ratio=0.9), strict=True):
        assert torch.equal(ours, expected)


def test_no_gradients():
    query, key = torch.randn(2, 5, 4, requires_grad=True)
    assert not nearest(query, key, mutual=True).similarity.requires_grad
    assert not nearest(query, key, k=2, window=(1, (1, 5))).similarity.requires_grad
