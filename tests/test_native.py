"""The native core's matcher against float64, on every instruction set that this CPU has."""

import math
import platform
import subprocess
import sys
import threading
import time
from itertools import product
from types import SimpleNamespace

import compiled
import native_build
import pytest
import torch

from lift_fast import _native, memory
from lift_fast.testing import AWKWARD_COUNTS, poisoned_outputs, unwritten

if not _native.can_run()[0]:
    pytest.skip(_native.can_run()[1], allow_module_level=True)

native = _native.require()
KERNELS = ("avx512_bf16", "avx512_int16", "avx512", "avx2", "baseline")


def runs(isa):
    try:
        return native.nearest_isa(isa) == isa
    except ValueError:
        return False


# Every kernel that this CPU can run, including searches in short numbers.
ISAS = [isa for isa in KERNELS if runs(isa)]
CHANNELS = (0, 1, 2, 7, 8, 17, 384)
LARGEST = torch.finfo(torch.float32).max


def match(query, key, *, normalize=True, k=2, back=True, rescore=True, threads=2, isa="auto"):
    """Call the core on ``[B, N, C]`` and ``[B, M, C]``; it must write all of the outputs and nothing else."""
    (batch, n, c), m = query.shape, key.shape[1]
    query, key = query.float().contiguous(), key.float().contiguous()
    with poisoned_outputs():
        outputs = {
            "similarity": memory.empty((batch, n, k), dtype=torch.float32),
            "index": memory.empty((batch, n, k), dtype=torch.int64),
        }
        if back:
            outputs["back"] = memory.empty((batch, n), dtype=torch.int64)
        native.nearest_f32(
            query.data_ptr(),
            key.data_ptr(),
            batch,
            n,
            m,
            c,
            normalize,
            rescore,
            k,
            outputs["similarity"].data_ptr(),
            outputs["index"].data_ptr(),
            outputs["back"].data_ptr() if back else 0,
            threads,
            isa,
        )
    for name, tensor in outputs.items():
        assert not unwritten(tensor).any(), f"{name}: not written"
    return SimpleNamespace(**outputs)


def table_of(query, key, normalize):
    """[N, M] similarities in float64 of ``[N, C]`` and ``[M, C]``; -inf where a pair takes no part."""
    finite = query.isfinite().all(1)[:, None] & key.isfinite().all(1)[None]
    query, key = query.double(), key.double()
    if normalize:
        query, key = (rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12) for rows in (query, key))
    table = query @ key.T
    return table.masked_fill(~finite | ~table.isfinite() | (table.abs() > LARGEST), -torch.inf)


def rounding(table, c):
    """How far a float32 similarity of ``c`` channels may be off, on the scale of the table."""
    finite = table[table.isfinite()]
    return (c + 8) * 6e-8 * max(float(finite.abs().max()), 1e-30) if finite.numel() else 0.0


def check(similarity, index, table, limit):
    """``similarity``, ``index [N, k]`` against ``table [N, M]``; rounding may decide among near equals."""
    (n, m), k = table.shape, index.shape[1]
    padded = torch.cat([table, torch.full((n, k), -torch.inf, dtype=torch.float64)], dim=1)
    best = padded.topk(k, dim=1).values
    matched = best > -torch.inf
    assert torch.equal(index >= 0, matched)
    assert bool((index < m).all())
    assert bool((index[~matched] == -1).all())
    assert bool((similarity[~matched] == -torch.inf).all())
    assert bool((similarity[:, 1:] <= similarity[:, :-1]).all())
    chosen = padded.gather(1, index.clamp_min(0))
    for actual, expected in ((chosen, best), (similarity.double(), chosen)):
        assert float((actual - expected)[matched].abs().max()) <= limit if bool(matched.any()) else True
    # No key twice, and equal similarities by ascending index.
    equal = (similarity[:, 1:] == similarity[:, :-1]) & matched[:, 1:]
    assert bool((index[:, 1:] > index[:, :-1])[equal].all())
    ordered = index.sort(1).values
    assert not bool(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any())


def check_back(index, back, table, limit):
    matched = index >= 0
    assert bool((back[~matched] == -1).all())
    columns = table[:, index[matched]]
    chosen = columns.gather(0, back[matched][None])[0]
    assert float((columns.amax(0) - chosen).max()) <= limit if bool(matched.any()) else True


def check_all(query, key, result, normalize):
    for b in range(query.shape[0]):
        table = table_of(query[b], key[b], normalize)
        limit = rounding(table, query.shape[2])
        check(result.similarity[b], result.index[b], table, limit)
        check_back(result.index[b, :, 0], result.back[b], table, limit)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("c", CHANNELS)
