"""``propagate_labels`` against a literal float64 implementation of the video evaluation's rule."""

import math

import pytest
import torch
from brute_force import in_window, unit
from hypothesis import given, settings
from hypothesis import strategies as st

from lift_fast import propagate_labels
from lift_fast.ops import propagate_labels as op


def literal(query, key, labels, mask, k, temperature, normalize=True):
    """[N, L] from the dense affinity in float64; which queries rounding cannot change; the similarities' error."""
    query, key = query.double(), key.double()
    if normalize:
        query, key = unit(query), unit(key)
    similarity = query @ key.T
    part = mask & similarity.isfinite()
    similarity = similarity.masked_fill(~part, -torch.inf)
    bound = ((query.shape[1] + 4) * 2.0**-24 * (query.abs() @ key.abs().T)).where(part, 0)
    certain = torch.ones(len(query), dtype=torch.bool)
    if not part.any():
        return torch.zeros(len(query), labels.shape[1], dtype=torch.float64), certain, 0.0
    # Relative to the largest, as in any softmax: exp(similarity / temperature) itself may overflow.
    top = similarity.amax(1, keepdim=True).clamp_min(-1e300)
    affinity = torch.where(part, ((similarity - top) / temperature).exp(), 0)
    if k < similarity.shape[1]:
        ranked = similarity.sort(dim=1, descending=True).values
        affinity[similarity < ranked[:, k - 1 : k]] = 0
        gap = ranked[:, k - 1] - ranked[:, k].clamp_min(-1e300)
        certain = (gap > 2 * bound.amax(1)) | (ranked[:, k] == -torch.inf)
    affinity = affinity / affinity.sum(1, keepdim=True).clamp_min(1e-300)
    return affinity @ labels.double(), certain, float(bound.max())


def limit(labels, error, k, temperature):
    """Largest float32 error: each weight by twice the error of two similarities, its rounding, a sum of k rows."""
    return float(labels.abs().max()) * (2 * math.expm1(4 * error / temperature) + (3 * k + 64) * 2.0**-24)


def check(query, key, labels, grid, key_grid, radius, k, temperature, normalize=True):
    """Compare the queries that rounding cannot change; returns their share."""
    options = {"grid": grid, "key_grid": key_grid, "radius": radius, "k": k, "normalize": normalize}
    out = propagate_labels(query, key, labels, temperature=temperature, **options)
    assert out.shape == (*query.shape[:-1], labels.shape[-1])
    assert out.dtype == torch.float32
    mask = in_window((radius, *grid, *(key_grid or grid)), math.prod(grid), key.shape[-2])
    shares = []
    for b in range(query.shape[0]):
        expected, certain, error = literal(query[b], key[b], labels[b], mask, k, temperature, normalize)
        off = (out[b].double() - expected).abs()[certain]
        assert not off.numel() or float(off.max()) <= limit(labels, error, k, temperature)
        shares.append(float(certain.double().mean()))
    return min(shares)


@settings(max_examples=100, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 6), st.integers(1, 11)),
    key_grid=st.one_of(st.none(), st.tuples(st.integers(1, 6), st.integers(1, 11))),
    frames=st.integers(0, 3),
    radius=st.one_of(st.integers(0, 6), st.just(40)),
    k=st.sampled_from((1, 2, 5, 40, 300)),
    temperature=st.sampled_from((0.02, 0.1, 1.0, 1e6)),
    channels=st.sampled_from((2, 3, 17)),
    objects=st.sampled_from((1, 2, 7)),
    poisoned=st.booleans(),
    seed=st.integers(0, 1 << 30),
)
def test_against_the_literal_rule(grid, key_grid, frames, radius, k, temperature, channels, objects, poisoned, seed):
    generator = torch.Generator().manual_seed(seed)
    m = frames * math.prod(key_grid or grid)
    query, key = (torch.randn(2, count, channels, generator=generator) for count in (math.prod(grid), m))
    labels = torch.rand(2, m, objects, generator=generator)
    if poisoned:
        for rows in (query, key):
            rows[torch.rand(rows.shape[:2], generator=generator) < 0.2] = math.nan
    if not m:
        labels = labels.new_zeros(2, 0, objects)
        assert not bool(propagate_labels(query, key, labels, grid=grid, key_grid=key_grid, k=k).any())
        return
    check(query, key, labels, grid, key_grid, radius, k, temperature)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_step_of_the_video_evaluation(dtype):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 19 * 31, 48, generator=generator).to(dtype)
    key = torch.randn(1, 8 * 19 * 31, 48, generator=generator).to(dtype)
    classes = torch.randint(4, key.shape[:2], generator=generator)
    labels = torch.nn.functional.one_hot(classes).to(dtype)
    assert check(query, key, labels, (19, 31), None, 12, 5, 0.1) > 0.9
    # One-hot labels still sum to one.
    shares = propagate_labels(query, key, labels, grid=(19, 31)).sum(-1)
    torch.testing.assert_close(shares, torch.ones_like(shares))


