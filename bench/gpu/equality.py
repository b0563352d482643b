"""Every kernel and the whole forward pass against the plain module in float64: fresh inputs, poisoned outputs."""

from __future__ import annotations

import copy
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import lift_fast
from lift_fast import LiFT
from lift_fast.ops import gpu_plan, image_encoder, image_encoder_cuda
from lift_fast.plan import build_plan
from lift_fast.testing import poisoned_outputs, randomize, relative_error

from .state import State

# (C, patch, h, w, B): prime, odd and rectangular grids, one token, widths that fill no tile, every scale.
CASES = [
    (384, 16, 7, 5, 3),
    (384, 8, 13, 11, 1),
    (384, 14, 5, 3, 2),
    (768, 16, 3, 7, 1),
    (32, 8, 1, 1, 2),
    (33, 16, 2, 3, 1),
]
TINY = [(32, 16, 2, 1, 1), (7, 8, 1, 3, 2)]
ROOT = Path(__file__).resolve().parents[2]
LIMITS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-3}


def run(state: State) -> None:
    """Writes ``equality``: relative errors by kernel, case and dtype."""
    rows = []
    for number, case in enumerate(TINY if state.rehearse else CASES):
        for dtype, limit in LIMITS.items():
            if state.rehearse and dtype == torch.bfloat16:
                # Triton's interpreter multiplies bfloat16 as if it were integers.
                continue
            if dtype == torch.float16 and number > 1:
                # Each case compiles every kernel anew; float16 differs from bfloat16 in nothing but rounding.
                continue
            for kernel, error in errors(case, dtype, state.device, state.seed + number).items():
                rows.append({"kernel": kernel, "case": list(case), "dtype": str(dtype), "error": error, "limit": limit})
                if not error <= limit:
                    state.failures.append(f"equality: {kernel} {case} {dtype}: {error:.2e} > {limit:.0e}")
    state.results["equality"] = rows
    worst = {d: max((r["error"] for r in rows if r["dtype"] == str(d)), default=0.0) for d in LIMITS}
    print("worst relative errors:", ", ".join(f"{d}: {e:.1e}" for d, e in worst.items()))


def errors(case: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int) -> dict[str, float]:
    """Relative error of each kernel, given the exact inputs of its stage in ``dtype``, and of the whole."""
    channels, patch, h, w, batch = case
    torch.manual_seed(seed)
    lift = randomize(LiFT(channels, patch), seed).eval()
    side = 8 if patch == 8 else 16
    imgs, x = torch.randn(batch, 3, side * h, side * w), torch.randn(batch, h, w, channels)
    exact = copy.deepcopy(lift).double()
    seen: dict[str, Tensor] = {}
    keep = {"f": exact.scale_adapter, "g": exact.image_convs_2, "u": exact.up1.conv_1.double_conv[2]}
    for name, module in keep.items():
        # ReLU works in place: keep what it returns before the next layer sees it.
        module.register_forward_hook(lambda _, __, out, name=name: seen.__setitem__(name, out.clone()))
    with torch.no_grad():
        y = exact._forward_plain(imgs.double(), x.double().permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    stage = {name: value.permute(0, 2, 3, 1) for name, value in seen.items()}

    def to(value: Tensor) -> Tensor:
        return value.to(device, dtype).contiguous()

    found = {}
    with torch.no_grad(), poisoned_outputs():
        plan = gpu_plan.prepare_gpu(build_plan(*lift._plan_sources(), lift.architecture), device, dtype)
        f, g = gpu_plan.encode_image(plan, to(imgs))
        found["image encoder f"] = relative_error(f.cpu(), stage["f"])
        found["image encoder g"] = relative_error(g.cpu(), stage["g"])
        u = gpu_plan.upsample(plan, to(x), to(stage["f"]), to(stage["g"]))
        found["upsample"] = relative_error(u.cpu(), stage["u"])
        found["head"] = relative_error(gpu_plan.head(plan, to(stage["u"])).cpu(), y)
        unit = gpu_plan.head(plan, to(stage["u"]), normalize=True)
        found["head, normalised"] = relative_error(unit.cpu(), F.normalize(y, dim=-1))
        found["forward"] = relative_error(gpu_plan.run_gpu_plan(plan, to(imgs), to(x)).cpu(), y)
    return found


# (patch, h, w, B): less than a strip, several blocks in a row and in a column, a device full of them.
ENCODER_CASES = [
    (16, 1, 1, 2),
    (8, 1, 3, 1),
    (16, 7, 29, 1),
    (8, 13, 23, 2),
    (16, 37, 41, 2),
    (16, 28, 28, 8),
    (8, 56, 57, 1),
]
TINY_ENCODER_CASES = [(16, 2, 1, 1), (8, 1, 3, 2)]


def run_encoders(state: State) -> None:
    """Writes ``image encoders``: each one's relative errors on odd sizes, crops and channels_last pictures."""
    runs, reason = image_encoder_cuda.can_run(state.device)
    if not runs:
        state.skipped.append(f"native image encoder: {reason}")
        if not state.rehearse:
            state.failures.append(f"native image encoder: {reason}")
    rows: list[dict[str, Any]] = []
    for number, case in enumerate(TINY_ENCODER_CASES if state.rehearse else ENCODER_CASES):
        for dtype, limit in LIMITS.items():
            if state.rehearse and dtype == torch.bfloat16:
                continue
            for encoder in ("triton", "cuda") if runs else ("triton",):
                error = encoder_error(encoder, case, dtype, state.device, state.seed + number)
                rows.append({"encoder": encoder, "case": list(case), "dtype": str(dtype), "error": error})
                if not error <= limit:
                    state.failures.append(f"{encoder} image encoder {case} {dtype}: {error:.2e} > {limit:.0e}")
    state.results["image encoders"] = rows
    for encoder in sorted({str(row["encoder"]) for row in rows}):
        errors_of_it = [float(row["error"]) for row in rows if row["encoder"] == encoder]
        print(f"{encoder} image encoder: worst relative error of {len(errors_of_it)}: {max(errors_of_it):.1e}")


@torch.no_grad()
def encoder_error(
    encoder: str, case: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int, layouts: int = 3
) -> float:
    """The largest relative error of f and g against float64, over pictures as they are, cropped and channels last."""
    patch, h, w, batch = case
    torch.manual_seed(seed)
    lift = randomize(LiFT(8, patch), seed).eval()
    plan = build_plan(*lift._plan_sources(), lift.architecture)
    imgs = torch.randn(batch, 3, patch * h, patch * w).to(device, dtype)
    exact = image_encoder.prepare_encoder(plan, device, torch.float64)
    expected = [part.permute(0, 2, 3, 1) for part in image_encoder.encode_image(exact, imgs.double())]
    # What lies beside a crop must not be read.
    frame = imgs.new_full((batch, 3, patch * h + 3, patch * w + 5), torch.nan)
    crop = frame[:, :, 1:-2, 2:-3].copy_(imgs)
    worst = 0.0
    with poisoned_outputs():
        ready = gpu_plan.prepare_gpu(plan, device, dtype, encoder)
        for pictures in (imgs, crop, imgs.contiguous(memory_format=torch.channels_last))[:layouts]:
            for actual, wanted in zip(gpu_plan.encode_image(ready, pictures), expected, strict=True):
                worst = max(worst, relative_error(actual, wanted))
    return worst


def run_tests(state: State) -> None:
    """The repository's own tests that need a GPU."""
    if importlib.util.find_spec("pytest") is None:
        state.skipped.append("gpu tests: pytest is not installed")
        return
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    if state.rehearse:
        command.append("--collect-only")
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=max(30.0, min(state.left(), 180))
    )
    last = done.stdout.strip().splitlines()[-1:] or ["no output"]
    state.results["gpu tests"] = last[0]
    print(last[0])
    if done.returncode:
        state.failures.append(f"gpu tests: {last[0]}")


