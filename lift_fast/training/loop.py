"""The training loop of any trainer: epochs, steps, saving, resuming, stopping and messages."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lift_fast._files import make_folder
from lift_fast._text import one_line, quoted
from lift_fast.defaults import plain_defaults
from lift_fast.distributed import World, join_world
from lift_fast.locks import reserved

from . import state as disk
from .data import MOST_UNREADABLE, Sample, stop_workers
from .log import Log, progress_bar, tensorboard_writer
from .schema import check_state
from .settings import contradictions
from .state import Progress
from .step import tuned_convolutions
from .stopping import StopSignals
from .trainer import Trainer

# Steps between reads of the losses on a GPU: each read waits for all queued work.
_CUDA_LOG_INTERVAL = 10


class Interrupted(Exception):
    """SIGINT or SIGTERM was received; the state is saved for ``resume``."""

    def __init__(self, number: int, step: int, folder: Path) -> None:
        super().__init__(
            f"stopped by {signal.Signals(number).name} after step {step}; saved to {folder}, resume with --resume"
        )
        self.number, self.step, self.folder = number, step, folder


def run(
    build: Callable[[World], Trainer],
    device: str | None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Run the trainer that ``build`` makes for this process, on ``device``; None is CUDA if there is one.

    Files, signals, resuming, errors, further arguments and returned figures are those of
    :func:`lift_fast.training.train`, with the trainer's own figures.
    """
    # PyTorch's optimiser allocates tensors.
    with plain_defaults(), join_world(device) as world, ExitStack() as held:
        loop = _Loop(build(world), resume, overwrite, quiet, held)
        with StopSignals(echoed=world.size > 1) as stop, tuned_convolutions():
            return loop.run(stop)


