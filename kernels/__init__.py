"""Triton kernels, installed as ``lift_fast.kernels``: one file per operator, kernels first, then their launcher."""

from __future__ import annotations

from functools import cache

import torch

from .. import _env


def can_run(device: torch.device | None = None) -> tuple[bool, str]:
    """Whether Triton kernels can run on a CUDA device (the current one), and the reason if not. May initialise CUDA."""
    if _env.triton_disabled():
        return False, "switched off by LIFT_FAST_DISABLE_TRITON=1"
    # The switch may change at any time, a device does not.
    return _probe(device) if device is not None and device.index is not None else _probe.__wrapped__(device)


@cache
def _probe(device: torch.device | None) -> tuple[bool, str]:
    try:
        import triton
    except ImportError as error:
        return False, f"Triton cannot be imported: {error}"
    if not torch.cuda.is_available():
        return False, f"Triton {triton.__version__} is installed, but PyTorch sees no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return False, f"needs compute capability 8.0 or later, the device has {capability[0]}.{capability[1]}"
    return True, f"Triton {triton.__version__}"
