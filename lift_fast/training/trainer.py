"""The parts of a training that differ between networks; :mod:`lift_fast.training.loop` is the common part."""

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
    """Input, output, length and saving intervals of a run, as in ``TrainingSettings``."""

    data: Path
    out: Path
    epochs: int
    max_steps: int | None
    save_every_steps: int | None
    save_every_epochs: int
    tensorboard: bool

    @classmethod
    def of(cls, settings: Any) -> Schedule:
        """Copy the fields of these names from any settings."""
        return cls(**{field.name: getattr(settings, field.name) for field in fields(cls)})


class Trainer(ABC):
    """One process's part of a training.

    Its constructor builds everything, validates the settings, and writes nothing. Under ``torchrun`` each process has
    one; the same methods are called in the same order in all of them.

    Attributes:
        name: of the network, in messages.
        part: the network's entry in ``last.pth``.
        files: names of the files that :meth:`save` writes.
        terms: names of the terms of the loss in ``log.csv``; the loss is their sum.
        schedule, world, device: of the run.
        network: the trained network, float32 on ``device``; its state dict is the entry ``part``.
        optimizer, scaler: saved and restored with the network.
        batches: the images of each batch; the loop sets epoch and first batch.
        loader: reads them, with a random generator of its own, as :func:`lift_fast.training.data.build_loader`.
        held_out: number of held out images.
        description: plain values that must not change when a run is resumed, see
            :func:`lift_fast.training.settings.contradictions`.
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
        """Train on this process's share of a batch; returns the terms of the loss before the step, ``[len(terms)]``."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """The network's entry in ``last.pth``."""

    @abstractmethod
    def checked(self, state: Mapping[Any, Any], source: str) -> dict[str, Tensor]:
        """Validate a saved :meth:`state` for the network's ``load_state_dict``.

        Raises:
            ValueError: naming ``source`` and the entry, if it is not a state of this network.
        """

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write :attr:`files`, each atomically; only called in the first process.

        Raises:
            OSError: if one cannot be written.
        """

    @abstractmethod
    def announcement(self, total: int) -> str:
        """One line on the network, data and ``total`` steps of the run."""

    def epoch_ended(self, epoch: int) -> str:
        """Called after each epoch before saving, for example to evaluate on held out images.

        Returns:
            A note to print after the mean loss.
        """
        return ""

    def figures(self) -> dict[str, Any]:
        """Figures of the result in addition to the loop's own."""
        return {}
