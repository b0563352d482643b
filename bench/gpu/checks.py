"""Checks by other programs: the repository's tests, compute-sanitizer, Nsight Compute."""

from __future__ import annotations

import csv
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from .context import call, last_line
from .state import State

# Every CUDA C++ kernel at small sizes, because the sanitizer runs them a hundred times slower.
SANITIZED = """
import torch
from bench.gpu import smoke
from lift_fast import devices
cuda = torch.device("cuda")
assert devices.cuda_runs(cuda)[0]
for dtype in (torch.bfloat16, torch.float32):
    for case in ((16, 5, 9, 1), (8, 3, 7, 2)):
        for cut in ("walk", "stream", "spread"):
            print(smoke.encoder_error("cuda", case, dtype, cuda, 1, layouts=2, cut=cut))
for normalize in ("grid", "pixel"):
    for maps in smoke.MAPS[1:]:
        print(smoke.dense_error(*maps, normalize, cuda, "cuda"))
"""
# Beginnings of the names of Nsight Compute's metrics; releases differ in the rest.
METRICS = (
    "Duration",
    "Compute (SM) Throughput",
    "Memory Throughput",
    "DRAM Throughput",
    "L2 Cache Throughput",
    "L1/TEX Hit Rate",
    "L2 Hit Rate",
    "Registers Per Thread",
    "Achieved Occupancy",
    "Executed Ipc Active",
    "Issue Slots Busy",
    "No Eligible",
    "Warp Cycles Per Issued Instruction",
)
SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "SchedulerStats", "WarpStateStats",
            "LaunchStats", "Occupancy")  # fmt: skip
# The tensor cores' share; the profiler leaves out a metric that a device does not know.
TENSOR = "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active"


def run_tests(state: State) -> None:
    """The repository's own tests that need a GPU."""
    if importlib.util.find_spec("pytest") is None:
        state.skipped.append("tests: pytest is not installed")
        return
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    if state.rehearse:
        command.append("--collect-only")
    limit = max(30.0, min(state.left(), 240))
    try:
        done = call(command, timeout=limit)
    except subprocess.TimeoutExpired:
        state.failures.append(f"tests: not done within {limit:.0f} s")
        return
    lines = done.stdout.strip().splitlines() or ["no output"]
    state.results["tests"] = {"summary": lines[-1]}
    print(lines[-1])
    if done.returncode:
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        state.failures += [f"tests: {line[:300]}" for line in failed or lines[-1:]]


def run_sanitizer(state: State) -> None:
    """compute-sanitizer's memcheck and racecheck over the CUDA C++ kernels at small sizes."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).is_file():
        if not state.rehearse:
            state.skipped.append("sanitizer: compute-sanitizer is not on this machine")
            return
        # A rehearsal checks at least that the program compiles.
        compile(SANITIZED, "sanitized", "exec")
    results: dict[str, str] = state.results.setdefault("sanitizer", {})
    for check in () if state.rehearse else ("memcheck", "racecheck"):
        # Only this package's kernels, not PyTorch's.
        command = [tool, "--tool", check, "--error-exitcode", "9", "--kernel-regex", "kns=lift_fast"]
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        limit = max(20.0, min(state.left() - 10, 120))
        try:
            done = call([*command, sys.executable, "-c", SANITIZED], timeout=limit, env=environment)
        except subprocess.TimeoutExpired:
            state.skipped.append(f"sanitizer: {check} not done within {limit:.0f} s")
            continue
        summary = [line for line in done.stdout.splitlines() if "SUMMARY" in line]
        results[check] = last_line(*summary[-1:], done.stderr, f"exit status {done.returncode}").strip("= ")
        print(check, results[check])
        if done.returncode:
            first = next((line.strip("= ") for line in done.stdout.splitlines() if " at " in line), "")
            state.failures.append(f"sanitizer: {check}: {results[check]} {first}")


def run_profile(state: State) -> None:
    """Nsight Compute on one launch of each kernel that takes much of the time."""
    from .figures import profiled

    tool = shutil.which("ncu") or "/usr/local/cuda/bin/ncu"
    results: dict[str, dict[str, str]] = state.results.setdefault("profile", {})
    for job in profiled(state.rehearse):
        log = state.out.with_name(f"{state.out.name}-profile.jsonl")
        command = [sys.executable, "-m", "bench.gpu.worker", "--stage", "profile", "--out", str(log)]
        command += ["--seed", str(state.seed), *(["--rehearse"] if state.rehearse else []), job.name]
        if not state.rehearse:
            if not Path(tool).is_file():
                state.skipped.append("profile: ncu is not on this machine")
                return
            if state.left() < 25:
                state.skipped.append(f"profile: {job.name}: no time left")
                continue
            sections = [part for name in SECTIONS for part in ("--section", name)]
            # This program must not set the card's clocks.
            command = [tool, "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "details",
                       *sections, "--metrics", TENSOR, *command]  # fmt: skip
        try:
            done = call(command, timeout=max(25.0, min(state.left(), 90)))
        except subprocess.TimeoutExpired:
            state.skipped.append(f"profile: {job.name}: not done in time")
            continue
        finally:
            log.unlink(missing_ok=True)
        if done.returncode:
            state.failures.append(f"profile: {job.name}: {last_line(done.stderr, done.stdout)}")
        for kernel, metrics in parse_profile(done.stdout).items():
            results[f"{job.name}: {kernel}"] = metrics
            print(f"{job.name}: {kernel}: {metrics}", flush=True)
        state.write()


def parse_profile(text: str) -> dict[str, dict[str, str]]:
    """Nsight Compute's table of details as kernel -> metric -> value with its unit."""
    lines = text.splitlines()
    start = next((number for number, line in enumerate(lines) if line.startswith('"ID"')), None)
    found: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(lines[start:]) if start is not None else ():
        name, value = row.get("Metric Name") or "", row.get("Metric Value") or ""
        if value and (name == TENSOR or name.startswith(METRICS)):
            kernel = (row.get("Kernel Name") or "").split("(")[0]
            found.setdefault(kernel, {})[name] = f"{value} {row.get('Metric Unit') or ''}".strip()
    return found
