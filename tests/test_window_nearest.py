"""The native core's windowed nearest neighbours against float64 brute force, on every instruction set of this CPU."""

import math
from pathlib import Path

import pytest
import torch
from brute_force import in_window, unit
from hypothesis import given, settings
from hypothesis import strategies as st

from lift_fast import Window, _native, nearest
from lift_fast.ops.nearest import cpu as op
from lift_fast.ops.nearest import plain
from lift_fast.ops.nearest.op import nearest_by

if not _native.can_run()[0]:
    pytest.skip(_native.can_run()[1], allow_module_level=True)

native = _native.require()
ISAS = native.cpu_isas()
ROOT = Path(__file__).resolve().parents[1]


def exact(query, key, window, normalize):
    """Similarities of all pairs in float64, -inf where there is none, and the largest float32 error of each."""
    channels = query.shape[1]
    query, key = query.double(), key.double()
    if normalize:
        query, key = unit(query), unit(key)
    table = query @ key.T
    # Two rounded factors, a sum of that many terms, and underflow.
    bound = (channels + 4) * 2.0**-24 * (query.abs() @ key.abs().T) + (channels + 2) * 1e-45
    table = table.masked_fill(~table.isfinite() | ~in_window(window, *table.shape), -torch.inf)
    return table, bound.where(table > -torch.inf, 0)


def check(query, key, k, window, normalize):
    """Check each match and its rank up to rounding, and that no better key was missed."""
    similarity, index = op.search_windows(query, key, k, window, normalize)
    assert similarity.shape == index.shape == (*query.shape[:2], k)
    for b in range(query.shape[0]):
        table, bound = exact(query[b], key[b], window, normalize)
        count = (table > -torch.inf).sum(1).clamp_max(k)
        found = torch.arange(k) < count[:, None]
        assert torch.equal(index[b] >= 0, found)
        assert bool((index[b][~found] == -1).all())
        assert bool((similarity[b][~found] == -torch.inf).all())
        if not found.any():
            continue
        at = index[b].clamp_min(0)
        error = (similarity[b].double() - table.gather(1, at))[found].abs()
        assert bool((error <= bound.gather(1, at)[found]).all())
        first, second = similarity[b, :, :-1], similarity[b, :, 1:]
        ordered = (first > second) | ((first == second) & (index[b, :, :-1] < index[b, :, 1:]))
        assert bool((ordered | ~found[:, 1:]).all())
        # Keys that were not chosen are no better than the last chosen one.
        others = table.scatter(1, torch.where(found, at, at[:, :1]), -torch.inf)
        last = similarity[b].gather(1, (count - 1).clamp_min(0)[:, None]).double()
        assert bool((others - bound <= last)[count > 0].all())
    return similarity, index


def random_case(seed, query_grid, key_grid, frames, batch, channels):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, math.prod(query_grid), channels, generator=generator)
    key = torch.randn(batch, frames * math.prod(key_grid), channels, generator=generator)
    return query, key, generator


sides = st.one_of(st.integers(1, 6), st.sampled_from((7, 8, 9, 15, 16, 17, 33, 50)))


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=100, deadline=None)
@given(
    query_grid=st.tuples(st.integers(1, 6), sides),
    key_grid=st.tuples(st.integers(1, 6), sides),
    equal=st.booleans(),
    radius=st.one_of(st.integers(0, 8), st.sampled_from((12, 60, 1 << 40))),
    frames=st.integers(0, 3),
    batch=st.integers(1, 2),
    channels=st.sampled_from((0, 1, 2, 3, 8, 17, 64, 70)),
    k=st.sampled_from((1, 2, 5, 32, 256)),
    normalize=st.booleans(),
    poison=st.sampled_from((None, math.nan, math.inf, -math.inf, 0.0)),
    seed=st.integers(0, 1 << 30),
)
def test_against_brute_force(
    isa, query_grid, key_grid, equal, radius, frames, batch, channels, k, normalize, poison, seed
):
    key_grid = query_grid if equal else key_grid
    query, key, generator = random_case(seed, query_grid, key_grid, frames, batch, channels)
    if poison is not None:
        for rows in (query, key):
            rows[torch.rand(rows.shape[:2], generator=generator) < 0.2] = poison
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIFT_FAST_CPU_ISA", isa)
        check(query, key, k, [radius, *query_grid, *key_grid], normalize)


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=60, deadline=None)
@given(
    query_grid=st.tuples(st.integers(1, 5), sides),
    key_grid=st.tuples(st.integers(1, 5), sides),
    radius=st.integers(0, 9),
    frames=st.integers(1, 3),
    channels=st.sampled_from((1, 2, 5, 64, 70)),
    k=st.sampled_from((1, 3, 20)),
    mutual=st.booleans(),
    ratio=st.sampled_from((None, 0.8, 1.0)),
    seed=st.integers(0, 1 << 30),
)
def test_small_integers_equal_the_plain_version(
    isa, query_grid, key_grid, radius, frames, channels, k, mutual, ratio, seed
):
    """Products of small integers are exact, so results are equal: many ties, both directions, the ratio."""
    query, key, _ = random_case(seed, query_grid, key_grid, frames, 2, channels)
    query, key = query.round(), key.round()
    key[:, ::7] = math.nan
    window = [radius, *query_grid, *key_grid]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIFT_FAST_CPU_ISA", isa)
        ours = nearest_by(op.search, query, key, k, mutual, ratio, window, False)
    expected = nearest_by(plain.search, query, key, k, mutual, ratio, window, False)
    for one, other in zip(ours, expected, strict=True):
        assert one.is_contiguous()
        assert torch.equal(one, other)


