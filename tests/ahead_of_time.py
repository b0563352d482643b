"""Compiles every Triton kernel as its launcher would launch it, for GPUs that need not be there; prints JSON.

Run as a program: pytest itself may have Triton in interpreter mode, in which nothing can be compiled.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonTensorDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from lift_fast import LiFT, tuning
from lift_fast.kernels import (
    cosine_loss,
    dense_match,
    head,
    image_encoder,
    launch,
    nearest,
    nearest_groups,
    nearest_pingpong,
    propagate_labels,
    tiles,
    upsample,
)
from lift_fast.ops import dense_match as dense_match_op
from lift_fast.ops import dense_match_gpu, gpu_plan, nearest_gpu
from lift_fast.plan import build_plan

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
CPU = torch.device("cpu")
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
}


class Recorder:
    """Stands in for a kernel: keeps what a launcher calls it with."""

    def __init__(self, module, name):
        self.name, self.kernel, self.calls = name, getattr(module, name), []
        setattr(module, name, self)

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.calls.append((args, options))

        return launch


def compile_call(kernel, args, options, capability):
    """Compile one recorded launch for a compute capability such as 90; its resources."""
    options = dict(options)
    warps = options.pop("num_warps")
    values = dict(zip(kernel.arg_names, args, strict=False)) | options
    signature, constants, attributes = {}, {}, {}
    for position, name in enumerate(kernel.arg_names):
        value = values[name]
        if isinstance(value, torch.Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
            # What PyTorch allocates is aligned so, and the launcher finds that out itself.
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif value is None or name in options or (value == 1 and not kernel.params[position].do_not_specialize):
            # The launcher, too, compiles a kernel of its own for integers that are 1.
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif isinstance(value, TensorDescriptor | GluonTensorDescriptor):
            block = f"{TYPES[value.base.dtype]}[{', '.join(map(str, value.block_shape))}]"
            layout = f",{value.layout!r}" if isinstance(value, GluonTensorDescriptor) else ""
            signature[name] = f"tensordesc<{block}{layout}>"
        else:
            signature[name] = "i32"
    source_of = GluonASTSource if kernel.is_gluon() else ASTSource
    source = source_of(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(TOOLS / "cuobjdump"), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    ptx = compiled.asm["ptx"]
    return {
        "registers": registers,
        "stack": stack,
        "local": local,
        "shared": compiled.metadata.shared,
        "wgmma": ptx.count("wgmma.mma_async"),
        "mma": ptx.count("mma.sync"),
        "tcgen05": ptx.count("tcgen05.mma"),
        "approximations": ptx.count("sqrt.approx") + ptx.count("div.full"),
        "async copies": ptx.count("cp.async.c") + ptx.count("cp.async.bulk"),
    }


def launches(channels, patch, batch, side, dtype, capability, normalize=False, use_image=True, tile=None):
    """(kernel, args, options) of one forward pass with the default tiles of a device of this capability; or of its two
    stages with a tile of their own, so far as that is a candidate."""
    parts = [(image_encoder, "fine_kernel"), (image_encoder, "coarse_kernel")]
    parts += [(upsample, "upsample_kernel"), (head, "head_kernel")]
    parts += [(upsample, "upsample_wide_kernel"), (head, "head_wide_kernel")]
    recorders = [Recorder(*part) for part in parts]
    launch.capability = lambda device: divmod(capability, 10)
    tuning.forget()
    # Shapes alone matter; the meta device holds no memory for large batches.
    lift = LiFT(channels, patch, use_image=use_image).eval()
    plan = gpu_plan.prepare_gpu(build_plan(*lift._plan_sources(), lift.architecture), CPU, dtype, "triton")
    h = side // patch
    imgs = torch.empty(batch, 3, side, side, dtype=dtype, device="meta")
    x = torch.empty(batch, h, h, channels, dtype=dtype, device="meta")
    if tile is not None:
        f, g = (torch.empty(batch, s * h, s * h, 32, dtype=dtype, device="meta") for s in (2, 1))
        u = torch.empty(batch, 2 * h, 2 * h, channels // 2, dtype=dtype, device="meta")
        tile = tiles.Tile(*tile)
        if tile in tuning._candidates(gpu_plan.upsample_work(plan, x), CPU):
            gpu_plan.upsample(plan, x, f, g, tile)
        if tile in tuning._candidates(gpu_plan.head_work(plan, u), CPU):
            gpu_plan.head(plan, u, normalize, tile)
    else:
        gpu_plan.run_gpu_plan(plan, imgs, x, normalize)
    found = []
    for recorder, (module, _) in zip(recorders, parts, strict=True):
        setattr(module, recorder.name, recorder.kernel)
        found += [(recorder.kernel, args, options) for args, options in recorder.calls]
    return found


def nearest_launches(
    n, m, channels, dtype, capability, k=1, mutual=False, ratio=None, window=None, normalize=True, feed="", **way
):
    """(kernel, args, options) of one call; each kernel once for each set of options."""
    if feed:
        depth = k if ratio is None else 2
        way["stream"] = nearest_groups.default_stream(channels, divmod(capability, 10), depth, mutual, feed)
    names = ["prepare_kernel", "search_kernel", "finish_kernel", "mutual_kernel", "blocks_kernel", "rescore_kernel"]
    recorders = [(Recorder(nearest, name), nearest) for name in names]
    recorders += [(Recorder(nearest_groups, name), nearest_groups) for name in ("groups_kernel", "resolve_kernel")]
    recorders.append((Recorder(nearest_pingpong, "pingpong_kernel"), nearest_pingpong))
    launch.capability = lambda device: divmod(capability, 10)
    query, key = (torch.empty(1, count, channels, dtype=dtype, device="meta") for count in (n, m))
    nearest_gpu.nearest_gpu(query, key, k, mutual, ratio, window, normalize, **way)
    found = {}
    for recorder, module in recorders:
        setattr(module, recorder.name, recorder.kernel)
        for args, options in recorder.calls:
            found.setdefault((recorder.name, *sorted(options.items())), (recorder.kernel, args, options))
    return list(found.values())


def dense_match_launches(grid, size, normalize, points, capability, dtype=torch.float32):
    """The same for every pixel (``points`` None) or some points of one picture, matched to itself."""
    recorder = Recorder(dense_match, "match_kernel")
    picture = dense_match_op._picture(torch.randn(8, *grid, dtype=dtype), tuple(size), normalize, True)
    at = None if points is None else torch.zeros(points, 2, dtype=torch.int64)
    dense_match_gpu.match_gpu(picture, picture, at, normalize == "pixel")
    dense_match.match_kernel = recorder.kernel
    args, options = recorder.calls[0]
    return [(recorder.kernel, args, options)]


def propagation_launches(channels, grid, frames, batch, k, objects, dtype, capability):
    """(kernel, args, options) of one label propagation."""
    launch.capability = lambda device: divmod(capability, 10)
    recorder = Recorder(propagate_labels, "propagate_labels_kernel")
    n, m = grid[0] * grid[1], frames * grid[0] * grid[1]
    shapes = ((n, channels), (m, channels), (n,), (m,), (m, objects))
    tensors = [torch.empty(batch, *shape, dtype=dtype, device="meta") for shape in shapes]
    propagate_labels.propagate_labels(*tensors, [12, *grid, *grid], k, 0.1)
    propagate_labels.propagate_labels_kernel = recorder.kernel
    return [(recorder.kernel, args, options) for args, options in recorder.calls]


def cosine_loss_launches(shape, dtype, capability, tokens=False):
    """(kernel, args, options) of one loss with its gradient, [outer, C, inner], and of the scaling."""
    recorders = [Recorder(cosine_loss, "cosine_loss_kernel"), Recorder(cosine_loss, "scale_kernel")]
    outer, channels, inner = shape
    x = torch.empty(outer, inner, channels, dtype=dtype, device="meta").transpose(1, 2) if tokens else None
    x = torch.empty(shape, dtype=dtype, device="meta") if x is None else x
    loss = torch.empty(outer, inner, device="meta")
    cosine_loss.cosine_loss(x, x, x, loss, 0.5, 1e-12)
    cosine_loss.scale_in_place(x, loss[0, 0])
    found = []
    for recorder in recorders:
        setattr(cosine_loss, recorder.name, recorder.kernel)
        found += [(recorder.kernel, args, options) for args, options in recorder.calls]
    return found


OPERATORS = {
    "cosine_loss": cosine_loss_launches,
    "lift_forward": launches,
    "nearest": nearest_launches,
    "dense_match": dense_match_launches,
    "propagate_labels": propagation_launches,
}


def main(cases):
    os.environ["LIFT_FAST_CACHE"] = tempfile.mkdtemp()
    results = []
    for case in cases:
        dtype = getattr(torch, case.pop("dtype"))
        capability = case["capability"]
        record = OPERATORS[case.pop("operator", "lift_forward")]
        for kernel, args, options in record(dtype=dtype, **case):
            resources = compile_call(kernel, args, options, capability)
            limit = tiles.shared_memory(divmod(capability, 10))
            results.append({**case, "kernel": kernel.__name__, "shared limit": limit, **resources})
    print(json.dumps(results))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
