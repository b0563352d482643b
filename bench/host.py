"""Microseconds of the host for LiFT's forward pass and the other operators' launches, without the device's part.

python -m bench.host

Uses a GPU if there is one, else a stand-in (bench/stand_in.py): PyTorch's, Triton's and this package's code runs as on
a GPU, launches end in a driver that returns at once, and memory comes from the CPU's allocator.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

# Groups of calls, and calls of a group; shared machines disturb most groups.
_GROUPS, _CALLS = 400, 20


def microseconds(run: Callable[[], Any], wait: Callable[[], None]) -> tuple[float, float]:
    """(least, median) of one call."""
    for _ in range(10):
        run()
    times = []
    for _ in range(_GROUPS):
        wait()
        start = time.perf_counter_ns()
        for _ in range(_CALLS):
            run()
        times.append((time.perf_counter_ns() - start) / 1000 / _CALLS)
    wait()
    return min(times), statistics.median(times)


def parts(device: torch.device) -> dict[str, Callable[[], Any]]:
    """name -> call to time: a forward pass, its parts (indented), then other operators."""
    from lift_fast import LiFT
    from lift_fast.kernels import cosine_loss, launch
    from lift_fast.ops.lift_forward import cache as plan_cache
    from lift_fast.ops.lift_forward import gpu as gpu_plan
    from lift_fast.ops.lift_forward import op as lift_forward
    from lift_fast.ops.nearest import gpu as nearest_gpu
    from lift_fast.ops.nearest.op import nearest_by

    dtype = torch.bfloat16
    lift = LiFT(384, 16).eval().requires_grad_(False).to(device, dtype)
    imgs = torch.randn(1, 3, 448, 448, device=device).to(dtype)
    x = torch.randn(1, 784, 384, device=device).to(dtype)
    tokens = x.view(1, 28, 28, 384)
    lift(imgs, x)
    network = lift._network()
    assert network is not None
    variant = gpu_plan.route(device, dtype, 384)
    plan = plan_cache.prepared_plan(*network, False, variant, lambda composed: None)
    operator = torch.ops.lift_fast.lift_forward.default
    given = torch.randn(8, 384, 784, device=device).to(dtype)
    loss = torch.empty(8, 784, device=device)
    query = torch.randn(1, 784, 384, device=device).to(dtype)

    def by_triton() -> None:
        launch.forget()
        cosine_loss.cosine_loss(given, given, None, loss, 0.5, 1e-12)

    return {
        f"LiFT.forward, B1 448 bf16, {plan.encoder} encoder": lambda: lift(imgs, x),
        "  weights, epsilons, modes": lift._network,
        "  checks of the inputs": lambda: lift._check(imgs, x, network),
        "  whether anybody looks": lambda: lift_forward._undisturbed(imgs, x, network[0]),
        "  look-up of the plan": lambda: plan_cache.prepared_plan(*network, False, variant, lambda composed: None),
        "  the pass: launches, memory": lambda: gpu_plan.run_gpu_plan(plan, imgs, tokens),
        "the same through the dispatcher": lambda: operator(imgs, tokens, *network[:2], *network[2], False, False),
        "one kernel, directly": lambda: cosine_loss.cosine_loss(given, given, None, loss, 0.5, 1e-12),
        "one kernel, through Triton": by_triton,
        "nearest, 784 x 784 bf16": lambda: nearest_by(nearest_gpu.search, query, query, 1, False, None, None, True),
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.host", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        device, wait = torch.device("cuda", 0), torch.cuda.synchronize
        print(f"{torch.cuda.get_device_name()}, ", end="")
    else:
        # Large blocks must come from a pool, as they do on a GPU.
        if os.environ.get("MALLOC_MMAP_THRESHOLD_") is None:
            hint = "MALLOC_MMAP_THRESHOLD_=1073741824 and MALLOC_TRIM_THRESHOLD_=4294967296"
            print(f"hint: for figures like a GPU's, set {hint}")
        from . import stand_in

        stand_in.install(native=True)
        device, wait = torch.device("cpu"), lambda: None
        print("stand-in for a GPU, ", end="")
    import triton

    print(f"PyTorch {torch.__version__}, Triton {triton.__version__}; microseconds, least and median")
    for name, run in parts(device).items():
        least, median = microseconds(run, wait)
        print(f"{name:52}{least:8.1f}{median:8.1f}", flush=True)


if __name__ == "__main__":
    main()
