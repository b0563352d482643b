"""The processes of one run under ``torchrun``; a single process is a world of one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import devices


class World(NamedTuple):
    """Rank of this process and size of the world."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Each process's ``value``, in order of rank, in every process."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the processes."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
            values /= self.size
        return values


def leads() -> bool:
    """Whether this process prints: it is rank 0 or the only one."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def join_world(device: str | None, patience: timedelta | None = None) -> Iterator[World]:
    """The world of ``torchrun``'s environment variables, with a process group inside the context.

    The backend is NCCL for a CUDA ``device``, else gloo. ``patience`` is its timeout; None is PyTorch's, some minutes.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    world = World(int(os.environ["RANK"]), size, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    cuda = devices.resolve(device).type == "cuda"
    if cuda:
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=patience)
    try:
        yield world
    finally:
        dist.destroy_process_group()
