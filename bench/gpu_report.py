"""The repository's standing check on a GPU: builds, compares, measures and reports, in one command.

python -m bench.gpu_report                       # everything, within 9 minutes on a cold machine
python -m bench.gpu_report --rehearse --out r    # on any machine: that it all runs; no figures

Writes <out>.json after every section, then <out>.md and <out>.png, and prints its summary last. The exit status is 1 if
anything failed. A further section is one function that takes the state, and a line in ``SECTIONS``.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch

from lift_fast._files import atomic_path

from .gpu import output
from .gpu.state import State

ROOT = Path(__file__).resolve().parents[1]


def build(state: State) -> None:
    """Build the native core where it lacks CUDA code for this device."""
    from lift_fast import _native

    if state.rehearse:
        return
    core = _native.load()
    works = core is not None and core.cuda_probe(state.device.index or 0)[0]
    if works:
        print("the native core is built and runs on this device")
        return
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", "."]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        state.failures.append(f"build: {last}")
    else:
        # This process has the old one loaded, or none: start over with the new one, once.
        if os.environ.get("LIFT_FAST_REPORT_BUILT"):
            state.failures.append("build: the native core was built and still does not run on this device")
            return
        os.execve(sys.executable, [sys.executable, "-m", "bench.gpu_report", *sys.argv[1:]],
                  {**os.environ, "LIFT_FAST_REPORT_BUILT": "1"})  # fmt: skip


def environment(state: State) -> None:
    """What a reader must know to judge the figures; no host name."""
    import lift_fast

    commit = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    about = {"commit": commit, "python": platform.python_version()}
    about |= {name: version(name) for name in ("torch", "triton", "lift_fast")}
    if state.device.type == "cuda":
        properties = torch.cuda.get_device_properties(state.device)
        about |= {
            "gpu": properties.name,
            "multiprocessors": str(properties.multi_processor_count),
            "compute capability": f"{properties.major}.{properties.minor}",
            "CUDA": str(torch.version.cuda),
        }
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem", "--format=csv,noheader"]
        try:
            done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=20)
            about["driver, clocks at the start"] = done.stdout.strip().splitlines()[0] if done.stdout else ""
        except (OSError, subprocess.TimeoutExpired):
            pass
    state.results["environment"] = about
    state.results["backends"] = lift_fast.backends().as_dict()
    print(lift_fast.backends())


def tune(state: State) -> None:
    """Measure the kernels' tiles for the shapes that are timed afterwards."""
    from lift_fast import LiFT
    from lift_fast import tune as measure

    from .gpu.forward import WORK

    if state.device.type != "cuda":
        state.skipped.append("tune: needs a CUDA device")
        return
    chosen: dict[str, list[int]] = {}
    for name, batch, side, patch, channels in WORK:
        if state.left() < 60:
            state.skipped.append(f"tune {name}: no time left")
            break
        found = measure(LiFT(channels, patch).to(state.device).eval(), (batch, 3, side, side))
        chosen |= {key: list(tile) for key, tile in found.items()}
    state.results["tiles"] = chosen


def sections(arguments: argparse.Namespace) -> list[tuple[str, object, float]]:
    """(name, function, seconds that it wants), in order."""
    from .gpu import ceilings, cosine_loss, equality, forward, matching, training

    rows: list[tuple[str, object, float]] = [] if arguments.no_build else [("build", build, 5)]
    rows += [
        ("environment", environment, 0),
        ("equality", equality.run, 10),
        ("image encoders", equality.run_encoders, 10),
        ("capture", equality.run_capture, 10),
        ("ceilings", ceilings.run, 5),
    ]
    if arguments.tune:
        rows.append(("tune", tune, 120))
    rows += [
        ("forward", forward.run, 20),
        ("matching", matching.run, 60),
        ("cosine loss", cosine_loss.run_section, 20),
        ("training", training.run, 60),
        ("gpu tests", equality.run_tests, 40),
        ("compute-sanitizer", equality.run_sanitizer, 80),
    ]
    return [row for row in rows if not arguments.only or row[0] in arguments.only]


def summary(state: State) -> str:
    """The end of the output: what failed, which goals are met."""
    lines = ["", "REHEARSAL: no figures" if state.rehearse else f"GPU report: {state.out.name}"]
    for goal in state.goals:
        measured = "not measured" if goal["measured"] is None else f"{goal['measured']:.3g}"
        verdict = {None: "?", True: "met", False: "MISSED"}[goal["met"]]
        lines.append(f"  {verdict:7} {goal['goal']}: {measured} (limit {goal['limit']:g})")
    lines += [f"  skipped {entry}" for entry in state.skipped]
    lines += [f"  FAILED  {entry}" for entry in state.failures]
    lines.append(f"{len(state.failures)} failures; written to {state.out}.json, .md, .png")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_report", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="stem of the files to write (bench/results/<name of the GPU>)")
    parser.add_argument("--budget", type=float, default=520, metavar="S", help="seconds for the whole run (520)")
    parser.add_argument("--seed", type=int, help="of the random inputs; by default a fresh one")
    parser.add_argument("--only", action="append", metavar="SECTION", help="run this section alone; may be repeated")
    parser.add_argument("--tune", action="store_true", help="measure tile shapes first and keep them")
    parser.add_argument("--no-build", action="store_true", help="take the native core as it is")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU: that it runs, and no figures")
    arguments = parser.parse_args(argv)
    if arguments.rehearse:
        # Before Triton is imported; a tile file of a real device must not be read or written.
        os.environ["TRITON_INTERPRET"] = "1"
        os.environ["LIFT_FAST_CACHE"] = tempfile.mkdtemp()
    elif not torch.cuda.is_available():
        parser.error("PyTorch sees no CUDA device; --rehearse runs everything on the CPU, without figures")
    device = torch.device("cpu") if arguments.rehearse else torch.device("cuda", torch.cuda.current_device())
    if arguments.out is None:
        if arguments.rehearse:
            parser.error("--rehearse needs --out, so that no rehearsal lands among the results")
        name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
        arguments.out = ROOT / "bench" / "results" / name
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    seed = int.from_bytes(os.urandom(3), "little") if arguments.seed is None else arguments.seed
    state = State(arguments.out, device, arguments.rehearse, arguments.budget, seed)
    print(f"seed {seed}")
    known = [name for name, _, _ in sections(argparse.Namespace(**{**vars(arguments), "only": None}))]
    unknown = [name for name in arguments.only or [] if name not in known]
    if unknown:
        parser.error(f"no section {unknown[0]!r}; there are {', '.join(known)}")
    for name, section, least in sections(arguments):
        state.run(name, section, least)  # type: ignore[arg-type]
    state.run("chart", output.chart, 0)
    with atomic_path(state.out.with_suffix(".md")) as path:
        path.write_text(output.markdown(state))
    state.write()
    print(summary(state))
    return 1 if state.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
