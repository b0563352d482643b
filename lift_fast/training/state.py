"""Training state on disk: everything that a continued run needs to go on as if it had never stopped."""

from __future__ import annotations

import hashlib
import io
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lift_fast._files import atomic_path
from lift_fast.backbones import FrozenViT
from lift_fast.tensor_files import read_tensor_file

from .schema import FORMAT, check_parts, numpy_state
from .trainer import Trainer

STATE_FILE, UNREADABLE_FILE = "last.pth", "unreadable.txt"


class NotSaved(Exception):
    """A file of the run could not be written, say for want of room; what was saved before stays."""


@contextmanager
def writing(folder: Path, step: int) -> Iterator[None]:
    """Raise :class:`NotSaved` where what is inside cannot write to ``folder``."""
    try:
        yield
    except OSError as error:
        raise NotSaved(
            f"cannot write to {folder} at step {step}: {error.strerror or error}. What was saved there before is "
            "sound; put that right and resume"
        ) from error


@dataclass
class Progress:
    """How far a run has come."""

    epoch: int = 0
    """Epochs that are done."""
    batch: int = 0
    """Batches of the next epoch that are done."""
    step: int = 0
    """Optimiser steps in all."""
    losses: list[float] = field(default_factory=list)
    """Mean loss of each epoch that is done."""
    epoch_sum: float = 0.0
    """Sum of the losses of the epoch that is not."""
    unreadable: dict[str, int] = field(default_factory=dict)
    """What was said of each file that could not be read, and how often it was met."""


def save(trainer: Trainer, progress: Progress) -> None:
    """Write the trainer's own files, ``last.pth`` and, if need be, ``unreadable.txt``, each atomically.

    Raises:
        OSError: if one cannot be written.
    """
    folder = trainer.schedule.out
    state = {
        "format": FORMAT,
        trainer.part: trainer.state(),
        "optimizer": trainer.optimizer.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "progress": vars(progress),
        "random": _random_state(),
        "description": trainer.description,
    }
    trainer.save(folder)
    if progress.unreadable:
        with atomic_path(folder / UNREADABLE_FILE) as temporary:
            temporary.write_text("".join(f"{message}\n" for message in sorted(progress.unreadable)), errors="replace")
    # Last: what has this state has the weights that belong to it, wherever the run may be killed.
    content = io.BytesIO()
    torch.save(state, content)
    with atomic_path(folder / STATE_FILE) as temporary:
        # PyTorch's own writer hides the system's error behind an assertion of its own.
        temporary.write_bytes(content.getbuffer())


def load(folder: Path, part: str) -> dict[str, Any] | None:
    """What :func:`save` wrote to ``folder``, with the network in its entry ``part``; None if there is nothing.

    Raises:
        ValueError: for a file that is no training state, or lacks a part of one.
    """
    path = folder / STATE_FILE
    if not path.exists():
        return None
    content = read_tensor_file(path)
    check_parts(content, path, part)
    return content


def restore(state: dict[str, Any], optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> Progress:
    """Put a loaded state back that :func:`lift_fast.training.schema.check_state` found sound, the network apart."""
    # The options are the run's settings, which are the same as those of the saved run.
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": groups})
    # A disabled scaler has an empty state, and refuses one.
    if state["scaler"]:
        scaler.load_state_dict(state["scaler"])
    _restore_random_state(state["random"])
    return Progress(**state["progress"])


def pictures_digests(paths: Sequence[Path], root: Path) -> dict[str, str]:
    """Tell one list of images from another, wherever their folder lies, without reading them.

    ``pictures`` by their names, ``picture_sizes`` by names and bytes, ``picture_times`` by names and times of the last
    change, which a copy of the folder may change as well.
    """
    names = [path.relative_to(root).as_posix().encode("utf-8", "surrogateescape") for path in paths]
    found = [_size_and_time(path) for path in paths]
    sizes = (b"%s %d" % (name, size) for name, (size, _) in zip(names, found, strict=True))
    times = (b"%s %d" % (name, time) for name, (_, time) in zip(names, found, strict=True))
    return {"pictures": _digest(names), "picture_sizes": _digest(sizes), "picture_times": _digest(times)}


def _size_and_time(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:
        # Reading it will say so.
        return -1, -1
    return status.st_size, status.st_mtime_ns


def _digest(lines: Iterable[bytes]) -> str:
    return hashlib.sha256(b"\n".join(lines)).hexdigest()[:16]


def weights_digest(backbone: FrozenViT) -> str:
    """Tells one backbone's weights from another's by the first and the last ones that its features depend on."""
    block = backbone.model.blocks[backbone.layer]
    digest = hashlib.sha256()
    for weight in (backbone.model.patch_embed.proj.weight, *block.norm1.parameters(), *block.attn.parameters()):
        digest.update(weight.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def remove(folder: Path, files: Iterable[str]) -> None:
    """What an earlier run has left in ``folder``, its trainer's ``files`` and the rest."""
    for name in (STATE_FILE, *files, UNREADABLE_FILE):
        (folder / name).unlink(missing_ok=True)


def _random_state() -> dict[str, Any]:
    name, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def _restore_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(numpy_state(state["numpy"]))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
