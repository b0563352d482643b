"""Starts workers, listens to them, and goes on behind whatever ends one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from .context import Job, Row
from .worker import LOST

ROOT = Path(__file__).resolve().parents[2]
# How often the workers' files are read.
_PAUSE = 0.1
# Importing PyTorch and starting CUDA, on a machine whose every core does so at the same time.
_START_SECONDS = 90.0


class Listener:
    """What a crew tells: rows as they come, and what went wrong. Called from several threads, one at a time."""

    def __init__(
        self,
        row: Callable[[str, Row], None],
        failed: Callable[[str, str], None],
        skipped: Callable[[str, str], None],
        ended: Callable[[str, float], None],
    ) -> None:
        self.row, self.failed, self.skipped, self.ended = row, failed, skipped, ended
        self.lock = threading.Lock()


def run_group(
    stage: str,
    jobs: Sequence[Job],
    *,
    rehearse: bool,
    seed: int,
    deadline: float,
    listener: Listener,
    patience: float = 4,
) -> None:
    """Run jobs one after the other, in one worker for as long as it lives.

    Args:
        stage: whose jobs they are.
        jobs: in the order in which to run them; those that ``deadline`` leaves no time for are skipped.
        rehearse, seed: see :class:`bench.gpu.context.Context`.
        deadline: by ``time.monotonic()``; a job that is running then is ended.
        listener: is told everything.
        patience: a job is ended after this many times what it should take.
    """
    left = list(jobs)
    with tempfile.TemporaryDirectory() as folder:
        turn = 0
        while left:
            fitting = [job for job in left if rehearse or time.monotonic() + job.seconds <= deadline]
            for job in left:
                if job not in fitting:
                    with listener.lock:
                        listener.skipped(job.name, f"no time left: it wants {job.seconds:.0f} s")
            if not fitting:
                return
            turn += 1
            left = _run_worker(
                stage, fitting, Path(folder, f"{turn}.jsonl"), rehearse, seed, deadline, listener, patience
            )


def _run_worker(
    stage: str,
    jobs: list[Job],
    out: Path,
    rehearse: bool,
    seed: int,
    deadline: float,
    listener: Listener,
    patience: float,
) -> list[Job]:
    """One worker's life; the jobs that it left undone."""
    command = [sys.executable, "-m", "bench.gpu.worker", "--stage", stage, "--out", str(out), "--seed", str(seed)]
    command += ["--rehearse"] if rehearse else []
    out.touch()
    threads = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": "1" if rehearse else "4"}
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        worker = subprocess.Popen(
            [*command, *(job.name for job in jobs)],
            cwd=ROOT,
            env={**os.environ, **threads},
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
        )
        try:
            undone, ended = _listen(worker, jobs, out, deadline, listener, patience)
        finally:
            worker.kill()
            worker.wait()
        # One that lost its device has said of which job. Whatever else ends with jobs undone would end so again: killed
        # for the memory it took, say.
        told = worker.returncode == LOST and len(undone) < len(jobs)
        if undone and ended and not told:
            said.seek(0)
            last = (said.read().strip().splitlines() or ["no output"])[-1]
            # One that never began anything would not begin the next job either.
            blamed = undone if not out.stat().st_size else undone[:1]
            with listener.lock:
                for job in blamed:
                    listener.failed(job.name, f"the worker ended with status {worker.returncode}: {last}")
            undone = undone[len(blamed) :]
    return undone


def _listen(
    worker: subprocess.Popen[bytes], jobs: list[Job], out: Path, deadline: float, listener: Listener, patience: float
) -> tuple[list[Job], bool]:
    """Pass on what a worker writes until it ends or takes too long; the jobs to go on with, whether it ended itself."""
    undone = list(jobs)
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
                        # Where the worker is lost, nothing follows.
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
                        tell = listener.skipped if now > deadline else listener.failed
                        tell(undone[0].name, reason)
                return undone[1:], False
            time.sleep(_PAUSE)


def run_side_by_side(
    stage: str,
    groups: dict[str, Sequence[Job]],
    *,
    workers: int,
    rehearse: bool,
    seed: int,
    deadline: float,
    listener: Listener,
) -> None:
    """Run groups of jobs at the same time, each in a process of its own: for jobs whose time is not measured."""
    waiting = list(groups.values())
    lock = threading.Lock()

    def serve() -> None:
        while True:
            with lock:
                if not waiting:
                    return
                jobs = waiting.pop(0)
            run_group(stage, jobs, rehearse=rehearse, seed=seed, deadline=deadline, listener=listener)

    # Nobody waits for them if this program is interrupted.
    threads = [threading.Thread(target=serve, daemon=True) for _ in range(min(workers, len(groups)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
