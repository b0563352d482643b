"""The training loop."""

from __future__ import annotations

import math
import signal
import sys
import time
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lift_fast import devices
from lift_fast._files import make_folder
from lift_fast._text import one_line, quoted
from lift_fast.backbones import FrozenViT, load_backbone
from lift_fast.defaults import plain_defaults
from lift_fast.distributed import World, join_world
from lift_fast.images import check_size, list_images
from lift_fast.lift import LiFT
from lift_fast.locks import reserved

from . import state as disk
from .data import MOST_UNREADABLE, GlobalBatches, Pictures, Sample, build_loader, default_workers, stop_workers
from .log import Log, progress_bar, tensorboard_writer
from .objective import FrozenFeatures, Objective
from .schema import check_state
from .settings import TrainingSettings, contradictions
from .split import split
from .state import Progress
from .step import TrainingStep, resolve_precision, tuned_convolutions
from .stopping import StopSignals
from .sync_batchnorm import synchronize

# Steps whose losses a GPU may keep to itself: reading one waits for everything queued before it.
_CUDA_LOG_INTERVAL = 10


class Interrupted(Exception):
    """SIGINT or SIGTERM came; the state is saved, and ``resume`` goes on from it."""

    def __init__(self, number: int, step: int, folder: Path) -> None:
        super().__init__(
            f"stopped by {signal.Signals(number).name} after step {step}; saved to {folder}, --resume continues there"
        )
        self.number, self.step, self.folder = number, step, folder


def train(
    settings: TrainingSettings, *, resume: bool = False, overwrite: bool = False, quiet: bool = False
) -> dict[str, Any]:
    """Train a LiFT. Under ``torchrun`` each process calls this and takes its share of every batch.

    Writes to ``settings.out``: ``lift.pth``, the weights in the published format; ``last.pth``, the training state;
    ``log.csv``, a row for each step. SIGINT and SIGTERM save before they end the run; a second one ends it at once.
    While it lasts no other training can write there. PyTorch's default dtype and device have no effect.

    Args:
        settings: what to train.
        resume: go on from ``last.pth`` if there is one; bit-exact on the CPU, in mid-epoch too.
        overwrite: begin anew although ``settings.out`` holds a training.
        quiet: no progress bar and no remarks.

    Returns:
        Figures: ``steps``, ``epochs``, ``images``, ``pictures`` (to train on), ``held_out``, ``seconds``,
        ``images_per_second``, ``waiting`` (share of the time spent waiting for pictures), ``epoch_losses``,
        ``unreadable`` (messages), ``parameters``, ``batch_size``, ``processes``, ``precision``, ``device``, ``lift``
        and ``resumed`` (the step at which this run began). The same in every process.

    Raises:
        ValueError: for settings that do not fit each other, the pictures or the saved state, a saved state that is
            damaged, or a folder to which another training writes; says what to do.
        FileNotFoundError: if there is no such folder or file.
        WeightsNotFoundError: as :func:`lift_fast.load_backbone`.
        FileExistsError: if ``settings.out`` holds a training and neither ``resume`` nor ``overwrite`` is given.
        FloatingPointError: if the loss is no longer finite; what was saved before stays.
        NotSaved: if something could not be written to ``settings.out``, say for want of room; the same holds.
        Interrupted: after SIGINT or SIGTERM.
    """
    # PyTorch's optimiser makes its own tensors.
    with plain_defaults(), join_world(settings.device) as world, ExitStack() as held:
        run = _Run(settings, world, resume, overwrite, quiet, held)
        with StopSignals(echoed=world.size > 1) as stop, tuned_convolutions():
            return run.train(stop)


