"""One training step, ViT-S/16: against the published loop in float32 and the same loop under autocast."""

from __future__ import annotations

from typing import Any

import torch

from bench.training_pair import build_ours, build_plain, losses_and_gradients
from lift_fast.testing import relative_error
from lift_fast.training.step import tuned_convolutions

from .clock import milliseconds
from .state import State

MODEL, TINY_MODEL = "dino_vits16", "vit_tiny_patch16_224"
# (B, pixels)
WORK, TINY = (64, 448), (2, 64)
# Of losses and of all gradients. Divisions by BatchNorm's small deviations let the rounding of early layers grow.
LIMITS = {torch.float32: (1e-4, 1e-2), torch.bfloat16: (1e-2, 0.25)}
# torch.compile of backbone and network.
_COMPILE_SECONDS = 150


def run(state: State) -> None:
    """Writes ``training``: errors of losses and gradients, times, peak memory; and judges the goals."""
    results: dict[str, Any] = {"errors": [], "times": []}
    state.results["training"] = results
    model = TINY_MODEL if state.rehearse else MODEL
    batch, side = TINY if state.rehearse else WORK
    torch.manual_seed(state.seed)
    pixels = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8, device=state.device)
    half = torch.float32 if state.rehearse else torch.bfloat16
    _compare(state, model, pixels[: max(2, batch // 8)], half)

    rows = [
        ("plain float32", lambda: build_plain(model, state.device)),
        ("plain autocast", lambda: build_plain(model, state.device, half)),
        ("ours", lambda: build_ours(model, state.device, half)),
    ]
    if not state.rehearse and state.left() > _COMPILE_SECONDS:
        rows.append(("ours, compiled", lambda: build_ours(model, state.device, half, compiled=True)))
    elif not state.rehearse:
        state.skipped.append(f"training, compiled: {state.left():.0f} s left, it wants {_COMPILE_SECONDS}")
    for name, build in rows:
        step = build()
        if state.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(state.device)
        with tuned_convolutions():
            time = milliseconds(step, [(pixels,)], state.device, seconds=2.0)
        peak = torch.cuda.max_memory_allocated(state.device) if state.device.type == "cuda" else None
        row = {"what": name, "ms": time, "images per second": 1e3 * batch / time, "peak bytes": peak}
        results["times"].append(row)
        print(f"{name:20} {time:9.2f} ms  {row['images per second']:9.1f} images/s", flush=True)
        state.write()
        del step
    _goals(state, {row["what"]: row["images per second"] for row in results["times"]})


def _compare(state: State, model: str, pixels: torch.Tensor, half: torch.dtype) -> None:
    """Losses and gradients of the first step, from equal weights."""
    expected = losses_and_gradients(build_plain(model, state.device), pixels)
    for dtype in dict.fromkeys((torch.float32, half)):
        actual = losses_and_gradients(build_ours(model, state.device, dtype), pixels)
        for name, a, b, limit in zip(("losses", "gradients"), actual, expected, LIMITS[dtype], strict=True):
            error = relative_error(a, b)
            row = {"what": name, "dtype": str(dtype), "error": error, "limit": limit}
            state.results["training"]["errors"].append(row)
            print(f"{name} in {dtype}: relative error {error:.1e}")
            if not error <= limit:
                state.failures.append(f"training: {name} in {dtype}: {error:.2e} > {limit:.0e}")


def _goals(state: State, speed: dict[str, float]) -> None:
    if state.rehearse:
        return
    ours = max(speed["ours"], speed.get("ours, compiled", 0.0))
    state.goal("training over the plain float32 loop", ours / speed["plain float32"], 6.0, at_least=True)
    state.goal("training over the plain loop under autocast", ours / speed["plain autocast"], 1.5, at_least=True)
