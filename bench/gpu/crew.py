"""Starts workers, listens to them, and starts another one after a job that ends its worker."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from .context import ROOT, Job, last_line
from .state import Listener
from .worker import LOST

# Seconds between two looks at a worker's file.
_PAUSE = 0.1
# Importing PyTorch and starting CUDA, on a machine whose every core does so at the same time.
_START_SECONDS = 90.0


def run_group(jobs: Sequence[Job], listener: Listener, patience: float = 4) -> None:
    """Run jobs of the listener's stage one after the other, in one worker for as long as it lives.

    Args:
        jobs: in the order in which to run them; jobs that do not fit before the deadline are skipped.
        listener: receives everything; its state says how to run, and a job that is running at its deadline is ended.
        patience: a job is ended after this many times its expected time.
    """
    left, state = list(jobs), listener.state
    with tempfile.TemporaryDirectory() as folder:
        turn = 0
        while left:
            fitting = [job for job in left if state.rehearse or time.monotonic() + job.seconds <= state.deadline]
            for job in left:
                if job not in fitting:
                    with listener.lock:
                        listener.skipped(job.name, f"no time left: it takes {job.seconds:.0f} s")
            if not fitting:
                return
            turn += 1
            left = _run_worker(fitting, Path(folder, f"{turn}.jsonl"), listener, patience)


def _run_worker(jobs: list[Job], out: Path, listener: Listener, patience: float) -> list[Job]:
    """Run one worker until it ends; returns the jobs that it left undone."""
    state = listener.state
    command = [sys.executable, "-m", "bench.gpu.worker", "--stage", listener.stage, "--out", str(out)]
    command += ["--seed", str(state.seed), *(["--rehearse"] if state.rehearse else [])]
    out.touch()
    threads = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": "1" if state.rehearse else "4"}
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        worker = subprocess.Popen(
            [*command, *(job.name for job in jobs)],
            cwd=ROOT,
            env={**os.environ, **threads},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            undone, ended = _listen(worker, jobs, out, listener, patience)
        finally:
            worker.kill()
            worker.wait()
        # A worker that lost its device has reported the job. Any other end with jobs undone would happen again, such as
        # being killed for the memory it took.
        reported = worker.returncode == LOST and len(undone) < len(jobs)
        if undone and ended and not reported:
            output.seek(0)
            last = last_line(output.read())
            # A worker that never began a job would not begin the next one either.
            blamed = undone if not out.stat().st_size else undone[:1]
            with listener.lock:
                for job in blamed:
                    listener.failed(job.name, f"the worker ended with status {worker.returncode}: {last}")
            undone = undone[len(blamed) :]
    return undone


def _listen(
    worker: subprocess.Popen[bytes], jobs: list[Job], out: Path, listener: Listener, patience: float
) -> tuple[list[Job], bool]:
    """Pass on a worker's reports until it ends or takes too long; returns the jobs left and whether it ended itself."""
    undone, deadline = list(jobs), listener.state.deadline
    limit = time.monotonic() + _START_SECONDS + patience * jobs[0].seconds
    with out.open() as file:
        half = ""
        while True:
            ended = worker.poll() is not None
            text = half + file.read()
            *lines, half = text.split("\n")
            for line in lines:
                message = json.loads(line)
                job = next(job for job in jobs if job.name == message["job"])
                with listener.lock:
                    if "begin" in message:
                        limit = time.monotonic() + max(20.0, patience * job.seconds)
                    elif "row" in message:
                        listener.row(job.name, message["row"])
                    elif "failure" in message:
                        listener.failed(job.name, message["failure"])
                        # If the worker is lost, no end follows.
                        undone = [other for other in undone if other is not job]
                    elif "skipped" in message:
                        listener.skipped(job.name, message["skipped"])
                    elif "end" in message:
                        listener.ended(job.name, message["seconds"])
                        undone = [other for other in undone if other is not job]
            if ended:
                return undone, True
            now = time.monotonic()
            if now > min(limit, deadline):
                reason = "the time is spent" if now > deadline else "it did not end in time"
                if undone:
                    with listener.lock:
                        report = listener.skipped if now > deadline else listener.failed
                        report(undone[0].name, reason)
                return undone[1:], False
            time.sleep(_PAUSE)


def run_side_by_side(groups: dict[str, list[Job]], workers: int, listener: Listener) -> None:
    """Run groups of jobs at the same time, each in a process of its own: for jobs whose time is not measured."""
    waiting = list(groups.values())
    lock = threading.Lock()

    def serve() -> None:
        while True:
            with lock:
                if not waiting:
                    return
                jobs = waiting.pop(0)
            run_group(jobs, listener)

    # Daemons, so that an interrupt of this program does not wait for them.
    threads = [threading.Thread(target=serve, daemon=True) for _ in range(min(workers, len(groups)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
