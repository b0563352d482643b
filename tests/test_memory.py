"""Allocation of memory that kernels write, and its test replacement with poison and guard bands."""

from __future__ import annotations

import ast
import importlib
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import lift_fast
from lift_fast import _native, memory, testing
from lift_fast.ops.cosine_loss import cpu as loss_cpu
from lift_fast.ops.dense_match import bilinear
from lift_fast.ops.dense_match import cpu as dense_match_cpu
from lift_fast.ops.nearest import cpu as nearest_cpu
from lift_fast.testing import poisoned_outputs, unwritten

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROOT = Path(__file__).resolve().parents[1]
HERE = Path(__file__).name
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
WHOLE = [torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("dtype", FLOATS + WHOLE, ids=str)
def test_poison(dtype, mode):
    like = torch.ones(2, 3, 4, 5, device=DEVICE, dtype=dtype).contiguous(memory_format=torch.channels_last)
    with mode(), poisoned_outputs():
        made = [
            memory.empty((2, 3), dtype=dtype, device=DEVICE),
            memory.empty(5, dtype=dtype, device=DEVICE),
            memory.empty((), dtype=dtype, device=DEVICE),
            memory.empty((3, 0), dtype=dtype, device=DEVICE),
            memory.new_empty(like, (7, 1)),
            memory.new_empty(like, 3, dtype=dtype),
            memory.empty_like(like),
            memory.empty_like(like, memory_format=torch.contiguous_format),
        ]
    plain = [torch.empty_like(like), torch.empty_like(like, memory_format=torch.contiguous_format)]
    assert [one.shape for one in made] == [(2, 3), (5,), (), (3, 0), (7, 1), (3,), like.shape, like.shape]
    assert [one.stride() for one in made[-2:]] == [one.stride() for one in plain]
    for one in made:
        assert one.dtype == dtype
        assert one.device == like.device
        assert one.data_ptr() % (512 if one.is_cuda else 64) == 0
        # As an operator's result is.
        assert not one._is_view()
        assert one.storage_offset() == 0
        assert one.untyped_storage().nbytes() == one.numel() * one.element_size()
        assert bool(unwritten(one).all())
        if dtype.is_floating_point:
            assert bool(one.isnan().all())
        elif dtype not in (torch.uint8, torch.bool):
            assert bool((one < -100).all())
    with mode():
        made[0][1, 2] = 1
    assert unwritten(made[0]).tolist() == [[True, True, True], [True, True, False]]


def test_initialised_memory_is_guarded_and_keeps_its_contents():
    with poisoned_outputs():
        zeros = memory.zeros((2, 3), dtype=torch.int32, device=DEVICE)
        full = memory.full((4,), -(1 << 63), dtype=torch.int64, device=DEVICE)
    assert zeros.tolist() == [[0] * 3] * 2
    assert full.tolist() == [-(1 << 63)] * 4
    with pytest.raises(AssertionError, match=overrun(1, 16)), poisoned_outputs():
        spill_triton(memory.full((4,), 3.0, device=DEVICE), 1)


def test_outlives_the_context_and_the_check():
    with poisoned_outputs():
        kept = memory.empty(1000, device=DEVICE).fill_(3)
    for _ in range(100):
        torch.zeros(1256, device=DEVICE)
    assert bool((kept == 3).all())


def test_the_door_is_closed_again():
    before = [getattr(memory, name) for name in testing._DOORS]
    with poisoned_outputs():
        assert all(getattr(memory, name) is not was for name, was in zip(testing._DOORS, before, strict=True))
    with pytest.raises(KeyError), poisoned_outputs():
        raise KeyError
    assert [getattr(memory, name) for name in testing._DOORS] == before
    assert set(testing._DOORS) == {name for name, value in vars(memory).items() if callable(value)} - {"annotations"}


def test_tracers_and_meta_tensors_get_their_own():
    with poisoned_outputs():
        assert memory.empty((2, 3), device="meta").is_meta
        with torch._subclasses.FakeTensorMode():
            fake = memory.empty((2, 3))
            assert type(memory.empty_like(fake)) is type(fake) is not torch.Tensor


@pytest.mark.unpoisoned
def test_without_the_context_it_is_pytorch():
    """Without guards there is no cost: no call, no check."""
    assert (memory.empty, memory.empty_like, memory.full, memory.zeros) == (
        torch.empty,
        torch.empty_like,
        torch.full,
        torch.zeros,
    )
    assert memory.new_empty is torch.Tensor.new_empty


def idle(*args, **kwargs):
    """Replaces a kernel; does nothing."""


class IdleKernel:
    """Replaces a Triton kernel."""

    def __getitem__(self, grid):
        return idle


def native():
    if not _native.can_run()[0]:
        pytest.skip(_native.can_run()[1])
    return _native.require()


def run_nearest():
    return nearest_cpu.search(torch.randn(1, 3, 4), torch.randn(1, 5, 4), 1, False, None, True)[:2]


def run_window():
    return nearest_cpu.search_windows(torch.randn(1, 6, 4), torch.randn(1, 6, 4), 2, [1, 2, 3, 2, 3], True)


def run_loss():
    return loss_cpu.loss_and_gradient(torch.randn(2, 3, 4), torch.randn(2, 3, 4), 1, "none", True)


def run_dense(points=None):
    stretched = bilinear.StretchedMap(torch.randn(6, 4), (2, 3), (5, 7))
    return dense_match_cpu.match(stretched, stretched, points, False)


@pytest.mark.parametrize(
    "run", [run_nearest, run_window, run_loss, run_dense, partial(run_dense, torch.tensor([[1, 2]]))], ids=range(5)
)
def test_what_the_native_core_leaves_out_shows(run, monkeypatch):
    core = native()
    assert not any(bool(unwritten(out).any()) for out in run())
    functions = dict.fromkeys((name for name in dir(core) if callable(getattr(core, name))), idle)
    monkeypatch.setattr(_native, "require", lambda: SimpleNamespace(**functions))
    for out in run():
        assert bool(unwritten(out).all())


def run_propagation(module):
    rows, part = torch.randn(1, 6, 4, device=DEVICE), torch.zeros(1, 6, device=DEVICE)
    return [module.propagate_labels(rows, rows, part, part, rows, [1, 2, 3, 2, 3], 2, 0.1)]


def run_preparation(module):
    rows = module.prepare(torch.randn(1, 6, 4, device=DEVICE), True, torch.float16, measured=True)
    return [rows.copy, rows.shift, rows.scale, rows.bias, rows.residual]


def run_search(module):
    from lift_fast.kernels import nearest_rows

    rows = nearest_rows.prepare(torch.randn(1, 6, 4, device=DEVICE), True, None)
    found = module.search(rows, rows, 1, module.default_tile(4, 4, 1, False, False, (9, 0)))
    return [found.values, found.indices]


@pytest.mark.parametrize(
    ("name", "kernels", "run"),
    [
        ("propagate_labels", ["propagate_labels_kernel"], run_propagation),
        ("nearest_rows", ["prepare_kernel"], run_preparation),
        ("nearest", ["search_kernel"], run_search),
    ],
)
def test_what_a_triton_kernel_leaves_out_shows(name, kernels, run, monkeypatch):
    pytest.importorskip("triton")
    module = importlib.import_module(f"lift_fast.kernels.{name}")
    for kernel in kernels:
        monkeypatch.setattr(module, kernel, IdleKernel())
    for out in run(module):
        assert bool(unwritten(out).all())


def spill_native(loss, by):
    """The native core's loss of ``loss.shape`` positions, with an address that is off by ``by`` elements."""
    # Equal vectors: a loss of zero has no byte in common with the bands; a random one may.
    x = y = torch.ones(len(loss), 3, 1)
    native().cosine_loss(
        x.data_ptr(), y.data_ptr(), "float32", x.shape, x.stride(), y.stride(), (0, 0, 0), 1.0,
        loss.data_ptr() + 4 * by, 0, 1, "auto",
    )  # fmt: skip


def spill_triton(values, by):
    """A Triton kernel that writes ``values`` at an offset of ``by`` elements."""
    triton = pytest.importorskip("triton")
    tl = triton.language

    @triton.jit
    def kernel(out, by, BLOCK: tl.constexpr):
        tl.store(out + by + tl.arange(0, BLOCK), tl.zeros((BLOCK,), tl.float32))

    kernel[(1,)](values, by, BLOCK=len(values))


def overrun(by, size):
    side, at = ("before its start", -4) if by < 0 else ("after its end", size)
    where = rf"float32 \[4\] allocated at .*{re.escape(HERE)}:\d+"
    return rf"{where}: 4 bytes written {side}, the first at byte {at} of {size}"


@pytest.mark.parametrize("by", [-1, 1])
@pytest.mark.parametrize("spill", [spill_native, spill_triton])
def test_a_kernel_that_writes_one_element_outside_is_caught(spill, by):
    @poisoned_outputs()
    def among_others(by):
        memory.zeros(3, device=DEVICE)
        # Freed before it is checked.
        spill(memory.empty(4, device="cpu" if spill is spill_native else DEVICE), by)
        memory.empty((), dtype=torch.bool, device=DEVICE)

    among_others(0)
    with pytest.raises(AssertionError, match=overrun(by, 16)) as caught:
        among_others(by)
    assert str(caught.value).count("\n") == 1


def test_an_operator_that_asks_for_too_little_is_caught(monkeypatch):
    """The operator's own call of the native core, whose index has a row too few."""
    native()

    @poisoned_outputs()
    def search():
        guarded = memory.empty

        def short(shape, *, dtype, device):
            return guarded((shape[0], shape[1] - (dtype == torch.int64), shape[2]), dtype=dtype, device=device)

        with monkeypatch.context() as patch:
            patch.setattr(memory, "empty", short)
            run_window()

    with pytest.raises(AssertionError) as caught:
        search()
    lines = str(caught.value).splitlines()[1:]
    assert len(lines) == 1
    assert lines[0].startswith("int64 [1, 5, 2]")
    # The bytes of the two indices that differ from the bands.
    assert re.search(r"1[3-6] bytes written after its end, the first at byte 80 of 80", lines[0])


def test_contexts_nest_and_each_has_its_own():
    with poisoned_outputs():
        first = memory.empty(4)
        with pytest.raises(AssertionError, match="after its end"), poisoned_outputs():
            spill_triton(memory.empty(4, device=DEVICE), 1)
        with poisoned_outputs():
            pass
        second = memory.empty(4)
    assert bool(unwritten(first).all())
    assert bool(unwritten(second).all())


def test_memory_awaiting_its_check_is_bounded(monkeypatch):
    """Memory in use stays guarded; other memory is checked early and released."""
    monkeypatch.setattr(testing, "_MOST_KEPT", 12 * (2 * testing.BAND + 16))
    kept, inspect = [], testing._Guards.inspect

    def spy(guards):
        kept.append(len(guards.kept))
        inspect(guards)

    monkeypatch.setattr(testing._Guards, "inspect", spy)

    @poisoned_outputs()
    def allocate():
        spill_triton(memory.empty(4, device=DEVICE), 1)
        used = memory.empty(4, device=DEVICE)
        for _ in range(100):
            memory.empty(4, device=DEVICE)
        spill_triton(used, -1)

    with pytest.raises(AssertionError, match=overrun(1, 16)) as caught:
        allocate()
    assert re.search(overrun(-1, 16), str(caught.value))
    assert str(caught.value).count("\n") == 2
    assert len(kept) > 5
    assert max(kept) == 13


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graph_records_plain_memory():
    graph = torch.cuda.CUDAGraph()
    with poisoned_outputs():
        memory.empty(4, device=DEVICE)
        with torch.cuda.graph(graph):
            out = memory.empty(4, device=DEVICE).fill_(2)
        graph.replay()
    assert out.tolist() == [2] * 4


# Exceptions that may allocate directly, by (file, function), and why.
ELSEWHERE = {
    ("lift_fast/memory.py", ""): "the door",
    ("lift_fast/testing.py", "randomize"): "PyTorch fills it, in tests",
    ("lift_fast/testing.py", "place"): "replaces the allocator in tests",
    ("lift_fast/ops/cosine_loss/op.py", "_fake_cosine_loss"): "a fake: nothing is written",
    ("lift_fast/ops/dense_match/op.py", "_fake_dense_match"): "a fake",
    ("lift_fast/ops/lift_forward/op.py", "_fake_lift_forward"): "a fake",
    ("lift_fast/ops/nearest/op.py", "_fake_nearest"): "a fake",
    ("lift_fast/ops/propagate_labels.py", "_fake_propagate_labels"): "a fake",
    ("lift_fast/witnesses.py", "expired"): "allocates nothing: checks whether tensors still exist",
    ("lift_fast/lift.py", "_forward_fused"): "holds no element, and torch.compile traces it",
    ("lift_fast/evaluation/cost.py", "_empty_image"): "counts operations on fake tensors",
    ("lift_fast/evaluation/cost.py", "_upsampler_flops"): "counts operations on fake tensors",
    ("lift_fast/evaluation/warp/protocol.py", "_draw_points"): "NumPy, holds no element",
}
UNINITIALISED = re.compile(r"(new_)?empty(_\w+)?|resize_(as_)?|(Untyped|Typed)Storage")
INITIALISED = re.compile(r"(new_)?(zeros|ones|full)")


def allocations(source, launches):
    """(function, line) of each direct allocation: of uninitialised memory, and with ``launches`` of any."""

    def walk(node, function):
        for child in ast.iter_child_nodes(node):
            inner = child.name if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) else function
            names = [child.attr] if isinstance(child, ast.Attribute) else []
            if isinstance(child, ast.ImportFrom) and child.module and child.module.split(".")[0] == "torch":
                names = [alias.name for alias in child.names]
            # Triton's and Gluon's own are registers.
            owner = child.value.id if isinstance(child, ast.Attribute) and isinstance(child.value, ast.Name) else ""
            for name in names if owner not in ("memory", "tl", "gl") else ():
                if UNINITIALISED.fullmatch(name) or (launches and INITIALISED.fullmatch(name)):
                    yield inner, child.lineno
            yield from walk(child, inner)

    return list(walk(ast.parse(source), ""))


