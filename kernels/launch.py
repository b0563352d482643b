"""What every launcher needs: the tensor's device made current, and how float32 products are rounded."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def device_guard(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's GPU the current one: Triton launches on the current device's current stream."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability, by which tiles are chosen."""
    # Tensors on the CPU come here in Triton's interpreter alone, where any tile runs.
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def tf32_allowed() -> bool:
    """Whether float32 convolutions may round their operands to TF32: PyTorch's own setting, by default yes."""
    # The older switch, allow_tf32, sets this too; anything but "tf32" asks for full precision.
    return bool(torch.backends.cudnn.conv.fp32_precision == "tf32")


def product_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of a kernel's products; three TF32 products where full float32 is asked for."""
    return "tf32" if dtype != torch.float32 or tf32_allowed() else "tf32x3"