def test_equals_brute_force(c, isa):
    generator = torch.Generator().manual_seed(c)
    # A third of the pairs each; together the channel counts meet them all.
    for n, m in list(product(AWKWARD_COUNTS, AWKWARD_COUNTS))[c % 3 :: 3]:
        # One channel has cosines of exactly +-1 and no channels a similarity of 0: all ties.
        query, key = torch.randn(1, n, c, generator=generator), torch.randn(1, m, c, generator=generator)
        normalize, k = bool((n + m) % 2), (1, 2, 5, 32)[(n + 3 * m) % 4]
        check_all(query, key, match(query, key, normalize=normalize, k=k, isa=isa), normalize)


def wave(count, c):
    """Neighbouring rows differ too little for the search to order them."""
    phase = torch.rand(c) * 6.3
    return torch.sin(torch.arange(count)[:, None] * torch.linspace(0.001, 0.01, c) + phase)[None]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("k", [1, 7, 128])
def test_rows_that_the_search_cannot_tell_apart(k, normalize, isa):
    rows = wave(1500, 40)
    for query, key in ((rows, rows), (rows[:, :600] + 1e-4 * torch.randn(1, 600, 40), rows)):
        check_all(query, key, match(query, key, normalize=normalize, k=k, isa=isa), normalize)
    # Nearly constant: every key is a candidate.
    flat = 1 + 1e-6 * torch.randn(1, 700, 24)
    check_all(flat[:, :90], flat, match(flat[:, :90], flat, normalize=normalize, k=k, isa=isa), normalize)


