"""The native core's matcher against float64, on every instruction set that this CPU has."""

import math
import platform
import shutil
import subprocess
import sys
import threading
import time
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lift_fast import _native
from lift_fast.testing import AWKWARD_COUNTS

if not _native.can_run()[0]:
    pytest.skip(_native.can_run()[1], allow_module_level=True)

native = _native.require()
ISAS = native.cpu_isas()
CHANNELS = (0, 1, 2, 7, 8, 17, 384)
LARGEST = torch.finfo(torch.float32).max
GARBAGE = -7777777


def match(query, key, *, normalize=True, second=True, reverse=True, threads=2, isa="auto"):
    """Call the core on ``[B, N, C]`` and ``[B, M, C]`` with poisoned outputs, one guarded element at each end."""
    (batch, n, c), m = query.shape, key.shape[1]
    query, key = query.float().contiguous(), key.float().contiguous()
    outputs = {}
    for name, rows, dtype, wanted in (
        ("similarity", n, torch.float32, True),
        ("index", n, torch.int64, True),
        ("second", n, torch.float32, second),
        ("reverse_similarity", m, torch.float32, reverse),
        ("reverse_index", m, torch.int64, reverse),
    ):
        if wanted:
            outputs[name] = torch.full((batch * rows + 2,), math.nan if dtype.is_floating_point else GARBAGE).to(dtype)

    def address(name):
        return outputs[name][1:].data_ptr() if name in outputs else 0

    native.nearest_f32(
        query.data_ptr(),
        key.data_ptr(),
        batch,
        n,
        m,
        c,
        normalize,
        address("similarity"),
        address("index"),
        address("second"),
        address("reverse_similarity"),
        address("reverse_index"),
        threads,
        isa,
    )
    for name, values in outputs.items():
        for guard in (values[0].item(), values[-1].item()):
            assert guard == GARBAGE or math.isnan(guard), f"{name}: written outside"
        written = values[1:-1]
        assert not (written.isnan() if written.is_floating_point() else written == GARBAGE).any(), (
            f"{name}: not written"
        )
        outputs[name] = written.view(batch, -1) if batch else written.view(0, n)
    return SimpleNamespace(**outputs)


def table_of(query, key, normalize):
    """[N, M] similarities in float64 of ``[N, C]`` and ``[M, C]``; -inf where a pair takes no part."""
    sound = query.isfinite().all(1)[:, None] & key.isfinite().all(1)[None]
    query, key = query.double(), key.double()
    if normalize:
        query, key = (rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12) for rows in (query, key))
    table = query @ key.T
    return table.masked_fill(~sound | ~table.isfinite() | (table.abs() > LARGEST), -torch.inf)


def check(similarity, index, table, second=None):
    """One direction: ``similarity``, ``index [N]`` against ``table [N, M]``; rounding may decide among near equals."""
    n, m = table.shape
    padded = torch.cat([table, torch.full((n, 2), -torch.inf, dtype=torch.float64)], dim=1)
    best, runner_up = padded.topk(2, dim=1).values.unbind(1)
    matched = best > -torch.inf
    assert torch.equal(index >= 0, matched)
    assert bool((index < m).all())
    assert bool((index[~matched] == -1).all())
    finite = table[table.isfinite()]
    # Absolute, on the scale of the table: a float32 dot product of C unit-scale terms errs by a few ulp times sqrt(C).
    limit = 2e-6 * max(float(finite.abs().max()), 1e-30) if finite.numel() else 0.0
    chosen = padded.gather(1, index.clamp_min(0)[:, None])[:, 0]
    for actual, expected in ((chosen[matched], best[matched]), (similarity.double()[matched], chosen[matched])):
        assert float((actual - expected).abs().max()) <= limit if actual.numel() else True
    assert bool((similarity[~matched] == -torch.inf).all())
    if second is not None:
        some = runner_up > -torch.inf
        assert torch.equal(second > -torch.inf, some)
        assert float((second.double() - runner_up)[some].abs().max()) <= limit if bool(some.any()) else True


def check_all(query, key, result, normalize):
    for b in range(query.shape[0]):
        table = table_of(query[b], key[b], normalize)
        check(result.similarity[b], result.index[b], table, result.second[b])
        check(result.reverse_similarity[b], result.reverse_index[b], table.T)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("c", CHANNELS)
def test_equals_brute_force(c, isa):
    generator = torch.Generator().manual_seed(c)
    # A third of the pairs each; together the channel counts meet them all.
    for n, m in list(product(AWKWARD_COUNTS, AWKWARD_COUNTS))[c % 3 :: 3]:
        # One channel has cosines of exactly +-1 and no channels a similarity of 0: all ties.
        query, key = torch.randn(1, n, c, generator=generator), torch.randn(1, m, c, generator=generator)
        normalize = bool((n + m) % 2)
        check_all(query, key, match(query, key, normalize=normalize, isa=isa), normalize)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("normalize", [True, False])
def test_batches_are_independent(isa, normalize):
    query, key = torch.randn(3, 33, 17), torch.randn(3, 47, 17)
    result = match(query, key, normalize=normalize, isa=isa, threads=3)
    check_all(query, key, result, normalize)
    alone = match(query[1:2], key[1:2], normalize=normalize, isa=isa)
    for name, values in vars(alone).items():
        assert torch.equal(values[0], getattr(result, name)[1]), name
    assert match(query[:0], key[:0], normalize=normalize, isa=isa).index.shape == (0, 33)


