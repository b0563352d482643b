"""Training state on disk, from which a run resumes as if it had never stopped."""

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
    """A file of the run could not be written, for example on a full disk; files saved earlier stay valid."""


@contextmanager
def writing(folder: Path, step: int) -> Iterator[None]:
    """Turn an OSError inside the context, which writes to ``folder``, into :class:`NotSaved`."""
    try:
        yield
    except OSError as error:
        raise NotSaved(
            f"cannot write to {folder} at step {step}: {error.strerror or error}. The files saved there earlier are "
            "valid; fix the problem and resume"
        ) from error


@dataclass
class Progress:
    """Progress of a run."""

    epoch: int = 0
    """Finished epochs."""
    batch: int = 0
    """Finished batches of the current epoch."""
    step: int = 0
    """Optimiser steps in total."""
    losses: list[float] = field(default_factory=list)
    """Mean loss of each finished epoch."""
    epoch_sum: float = 0.0
    """Sum of the losses of the current epoch."""
    unreadable: dict[str, int] = field(default_factory=dict)
    """Error of each unreadable file, and how often it occurred."""


def save(trainer: Trainer, progress: Progress) -> None:
    """Write the trainer's own files, ``last.pth`` and, if there are any errors, ``unreadable.txt``, each atomically.

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
    # Last, so that the weights belong to the state wherever the run may be killed.
    content = io.BytesIO()
    torch.save(state, content)
    with atomic_path(folder / STATE_FILE) as temporary:
        # PyTorch's own writer hides the system's error behind an assertion.
        temporary.write_bytes(content.getbuffer())


def load(folder: Path, part: str) -> dict[str, Any] | None:
    """What :func:`save` wrote to ``folder``, with the network in its entry ``part``; None if there is nothing.

    Raises:
        ValueError: for a file that is not a training state or has missing parts.
    """
    path = folder / STATE_FILE
    if not path.exists():
        return None
    content = read_tensor_file(path)
    check_parts(content, path, part)
    return content


def restore(state: dict[str, Any], optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> Progress:
    """Restore a state that :func:`lift_fast.training.schema.check_state` has validated, without the network."""
    # Keep the run's own options, which are those of the saved run.
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": groups})
    # A disabled scaler has an empty state and does not load it.
    if state["scaler"]:
        scaler.load_state_dict(state["scaler"])
    _restore_random_state(state["random"])
    return Progress(**state["progress"])


def image_digests(paths: Sequence[Path], root: Path) -> dict[str, str]:
    """Digests that identify a list of images without reading them, independent of the location of ``root``.

    ``pictures`` from their names, ``picture_sizes`` from names and bytes, ``picture_times`` from names and modification
    times, which copying the folder may change.
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
        # Reading the file reports the error.
        return -1, -1
    return status.st_size, status.st_mtime_ns


def _digest(lines: Iterable[bytes]) -> str:
    return hashlib.sha256(b"\n".join(lines)).hexdigest()[:16]


def weights_digest(backbone: FrozenViT) -> str:
    """Digest of the first and the last weights that the backbone's features depend on."""
    block = backbone.model.blocks[backbone.layer]
    digest = hashlib.sha256()
    for weight in (backbone.model.patch_embed.proj.weight, *block.norm1.parameters(), *block.attn.parameters()):
        digest.update(weight.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def remove(folder: Path, files: Iterable[str]) -> None:
    """Remove an earlier run's files from ``folder``: its trainer's ``files`` and the rest."""
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