@pytest.mark.parametrize("isa", ISAS)
def test_norms_of_every_size_beside_each_other(isa):
    query, key = torch.randn(1, 150, 33), torch.randn(1, 400, 33)
    query *= 10.0 ** torch.randint(-12, 13, (1, 150, 1))
    key *= 10.0 ** torch.randint(-12, 13, (1, 400, 1))
    check_all(query, key, match(query, key, isa=isa), True)
    # Each row on its own scale: a table of products has no common scale.
    result = match(query, key, normalize=False, isa=isa)
    table = table_of(query[0], key[0], False)
    for i in range(query.shape[1]):
        assert torch.allclose(result.similarity[0, i, 0].double(), table[i].max(), rtol=1e-5, atol=0)
    columns = table[:, result.index[0, :, 0]]
    chosen = columns.gather(0, result.back)[0]
    assert torch.allclose(chosen, columns.amax(0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("isa", ISAS)
def test_without_rescoring_the_error_is_that_of_the_search(isa):
    query, key = torch.randn(1, 300, 384), torch.randn(1, 500, 384)
    result = match(query, key, rescore=False, isa=isa)
    table = table_of(query[0], key[0], True)
    error = (result.similarity[0].double() - table.gather(1, result.index[0])).abs().max()
    limit = {"bfloat16": 2**-7, "int16": 1e-4, "float32": 1e-6}[native.nearest_search(isa)]
    assert float(error) <= limit
    assert float((table.amax(1) - table.gather(1, result.index[0])[:, 0]).max()) <= 2 * limit


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("normalize", [True, False])
def test_batches_are_independent(isa, normalize):
    query, key = torch.randn(3, 33, 17), torch.randn(3, 47, 17)
    # Different scales of one batch must not affect another batch.
    query *= torch.tensor([1e-20, 1.0, 1e10])[:, None, None]
    result = match(query, key, normalize=normalize, isa=isa, threads=3)
    check_all(query, key, result, normalize)
    alone = match(query[1:2], key[1:2], normalize=normalize, isa=isa)
    for name, values in vars(alone).items():
        assert torch.equal(values[0], getattr(result, name)[1]), name
    assert match(query[:0], key[:0], normalize=normalize, isa=isa).index.shape == (0, 33, 2)


@pytest.mark.parametrize("isa", ISAS)
def test_outputs_do_not_depend_on_which_are_asked_for(isa):
    query, key = torch.randn(2, 97, 24), torch.randn(2, 131, 24)
    everything = match(query, key, k=5, isa=isa)
    for k, back in product((1, 2, 5), (True, False)):
        result = match(query, key, k=k, back=back, isa=isa)
        assert torch.equal(result.similarity, everything.similarity[..., :k])
        assert torch.equal(result.index, everything.index[..., :k])
        assert not back or torch.equal(result.back, everything.back)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("distinct", [1, 3, 100, 601])
def test_equal_similarities_go_to_the_lowest_index(distinct, normalize, isa):
    # More rows than one task or tile holds, so equal rows stand in several lanes, tiles, tasks and threads.
    n, m, c = 1201, 1300, 19
    # Row i of either set equals row i % distinct bit by bit.
    key = torch.randn(1, distinct, c).repeat(1, m, 1)[:, :m]
    query = key[:, :n]
    for threads in (1, 2, 5, 16):
        result = match(query, key, normalize=normalize, isa=isa, threads=threads)
        assert bool((result.index[..., 0] < distinct).all())
        assert bool((result.back < distinct).all())
        # An equal row is a runner-up of the same similarity, one period further on.
        assert torch.equal(result.similarity[..., 1], result.similarity[..., 0])
        assert torch.equal(result.index[..., 1], result.index[..., 0] + distinct)
        for period in range(distinct, n, distinct):
            assert torch.equal(result.index[0, period:], result.index[0, : n - period])
        if normalize and distinct > 1:
            assert torch.equal(result.index[0, :, 0], torch.arange(n) % distinct)
            assert torch.equal(result.back[0], torch.arange(n) % distinct)


@pytest.mark.parametrize("isa", ISAS)
def test_zero_rows_tie_at_zero(isa):
    result = match(torch.zeros(1, 20, 5), torch.zeros(1, 70, 5), isa=isa)
    assert bool((result.similarity == 0).all())
    assert bool((result.index == torch.tensor([0, 1])).all())
    assert bool((result.back == 0).all())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("n", "m", "c"), [(1, 1, 384), (5, 300, 33), (700, 65, 7), (601, 599, 24)])
def test_bitwise_equal_for_any_number_of_threads(n, m, c, normalize, isa):
    query, key = torch.randn(2, n, c), torch.randn(2, m, c)
    for rescore in (True, False):
        expected = match(query, key, normalize=normalize, rescore=rescore, isa=isa, threads=1)
        for threads in (2, 5, 64):
            result = match(query, key, normalize=normalize, rescore=rescore, isa=isa, threads=threads)
            for name, values in vars(result).items():
                assert torch.equal(values, getattr(expected, name)), (name, threads)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_rows_that_are_not_finite_take_no_part(poison, normalize, isa):
    for c in (1, 17, 40):
        query, key = torch.randn(1, 64, c), torch.randn(1, 97, c)
        bad_queries, bad_keys = [0, 15, 16, 63], [0, 1, 31, 64, 96]
        for channel, (tensor, rows) in enumerate(((query, bad_queries), (key, bad_keys))):
            for row in rows:
                tensor[0, row, (row * 5 + channel) % c] = poison
        result = match(query, key, normalize=normalize, k=100, isa=isa)
        check_all(query, key, result, normalize)
        assert bool((result.index[0, bad_queries] == -1).all())
        assert bool((result.back[0, bad_queries] == -1).all())
        assert not bool(torch.isin(result.index, torch.tensor(bad_keys)).any())
        assert not bool(torch.isin(result.back, torch.tensor(bad_queries)).any())
    result = match(query, torch.full((1, 5, c), poison), normalize=normalize, isa=isa)
    assert bool((result.index == -1).all())
    assert bool((result.back == -1).all())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rescore", [True, False])
def test_overflown_products_never_win(rescore, isa):
    huge = 3e38
    query = torch.tensor([[[huge, 0.0], [huge, huge], [-huge, 0.0]]])
    # With the first query: 9e76, 3e38, -9e76, 0; with the second: 9e76, 3e38, 0 (9e76 - 9e76), 3e38.
    key = torch.tensor([[[huge, 0.0], [1.0, 0.0], [-huge, huge], [0.0, 1.0]]])
    result = match(query, key, normalize=False, rescore=rescore, isa=isa)
    assert result.index[..., 0].tolist() == [[1, 1, 3]]
    assert result.similarity[0, 1, 1].item() == torch.tensor(huge).item()
    assert bool(result.similarity.isfinite().all())
    # The first and second query give the key (1, 0) the same similarity.
    assert result.back.tolist() == [[0, 0, 1]]
    none = match(torch.full((1, 2, 3), huge), torch.full((1, 40, 3), huge), normalize=False, isa=isa)
    assert bool((none.index == -1).all())
    assert bool((none.back == -1).all())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-10, 1e10, 1e30, 1e38])
def test_magnitudes(scale, isa):
    query, key = torch.randn(1, 60, 50).clamp(-3, 3), torch.randn(1, 70, 50).clamp(-3, 3)
    check_all(query * scale, key * scale, match(query * scale, key * scale, isa=isa), True)
    check_all(query * scale, key / scale, match(query * scale, key / scale, normalize=False, isa=isa), False)
    # Between 1e-12 and the largest float a cosine does not see the magnitude at all.
    if scale > 1e-12:
        assert torch.allclose(
            match(query * scale, key, isa=isa).similarity, match(query, key, isa=isa).similarity, rtol=0, atol=2e-6
        )