@pytest.mark.parametrize("isa", ISAS)
def test_outputs_do_not_depend_on_which_are_asked_for(isa):
    query, key = torch.randn(2, 97, 24), torch.randn(2, 131, 24)
    everything = match(query, key, isa=isa)
    for second, reverse in product((True, False), repeat=2):
        for name, values in vars(match(query, key, isa=isa, second=second, reverse=reverse)).items():
            assert torch.equal(values, getattr(everything, name)), name


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
        assert bool((result.index < distinct).all())
        assert bool((result.reverse_index < distinct).all())
        # An equal row is a runner-up of the same similarity.
        assert torch.equal(result.second, result.similarity)
        for period in range(distinct, n, distinct):
            assert torch.equal(result.index[0, period:], result.index[0, : n - period])
        if normalize and distinct > 1:
            assert torch.equal(result.index[0], torch.arange(n) % distinct)
            assert torch.equal(result.reverse_index[0], torch.arange(m) % distinct)


@pytest.mark.parametrize("isa", ISAS)
def test_zero_rows_tie_at_zero(isa):
    result = match(torch.zeros(1, 20, 5), torch.zeros(1, 70, 5), isa=isa)
    assert bool((result.similarity == 0).all())
    assert bool((result.index == 0).all())
    assert bool((result.reverse_index == 0).all())
    assert bool((result.second == 0).all())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("n", "m", "c"), [(1, 1, 384), (5, 300, 33), (700, 65, 7), (601, 599, 24)])
def test_bitwise_equal_for_any_number_of_threads(n, m, c, normalize, isa):
    query, key = torch.randn(2, n, c), torch.randn(2, m, c)
    expected = match(query, key, normalize=normalize, isa=isa, threads=1)
    for threads in (2, 5, 64):
        for name, values in vars(match(query, key, normalize=normalize, isa=isa, threads=threads)).items():
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
        result = match(query, key, normalize=normalize, isa=isa)
        check_all(query, key, result, normalize)
        assert bool((result.index[0, bad_queries] == -1).all())
        assert bool((result.similarity[0, bad_queries] == -torch.inf).all())
        assert bool((result.second[0, bad_queries] == -torch.inf).all())
        assert bool((result.reverse_index[0, bad_keys] == -1).all())
    result = match(query, torch.full((1, 5, c), poison), normalize=normalize, isa=isa)
    assert bool((result.index == -1).all())
    assert bool((result.reverse_index == -1).all())


@pytest.mark.parametrize("isa", ISAS)
def test_overflown_products_never_win(isa):
    huge = 3e38
    query = torch.tensor([[[huge, 0.0], [huge, huge], [-huge, 0.0]]])
    # With the first query: +inf, 3e38, -inf, 0; with the second: +inf, 3e38, NaN (inf - inf), 3e38.
    key = torch.tensor([[[huge, 0.0], [1.0, 0.0], [-huge, huge], [0.0, 1.0]]])
    result = match(query, key, normalize=False, isa=isa)
    assert result.index.tolist() == [[1, 1, 3]]
    assert result.second[0, 1].item() == torch.tensor(huge).item()
    assert bool(result.similarity.isfinite().all())
    assert result.reverse_index.tolist() == [[-1, 0, -1, 1]]
    none = match(torch.full((1, 2, 3), huge), torch.full((1, 40, 3), huge), normalize=False, isa=isa)
    assert none.index.tolist() == [[-1, -1]]
    assert bool((none.reverse_similarity == -torch.inf).all())


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
    assert torch.equal(result.index[0], torch.arange(131))
    assert float((result.similarity - 1).abs().max()) <= 5e-6
    # The norm is beyond the largest float, its reciprocal is subnormal.
    huge = match(rows.sign() * LARGEST, rows.sign() * LARGEST, isa=isa)
    assert torch.equal(huge.index[0], torch.arange(131))
    # Equal terms round the same way every time: the error is a sum and does not average out.
    assert float((huge.similarity - 1).abs().max()) <= 5e-6


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
        "similarity": similarity.data_ptr(),
        "index": index.data_ptr(),
        "second": 0,
        "reverse_similarity": 0,
        "reverse_index": 0,
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
        ({"reverse_index": 8}, "come together"),
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
    assert ISAS[-1] == "baseline"
    assert [isa for isa in ("avx512", "avx2", "baseline") if isa in ISAS] == ISAS
    for isa in {"avx512", "avx2"} - set(ISAS):
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
    # With the GIL held, nothing could have ticked in the middle of the call.
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
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_address_and_undefined_behaviour_sanitizers(tmp_path):
    root = Path(__file__).resolve().parents[1]
    sanitize = ["-fopenmp", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    command = ["g++", *sanitize, str(probe), "-o", str(tmp_path / "probe")]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("g++ has no sanitizer libraries")
    sources = {"csrc/cpu/isa.cpp": [], "csrc/cpu/nearest.cpp": [], "csrc/cpu/nearest_baseline.cpp": []}
    if platform.machine() in ("x86_64", "AMD64"):
        avx2 = ["-mavx2", "-mfma", "-mf16c"]
        sources["csrc/cpu/nearest_avx2.cpp"] = avx2
        sources["csrc/cpu/nearest_avx512.cpp"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", *avx2]
    sources["tests/native/nearest_sanitize.cpp"] = []
    objects = []
    for source, flags in sources.items():
        objects.append(str(tmp_path / f"{Path(source).stem}.o"))
        command = ["g++", "-std=c++17", "-O1", "-g", *sanitize, *flags, f"-I{root / 'csrc'}", "-c", str(root / source)]
        subprocess.run([*command, "-o", objects[-1]], check=True)
    subprocess.run(["g++", *sanitize, *objects, "-o", str(tmp_path / "run")], check=True)
    done = subprocess.run([str(tmp_path / "run")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "baseline ok" in done.stdout
