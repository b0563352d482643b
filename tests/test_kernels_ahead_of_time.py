"""Every Triton kernel, compiled for absent GPUs: no spills, shared memory that fits, tensor cores in use."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

KERNELS = ["fine_kernel", "coarse_kernel", "upsample_kernel", "head_kernel"]
# One image and a batch, both published widths, every dtype, the normalised head; one program compiles them all.
CASES = [
    {"channels": 384, "patch": 16, "batch": 1, "side": 448, "dtype": "bfloat16", "capability": 80},
    {"channels": 384, "patch": 16, "batch": 64, "side": 448, "dtype": "bfloat16", "capability": 80},
    {"channels": 384, "patch": 16, "batch": 1, "side": 448, "dtype": "bfloat16", "capability": 90},
    {"channels": 384, "patch": 16, "batch": 64, "side": 448, "dtype": "bfloat16", "capability": 90},
    {"channels": 384, "patch": 16, "batch": 64, "side": 448, "dtype": "float16", "capability": 90, "normalize": True},
    {"channels": 384, "patch": 8, "batch": 8, "side": 448, "dtype": "float32", "capability": 90},
    {"channels": 768, "patch": 16, "batch": 64, "side": 448, "dtype": "bfloat16", "capability": 90},
    {"channels": 384, "patch": 16, "batch": 1, "side": 16, "dtype": "bfloat16", "capability": 90},
    {"channels": 384, "patch": 8, "batch": 3, "side": 224, "dtype": "float32", "capability": 80, "normalize": True},
    {"channels": 1024, "patch": 16, "batch": 1, "side": 224, "dtype": "bfloat16", "capability": 86},
    {"channels": 33, "patch": 16, "batch": 2, "side": 48, "dtype": "float16", "capability": 80},
    # Twice as many output channels as the accumulators before them.
    {"channels": 33, "patch": 14, "batch": 1, "side": 28, "dtype": "float16", "capability": 90, "normalize": True},
    {"channels": 384, "patch": 16, "batch": 1, "side": 448, "dtype": "bfloat16", "capability": 90, "use_image": False},
    {"channels": 384, "patch": 16, "batch": 1, "side": 448, "dtype": "bfloat16", "capability": 100},
    {"channels": 384, "patch": 16, "batch": 64, "side": 448, "dtype": "bfloat16", "capability": 100},
]
# Wide accumulators, both published widths: candidates until they are measured.
SMALL_TILE, LARGE_TILE, HEAD_TILE = (128, 64, 3, 64, 8, 4, 2), (256, 64, 3, 64, 8, 3, 2), (128, 64, 6, 64, 8, 3, 4)
WIDE = [
    {"channels": channels, "patch": 16, "batch": 8, "side": 448, "dtype": "bfloat16", "tile": tile}
    for channels, tile in (
        (384, SMALL_TILE),
        (384, LARGE_TILE),
        (384, (*LARGE_TILE, 1)),
        (768, SMALL_TILE),
        (768, HEAD_TILE),
    )
]
WIDE = [{**case, "capability": capability, "normalize": True} for case in WIDE for capability in (90, 100)]
# One direction, both, a list, a window, and the searches of float32; sets as large as for matching images.
LARGE = {"operator": "nearest", "n": 50176, "m": 50176, "channels": 384}
WINDOW = {"operator": "nearest", "n": 3136, "m": 7 * 3136, "channels": 384, "window": [12, 56, 56, 56, 56], "k": 5}
DENSE = {"operator": "dense_match", "grid": [56, 56], "size": [448, 448], "dtype": "float32"}
MATCHING = [
    *({**LARGE, "dtype": "bfloat16", "capability": capability} for capability in (80, 90, 100)),
    *({**LARGE, "dtype": "bfloat16", "capability": capability, "mutual": True} for capability in (80, 90, 100)),
    *({**LARGE, "dtype": "float32", "capability": capability} for capability in (80, 90, 100)),
    *(
        {**LARGE, "dtype": "bfloat16", "capability": 90, "mutual": mutual, "feed": "warp", "channels": channels}
        for mutual in (False, True)
        for channels in (33, 384)
    ),
    *(
        {**LARGE, "dtype": "bfloat16", "capability": capability, "mutual": mutual, "feed": feed}
        for capability, feed in ((80, "threads"), (90, "threads"), (90, "tma"))
        for mutual in (False, True)
    ),
    {**LARGE, "dtype": "bfloat16", "capability": 90, "ratio": 0.9, "feed": "tma"},
    {**LARGE, "dtype": "bfloat16", "capability": 100, "feed": "tma"},
    {**LARGE, "dtype": "bfloat16", "capability": 90, "channels": 4096, "mutual": True},
    {**LARGE, "dtype": "float32", "capability": 90, "channels": 1024},
    {**LARGE, "dtype": "bfloat16", "capability": 86, "channels": 768, "mutual": True},
    {**LARGE, "dtype": "float16", "capability": 90, "ratio": 0.9},
    {**LARGE, "dtype": "bfloat16", "capability": 90, "k": 32},
    {**LARGE, "dtype": "float32", "capability": 90, "k": 5, "normalize": False},
    {**LARGE, "dtype": "float16", "capability": 86, "channels": 33, "k": 5, "mutual": True},
    *({**WINDOW, "dtype": "bfloat16", "capability": capability} for capability in (80, 90, 100)),
    *({**WINDOW, "dtype": "float32", "capability": capability} for capability in (80, 90)),
    *(
        {**DENSE, "normalize": normalize, "points": points, "capability": capability}
        for capability in (80, 90, 100)
        for normalize in ("grid", "pixel")
        for points in (None, 30)
    ),
    {**DENSE, "grid": [100, 100], "size": [1600, 1600], "normalize": "pixel", "points": None, "capability": 90},
]


# Label propagation: a step of DAVIS 2017 at patch 8 with small and with wide patches, many matches and objects.
PROPAGATIONS = [
    {
        "operator": "propagate_labels",
        "channels": 384,
        "grid": (56, 56),
        "frames": 8,
        "batch": batch,
        "k": k,
        "objects": objects,
        "dtype": "float32",
        "capability": capability,
    }
    for capability in (80, 90, 100)
    for batch, k, objects in ((1, 5, 4), (4, 5, 4), (1, 32, 150))
]
# Integers that are 1 become constants of the kernel.
PROPAGATIONS += [
    {
        "operator": "propagate_labels",
        "channels": 3,
        "grid": (1, 1),
        "frames": 1,
        "batch": 1,
        "k": 1,
        "objects": 1,
        "dtype": "float32",
        "capability": 90,
    },
]

# The loss at the training's size as maps and as tokens, with one channel more than one tile holds, and with one.
LOSSES = [
    {"operator": "cosine_loss", "shape": shape, "tokens": tokens, "dtype": dtype, "capability": capability}
    for capability in (80, 86, 90, 100)
    for dtype in ("float32", "bfloat16", "float16")
    for shape, tokens in (((256, 384, 784), False), ((256, 384, 784), True), ((2, 1024, 100), False))
]
LOSSES += [
    {"operator": "cosine_loss", "shape": shape, "tokens": False, "dtype": "float32", "capability": 90}
    for shape in ((3, 4099, 1), (1, 1, 1))
]


def may_stack():
    """Bytes of a kernel's stack. Other releases of Triton than the one that kernels were tuned with may keep a few
    addresses there; 3.8 does in label propagation and the loss."""
    return 0 if version("triton").startswith("3.9.") else 32


def compile_all(cases):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("ahead_of_time.py")), json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def compiled():
    return compile_all(CASES)


@pytest.fixture(scope="module")
def matching():
    return compile_all(MATCHING)


def test_every_kernel_compiles_for_every_target(compiled):
    # A network without image has no encoders.
    assert len(compiled) == len(CASES) * len(KERNELS) - 2
    assert {(one["kernel"], one["capability"]) for one in compiled} >= {(k, c) for k in KERNELS for c in (80, 90, 100)}


def test_nothing_spills(compiled):
    assert [one for one in compiled if one["local"]] == []
    # Small work, and float32 on devices before Hopper, may keep a few addresses on the stack.
    assert [one for one in compiled if one["stack"] > (0 if one["side"] == 448 else 128)] == []


@pytest.fixture(scope="module")
def wide():
    return compile_all(WIDE)


def test_wide_accumulators_stay_in_registers_and_shared_memory(wide):
    stages = {(one["kernel"], one["channels"], one["capability"]) for one in wide}
    names = ("upsample_wide_kernel", "head_wide_kernel")
    assert stages == {(n, channels, capability) for n in names for channels in (384, 768) for capability in (90, 100)}
    assert [one for one in wide if one["local"] or one["shared"] > one["shared limit"]] == []
    # Three quarters of all registers hold sums with the larger ones: a few addresses for before and after the products.
    allowed = {SMALL_TILE: may_stack(), (*LARGE_TILE, 1): 512}
    assert [one for one in wide if one["stack"] > allowed.get(tuple(one["tile"]), 192)] == []


def test_wide_accumulators_run_on_tensor_cores(wide):
    assert [one for one in wide if one["capability"] == 90 and not one["wgmma"]] == []
    assert [one for one in wide if one["capability"] == 100 and not one["tcgen05"]] == []
    assert [one for one in wide if not one["async copies"]] == []


def test_wide_accumulators_compile_once_for_all_sizes():
    """Sizes of images and batches are not compiled in, not even a size of 1."""
    case = {"channels": 384, "patch": 16, "dtype": "bfloat16", "capability": 90, "tile": SMALL_TILE}
    compiled = compile_all([{**case, "batch": batch, "side": side} for batch, side in ((1, 16), (64, 448))])
    for kernel in ("upsample_wide_kernel", "head_wide_kernel"):
        small, large = ({**one, "batch": 0, "side": 0} for one in compiled if one["kernel"] == kernel)
        assert small == large


def test_shared_memory_fits(compiled):
    assert [one for one in compiled if one["shared"] > one["shared limit"]] == []


def test_products_run_on_tensor_cores(compiled):
    assert [one for one in compiled if not one["wgmma"] + one["mma"] + one["tcgen05"]] == []
    large = [one for one in compiled if one["kernel"] in ("upsample_kernel", "head_kernel") and one["batch"] == 64]
    assert [one for one in large if one["capability"] == 90 and not one["wgmma"]] == []
    assert [one for one in large if one["capability"] == 100 and not one["tcgen05"]] == []


def test_loads_are_in_flight_during_the_products(compiled):
    stages = [one for one in compiled if one["kernel"] in ("upsample_kernel", "head_kernel") and one["channels"] == 384]
    assert [one for one in stages if not one["async copies"]] == []


def test_matching_compiles_for_every_target(matching):
    kernels = {(one["kernel"], one["capability"]) for one in matching}
    names = ["prepare", "search", "finish", "groups", "resolve", "mutual", "blocks", "rescore", "match", "spans"]
    assert kernels >= {(f"{name}_kernel", capability) for name in names for capability in (80, 90, 100)}
    assert ("pingpong_kernel", 90) in kernels


def test_matching_keeps_to_its_registers_and_shared_memory(matching):
    assert [one for one in matching if one["local"] or one["shared"] > one["shared limit"]] == []
    # A few addresses.
    assert [one for one in matching if one["stack"] > (160 if one["kernel"] == "pingpong_kernel" else 128)] == []
    hopper = [one for one in matching if one["capability"] == 90]
    # Two blocks a multiprocessor, and warps that take turns, have fewer registers than both directions need.
    most = {"pingpong_kernel": 160, "search_kernel": 32}
    assert [one for one in hopper if one["stack"] > most.get(one["kernel"], 0)] == []


def test_norms_are_rounded_as_the_interpreter_rounds_them(matching):
    assert [one for one in matching if one["kernel"] == "prepare_kernel" and one["approximations"]] == []


def test_searches_run_on_tensor_cores(matching):
    searches = [one for one in matching if one["kernel"] in ("search_kernel", "blocks_kernel", "mutual_kernel")]
    searches += [one for one in matching if one["kernel"] in ("groups_kernel", "pingpong_kernel")]
    assert [one for one in searches if not one["wgmma"] + one["mma"] + one["tcgen05"]] == []
    half = [one for one in searches if one["capability"] == 90 and one["channels"] == 384]
    assert [one for one in half if not one["wgmma"] or not one["async copies"]] == []


def test_label_propagation_compiles_for_every_target():
    compiled = compile_all(PROPAGATIONS)
    assert len(compiled) == len(PROPAGATIONS)
    assert [one for one in compiled if one["local"] or one["stack"] > may_stack()] == []
    assert [one for one in compiled if one["shared"] > one["shared limit"]] == []
    assert [one for one in compiled if not one["wgmma"] + one["mma"] + one["tcgen05"]] == []
    # Three channels fill no copy.
    assert [one for one in compiled if not one["async copies"] and one["channels"] == 384] == []


def test_cosine_loss_compiles_for_every_target_without_spills():
    compiled = compile_all(LOSSES)
    half = [case for case in LOSSES if case["dtype"] == "float16"]
    assert len(compiled) == 2 * len(LOSSES) + 2 * len(half)
    assert {one["kernel"] for one in compiled} == {"cosine_loss_kernel", "scale_kernel"}
    assert [one for one in compiled if one["local"] or one["stack"] > may_stack()] == []
    assert [one for one in compiled if one["shared"] > one["shared limit"]] == []
