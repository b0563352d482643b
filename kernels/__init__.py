"""Triton kernels, installed as ``lift_fast.kernels``: one file per operator, kernels first, then their launcher."""

from __future__ import annotations

import torch


def can_run() -> tuple[bool, str]:
    """Whether Triton kernels can run here, and the reason if they cannot. May initialise CUDA."""
    try:
        import triton
    except ImportError as error:
        return False, f"Triton cannot be imported: {error}"
    if not torch.cuda.is_available():
        return False, f"Triton {triton.__version__} is installed, but PyTorch sees no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return False, f"needs compute capability 8.0 or later, the device has {capability[0]}.{capability[1]}"
    return True, f"Triton {triton.__version__}"