def test_dot_products():
    generator = torch.Generator().manual_seed(1)
    query, key = (30 * torch.randn(1, count, 8, generator=generator) for count in (35, 70))
    assert check(query, key, torch.randn(1, 70, 3, generator=generator), (5, 7), None, 2, 4, 5.0, normalize=False) > 0.9


def test_native_and_plain_agree():
    generator = torch.Generator().manual_seed(2)
    query, key = (torch.randn(2, count, 24, generator=generator) for count in (77, 3 * 77))
    labels = torch.rand(2, 3 * 77, 5, generator=generator)
    window = [3, 7, 11, 7, 11]
    ours = torch.ops.lift_fast.propagate_labels(query, key, labels, window, 5, 0.1, True)
    plain = op.propagate_labels_plain(query, key, labels, window, 5, 0.1, True)
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-4)


def test_float64_stays_float64():
    query, key, labels = (torch.randn(1, *shape, dtype=torch.float64) for shape in ((12, 5), (24, 5), (24, 3)))
    out = propagate_labels(query, key, labels, grid=(3, 4), radius=1)
    expected, _, _ = literal(query[0], key[0], labels[0], in_window((1, 3, 4, 3, 4), 12, 24), 5, 0.1)
    torch.testing.assert_close(out[0], expected, rtol=1e-11, atol=1e-11)


def test_no_window():
    query, key, labels = torch.randn(1, 20, 6), torch.randn(1, 40, 6), torch.rand(1, 40, 2)
    everywhere = propagate_labels(query, key, labels, grid=(4, 5), radius=None)
    assert torch.equal(everywhere, propagate_labels(query, key, labels, grid=(4, 5), radius=1 << 70))
    expected, certain, error = literal(query[0], key[0], labels[0], torch.ones(20, 40, dtype=torch.bool), 5, 0.1)
    off = (everywhere[0] - expected).abs()[certain]
    assert bool((off <= limit(labels, error, 5, 0.1)).all())


def test_ties_beyond_k_are_cut_to_the_lowest_index():
    out = propagate_labels(torch.ones(6, 4), torch.ones(12, 4), torch.eye(12), grid=(2, 3), radius=None, k=4)
    assert bool((out[:, :4] == 0.25).all())
    assert bool((out[:, 4:] == 0).all())


def test_queries_without_keys_get_zeros():
    # With radius 0 only the centre of a cell of equal size, or of an odd fraction of it, lies within a coarser cell's.
    query, key, labels = torch.randn(1, 36, 4), torch.randn(1, 4, 4), torch.ones(1, 4, 2)
    out = propagate_labels(query, key, labels, grid=(6, 6), key_grid=(2, 2), radius=0)
    mask = in_window((0, 6, 6, 2, 2), 36, 4).any(1)
    assert 0 < int(mask.sum()) < 36
    assert torch.equal(out, mask.float()[None, :, None].expand(1, 36, 2))
    query[0, 3, 1], key[0, 2, 0] = math.nan, math.inf
    labels[0, 2] = math.nan
    out = propagate_labels(query, key, labels, grid=(6, 6), key_grid=(2, 2), radius=None)
    assert bool((out[0, 3] == 0).all())
    torch.testing.assert_close(out[0, 4:], torch.ones(32, 2))
    assert bool((propagate_labels(query, key[:, :0], labels[:, :0], grid=(6, 6)) == 0).all())


def test_labels_that_are_not_finite_stay_where_they_are():
    features, labels = torch.eye(9), torch.ones(9, 2)
    labels[0, 0] = math.nan
    out = propagate_labels(features, features, labels, grid=(3, 3), radius=0)
    assert torch.equal(out.isnan(), labels.isnan())
    assert torch.equal(out[1:], labels[1:])


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e30, 1e300])
def test_extreme_temperatures(temperature):
    generator = torch.Generator().manual_seed(3)
    query, key, labels = (torch.randn(9, size, generator=generator) for size in (4, 4, 3))
    out = propagate_labels(query, key, labels, grid=(3, 3), radius=None, k=3, temperature=temperature)
    cosines = torch.nn.functional.normalize(query, dim=1) @ torch.nn.functional.normalize(key, dim=1).T
    index = cosines.topk(3, dim=1).indices
    torch.testing.assert_close(out, labels[index[:, 0]] if temperature < 1 else labels[index].mean(1))


def test_leading_dimensions_broadcast():
    query, key, labels = torch.randn(3, 1, 12, 4), torch.randn(2, 12, 4), torch.rand(12, 5)
    out = propagate_labels(query, key, labels, grid=(3, 4), radius=1, k=2)
    assert out.shape == (3, 2, 12, 5)
    for i in range(3):
        for j in range(2):
            assert torch.equal(out[i, j], propagate_labels(query[i, 0], key[j], labels, grid=(3, 4), radius=1, k=2))


