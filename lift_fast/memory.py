"""Where operators and launchers get the memory that kernels write, outputs and scratch alike: one door for all of them.

These are PyTorch's own functions, looked up here at each call (``memory.empty(...)``), which costs nothing.
:func:`lift_fast.testing.poisoned_outputs` puts others in their place, which show what a kernel leaves out and what it
writes outside.
"""

from __future__ import annotations

import torch

empty = torch.empty
empty_like = torch.empty_like
full = torch.full
new_empty = torch.Tensor.new_empty
zeros = torch.zeros


def address(tensor: torch.Tensor) -> int:
    """Where the native core finds the numbers of ``tensor``.

    Raises:
        ValueError: if its memory holds others (negated on reading, sparse) or is no memory of the CPU.
    """
    if tensor.is_neg() or tensor.layout is not torch.strided or tensor.device.type != "cpu":
        raise ValueError(f"the native core reads plain memory, got {tensor.layout} {tensor.dtype} on {tensor.device}")
    return tensor.data_ptr()
