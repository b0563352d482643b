"""The host's work before each launch on a GPU: the device and stream, no waiting, and few calls."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lift_fast.kernels import launch

pytest.importorskip("triton")

KERNELS = ["image_encoder", "upsample_kernel", "head_kernel"]
# Python and C functions that a forward pass of LiFT enters, including Module.__call__ and the launches: 106.
MOST_CALLS = 120


def program(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name in ("TRITON_INTERPRET", "LIFT_FAST_DISABLE_DIRECT_LAUNCH"):
        environment.pop(name, None)
    path = Path(__file__).with_name("host_path.py")
    run = subprocess.run([sys.executable, path, *arguments], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def seen():
    return program()


def test_triton_launches_twice_and_then_no_more(seen):
    direct = seen["direct"]
    assert direct["by triton"] == [1, 1, 0]
    # The direct launch passed the same arguments as Triton, except for the address of the new loss.
    assert direct["length"][0] == direct["length"][1]
    assert direct["same but for the loss"] <= 1


@pytest.mark.parametrize("change", ["another size", "a size of one", "another dtype"])
def test_whatever_triton_compiles_for_goes_to_triton(seen, change):
    assert seen["direct"][change] == 1


def test_arguments_of_other_kinds_are_triton_s(seen):
    assert seen["direct"]["foreign arguments"] == [["no number"]] * 4


class Kernel:
    """Compiled for each type, as by Triton; ``ran`` lists the compilation of each launch."""

    pre_run_hooks, arg_names = (), ("x", "n", "SIZE")

    def __init__(self):
        self.compiled, self.ran = {}, []

    def __getitem__(self, grid):
        def start(x, n, SIZE):
            types = type(n).__name__, type(SIZE).__name__
            if types not in self.compiled:
                run = lambda *_: self.ran.append(types)  # noqa: E731
                self.compiled[types] = SimpleNamespace(_run=run, function=1, packed_metadata=2)
            compiled = self.compiled[types]
            compiled._run(*grid, 1, 1, 7, 1, 2, None, None, None, x, n, SIZE)
            return compiled

        return start


def test_equal_numbers_of_other_types_are_other_kernels(monkeypatch):
    for name, answer in (("device_of", 0), ("is_current", True), ("_current_stream", 7), ("watched", False)):
        monkeypatch.setattr(launch, name, lambda *_, answer=answer: answer)
    kernel, x = Kernel(), torch.zeros(16)
    for n, size in (*[(1, 1)] * 3, (True, 1), (1, True), (1, 1.0)):
        launch.run(kernel, (1,), x, n, SIZE=size)
    launch.forget()
    assert kernel.ran == [*[("int", "int")] * 3, ("bool", "int"), ("int", "bool"), ("int", "float")]


def test_a_float_is_handed_on(seen):
    assert seen["direct"]["another float"] == [0, 1]


def test_misaligned_tensors_are_always_triton_s(seen):
    assert seen["direct"]["misaligned"] == [1, 1, 1, 1]


def test_profilers_and_hooks_hear_of_every_launch(seen):
    direct = seen["direct"]
    assert [direct[when] for when in ("before a profiler", "with a profiler", "with a hook", "after them")] == [
        0,
        1,
        1,
        0,
    ]


def test_each_device_has_its_own_kernel(seen):
    assert seen["direct"]["on another device"] == [1, 1, 0]


def test_switched_off(seen):
    assert seen["direct"]["switched off"] == [1, 1, 1, 1]


def test_a_triton_that_calls_its_kernels_otherwise_keeps_its_launches(seen):
    assert seen["direct"]["another convention"] == [1, 1, 1, 1]


def test_a_forward_pass_is_three_launches_and_two_allocations(seen):
    passes = seen["passes"]
    assert passes["rounds"] == [[2, KERNELS], [2, KERNELS], [0, KERNELS], [0, KERNELS]]
    assert passes["allocations"] == 2
    assert passes["no image"] == [0, KERNELS[1:]]
    assert passes["PyTorch's encoder"] == [0, KERNELS[1:]]


def test_the_host_s_work_is_bounded(seen):
    calls = seen["passes"]["calls"]
    assert calls["call"] + calls["c_call"] <= MOST_CALLS, calls


def test_the_dispatcher_is_left_out_only_where_nobody_looks(seen):
    assert seen["passes"]["dispatched operators"] == 0
    assert seen["passes"]["operator under a dispatch mode"]


def test_a_pass_is_never_older_than_the_weights_and_tiles(seen):
    passes = seen["passes"]
    read, held = passes["weights that the launches read"]
    assert read == held > 0
    assert passes["weights of before a change"] == 0
    assert passes["after a change"] == [0, KERNELS]
    # New tiles are looked up, and recorded as another pass.
    assert passes["passes after new tiles"] == [1, 2]


def test_other_sizes_and_strides_have_their_own_pass(seen):
    passes = seen["passes"]
    assert passes["another size"] == [2, 2, 0]
    assert passes["the first again"] == 0
    strides = [[12288, 4096, 64, 1], [12288, 1, 192, 3], [12288, 4096, 64, 1]]
    assert passes["strides given to the encoder"] == passes["strides given to Triton's encoder"] == strides


OPERATORS = [
    "lift_forward, Triton encoder",
    "lift_forward, CUDA encoder",
    "lift_forward, wide tiles",
    "cosine_loss",
    "propagate_labels",
    "nearest, half",
    "nearest, mutual",
    "nearest, float32",
    "nearest, float32 list",
    "nearest, window",
    "dense_match, Triton",
    "dense_match, CUDA",
]


@pytest.mark.parametrize("name", OPERATORS)
def test_every_launch_is_on_the_tensors_device_and_its_stream(seen, name):
    rounds = seen["two devices"]["rounds"][name]
    assert [one["current after"] for one in rounds] == [0] * len(rounds)
    for one in rounds:
        assert one["launches"]
        assert {(device, stream) for _, device, stream in one["launches"]} == {(1, 1001)}
        assert one["launches"] == rounds[0]["launches"]
    assert [one["by triton"] for one in rounds[2:]] == [0, 0]


@pytest.mark.parametrize("name", OPERATORS)
def test_no_launch_waits_or_asks_for_attributes(seen, name):
    assert seen["two devices"]["waited"][name] is None


def test_every_operator_is_asked(seen):
    assert sorted(seen["two devices"]["rounds"]) == sorted(OPERATORS)
    kernels = {kernel for rounds in seen["two devices"]["rounds"].values() for kernel, *_ in rounds[0]["launches"]}
    assert kernels == set(seen["kernels"])


@pytest.mark.skipif(shutil.which(os.environ.get("CC", "cc")) is None, reason="needs a C compiler")
def test_the_driver_gets_the_same_without_triton():
    seen = program("native")
    by_triton, launches = zip(*seen["rounds"], strict=True)
    assert by_triton == (2, 2, 0, 0, 2, 2, 0, 0)
    for number, round_ in enumerate(launches):
        assert len(round_) == 2
        upsample, head = round_
        assert upsample[3] == head[3] == 1000 + number // 4
        assert [upsample[:3], head[:3]] == [one[:3] for one in launches[0]]
        # x, then g and f; the head reads the intermediate map and writes to other memory.
        assert upsample[4] == seen["features"]
        assert len({*upsample[4:7], head[4], head[9]}) == 5
        # The weights of each network, as Triton gave them in its first round.
        by_triton = launches[number // 4 * 4]
        assert upsample[7:] == by_triton[0][7:]
        assert head[5:9] == by_triton[1][5:9]
    # The C function itself, with releases of Triton whose launcher is known.
    import triton

    if triton.__version__.split(".")[:2] in (["3", "6"], ["3", "8"], ["3", "9"]):
        assert set(seen["functions"]) == {"builtin_function_or_method"}
