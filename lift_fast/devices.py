"""What can run on which device, and the reason if it cannot; every automatic choice is made with these functions.

Environment switches may change at any time and are read at each call; each device is queried once.
"""

from __future__ import annotations

from functools import cache

import torch

from . import _env, _native

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class DeviceError(ValueError, RuntimeError):
    """The requested device does not exist on this machine."""


def resolve(wish: str | torch.device | None, local_rank: int | None = None) -> torch.device:
    """The device to compute on: ``wish``, or for None a GPU if there is one, else the CPU.

    Args:
        wish: such as ``"cpu"``, ``"cuda"`` or ``"cuda:1"``.
        local_rank: index of this process on its machine, and of the GPU that ``"cuda"`` means. None leaves ``"cuda"``
            without index: PyTorch's current device.

    Raises:
        ValueError: for an unknown device; DeviceError for one that this machine lacks.
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if wish is None else wish)
        if device.type not in ("cpu", "cuda", "meta"):
            # PyTorch accepts names of devices that this machine lacks.
            torch.zeros(1, device=device)
    except (TypeError, RuntimeError, AssertionError, ImportError):
        raise ValueError(
            f"device {wish!r} does not exist: device must be cpu, cuda, cuda:1, ... or None for what is available"
        ) from None
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise DeviceError(
            f"device={str(device)!r} was requested, but PyTorch sees no CUDA device; pass device='cpu', or device=None "
            "for what is available"
        )
    if device.index is None and local_rank is not None:
        device = torch.device("cuda", local_rank)
    if (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(
            f"device={str(device)!r} was requested, but PyTorch sees {torch.cuda.device_count()} CUDA devices, "
            "starting at cuda:0"
        )
    return device


def native_runs() -> tuple[bool, str]:
    """Whether the native core supports tensors on the CPU, and the reason if not."""
    return _native.can_run()


def kernels_run(device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether the Triton kernels support tensors of ``dtype`` on ``device``, and the reason if not."""
    if device.type != "cuda":
        return False, f"the tensors are on {device}, not on a CUDA device"
    if dtype not in KERNEL_DTYPES:
        return False, f"the kernels compute in {', '.join(map(str, KERNEL_DTYPES))}, not in {dtype}"
    return triton_runs(device)


def triton_runs(device: torch.device | None = None) -> tuple[bool, str]:
    """Whether Triton kernels run on a CUDA device (the current one), and the reason if not. May initialise CUDA."""
    if _env.triton_disabled():
        return False, "switched off by LIFT_FAST_DISABLE_TRITON=1"
    # Only a device with an index is always the same one.
    indexed = device is not None and device.index is not None
    return _probe_triton(device) if indexed else _probe_triton.__wrapped__(device)


@cache
def _probe_triton(device: torch.device | None) -> tuple[bool, str]:
    # Imported only here: Triton is optional and slow to load.
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


def cuda_runs(device: torch.device) -> tuple[bool, str]:
    """Whether the native core's CUDA kernels run on a device, and the reason if not. Initialises CUDA."""
    if _env.cuda_disabled():
        return False, "switched off by LIFT_FAST_DISABLE_CUDA=1"
    runs, reason = native_runs()
    if not runs:
        return False, reason
    if device.type != "cuda":
        return False, f"needs a CUDA device, got {device}"
    return _probe_core(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _probe_core(index: int) -> tuple[bool, str]:
    works, reason = _native.require().cuda_probe(index)
    return works, reason