def test_layouts_and_gradients_do_not_matter():
    maps, masks = torch.randn(2, 4, 3, 5).requires_grad_(), torch.rand(2, 6, 3, 5)
    tokens, rows = (part.flatten(2).transpose(1, 2) for part in (maps, masks))
    out = propagate_labels(tokens, tokens, rows, grid=(3, 5))
    assert not out.requires_grad
    assert torch.equal(out, propagate_labels(tokens.contiguous(), tokens.contiguous(), rows.contiguous(), grid=(3, 5)))
    # Back to a map: with one key each, every cell keeps its own mask.
    out = propagate_labels(tokens, tokens, rows, grid=(3, 5), k=1)
    torch.testing.assert_close(out.transpose(-1, -2).unflatten(-1, (3, 5)), masks)


def test_empty():
    assert propagate_labels(torch.randn(0, 6, 4), torch.randn(0, 6, 4), torch.rand(0, 6, 2), grid=(2, 3)).numel() == 0
    out = propagate_labels(torch.randn(1, 6, 4), torch.randn(1, 6, 4), torch.rand(1, 6, 0), grid=(2, 3))
    assert out.shape == (1, 6, 0)


BAD_CALLS = {
    "list": (TypeError, "query must be a torch.Tensor, got list", lambda q, k, y: ([[1.0]], k, y), {}),
    "dtypes": (TypeError, "one dtype", lambda q, k, y: (q, k.double(), y), {}),
    "labels list": (TypeError, "labels must be a torch.Tensor, got list", lambda q, k, y: (q, k, [1.0]), {}),
    "class numbers": (TypeError, r"int64; turn class numbers .*one_hot", lambda q, k, y: (q, k, y.long()), {}),
    "vector": (ValueError, r"labels \[\.\.\., M, L\], got .* and \[12\]", lambda q, k, y: (q, k, y[:, 0]), {}),
    "channels": (ValueError, "same number of channels", lambda q, k, y: (q, k[:, :2], y), {}),
    "rows": (ValueError, r"each of the 12 keys, got \[11, 2\]", lambda q, k, y: (q, k, y[1:]), {}),
    "batch": (ValueError, "do not broadcast", lambda q, k, y: (q.expand(2, 6, 3), k, y.expand(3, 12, 2)), {}),
    "device": (ValueError, "one device", lambda q, k, y: (q, k.to("meta"), y), {}),
    "labels device": (ValueError, "labels are on meta", lambda q, k, y: (q, k, y.to("meta")), {}),
    "grid": (ValueError, r"grid \(3, 3\) does not hold the 6 queries", lambda *a: a, {"grid": (3, 3)}),
    "no grid": (ValueError, r"grid must be \(H, W\)", lambda *a: a, {"grid": 6}),
    "frames": (ValueError, "does not divide the 12 keys into whole grids", lambda *a: a, {"key_grid": (2, 4)}),
    "radius": (ValueError, "radius must be an integer >= 0, got -1", lambda *a: a, {"radius": -1}),
    "k": (ValueError, "k must be an integer >= 1, got 0", lambda *a: a, {"k": 0}),
    "temperature": (ValueError, r"positive number, got 0", lambda *a: a, {"temperature": 0}),
    "temperature nan": (ValueError, r"positive number, got nan", lambda *a: a, {"temperature": math.nan}),
    "temperature bool": (ValueError, r"positive number, got True", lambda *a: a, {"temperature": True}),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_input_is_named(case):
    error, message, arguments, options = BAD_CALLS[case]
    tensors = arguments(torch.randn(6, 3), torch.randn(12, 3), torch.rand(12, 2))
    with pytest.raises(error, match=message):
        propagate_labels(*tensors, **{"grid": (2, 3), **options})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype):
    query, key, labels = (torch.randn(2, *shape, dtype=dtype) for shape in ((6, 3), (12, 3), (12, 4)))
    arguments = (query, key, labels, [1, 2, 3, 2, 3], 2, 0.1, True)
    torch.library.opcheck(torch.ops.lift_fast.propagate_labels.default, arguments)


def test_compile_full_graph():
    torch._dynamo.reset()
    query, key, labels = torch.randn(6, 3), torch.randn(12, 3), torch.rand(12, 4)
    compiled = torch.compile(
        lambda q, k, y: propagate_labels(q, k, y, grid=(2, 3)), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(query, key, labels), propagate_labels(query, key, labels, grid=(2, 3)))


@pytest.mark.unpoisoned
def test_memory_stays_bounded():
    # The affinity of all pairs would take 3.2 GB, its mask a quarter of that.
    import resource

    query, key, labels = torch.randn(10_000, 8), torch.randn(8 * 10_000, 8), torch.rand(80_000, 4)
    propagate_labels(query[:100], key[:100], labels[:100], grid=(10, 10))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    propagate_labels(query, key, labels, grid=(100, 100))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * 1024 < 1 << 28
