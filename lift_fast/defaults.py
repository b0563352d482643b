"""PyTorch's global defaults (dtype, device) set aside while the package makes networks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch


@contextmanager
def plain_defaults() -> Iterator[None]:
    """Float32 on the CPU wherever code names no dtype and no device, whatever the program has set.

    For code of other libraries and of modules; tensors of our own name both.
    """
    dtype = torch.get_default_dtype()
    # A device as context sees every call, so only where there is something to set aside.
    device = nullcontext() if _is_cpu() else torch.device("cpu")
    if dtype != torch.float32:
        torch.set_default_dtype(torch.float32)
    try:
        with device:
            yield
    finally:
        if dtype != torch.float32:
            torch.set_default_dtype(dtype)


def _is_cpu() -> bool:
    try:
        return torch.get_default_device().type == "cpu"
    except (RuntimeError, AssertionError):
        # Asked for the default, PyTorch makes a tensor there, and without a GPU there is no "cuda" to make it on.
        return False
