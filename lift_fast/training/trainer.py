"""What one training does and another does not: :mod:`lift_fast.training.loop` does the rest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lift_fast.distributed import World

from .data import GlobalBatches, Sample


@dataclass(frozen=True)
class Schedule:
    """Where a run reads and writes, how long it lasts and when it saves; as in ``TrainingSettings``."""

    data: Path
    out: Path
    epochs: int
    max_steps: int | None
    save_every_steps: int | None
    save_every_epochs: int
    tensorboard: bool

    @classmethod
    def of(cls, settings: Any) -> Schedule:
        """The fields of these names of any settings."""
        return cls(**{field.name: getattr(settings, field.name) for field in fields(cls)})


class Trainer(ABC):
    """One process's part of a training.

    Its constructor makes everything, refuses what does not fit, and writes nothing. Under ``torchrun`` each process has
    one; all of them are asked the same things in the same order.

    Attributes:
        name: of what is trained, in messages.
        part: the network's entry in ``last.pth``.
        files: names of what :meth:`save` writes.
        terms: names of the terms of the loss in ``log.csv``; the loss is their sum.
        schedule, world, device: of the run.
        network: what is trained, float32 on ``device``; its state dict is the entry ``part``.
        optimizer, scaler: saved and restored with it.
        batches: which images make up which batch; the loop sets its epoch and first batch.
        loader: reads them, and draws from a generator of its own, as :func:`lift_fast.training.data.build_loader` does.
        held_out: how many images are left out of them.
        description: what must not change when a run is resumed, see
            :func:`lift_fast.training.settings.contradictions`; plain values.
    """

    name: ClassVar[str]
    part: ClassVar[str]
    files: ClassVar[tuple[str, ...]]
    terms: ClassVar[tuple[str, ...]]
    schedule: Schedule
    world: World
    device: torch.device
    network: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    batches: GlobalBatches
    loader: DataLoader[Sample]
    held_out: int
    description: dict[str, Any]

    @abstractmethod
    def step(self, sample: Sample) -> Tensor:
        """Train on this process's share of a batch; the terms of its loss before the step, ``[len(terms)]``."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """The network as ``last.pth`` holds it."""

    @abstractmethod
    def checked(self, state: Mapping[Any, Any], source: str) -> dict[str, Tensor]:
        """A saved :meth:`state`, as the network's ``load_state_dict`` takes it.

        Raises:
            ValueError: naming ``source`` and the entry, for what is no state of this network.
        """

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write :attr:`files`, each atomically; called in the first process alone.

        Raises:
            OSError: if one cannot be written.
        """

    @abstractmethod
    def announcement(self, total: int) -> str:
        """One line that says what is trained on what, in ``total`` steps."""

    def epoch_ended(self, epoch: int) -> str:
        """Called once after each epoch, before it is saved: the place to evaluate on images that were held out.

        Returns:
            What to say of it beside the mean loss.
        """
        return ""

    def figures(self) -> dict[str, Any]:
        """What the result of a run holds beside the loop's own figures."""
        return {}
