"""Reset PyTorch's global defaults (dtype, device) while the package builds networks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch


@contextmanager
def plain_defaults() -> Iterator[None]:
    """Make float32 and the CPU the defaults inside the context, for code of other libraries and modules."""
    dtype = torch.get_default_dtype()
    # A device context intercepts every call, so only use it if the default is another one.
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
        # PyTorch allocates a tensor to find the default device, which fails for "cuda" without a GPU.
        return False