class _Run:
    """One process's part of a run."""

    def __init__(
        self, settings: TrainingSettings, world: World, resume: bool, overwrite: bool, quiet: bool, held: ExitStack
    ) -> None:
        """``held`` keeps the folder for this run."""
        self.settings, self.world = settings, world
        self.quiet = quiet or not world.leads
        self.device = devices.resolve(settings.device, world.local_rank)
        self.dtype = resolve_precision(settings.precision, self.device)

        found = list_images(settings.data)
        root = settings.data if settings.data.is_dir() else settings.data.parent
        self.paths, self.held_out = split(found, settings.held_out, root)
        self.paths = self.paths[: settings.limit]
        backbone = _backbone(settings)
        self.batch_size = settings.batch_size or (64 if backbone.patch_size <= 8 else 256)
        self._check(backbone)

        saved = self._saved(resume, overwrite, held)
        lift = _fresh_lift(settings, backbone)
        self.description = {
            **settings.as_dict(),
            "batch_size": self.batch_size,
            "precision": str(self.dtype).removeprefix("torch."),
            "processes": world.size,
            **disk.pictures_digests(self.paths, root),
            "backbone": disk.weights_digest(backbone),
            "patch_size": backbone.patch_size,
            "channels": backbone.embed_dim,
        }
        if saved is not None:
            different = contradictions(saved["description"], self.description)
            if different:
                raise ValueError(
                    f"{settings.out / disk.STATE_FILE} was trained otherwise; resume with the same options, or begin "
                    f"anew in another folder (--out). {'; '.join(different)}"
                )
            if saved["description"].get("picture_times", now := self.description["picture_times"]) != now:
                self._remark(
                    f"the pictures in {settings.data} have been written since, with the same names and sizes; if they "
                    "are other ones, begin anew in another folder (--out)"
                )
        self.lift = lift.to(self.device).to(memory_format=torch.channels_last).train()
        optimizer = torch.optim.Adam(
            self.lift.parameters(), lr=settings.learning_rate, fused=self.device.type == "cuda"
        )
        features = FrozenFeatures(backbone.to(self.device, self.dtype), settings.compile, settings.target)
        self.step = TrainingStep(features, self._wrap(Objective(self.lift, settings.loss)), optimizer)
        self.batches = GlobalBatches(len(self.paths), self.batch_size, settings.seed, world.rank, world.size)
        self.progress = Progress()
        if saved is not None:
            file = settings.out / disk.STATE_FILE
            check_state(saved, file, self.lift, optimizer, self.step.scaler, self.batches.batches)
            self.progress = disk.restore(saved, self.lift, optimizer, self.step.scaler)
        self.resumed = self.progress.step
        self.total = self.batches.batches * settings.epochs
        if settings.max_steps is not None:
            self.total = min(self.total, settings.max_steps)
        if self.progress.step > self.total:
            raise ValueError(
                f"{settings.out / disk.STATE_FILE} has come to step {self.progress.step} already, beyond the "
                f"{self.total} that were asked for; give more epochs (--epochs) or max_steps "
                "(--max-steps)"
            )
        cuda = self.device.type == "cuda"
        workers = default_workers(cuda, world.local_size) if settings.workers is None else settings.workers
        pictures = Pictures(self.paths, settings.image_size, settings.fit, settings.jitter, settings.seed)
        self.loader = build_loader(pictures, self.batches, workers, pin=cuda)
        self.log_interval = _CUDA_LOG_INTERVAL if cuda else 1
        if world.leads and saved is None:
            # From here on, so that a resume cannot go on with what was to be overwritten.
            disk.remove(settings.out)
        self.log: Log | None = None
        if world.leads:
            with self._writing():
                self.log = Log(settings.out, self.progress.step, settings.tensorboard)
        self.waited = 0.0
        self._unlogged: list[tuple[int, int, Tensor]] = []
        self._since = time.perf_counter()
        self._flag: tuple[Tensor, Any] | None = None
        if not self.quiet:
            self._announce(backbone)

    def train(self, stop: StopSignals) -> dict[str, Any]:
        settings, progress = self.settings, self.progress
        bar = progress_bar(self.total, progress.step, self.quiet)
        began = self._since = time.perf_counter()
        first = progress.step
        stopped_by = 0
        try:
            while progress.step < self.total and not stopped_by:
                self.batches.epoch, self.batches.start = progress.epoch, progress.batch
                waiting = time.perf_counter()
                for sample in self.loader:
                    self.waited += time.perf_counter() - waiting
                    self._train_on(sample, bar)
                    bar.update()
                    if len(self._unlogged) >= self.log_interval or progress.step == self.total:
                        self._write_log(bar)
                    stopped_by = self._agreed(stop.number)
                    last = progress.step == self.total
                    mid_epoch = progress.batch < self.batches.batches
                    if stopped_by or (last and mid_epoch) or _due(progress.step, settings.save_every_steps):
                        self._save(bar)
                    if stopped_by or last:
                        break
                    waiting = time.perf_counter()
                if progress.batch == self.batches.batches:
                    self._end_epoch(bar)
        finally:
            stop_workers(self.loader)
            bar.close()
            if self.log is not None:
                with self._writing():
                    self.log.close()
        self._settle()
        seconds = time.perf_counter() - began
        if stopped_by:
            raise Interrupted(stopped_by, progress.step, settings.out)
        return self._figures(progress.step - first, seconds)

    def _train_on(self, sample: Sample, bar: Any) -> None:
        for message in sample.unreadable:
            if message not in self.progress.unreadable and not self.quiet:
                bar.write(f"skipped: {one_line(message)}", file=sys.stderr)
            self.progress.unreadable[message] = self.progress.unreadable.get(message, 0) + 1
        if sample.failed:
            raise ValueError(
                f"more than {MOST_UNREADABLE} pictures in a row cannot be read, the last: {sample.unreadable[-1]}; "
                f"check {self.settings.data}"
            )
        losses = self.step(sample.pixels)
        self.progress.step += 1
        self.progress.batch += 1
        self._unlogged.append((self.progress.step, self.progress.epoch + 1, losses))

    def _write_log(self, bar: Any) -> None:
        """Read the losses of the steps since the last call; every process comes here at the same steps."""
        if not self._unlogged:
            return
        values = self.world.mean(torch.stack([losses for _, _, losses in self._unlogged])).double().tolist()
        now = time.perf_counter()
        speed = len(values) * self.batch_size / max(now - self._since, 1e-9)
        self._since = now
        rows = []
        for (step, epoch, _), (full, half) in zip(self._unlogged, values, strict=True):
            loss = full + half
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"the loss is {loss} at step {step}; take a lower learning rate, or precision float32. What was "
                    f"saved in {self.settings.out} before is sound"
                )
            self.progress.epoch_sum += loss
            rows.append((step, epoch, loss, full, half, speed, len(self.progress.unreadable)))
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
        if not self.quiet:
            bar.write(f"epoch {progress.epoch}: mean loss {progress.losses[-1]:.4f}", file=sys.stderr)
        if _due(progress.epoch, self.settings.save_every_epochs) or progress.step == self.total:
            self._save(bar)

    def _save(self, bar: Any) -> None:
        """Write the state; every process comes here at the same steps."""
        self._write_log(bar)
        self.progress.unreadable = _merged(self.world.gather(self.progress.unreadable))
        if not self.world.leads:
            self.progress.unreadable = {}
            return
        if not all(bool(torch.isfinite(weight).all()) for weight in self.lift.state_dict().values()):
            raise FloatingPointError(
                f"LiFT's weights are no longer finite at step {self.progress.step}; take a lower learning rate, or "
                f"precision float32. What was saved in {self.settings.out} before is sound"
            )
        with self._writing():
            disk.save(
                self.settings.out, self.lift, self.step.optimizer, self.step.scaler, self.progress, self.description
            )

    def _writing(self) -> AbstractContextManager[None]:
        return disk.writing(self.settings.out, self.progress.step)

    def _agreed(self, number: int) -> int:
        """The signal that any process has received; the processes learn of it a step later, all at the same one."""
        if self.world.size == 1:
            return number
        flag = torch.tensor(number, dtype=torch.int64, device=self.device)
        before, self._flag = self._flag, (flag, dist.all_reduce(flag, dist.ReduceOp.MAX, async_op=True))
        if before is None:
            return 0
        before[1].wait()
        return int(before[0])

    def _settle(self) -> None:
        if self._flag is not None:
            self._flag[1].wait()

    def _wrap(self, objective: nn.Module) -> nn.Module:
        if self.settings.sync_batchnorm and self.world.size > 1:
            synchronize(objective, self.device)
        if self.world.size > 1:
            devices = [self.device.index] if self.device.type == "cuda" else None
            objective = nn.parallel.DistributedDataParallel(objective, device_ids=devices)
        return torch.compile(objective, dynamic=False) if self.settings.compile else objective  # type: ignore[return-value]

    def _check(self, backbone: FrozenViT) -> None:
        settings, patch, count = self.settings, backbone.patch_size, len(self.paths)
        check_size((settings.image_size, settings.image_size))
        if settings.out.exists() and settings.out.samefile(settings.data):
            raise ValueError(f"out is the folder of the pictures, {quoted(settings.out)}; give another out (--out)")
        if settings.tensorboard:
            # Before an earlier training is overwritten.
            tensorboard_writer()
        if settings.image_size % (4 * patch):
            near = max(1, round(settings.image_size / (4 * patch))) * 4 * patch
            raise ValueError(
                f"image_size (--size) must be a multiple of four patches ({4 * patch} pixels), so that a quarter of it "
                f"is whole patches, got {settings.image_size}; take {near}"
            )
        if self.batch_size % self.world.size:
            raise ValueError(
                f"batch_size (--batch-size) {self.batch_size} is that of all {self.world.size} processes together and "
                "must be a multiple of their number"
            )
        if count < self.batch_size:
            held = f" ({len(self.held_out)} are held out)" if self.held_out else ""
            raise ValueError(
                f"{count} pictures to train on{held} are fewer than one batch of {self.batch_size}; give a "
                f"batch_size (--batch-size) of {count} or less"
            )

        shared = 1 if settings.sync_batchnorm else self.world.size
        if self.batch_size == shared and settings.use_image and settings.image_size == 4 * patch:
            # The halved picture is a quarter of the doubled one: a single patch.
            raise ValueError(
                f"batch_size {self.batch_size} with image_size {settings.image_size} leaves BatchNorm a single value "
                f"for each channel; give a batch_size (--batch-size) of at least {2 * shared}, or an image_size "
                f"(--size) of at least {8 * patch}"
            )

    def _saved(self, resume: bool, overwrite: bool, held: ExitStack) -> dict[str, Any] | None:
        out = make_folder(self.settings.out)
        if self.world.leads:
            held.enter_context(reserved(out, "training"))
        if resume:
            saved = disk.load(out)
            if saved is None:
                self._remark(f"nothing to resume in {out}: begins anew")
            return saved
        there = [name for name in (disk.STATE_FILE, disk.LIFT_FILE) if (out / name).exists()]
        # The first process may have written by the time that another one looks.
        if there and not overwrite and self.world.leads:
            raise FileExistsError(
                f"{out} holds {' and '.join(there)} already; go on with it (--resume), overwrite it (--overwrite), or "
                "give another folder (--out)"
            )
        return None

    def _remark(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr)

    def _announce(self, backbone: FrozenViT) -> None:
        if self.resumed and self.resumed == self.total:
            print(
                f"complete after {self.total} steps ({self.progress.epoch} epochs); nothing to do, give more --epochs"
                + ("" if self.settings.max_steps is None else " or --max-steps"),
                file=sys.stderr,
            )
            return
        note = " (random weights)" if backbone.random_weights else ""
        print(
            f"{len(self.paths)} pictures, {len(self.held_out)} held out; {backbone.name}{note} {backbone.facet}s, "
            f"{backbone.embed_dim} channels; {self.total} steps of {self.batch_size} pictures of "
            f"{self.settings.image_size} pixels in {str(self.dtype).removeprefix('torch.')} on {self.device}"
            + (f", {self.world.size} processes" if self.world.size > 1 else "")
            + (f"; continues after step {self.resumed}" if self.resumed else ""),
            file=sys.stderr,
        )

    def _figures(self, steps: int, seconds: float) -> dict[str, Any]:
        progress, settings = self.progress, self.settings
        unreadable = _merged(self.world.gather(progress.unreadable))
        return {
            "steps": progress.step,
            "resumed": self.resumed,
            "epochs": progress.epoch,
            "images": progress.step * self.batch_size,
            "pictures": len(self.paths),
            "held_out": len(self.held_out),
            "seconds": round(seconds, 3),
            "images_per_second": steps * self.batch_size / seconds if steps else None,
            "waiting": round(self.waited / seconds, 4) if steps else None,
            "epoch_losses": progress.losses,
            "unreadable": list(unreadable),
            "parameters": sum(parameter.numel() for parameter in self.lift.parameters()),
            "batch_size": self.batch_size,
            "processes": self.world.size,
            "precision": self.description["precision"],
            "device": str(self.device),
            "lift": str(settings.out / disk.LIFT_FILE),
        }


def _backbone(settings: TrainingSettings) -> FrozenViT:
    """In the channel order in which the extractor feeds a LiFT."""
    return load_backbone(
        settings.model,
        weights=settings.weights,
        random_weights=settings.random_weights,
        checkpoint_key=settings.checkpoint_key,
        facet=settings.facet,
        layer=settings.layer,
        head_order="interleaved",
    )


def _fresh_lift(settings: TrainingSettings, backbone: FrozenViT) -> LiFT:
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(settings.seed)
        return LiFT(
            backbone.embed_dim,
            backbone.patch_size,
            use_image=settings.use_image,
            image_channels=settings.image_channels,
            extra_image_blocks=settings.extra_image_blocks,
        )


def _due(count: int, every: int | None) -> bool:
    return every is not None and count % every == 0


def _merged(counts: list[dict[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for part in counts:
        for message, count in part.items():
            total[message] = total.get(message, 0) + count
    return total