@pytest.mark.parametrize("isa", ISAS)
def test_several_stages_and_tasks(isa, monkeypatch):
    """More keys than are packed together, more queries than one task holds, windows wider than one step."""
    monkeypatch.setenv("LIFT_FAST_CPU_ISA", isa)
    query, key, _ = random_case(3, (9, 70), (11, 90), 9, 1, 384)
    for radius in (2, 30):
        check(query, key, 5, [radius, 9, 70, 11, 90], True)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("shape", ["even", "late", "early", "wild"])
def test_giving_up_early_changes_nothing(isa, shape, normalize, monkeypatch):
    """Similar frames, where most pairs are abandoned after some channels."""
    monkeypatch.setenv("LIFT_FAST_CPU_ISA", isa)
    query, _, generator = random_case(9, (8, 27), (8, 27), 1, 1, 97)
    # The distribution of a row's length among its channels decides what remains when it is abandoned.
    share = torch.linspace(-4, 4, 97).exp()
    if shape != "even":
        query = (
            query
            * {"late": share, "early": share.flip(0), "wild": share[torch.randperm(97, generator=generator)]}[shape]
        )
    if shape == "wild":
        query = query * torch.randn(1, 216, 1, generator=generator).mul(3).exp()
    frames = [query + noise * query * torch.randn(query.shape, generator=generator) for noise in (0.3, 0.0, 0.1)]
    # Negated first channels: abandoning a pair because of them alone would lose the match.
    frames[0][..., :30] *= -1
    check(query, torch.cat(frames, dim=1), 3, [5, 8, 27, 8, 27], normalize)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("normalize", [True, False])
def test_cells_that_are_not_finite_take_no_part(isa, poison, normalize, monkeypatch):
    monkeypatch.setenv("LIFT_FAST_CPU_ISA", isa)
    query, key, _ = random_case(4, (5, 19), (5, 19), 2, 1, 6)
    query[0, 7, 2] = key[0, 30, 5] = key[0, 100, 0] = poison
    _, index = check(query, key, 4, [2, 5, 19, 5, 19], normalize)
    assert index[0, 7].tolist() == [-1] * 4
    assert not bool(torch.isin(index, torch.tensor([30, 100])).any())
    key[:] = poison
    assert bool((check(query, key, 4, [2, 5, 19, 5, 19], normalize)[1] == -1).all())


@pytest.mark.parametrize("isa", ISAS)
def test_overflowing_products_take_no_part(isa, monkeypatch):
    monkeypatch.setenv("LIFT_FAST_CPU_ISA", isa)
    query = torch.full((1, 3, 2), 1e30)
    key = torch.tensor([1e30, -1e30, 1.0])[None, :, None].expand(1, 3, 2)
    similarity, index = op.search_windows(query, key, 2, [3, 1, 3, 1, 3], False)
    assert index.tolist() == [[[2, -1]] * 3]
    assert bool((similarity[..., 0] == 2e30).all())
    # As cosines they are finite.
    similarity, index = op.search_windows(query, key, 3, [3, 1, 3, 1, 3], True)
    assert index.tolist() == [[[0, 2, 1]] * 3]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("channels", [33, 100])
def test_equal_keys_go_to_the_lowest_index(isa, channels, normalize, monkeypatch):
    monkeypatch.setenv("LIFT_FAST_CPU_ISA", isa)
    generator = torch.Generator().manual_seed(5)
    row = torch.randn(1, 1, channels, generator=generator)
    query = row.expand(1, 60, channels)
    # All keys of both frames are the same: the first ones of the window, in order.
    similarity, index = op.search_windows(query, row.expand(1, 120, channels), 6, [1, 3, 20, 3, 20], normalize)
    near = in_window([1, 3, 20, 3, 20], 60, 120)
    for i in range(60):
        assert index[0, i].tolist() == near[i].nonzero()[:6, 0].tolist()
    assert bool((similarity == similarity[..., :1]).all())
    # Two frames of the same image: each match occurs twice, the earlier frame first.
    frame = torch.randn(1, 60, channels, generator=generator)
    index = op.search_windows(frame, frame.repeat(1, 2, 1), 8, [2, 3, 20, 3, 20], normalize)[1]
    assert bool((index[..., 0::2] + 60 == index[..., 1::2]).all())
    assert index[0, :, 0].tolist() == list(range(60)) or not normalize


