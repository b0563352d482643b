"""Allocates all memory that kernels write, outputs and scratch.

These are PyTorch's own functions, looked up here at each call (``memory.empty(...)``), which costs nothing.
:func:`lift_fast.testing.poisoned_outputs` replaces them to detect elements that a kernel leaves unwritten and writes
out of bounds.
"""

from __future__ import annotations

import torch

empty = torch.empty
empty_like = torch.empty_like
full = torch.full
new_empty = torch.Tensor.new_empty
zeros = torch.zeros
