"""Train a LiFT."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lift_fast import devices
from lift_fast.backbones import FrozenViT, load_backbone
from lift_fast.checkpoints import save_lift
from lift_fast.distributed import World
from lift_fast.images import check_size, list_images
from lift_fast.lift import LiFT
from lift_fast.lift_state import fit_lift, lift_state_dict, plain_name

from . import loop
from .data import GlobalBatches, Sample, TrainingImages, build_loader, default_workers
from .objective import FrozenFeatures, Objective
from .settings import TrainingSettings
from .split import split
from .state import image_digests, weights_digest
from .step import TrainingStep, resolve_precision
from .sync_batchnorm import synchronize
from .trainer import Schedule, Trainer

_WEIGHTS = "lift.pth"


def train(
    settings: TrainingSettings, *, resume: bool = False, overwrite: bool = False, quiet: bool = False
) -> dict[str, Any]:
    """Train a LiFT. Under ``torchrun`` each process calls this and takes its share of every batch.

    Writes to ``settings.out``: ``lift.pth``, the weights in the published format; ``last.pth``, the training state;
    ``log.csv``, a row for each step. SIGINT and SIGTERM save and stop the run; a second signal stops it immediately. No
    other training can write there during the run. PyTorch's default dtype and device have no effect.

    Args:
        settings: what to train.
        resume: resume from ``last.pth`` if it exists; bit-exact on the CPU, also in mid-epoch.
        overwrite: start over if ``settings.out`` contains a training.
        quiet: no progress bar and no messages.

    Returns:
        Figures: ``steps``, ``epochs``, ``images``, ``pictures`` (to train on), ``held_out``, ``seconds``,
        ``images_per_second``, ``waiting`` (share of the time spent waiting for images), ``epoch_losses``,
        ``unreadable`` (messages), ``parameters``, ``batch_size``, ``processes``, ``precision``, ``device``, ``lift``
        and ``resumed`` (the step at which this run began). The same in every process.

    Raises:
        ValueError: for settings that do not fit each other, the images or the saved state, a malformed saved state, or
            a folder to which another training writes.
        FileNotFoundError: if a folder or file does not exist.
        WeightsNotFoundError: as :func:`lift_fast.load_backbone`.
        FileExistsError: if ``settings.out`` contains a training, without ``resume`` or ``overwrite``.
        FloatingPointError: if the loss is not finite; files saved earlier stay valid.
        NotSaved: if a file cannot be written to ``settings.out``, for example on a full disk; files saved earlier stay
            valid.
        Interrupted: after SIGINT or SIGTERM.
    """
    return loop.run(partial(LiftTrainer, settings), settings.device, resume=resume, overwrite=overwrite, quiet=quiet)


class LiftTrainer(Trainer):
    """A LiFT for a frozen backbone, as :class:`TrainingSettings` describe it."""

    name, part, files, terms = "LiFT", "lift", (_WEIGHTS,), ("full", "half")

    def __init__(self, settings: TrainingSettings, world: World) -> None:
        self.settings, self.schedule, self.world = settings, Schedule.of(settings), world
        self.device = devices.resolve(settings.device, world.local_rank)
        precision = resolve_precision(settings.precision, self.device)
        self.precision = str(precision).removeprefix("torch.")

        found = list_images(settings.data)
        root = settings.data if settings.data.is_dir() else settings.data.parent
        paths, held_out = split(found, settings.held_out, root)
        paths, self.held_out = paths[: settings.limit], len(held_out)
        # The channel order of the extractor's LiFT.
        self.backbone = load_backbone(
            settings.model,
            weights=settings.weights,
            random_weights=settings.random_weights,
            checkpoint_key=settings.checkpoint_key,
            facet=settings.facet,
            layer=settings.layer,
            head_order="interleaved",
        )
        self.batch_size = settings.batch_size or (64 if self.backbone.patch_size <= 8 else 256)
        self._check_size()
        self.description = {
            **settings.as_dict(),
            "batch_size": self.batch_size,
            "precision": self.precision,
            "processes": world.size,
            **image_digests(paths, root),
            "backbone": weights_digest(self.backbone),
            "patch_size": self.backbone.patch_size,
            "channels": self.backbone.embed_dim,
        }
        self.network: LiFT = _fresh_lift(settings, self.backbone).to(self.device)
        self.network.to(memory_format=torch.channels_last).train()
        cuda = self.device.type == "cuda"
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=settings.learning_rate, fused=cuda)
        features = FrozenFeatures(self.backbone.to(self.device, precision), settings.compile, settings.target)
        self._step = TrainingStep(features, self._wrapped(Objective(self.network, settings.loss)), self.optimizer)
        self.scaler = self._step.scaler
        self.batches = GlobalBatches(len(paths), self.batch_size, settings.seed, world.rank, world.size)
        workers = default_workers(cuda, world.local_size) if settings.workers is None else settings.workers
        images = TrainingImages(paths, settings.image_size, settings.fit, settings.jitter, settings.seed)
        self.loader = build_loader(images, self.batches, workers, pin=cuda)

    def step(self, sample: Sample) -> Tensor:
        return self._step(sample.pixels)

    def state(self) -> dict[str, Tensor]:
        return {plain_name(name): value for name, value in self.network.state_dict().items()}

    def checked(self, state: Mapping[Any, Any], source: str) -> dict[str, Tensor]:
        weights = lift_state_dict(state, source)
        fit_lift(weights, self.network, source)
        return weights

    def save(self, folder: Path) -> None:
        save_lift(self.network, folder / _WEIGHTS)

    def announcement(self, total: int) -> str:
        backbone, note = self.backbone, " (random weights)" if self.backbone.random_weights else ""
        return (
            f"{self.batches.count} images, {self.held_out} held out; {backbone.name}{note} {backbone.facet}s, "
            f"{backbone.embed_dim} channels; {total} steps of {self.batch_size} images of {self.settings.image_size} "
            f"pixels in {self.precision} on {self.device}"
        )

    def figures(self) -> dict[str, Any]:
        return {"precision": self.precision, "lift": str(self.settings.out / _WEIGHTS)}

    def _wrapped(self, objective: nn.Module) -> nn.Module:
        if self.settings.sync_batchnorm and self.world.size > 1:
            synchronize(objective, self.device)
        if self.world.size > 1:
            own = [self.device.index] if self.device.type == "cuda" else None
            objective = nn.parallel.DistributedDataParallel(objective, device_ids=own)
        return torch.compile(objective, dynamic=False) if self.settings.compile else objective  # type: ignore[return-value]

    def _check_size(self) -> None:
        settings, patch = self.settings, self.backbone.patch_size
        check_size((settings.image_size, settings.image_size))
        if settings.image_size % (4 * patch):
            near = max(1, round(settings.image_size / (4 * patch))) * 4 * patch
            raise ValueError(
                f"image_size (--size) must be a multiple of four patches ({4 * patch} pixels), so that a quarter of it "
                f"is whole patches, got {settings.image_size}; use {near}"
            )
        shared = 1 if settings.sync_batchnorm else self.world.size
        if self.batch_size == shared and settings.use_image and settings.image_size == 4 * patch:
            # The halved image is a quarter of the doubled one: a single patch.
            raise ValueError(
                f"batch_size {self.batch_size} with image_size {settings.image_size} leaves BatchNorm a single value "
                f"per channel; give a batch_size (--batch-size) of at least {2 * shared}, or an image_size "
                f"(--size) of at least {8 * patch}"
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