@pytest.mark.parametrize("isa", ISAS)
def test_identical_rows_have_a_cosine_of_one(isa):
    rows = torch.randn(1, 131, 384)
    result = match(rows, rows, isa=isa)
    assert torch.equal(result.index[0, :, 0], torch.arange(131))
    assert float((result.similarity[..., 0] - 1).abs().max()) <= 5e-6
    # The norm is beyond the largest float, its reciprocal is subnormal.
    huge = match(rows.sign() * LARGEST, rows.sign() * LARGEST, isa=isa)
    assert torch.equal(huge.index[0, :, 0], torch.arange(131))
    # Equal terms round the same way every time: the error is a sum and does not average out.
    assert float((huge.similarity[..., 0] - 1).abs().max()) <= 5e-6


def call(**changes):
    rows = torch.zeros(4, 4)
    similarity, index = torch.zeros(4), torch.zeros(4, dtype=torch.int64)
    arguments = {
        "query": rows.data_ptr(),
        "key": rows.data_ptr(),
        "batch": 1,
        "n": 4,
        "m": 4,
        "c": 4,
        "normalize": True,
        "rescore": True,
        "k": 1,
        "similarity": similarity.data_ptr(),
        "index": index.data_ptr(),
        "back": 0,
        "threads": 1,
    }
    native.nearest_f32(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"isa": "sse9"}, "sse9"),
        ({"isa": ""}, "isa must be"),
        ({"threads": 0}, "threads"),
        ({"threads": -3}, "threads"),
        ({"batch": -1}, "negative"),
        ({"n": -1}, "negative"),
        ({"m": -1}, "negative"),
        ({"c": -1}, "negative"),
        ({"n": 2**31}, "2147483648"),
        ({"m": 2**40}, "1099511627776"),
        ({"c": 2**40}, "too large"),
        ({"m": 2**30, "c": 2**30}, "too large"),
        ({"k": 0}, "k must be 1 to 128, got 0"),
        ({"k": 129}, "k must be 1 to 128, got 129"),
        ({"query": 0}, "null"),
        ({"key": 0}, "null"),
        ({"similarity": 0}, "null"),
        ({"index": 0}, "null"),
    ],
)
def test_bad_arguments_are_refused(changes, message):
    call()
    with pytest.raises(ValueError, match=message):
        call(**changes)


def test_instruction_sets_are_listed_best_first():
    sets = native.cpu_isas()
    assert sets[-1] == "baseline"
    assert [isa for isa in ("avx512", "avx2", "baseline") if isa in sets] == sets
    assert native.nearest_isa("auto") == ISAS[0]
    for isa in set(KERNELS) - set(ISAS):
        with pytest.raises(ValueError, match=isa):
            call(isa=isa)


def test_other_python_threads_run_meanwhile():
    query, key = torch.randn(1, 6000, 384), torch.randn(1, 6000, 384)
    spans = []

    def work():
        start = time.perf_counter()
        match(query, key, threads=1, isa="baseline")
        spans.append((start, time.perf_counter()))

    thread = threading.Thread(target=work)
    thread.start()
    ticks = []
    while thread.is_alive():
        ticks.append(time.perf_counter())
        time.sleep(0.001)
    thread.join()
    start, end = spans[0]
    # With the GIL held, nothing could tick during the call.
    assert any(start + 0.25 * (end - start) < tick < end - 0.25 * (end - start) for tick in ticks)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_openmp_runtime():
    code = (
        "import torch, lift_fast._C\n"
        "maps = open('/proc/self/maps').read().splitlines()\n"
        "print('\\n'.join(sorted({line.split()[-1] for line in maps if 'libgomp' in line or 'libomp' in line})))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    runtimes = done.stdout.split()
    if not native.build_info()["openmp"]:
        pytest.skip("the native core was built without OpenMP")
    assert len(runtimes) == 1, runtimes


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="that kernel is not built here")
def test_the_kernel_for_avx512_vnni_on_any_processor():
    """The kernel's own source, with a header that defines its instructions in plain C++."""
    emulated = ["-DLIFT_FAST_ISA=avx512_int16", f"-I{native_build.NATIVE / 'emulated_avx512'}"]
    units = [
        (source, name, emulated if name == "nearest_kernel_avx512_int16" else flags)
        for source, name, flags in native_build.core("nearest")
    ]
    assert emulated in [flags for _, _, flags in units]
    units += native_build.own("nearest_emulate")
    program = native_build.program("nearest-emulate", units, ["-O2", "-fopenmp", "-Wno-psabi"])
    assert "matches ok" in compiled.run([program])
