"""Runs jobs of one stage in a process of its own and writes each row as soon as it is known.

After a kernel reads out of bounds, every later call of its process fails: the worker then exits, and the crew starts
another one after the failed job. Only :mod:`bench.gpu.crew` runs it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import signal
import time
from pathlib import Path
from typing import Any

# The exit status of a worker that can no longer use its device.
LOST = 3


def _end_with_the_report() -> None:
    """Let Linux end this worker with the report: a killed report cannot, and the device would stay busy."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        # PR_SET_PDEATHSIG, before the imports, which take seconds.
        prctl(1, signal.SIGKILL)


def main() -> int:
    _end_with_the_report()
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.worker")
    parser.add_argument("--stage", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("names", nargs="+")
    arguments = parser.parse_args()
    if arguments.rehearse:
        from lift_fast import interpreter

        # Before Triton is imported.
        interpreter.enable()

    import torch

    from .context import Context, Skip
    from .stages import jobs_of

    if arguments.rehearse:
        torch.set_num_threads(1)
    device = torch.device("cpu") if arguments.rehearse else torch.device("cuda", torch.cuda.current_device())
    context = Context(device, arguments.rehearse, arguments.seed)
    jobs = {job.name: job for group in jobs_of(arguments.stage, arguments.rehearse).values() for job in group}
    with arguments.out.open("a") as file:

        def report(**line: Any) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        for name in arguments.names:
            report(job=name, begin=True)
            start = time.monotonic()
            try:
                for row in jobs[name].run(context):
                    report(job=name, row=row)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
            except Skip as reason:
                report(job=name, skipped=str(reason))
            except Exception as error:
                lines = [line for line in str(error).splitlines() if line.strip()] or [""]
                # A compiler's error begins with a position and ends with the reason.
                reason = lines[0] if len(lines) == 1 else f"{lines[0]} ... {lines[-1][:200]}"
                report(job=name, failure=f"{type(error).__name__}: {reason}")
                if _lost(device):
                    return LOST
            report(job=name, end=True, seconds=round(time.monotonic() - start, 2))
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return 0


def _lost(device: Any) -> bool:
    """Whether this process can no longer use its device."""
    import torch

    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
        torch.ones(1, device=device).item()
    except Exception:
        return True
    return False


if __name__ == "__main__":
    raise SystemExit(main())
