"""The host's path to every launch on a GPU that is not there (bench/stand_in.py); prints the records as JSON.

Run as a program: it replaces parts of PyTorch and Triton, and pytest itself may have Triton in interpreter mode.
"""

import json
import os
import sys
import tempfile
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import stand_in

NATIVE = sys.argv[1:] == ["native"]
DEVICE = stand_in.install(NATIVE)

import torch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from lift_fast import LiFT, memory  # noqa: E402
from lift_fast.kernels import (  # noqa: E402
    cosine_loss,
    launch,
    nearest_float32,
    nearest_rows,
    propagate_labels,
    tiles,
)
from lift_fast.kernels import dense_match as dense_match_kernel  # noqa: E402
from lift_fast.kernels import lift_forward_head as head  # noqa: E402
from lift_fast.kernels import lift_forward_image_encoder as triton_encoder  # noqa: E402
from lift_fast.kernels import lift_forward_upsample as upsample  # noqa: E402
from lift_fast.kernels import nearest as nearest_kernel  # noqa: E402
from lift_fast.ops.dense_match import cuda as dense_match_cuda  # noqa: E402
from lift_fast.ops.dense_match import gpu as dense_match_gpu  # noqa: E402
from lift_fast.ops.dense_match import op as dense_match  # noqa: E402
from lift_fast.ops.lift_forward import cache as plan_cache  # noqa: E402
from lift_fast.ops.lift_forward import gpu as gpu_plan  # noqa: E402
from lift_fast.ops.lift_forward import op as lift_forward  # noqa: E402
from lift_fast.ops.lift_forward import tiles as tile_table  # noqa: E402
from lift_fast.ops.lift_forward.plan import build_plan  # noqa: E402
from lift_fast.ops.nearest import gpu as nearest_gpu  # noqa: E402
from lift_fast.ops.nearest.op import nearest_by  # noqa: E402

# Search even few descriptors in blocks.
nearest_gpu._SMALL = 1
HOME, ELSEWHERE = 1, 0
HALF = torch.bfloat16


def network(channels=32, patch=16, dtype=HALF, **options):
    return LiFT(channels, patch, **options).eval().requires_grad_(False).to(dtype)


