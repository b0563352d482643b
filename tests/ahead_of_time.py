"""Compiles every Triton kernel as its launcher would launch it, for GPUs that may be absent; prints JSON.

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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.gpu.launches import OPERATORS
from lift_fast.kernels import tiles

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
}


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
            # PyTorch's allocations have this alignment, and the launcher detects it.
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif value is None or name in options or (value == 1 and not kernel.params[position].do_not_specialize):
            # The launcher too compiles a special kernel for integers that are 1.
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
