"""What this device reaches at best: copy bandwidth, bfloat16 matrix products, and the least time of a launch."""

from __future__ import annotations

import torch

from .clock import milliseconds, replay_milliseconds
from .state import State


def run(state: State) -> None:
    """Writes ``ceilings``: bytes and operations per second, seconds."""
    device = state.device
    megabytes, side = (1, 64) if state.rehearse else (1024, 8192)
    source = torch.randint(255, (megabytes << 20,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = milliseconds(target.copy_, [(source,)], device, seconds=1.0)
    matrices = [
        (torch.randn(side, side, device=device).bfloat16(), torch.randn(side, side, device=device).bfloat16())
        for _ in range(2)
    ]
    product = milliseconds(torch.mm, matrices, device, seconds=1.0)
    one = torch.ones(1, device=device)
    state.results["ceilings"] = {
        "copy bytes per second": 2 * source.numel() / copy * 1e3,
        "bf16 flops per second": 2 * side**3 / product * 1e3,
        "launch seconds": replay_milliseconds(one.add_, (1,), device) / 1e3,
    }
    for name, value in state.results["ceilings"].items():
        print(f"{name}: {value:.3g}")
