"""The repository's check on a GPU, in stages: the most important one comes first, and a kill loses one row.

python -m bench.gpu_report                         # as many stages as 8 minutes allow, in their order
python -m bench.gpu_report --stage smoke           # one stage; may be repeated
python -m bench.gpu_report --rehearse --out r      # on any machine: every stage, the code of every figure, no figures

build      the native core, for the present GPU's architecture alone
warm-up    every Triton kernel of the next two stages, compiled on all cores
smoke      every kernel in every dtype against float64, each in a process of its own
figures    times and ceilings, the most valuable first
tests      the repository's own tests that need a GPU
sanitizer  compute-sanitizer's memcheck and racecheck on the CUDA C++ kernels
profile    Nsight Compute on the kernels that take most of the time

<out>.json holds every row as soon as it is known; <out>.md and <out>.png follow at the end. A table of predictions and
outcomes is printed last. The exit status is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from lift_fast._files import make_folder

from .gpu import checks
from .gpu.context import ROOT, call, last_line
from .gpu.crew import run_group, run_side_by_side
from .gpu.stages import STAGES, jobs_of
from .gpu.state import Listener, State

# Seconds of the budget that must be left for a stage to begin.
LEAST_SECONDS = {"build": 0, "warm-up": 20, "smoke": 20, "figures": 20, "tests": 30, "sanitizer": 40, "profile": 40}
BUDGET = 480.0
# The least time of compiling and timing tiles.
TILES_SECONDS = 60


def build(state: State) -> None:
    """Build the native core where it is missing or lacks CUDA code for this device."""
    probe = "from lift_fast import _native; core = _native.load(); print(*core.cuda_probe(0)) if core else print(False)"

    def works() -> str:
        done = call([sys.executable, "-c", probe])
        return last_line(done.stdout, done.stderr)

    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-v", "-e", "."]
    if state.rehearse:
        # Without the compilation, which would replace the core that the rehearsal runs on.
        command[4:4] = ["--dry-run"]
    elif works().startswith("True"):
        print("the native core is built and runs on this device")
        return
    capability = "9.0" if state.rehearse else "{}.{}".format(*torch.cuda.get_device_capability())
    # setup.py decides how many compilers run at one time, from the free memory too.
    done = call(command, env={**os.environ, "TORCH_CUDA_ARCH_LIST": capability})
    built = [line.strip() for line in done.stdout.splitlines() if "lift_fast: built" in line]
    if state.rehearse and not done.returncode:
        built = ["pip's dry run passes"]
    print(*built[-1:], flush=True)
    if done.returncode:
        state.failures.append(f"build: {last_line(done.stderr, done.stdout)}")
    elif not state.rehearse and not works().startswith("True"):
        state.failures.append(f"build: the native core was built but does not run: {works()}")


def environment(state: State) -> None:
    """What a reader needs to interpret the figures; no host name."""
    commit = call(["git", "rev-parse", "--short=12", "HEAD"]).stdout.strip()
    about = {"commit": commit, "python": platform.python_version(), "cores": str(len(os.sched_getaffinity(0)))}
    for name in ("torch", "triton", "numpy", "lift_fast"):
        try:
            about[name] = version(name)
        except PackageNotFoundError:
            about[name] = "missing"
    if not state.rehearse:
        properties = torch.cuda.get_device_properties()
        about |= {
            "gpu": properties.name,
            "multiprocessors": str(properties.multi_processor_count),
            "compute capability": f"{properties.major}.{properties.minor}",
            "CUDA": str(torch.version.cuda),
        }
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem", "--format=csv,noheader"]
        try:
            done = call(query, timeout=20)
            about["driver, clocks at the start"] = done.stdout.strip().splitlines()[0] if done.stdout else ""
        except (OSError, subprocess.TimeoutExpired):
            pass
    state.results["environment"] = about
    # In a process of its own, because the core may be new.
    code = "import json, lift_fast; print(json.dumps(lift_fast.backends().as_dict()))"
    done = call([sys.executable, "-c", code])
    if done.returncode:
        state.failures.append(f"environment: {last_line(done.stderr)}")
    else:
        state.results["backends"] = json.loads(done.stdout.splitlines()[-1])
    print(", ".join(f"{name} {value}" for name, value in about.items()))


def warm_up(state: State, tiles: bool = False) -> None:
    """Compile for the device; a rehearsal compiles a few kernels for a device that need not exist.

    ``tiles``: compile what only the figures of tiles launch, so that no other figure waits for it.
    """
    major, minor = (9, 0) if state.rehearse else torch.cuda.get_device_capability()
    command = [sys.executable, "-m", "bench.gpu.warm_up", "--capability", f"{major}{minor}"]
    command += ["--most", "4"] if state.rehearse else []
    command += ["--tiles"] if tiles else []
    done = call(command)
    try:
        state.results["warm-up of tiles" if tiles else "warm-up"] = summary = json.loads(last_line(done.stdout))
    except ValueError:
        state.failures.append(f"warm-up: {last_line(done.stderr)}")
        return
    state.failures += [f"warm-up: {failure}" for failure in summary["failures"]]
    print(summary)


def smoke(state: State) -> None:
    """Every kernel against float64."""
    from .gpu.output import smoke_lines

    run_side_by_side(jobs_of("smoke", state.rehearse), len(os.sched_getaffinity(0)), Listener(state, "smoke"))
    print(*smoke_lines(state.rows("smoke")), sep="\n", flush=True)


def figures(state: State) -> None:
    """Times; before the figures of tiles, their kernels are compiled on all cores."""
    (jobs,) = jobs_of("figures", state.rehearse).values()
    first = next(number for number, job in enumerate(jobs) if "tiles" in job.name)
    for part in (jobs[:first], jobs[first:]):
        if part[0] is jobs[first] and state.left() > TILES_SECONDS:
            warm_up(state, tiles=True)
        run_group(part, Listener(state, "figures"))


RUN: dict[str, Callable[[State], None]] = {
    "build": build,
    "warm-up": warm_up,
    "smoke": smoke,
    "figures": figures,
    "tests": checks.run_tests,
    "sanitizer": checks.run_sanitizer,
    "profile": checks.run_profile,
}
assert tuple(RUN) == STAGES


def run_stage(state: State, name: str, run: Callable[[State], None]) -> None:
    """Run a stage if there is time for it; an error in it is a failure and ends only this stage."""
    least = LEAST_SECONDS.get(name, 0)
    if state.left() < least:
        state.skipped.append(f"{name}: {max(state.left(), 0):.0f} s of {state.budget:.0f} left, it needs {least:.0f}")
        return
    start = time.monotonic()
    print(f"== {name}", flush=True)
    try:
        run(state)
    except Exception as error:
        lines = str(error).splitlines() or [""]
        state.failures.append(f"{name}: {type(error).__name__}: {lines[0]}")
    took = round(time.monotonic() - start, 1)
    state.results.setdefault("seconds", {})[name] = took
    print(f"-- {name}: {took} s, {max(state.left(), 0):.0f} s left", flush=True)
    state.write()


def finish(state: State) -> None:
    """Write the files, print the table."""
    from .gpu import output

    run_stage(state, "chart", output.chart)
    lines = output.outcomes(state)
    state.results["predictions"] = lines
    state.file(".md").write_text(output.markdown(state))
    state.write()
    print("", "REHEARSAL: no figures" if state.rehearse else f"GPU report: {state.out.name}", sep="\n")
    print(*output.prediction_lines(lines), sep="\n")
    for entry in state.skipped:
        print(f"  skipped {entry}")
    for entry in state.failures:
        print(f"  FAILED  {entry}")
    written = [suffix for suffix in (".json", ".md", ".png") if state.file(suffix).exists()]
    print(f"{len(state.failures)} failures; written to {state.out}{', '.join(written)}", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--stage", action="append", choices=STAGES, metavar="STAGE", help="run only this one; may be repeated"
    )
    parser.add_argument("--out", type=Path, help="stem of the files to write (bench/results/<name of the GPU>)")
    parser.add_argument(
        "--budget", type=float, default=BUDGET, metavar="S", help=f"seconds for the whole run ({BUDGET:.0f})"
    )
    parser.add_argument("--seed", type=int, help="of the random inputs; by default a fresh one")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU: check that it runs, no figures")
    arguments = parser.parse_args(argv)
    if arguments.rehearse:
        # A tile file of a real device must not be read or written.
        os.environ["LIFT_FAST_CACHE"] = tempfile.mkdtemp()
    elif not torch.cuda.is_available():
        parser.error("PyTorch sees no CUDA device; --rehearse runs everything on the CPU, without figures")
    if arguments.out is None:
        if arguments.rehearse:
            parser.error("--rehearse needs --out, so that no rehearsal lands among the results")
        name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
        arguments.out = ROOT / "bench" / "results" / name
    try:
        make_folder(arguments.out.parent)
    except ValueError as error:
        parser.error(f"--out: {error}")
    if arguments.out.is_dir():
        parser.error(f"--out: {arguments.out} is a folder; expected the stem of files, such as {arguments.out}/mine")
    seed = int.from_bytes(os.urandom(3), "little") if arguments.seed is None else arguments.seed
    state = State(arguments.out.resolve(), arguments.rehearse, arguments.budget, seed)
    print(f"seed {seed}")
    chosen = [name for name in STAGES if not arguments.stage or name in arguments.stage]
    if "build" in chosen:
        run_stage(state, "build", build)
    run_stage(state, "environment", environment)
    for name in chosen:
        if name != "build":
            run_stage(state, name, RUN[name])
    finish(state)
    return 1 if state.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