def inputs(batch=1, side=64, channels=32, patch=16, dtype=HALF):
    return torch.randn(batch, 3, side, side).to(dtype), torch.randn(batch, (side // patch) ** 2, channels).to(dtype)


def nearest(n, m, dtype, **options):
    settings = {"k": 1, "mutual": False, "ratio": None, "window": None, "normalize": True, "fast": False} | options
    query, key = torch.randn(1, n, 32).to(dtype), torch.randn(1, m, 32).to(dtype)
    return lambda: nearest_by(nearest_gpu.search, query, key, *settings.values())


def matching(backend):
    stretched = dense_match.stretch(torch.randn(8, 5, 6), (40, 48), "grid")
    points = torch.zeros(3, 2, dtype=torch.int64)

    def run():
        for at, per_pixel in product((None, points), (False, True)):
            dense_match_gpu.match(stretched, stretched, at, per_pixel, backend)
        if backend == "cuda":
            axes = stretched.strips()
            index, valid = torch.zeros(40 * 48, dtype=torch.int64), torch.zeros(40 * 48, dtype=torch.bool)
            dense_match_cuda.mutual(torch.zeros(30, 30), axes, None, axes, index, valid)

    return run


def launchers():
    """name -> a call that launches every kernel of one operator."""
    x = torch.randn(2, 5, 32)
    loss = torch.empty(2, 32)
    imgs, tokens = inputs()
    plan = build_plan(*network()._plan_sources(), network().architecture)

    def lift(encoder):
        prepared = gpu_plan.prepare_gpu(plan, torch.device("cpu"), HALF, encoder)
        return lambda: gpu_plan.run_gpu_plan(prepared, imgs, tokens.view(1, 4, 4, 32))

    def wide():
        prepared = gpu_plan.prepare_gpu(plan, torch.device("cpu"), HALF, "cuda")
        image = torch.zeros(1, 8, 8, 32, dtype=HALF), torch.zeros(1, 4, 4, 32, dtype=HALF)
        tile = tiles.Tile(64, 16, 1, 16, 4, 3, 1, 1)

        def run():
            u = gpu_plan.upsample(prepared, tokens.view(1, 4, 4, 32), *image, tile)
            gpu_plan.head(prepared, u, tile=tile)

        return run

    def propagate():
        query, key = torch.randn(1, 16, 8), torch.randn(1, 32, 8)
        parts = torch.zeros(1, 16), torch.zeros(1, 32)
        propagate_labels.propagate_labels(query, key, *parts, torch.randn(1, 32, 3), [2, 4, 4, 4, 4], 2, 0.1)

    def cosine():
        cosine_loss.cosine_loss(x, x, x.clone(), loss, 0.5, 1e-12)
        cosine_loss.scale_in_place(x.clone(), torch.ones(()))

    return {
        "lift_forward, Triton encoder": lift("triton"),
        "lift_forward, CUDA encoder": lift("cuda"),
        "lift_forward, wide tiles": wide(),
        "cosine_loss": cosine,
        "propagate_labels": propagate,
        "nearest, half": nearest(300, 260, HALF),
        "nearest, mutual": nearest(300, 260, HALF, mutual=True),
        "nearest, float32": nearest(300, 700, torch.float32, mutual=True),
        "nearest, float32 list": nearest(300, 700, torch.float32, k=3),
        "nearest, window": nearest(16, 32, HALF, window=[2, 4, 4, 4, 4]),
        "dense_match, Triton": matching("triton"),
        "dense_match, CUDA": matching("cuda"),
    }


def kernels():
    """Names of all kernels, Triton's and those of the native core that launchers call."""
    modules = (cosine_loss, dense_match_kernel, head, nearest_rows, nearest_kernel, nearest_float32, propagate_labels)
    modules += (triton_encoder, upsample)
    names = [name for module in modules for name in vars(module) if name.endswith("_kernel")]
    return [*names, "image_encoder", *(f"dense_match_{one}" for one in ("spans", "points", "groups", "mutual"))]


class Waiting(AssertionError):
    pass


def forbid_waiting():
    """Functions that wait for a device or query its attributes."""

    def refuse(name):
        def refused(*_, **__):
            raise Waiting(name)

        return refused

    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "nonzero"):
        setattr(torch.Tensor, name, refuse(f"Tensor.{name}"))
    for name in ("synchronize", "get_device_properties", "get_device_capability", "get_device_name", "current_stream"):
        setattr(torch.cuda, name, refuse(f"torch.cuda.{name}"))


def two_devices():
    """For each operator the launches of its first calls, and the current device after them. Must run last."""
    found = {}
    calls = launchers()
    DEVICE.home, DEVICE.current = HOME, ELSEWHERE
    for name, call in calls.items():
        rounds = []
        for _ in range(4):
            DEVICE.log.clear()
            DEVICE.triton_calls = 0
            call()
            seen = [(one.kernel, one.device, one.stream) for one in DEVICE.log]
            rounds.append({"launches": seen, "by triton": DEVICE.triton_calls, "current after": DEVICE.current})
        found[name] = rounds
    forbid_waiting()
    waited = {}
    for name, call in calls.items():
        try:
            call()
            waited[name] = None
        except Waiting as error:
            waited[name] = str(error)
    return {"rounds": found, "waited": waited}


def plain(arguments):
    """Launch arguments with addresses for tensors."""
    return [one.data_ptr() if isinstance(one, torch.Tensor) else one for one in arguments]


def run_kernel(x, inner=7, epsilon=1e-12):
    """One launch of the loss kernel: the launcher's arguments, and how often Triton was involved."""
    DEVICE.log.clear()
    DEVICE.triton_calls = 0
    cosine_loss.cosine_loss(x[:, :, :inner], x[:, :, :inner], None, torch.empty(4, inner), 0.5, epsilon)
    return plain(DEVICE.log[0].arguments), DEVICE.triton_calls


class Foreign:
    """Stands in for a kernel."""

    pre_run_hooks = ()

    def __init__(self, taken):
        self.taken = taken

    def __getitem__(self, grid):
        return lambda *args, **options: self.taken.append(args[1])


def direct():
    """The conditions of a launch without Triton."""
    launch.forget()
    x, apart = torch.randn(4, 3, 8), torch.randn(4 * 3 * 8 + 1)[1:].view(4, 3, 8)
    out = {}
    first, second, third = (run_kernel(x) for _ in range(3))
    out["by triton"] = [first[1], second[1], third[1]]
    out["same but for the loss"] = [a == b for a, b in zip(first[0], third[0], strict=True)].count(False)
    out["length"] = [len(first[0]), len(third[0])]
    out["another float"] = run_kernel(x, epsilon=1e-3)[1], run_kernel(x, epsilon=1e-3)[0].count(1e-3)
    out["another size"] = run_kernel(x, inner=8)[1]
    out["a size of one"] = run_kernel(x, inner=1)[1]
    out["another dtype"] = run_kernel(x.half())[1]
    out["misaligned"] = [run_kernel(apart)[1] for _ in range(4)]
    from triton import knobs

    def hook(_):
        pass

    out["before a profiler"] = run_kernel(x)[1]
    knobs.runtime.launch_enter_hook.add(hook)
    out["with a profiler"] = run_kernel(x)[1]
    knobs.runtime.launch_enter_hook.remove(hook)
    kernel = cosine_loss.cosine_loss_kernel
    kernel.add_pre_run_hook(lambda *_, **__: None)
    out["with a hook"] = run_kernel(x)[1]
    kernel.pre_run_hooks.clear()
    out["after them"] = run_kernel(x)[1]
    DEVICE.home = DEVICE.current = 1
    out["on another device"] = [run_kernel(x)[1] for _ in range(3)]
    DEVICE.home = DEVICE.current = 0
    # Whatever is neither a tensor nor a number, such as a tensor's descriptor.
    taken = []
    for _ in range(4):
        launch.run(Foreign(taken), (1,), x, ["no number"], SIZE=1)
    out["foreign arguments"] = taken
    launch.forget()
    os.environ["LIFT_FAST_DISABLE_DIRECT_LAUNCH"] = "1"
    out["switched off"] = [run_kernel(x)[1] for _ in range(4)]
    del os.environ["LIFT_FAST_DISABLE_DIRECT_LAUNCH"]
    # A Triton with another calling convention.
    launch.forget()
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def turned(self, *args, **kwargs):
        kernel_cache = self.device_caches[0][0]
        before = {name: compiled._run for name, compiled in kernel_cache.items()}
        for compiled in kernel_cache.values():
            inner = compiled._run
            compiled._run = lambda *given, inner=inner: inner(*given[:9], *reversed(given[9:]))
        try:
            return run(self, *args, **kwargs)
        finally:
            for name, inner in before.items():
                kernel_cache[name]._run = inner

    JITFunction.run = turned
    out["another convention"] = [run_kernel(x)[1] for _ in range(4)]
    JITFunction.run = run
    launch.forget()
    return out


class Dispatched(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def count(call):
    """Python and C functions that one call enters."""
    calls = {"call": 0, "c_call": 0}

    def seen(frame, event, argument):
        if event in calls:
            calls[event] += 1

    sys.setprofile(seen)
    try:
        call()
    finally:
        sys.setprofile(None)
    return calls


@torch.no_grad()
def passes():
    """The module's forward pass with sizes seen before."""
    tile_table.forget()
    lift, (imgs, x) = network(), inputs()
    out = {}

    def forward(imgs=imgs, x=x, lift=lift):
        DEVICE.log.clear()
        DEVICE.triton_calls = 0
        lift(imgs, x)
        return DEVICE.triton_calls, [one.kernel for one in DEVICE.log]

    out["rounds"] = [forward() for _ in range(4)]
    made = []
    empty = memory.new_empty
    memory.new_empty = lambda self, *size, **options: made.append(size) or empty(self, *size, **options)
    forward()
    memory.new_empty = empty
    out["allocations"] = len(made)
    seen = Dispatched()
    with seen:
        forward()
    out["operator under a dispatch mode"] = "lift_fast.lift_forward.default" in seen.names
    calls = []
    operator = lift_forward.torch.ops.lift_fast.lift_forward
    default = operator.default
    operator.default = lambda *given: calls.append(1) or default(*given)
    forward()
    out["dispatched operators"] = len(calls)
    operator.default = default
    out["calls"] = count(lambda: lift(imgs, x))

    def addresses():
        forward()
        return [argument for one in DEVICE.log for argument in one.arguments]

    (entry,) = plan_cache._entries.values()
    (plan,) = entry.prepared.values()
    # Only wide tiles read the bias as terms.
    stages = (plan.upsample._replace(bias_terms=None), plan.head)
    held = {weight.data_ptr() for stage in stages for weight in stage if hasattr(weight, "data_ptr")}
    out["weights that the launches read"] = len(held & set(addresses())), len(held)
    lift.outc.bias.add_(1)
    out["weights of before a change"] = len(held & set(addresses()))
    out["after a change"] = [forward() for _ in range(3)][-1]
    (entry,) = plan_cache._entries.values()
    (plan,) = entry.prepared.values()
    out["passes after new tiles"] = [len(plan.passes)]
    tile_table.forget()
    forward()
    out["passes after new tiles"].append(len(plan.passes))
    wide = inputs(side=128)
    out["another size"] = [forward(*wide)[0] for _ in range(3)]
    out["the first again"] = forward()[0]
    strided = imgs.contiguous(memory_format=torch.channels_last)
    out["strides given to the encoder"] = []
    for images in (imgs, strided, imgs):
        for _ in range(3):
            forward(images)
        out["strides given to the encoder"].append(DEVICE.log[0].arguments[1])
    composed = build_plan(*lift._plan_sources(), lift.architecture)
    triton = gpu_plan.prepare_gpu(composed, torch.device("cpu"), HALF, "triton")
    out["strides given to Triton's encoder"] = []
    for images in (imgs, strided, imgs):
        for _ in range(3):
            DEVICE.log.clear()
            gpu_plan.run_gpu_plan(triton, images, x.view(1, 4, 4, 32))
        out["strides given to Triton's encoder"].append(DEVICE.log[0].arguments[1:5])
    other = network(use_image=False)
    out["no image"] = [forward(lift=other) for _ in range(4)][-1]
    deep = network(extra_image_blocks=1)
    out["PyTorch's encoder"] = [forward(lift=deep) for _ in range(4)][-1]
    return out


@torch.no_grad()
def native():
    """Triton's own launcher in C: the driver's arguments with Triton, and later without it."""
    imgs, x = inputs()
    rounds = []
    for DEVICE.home in (0, 1):
        lift = network()
        for _ in range(4):
            DEVICE.triton_calls = 0
            lift(imgs, x)
            rounds.append([DEVICE.triton_calls, stand_in.native_launches()])
    deepest = [type(ready.run).__name__ for ready in launch._ready.values()]
    return {"features": x.data_ptr(), "rounds": rounds, "functions": deepest}


if __name__ == "__main__":
    os.environ["LIFT_FAST_CACHE"] = tempfile.mkdtemp()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if NATIVE:
        print(json.dumps(native()))
        sys.exit()
    print(json.dumps({"kernels": kernels(), "direct": direct(), "passes": passes(), "two devices": two_devices()}))