SANITIZED = """
import torch
from bench.gpu.equality import CASES, encoder_error, errors
from lift_fast.ops import image_encoder_cuda
if image_encoder_cuda.can_run(torch.device("cuda"))[0]:
    for dtype in (torch.bfloat16, torch.float32):
        for case in ((16, 5, 9, 1), (8, 3, 7, 2)):
            print(encoder_error("cuda", case, dtype, torch.device("cuda"), 1))
from bench.gpu.matching import MAPS, dense_error
from lift_fast.ops import dense_match_cuda
if dense_match_cuda.can_run(torch.device("cuda"))[0]:
    for normalize in ("grid", "pixel"):
        print(dense_error(*MAPS[1], normalize, torch.device("cuda"), "cuda"))
        print(dense_error((9, 7), (6, 11), (40, 37), (50, 61), normalize, torch.device("cuda"), "cuda"))
for case in CASES[2:4]:
    print(errors(case, torch.bfloat16, torch.device("cuda"), 1))
"""


def run_sanitizer(state: State) -> None:
    """compute-sanitizer's memcheck and racecheck over every kernel at small sizes."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).is_file():
        state.skipped.append("compute-sanitizer: not on this machine")
        return
    results = {}
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, "-c", SANITIZED]
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        limit = max(20.0, min(state.left() - 60, 100))
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=limit, env=environment, cwd=ROOT
            )
        except subprocess.TimeoutExpired:
            state.skipped.append(f"compute-sanitizer {check}: not done within {limit:.0f} s")
            continue
        summary = [line for line in done.stdout.splitlines() if "SUMMARY" in line] or done.stderr.splitlines()[-1:]
        results[check] = summary[-1] if summary else f"exit status {done.returncode}"
        print(check, results[check])
        if done.returncode:
            state.failures.append(f"compute-sanitizer {check}: {results[check]}")
    state.results["compute-sanitizer"] = results


def run_capture(state: State) -> None:
    """``lift_fast.capture`` against the eager extractor."""
    if state.device.type != "cuda":
        state.skipped.append("capture: needs a CUDA device")
        return
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        module = lift_fast.ViTLiFTExtractor(
            "dino_vits16", random_weights=True, random_lift=True, device=state.device, dtype=dtype, silent=True
        )
        captured = lift_fast.capture(module, (2, 3, 80, 112))
        batch = torch.randn(2, 3, 80, 112, device=state.device, dtype=dtype)
        with torch.no_grad():
            error = relative_error(captured(batch), module(batch))
        state.results.setdefault("capture", {})[str(dtype)] = error
        if not error <= limit:
            state.failures.append(f"capture {dtype}: {error:.2e} > {limit:.0e}")