class _Loop:
    """One process's part of a run."""

    def __init__(self, trainer: Trainer, resume: bool, overwrite: bool, quiet: bool, held: ExitStack) -> None:
        """``held`` keeps the folder reserved for this run."""
        self.trainer, self.schedule, self.world = trainer, trainer.schedule, trainer.world
        self.batches = trainer.batches
        self.quiet = quiet or not self.world.leads
        self._check()
        saved = self._saved(resume, overwrite, held)
        self.progress = Progress() if saved is None else self._restored(saved)
        self.resumed = self.progress.step
        self.total = self.batches.batches * self.schedule.epochs
        if self.schedule.max_steps is not None:
            self.total = min(self.total, self.schedule.max_steps)
        if self.progress.step > self.total:
            raise ValueError(
                f"{self.schedule.out / disk.STATE_FILE} is at step {self.progress.step}, beyond the requested "
                f"{self.total}; give more epochs (--epochs) or max_steps (--max-steps)"
            )
        self.log_interval = _CUDA_LOG_INTERVAL if trainer.device.type == "cuda" else 1
        self.log: Log | None = None
        if self.world.leads:
            if saved is None:
                # Now, so that a later resume cannot use the overwritten training.
                disk.remove(self.schedule.out, trainer.files)
            with self._writing():
                self.log = Log(self.schedule.out, trainer.terms, self.progress.step, self.schedule.tensorboard)
        self.waited = 0.0
        self._unlogged: list[tuple[int, int, Tensor]] = []
        self._since = time.perf_counter()
        self._flag: tuple[Tensor, Any] | None = None
        self._announce()

    def run(self, stop: StopSignals) -> dict[str, Any]:
        schedule, progress, loader = self.schedule, self.progress, self.trainer.loader
        bar = progress_bar(self.total, progress.step, self.quiet)
        began = self._since = time.perf_counter()
        stopped_by = 0
        try:
            while progress.step < self.total and not stopped_by:
                self.batches.epoch, self.batches.start = progress.epoch, progress.batch
                waiting = time.perf_counter()
                for sample in loader:
                    self.waited += time.perf_counter() - waiting
                    self._train_on(sample, bar)
                    bar.update()
                    if len(self._unlogged) >= self.log_interval or progress.step == self.total:
                        self._write_log(bar)
                    stopped_by = self._agreed(stop.number)
                    last = progress.step == self.total
                    mid_epoch = progress.batch < self.batches.batches
                    if stopped_by or (last and mid_epoch) or _due(progress.step, schedule.save_every_steps):
                        self._save(bar)
                    if stopped_by or last:
                        break
                    waiting = time.perf_counter()
                if progress.batch == self.batches.batches:
                    self._end_epoch(bar)
        finally:
            stop_workers(loader)
            bar.close()
            if self.log is not None:
                with self._writing():
                    self.log.close()
        self._settle()
        seconds = time.perf_counter() - began
        if stopped_by:
            raise Interrupted(stopped_by, progress.step, schedule.out)
        return self._figures(progress.step - self.resumed, seconds)

    def _train_on(self, sample: Sample, bar: Any) -> None:
        for message in sample.unreadable:
            if message not in self.progress.unreadable and not self.quiet:
                bar.write(f"skipped: {one_line(message)}", file=sys.stderr)
            self.progress.unreadable[message] = self.progress.unreadable.get(message, 0) + 1
        if sample.failed:
            raise ValueError(
                f"more than {MOST_UNREADABLE} images in a row cannot be read, the last: {sample.unreadable[-1]}; "
                f"check {self.schedule.data}"
            )
        terms = self.trainer.step(sample)
        self.progress.step += 1
        self.progress.batch += 1
        self._unlogged.append((self.progress.step, self.progress.epoch + 1, terms))

    def _write_log(self, bar: Any) -> None:
        """Read the losses of the steps since the last call; every process calls this at the same steps."""
        if not self._unlogged:
            return
        values = self.world.mean(torch.stack([terms for _, _, terms in self._unlogged])).double().tolist()
        now = time.perf_counter()
        speed = len(values) * self.batches.batch_size / max(now - self._since, 1e-9)
        self._since = now
        rows = []
        for (step, epoch, _), terms in zip(self._unlogged, values, strict=True):
            loss = sum(terms)
            if not math.isfinite(loss):
                self._diverged(f"the loss is {loss} at step {step}")
            self.progress.epoch_sum += loss
            rows.append((step, epoch, loss, terms, speed, len(self.progress.unreadable)))
        self._unlogged.clear()
        if self.log is not None:
            with self._writing():
                self.log.write(rows)
        bar.set_postfix_str(f"loss {rows[-1][2]:.4f}, {speed:.3g} images/s", refresh=False)

    def _end_epoch(self, bar: Any) -> None:
        self._write_log(bar)
        progress = self.progress
        progress.losses.append(progress.epoch_sum / self.batches.batches)
        progress.epoch, progress.batch, progress.epoch_sum = progress.epoch + 1, 0, 0.0
        report = self.trainer.epoch_ended(progress.epoch)
        if not self.quiet:
            note = f"; {report}" if report else ""
            bar.write(f"epoch {progress.epoch}: mean loss {progress.losses[-1]:.4f}{note}", file=sys.stderr)
        if _due(progress.epoch, self.schedule.save_every_epochs) or progress.step == self.total:
            self._save(bar)

    def _save(self, bar: Any) -> None:
        """Write the state; every process calls this at the same steps."""
        self._write_log(bar)
        self.progress.unreadable = _merged(self.world.gather(self.progress.unreadable))
        if not self.world.leads:
            self.progress.unreadable = {}
            return
        trainer = self.trainer
        if not all(bool(torch.isfinite(weight).all()) for weight in trainer.network.state_dict().values()):
            self._diverged(f"{trainer.name}'s weights are no longer finite at step {self.progress.step}")
        with self._writing():
            disk.save(trainer, self.progress)

    def _diverged(self, what: str) -> None:
        raise FloatingPointError(
            f"{what}; use a lower learning rate, or precision float32. The files saved earlier in {self.schedule.out} "
            "are valid"
        )

    def _writing(self) -> AbstractContextManager[None]:
        return disk.writing(self.schedule.out, self.progress.step)

    def _agreed(self, number: int) -> int:
        """The signal that any process has received; all processes get it at the same step, one step later."""
        if self.world.size == 1:
            return number
        flag = torch.tensor(number, dtype=torch.int64, device=self.trainer.device)
        before, self._flag = self._flag, (flag, dist.all_reduce(flag, dist.ReduceOp.MAX, async_op=True))
        if before is None:
            return 0
        before[1].wait()
        return int(before[0])

    def _settle(self) -> None:
        if self._flag is not None:
            self._flag[1].wait()

    def _check(self) -> None:
        schedule, count, size = self.schedule, self.batches.count, self.batches.batch_size
        if schedule.out.exists() and schedule.out.samefile(schedule.data):
            raise ValueError(f"out is the folder of the images, {quoted(schedule.out)}; give another out (--out)")
        if schedule.tensorboard:
            # Fail before an earlier training is overwritten.
            tensorboard_writer()
        if size % self.world.size:
            raise ValueError(
                f"batch_size (--batch-size) {size} covers all processes and must be a multiple of their number, "
                f"{self.world.size}"
            )
        if count < size:
            held_out = self.trainer.held_out
            held = f" ({held_out} are held out)" if held_out else ""
            raise ValueError(
                f"{count} images to train on{held} are fewer than one batch of {size}; give a batch_size "
                f"(--batch-size) of {count} or less"
            )

    def _saved(self, resume: bool, overwrite: bool, held: ExitStack) -> dict[str, Any] | None:
        out = make_folder(self.schedule.out)
        if self.world.leads:
            held.enter_context(reserved(out, "training"))
        if resume:
            saved = disk.load(out, self.trainer.part)
            if saved is None:
                self._remark(f"nothing to resume in {out}: starting over")
            return saved
        existing = [name for name in (disk.STATE_FILE, *self.trainer.files) if (out / name).exists()]
        # Only the first process checks: it may have written files before the others get here.
        if existing and not overwrite and self.world.leads:
            raise FileExistsError(
                f"{out} already contains {' and '.join(existing)}; resume it (--resume), overwrite it (--overwrite), "
                "or give another folder (--out)"
            )
        return None

    def _restored(self, saved: dict[str, Any]) -> Progress:
        """Restore the saved state after checking that it belongs to this run."""
        trainer, file, now = self.trainer, self.schedule.out / disk.STATE_FILE, self.trainer.description
        different = contradictions(saved["description"], now)
        if different:
            raise ValueError(
                f"{file} was trained with other options; resume with the same ones, or start over in another folder "
                f"(--out). {'; '.join(different)}"
            )
        if saved["description"].get("picture_times", now.get("picture_times")) != now.get("picture_times"):
            self._remark(
                f"the images in {self.schedule.data} have been rewritten since, with the same names and sizes; if "
                "their content has changed, start over in another folder (--out)"
            )
        weights = trainer.checked(saved[trainer.part], f"{file}, {trainer.part}")
        check_state(saved, file, trainer.optimizer, trainer.scaler, self.batches.batches)
        trainer.network.load_state_dict(weights)
        return disk.restore(saved, trainer.optimizer, trainer.scaler)

    def _remark(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr)

    def _announce(self) -> None:
        if self.resumed and self.resumed == self.total:
            self._remark(
                f"complete after {self.total} steps ({self.progress.epoch} epochs); nothing to do, give more --epochs"
                + ("" if self.schedule.max_steps is None else " or --max-steps")
            )
            return
        self._remark(
            self.trainer.announcement(self.total)
            + (f", {self.world.size} processes" if self.world.size > 1 else "")
            + (f"; resumes after step {self.resumed}" if self.resumed else "")
        )

    def _figures(self, steps: int, seconds: float) -> dict[str, Any]:
        progress, size = self.progress, self.batches.batch_size
        return {
            "steps": progress.step,
            "resumed": self.resumed,
            "epochs": progress.epoch,
            "images": progress.step * size,
            "pictures": self.batches.count,
            "held_out": self.trainer.held_out,
            "seconds": round(seconds, 3),
            "images_per_second": steps * size / seconds if steps else None,
            "waiting": round(self.waited / seconds, 4) if steps else None,
            "epoch_losses": progress.losses,
            "unreadable": list(_merged(self.world.gather(progress.unreadable))),
            "parameters": sum(parameter.numel() for parameter in self.trainer.network.parameters()),
            "batch_size": size,
            "processes": self.world.size,
            "device": str(self.trainer.device),
            **self.trainer.figures(),
        }


def _due(count: int, every: int | None) -> bool:
    return every is not None and count % every == 0


def _merged(counts: list[dict[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for part in counts:
        for message, count in part.items():
            total[message] = total.get(message, 0) + count
    return total