@pytest.mark.parametrize("isa", ISAS)
def test_zero_vectors_have_similarity_zero(isa, monkeypatch):
    monkeypatch.setenv("LIFT_FAST_CPU_ISA", isa)
    key = -torch.ones(1, 12, 4)
    key[0, 5] = 0
    similarity, index = op.search_windows(torch.ones(1, 12, 4), key, 1, [12, 3, 4, 3, 4], True)
    assert bool((index == 5).all())
    assert bool((similarity == 0).all())
    similarity, index = op.search_windows(torch.zeros(1, 12, 4), key, 1, [0, 3, 4, 3, 4], True)
    assert index.flatten().tolist() == list(range(12))
    assert bool((similarity == 0).all())


@pytest.mark.parametrize("isa", ISAS)
def test_the_result_does_not_depend_on_threads(isa, monkeypatch):
    monkeypatch.setenv("LIFT_FAST_CPU_ISA", isa)
    query, key, _ = random_case(6, (13, 21), (10, 25), 3, 2, 48)
    window = [4, 13, 21, 10, 25]
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            results.append((*op.search_windows(query, key, 5, window, True), op.search_back(query, key, window, True)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))
    # Nor on the rest of the batch.
    alone = op.search_windows(query[1:], key[1:], 5, window, True)
    assert torch.equal(alone[0], results[0][0][1:])
    assert torch.equal(alone[1], results[0][1][1:])


def test_instruction_sets_agree(monkeypatch):
    query, key, _ = random_case(7, (6, 23), (7, 31), 2, 1, 65)
    found = []
    for isa in ISAS:
        monkeypatch.setenv("LIFT_FAST_CPU_ISA", isa)
        found.append(op.search_windows(query, key, 5, [3, 6, 23, 7, 31], True)[0])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=2 * 69 * 2.0**-24)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_user_function_takes_this_way(dtype, monkeypatch):
    query, key, _ = random_case(8, (4, 9), (4, 9), 2, 1, 16)
    query, key = query.to(dtype).expand(3, -1, -1), key.to(dtype)
    expected = nearest_by(op.search, query, key.expand(3, -1, -1), 3, True, 0.9, [2, 4, 9, 4, 9], True)
    monkeypatch.setattr(plain, "search", None)
    ours = nearest(query, key, k=3, mutual=True, ratio=0.9, window=Window(2, (4, 9)))
    assert all(torch.equal(one, two) for one, two in zip(ours, expected, strict=True))


def test_what_it_cannot_do_is_left_to_the_plain_version(monkeypatch):
    query, key = torch.randn(1, 6, 4), torch.randn(1, 6, 4)
    window = [1, 2, 3, 2, 3]
    assert op.can_run(query, 256, window) == (True, "")
    for case, reason in (
        ((query.double(), 1, window), "float64"),
        ((query.to("meta"), 1, window), "meta"),
        ((query, 257, window), "at most 256"),
        ((query, 1, [1, 2, 3, 1 << 31, 1]), "2147483648"),
    ):
        runs, why = op.can_run(*case)
        assert not runs
        assert reason in why
    monkeypatch.setattr(op, "search", None)
    assert nearest(query.double(), key.double(), window=Window(1, (2, 3))).similarity.dtype == torch.float64
    assert nearest(query, key, k=300, window=Window(1, (2, 3))).index.shape == (1, 6, 300)


def call(**changes):
    query, key = torch.randn(1, 2, 6, 4), torch.randn(1, 3, 10, 4)
    similarity, index = torch.zeros(1, 12, 2), torch.zeros(1, 12, 2, dtype=torch.int64)
    arguments = {
        "query": query.data_ptr(),
        "key": key.data_ptr(),
        "batch": 1,
        "query_frames": 2,
        "query_h": 2,
        "query_w": 3,
        "key_frames": 3,
        "key_h": 5,
        "key_w": 2,
        "c": 4,
        "k": 2,
        "reach_y": 4,
        "reach_x": 6,
        "normalize": True,
        "similarity": similarity.data_ptr(),
        "index": index.data_ptr(),
        "threads": 1,
    }
    native.window_nearest_f32(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"isa": "sse9"}, "sse9"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"batch": -1}, "negative"),
        ({"query_frames": -1}, "negative"),
        ({"key_frames": -1}, "negative"),
        ({"c": -1}, "negative"),
        ({"reach_y": -1}, "negative"),
        ({"reach_x": -1}, "negative"),
        ({"query_h": 0}, "sides of grids"),
        ({"key_w": -3}, "sides of grids"),
        ({"query_w": (1 << 30) + 1}, "sides of grids"),
        ({"query": 0}, "null"),
        ({"key": 0}, "null"),
        ({"similarity": 0}, "null"),
        ({"index": 0}, "null"),
        ({"k": 1 << 60}, "too large"),
        ({"c": 1 << 60}, "too large"),
        ({"key_frames": 1 << 60}, "too large"),
    ],
)
def test_bad_arguments_are_refused(changes, message):
    call()
    with pytest.raises(ValueError, match=message):
        call(**changes)


def test_nothing_to_do():
    call(batch=0, similarity=0, index=0)
    call(query_frames=0, query=0)
    call(key_frames=0, key=0)
    call(c=0, query=0, key=0)
