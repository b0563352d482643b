"""PyTorch's defaults as they are at the start, for code that makes tensors without naming dtype and device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def first_defaults() -> Iterator[None]:
    """Default dtype float32 and default device CPU while the context lasts, whatever the caller has set.

    Costs nothing where nothing was set: a default device slows every call of PyTorch's down.
    """
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    try:
        torch.set_default_dtype(torch.float32)
        if device.type == "cpu":
            yield
        else:
            with torch.device("cpu"):
                yield
    finally:
        torch.set_default_dtype(dtype)