def test_the_walk_finds_what_it_should():
    found = allocations(
        "from torch import empty_like\n"
        "x = torch.empty(3)\n"
        "def f(x):\n"
        "    y = x.new_empty(3); z = torch.zeros(3)\n"
        "    return memory.empty(3), memory.zeros(2), tl.full((), 1), torch.zeros_like(x)\n"
        "def g(make=torch.empty_strided): return x.data.resize_(3)\n",
        True,
    )
    assert found == [("", 1), ("", 2), ("f", 4), ("f", 4), ("g", 6), ("g", 6)]


def test_everything_that_a_kernel_writes_comes_through_the_door():
    package = Path(lift_fast.__file__).parent
    if package != ROOT / "lift_fast":
        pytest.skip("reads the sources of a checkout")
    files = [path for path in sorted(package.rglob("*.py")) if path.parent.name != "kernels"]
    files += sorted((ROOT / "kernels").glob("*.py"))
    assert len(files) > 50
    used, strays = set(), []
    for path in files:
        name = path.relative_to(ROOT).as_posix()
        launches = name.startswith("kernels/") or path.stem.rpartition("_")[2] in ("gpu", "cuda")
        for function, line in allocations(path.read_text(encoding="utf-8"), launches):
            used.add((name, function))
            if (name, function) not in ELSEWHERE:
                strays.append(f"{name}:{line} in {function or 'the module'}")
    assert not strays, "allocate through lift_fast.memory, which tests can poison: " + "; ".join(strays)
    assert not ELSEWHERE.keys() - used, "no longer needed"
