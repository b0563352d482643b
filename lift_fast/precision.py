"""Which dtypes a device computes natively, what ``dtype="auto"`` means there, and autocast on any device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Of networks and their descriptors."""
_AMPERE = (8, 0)


def resolve_dtype(wish: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    """The dtype of networks on ``device``: ``wish``, a dtype or its name (``"bfloat16"``), or float32 for None.

    ``"auto"`` is bfloat16 where the processor multiplies it: CPUs with AVX512-BF16 or AMX, and CUDA devices of compute
    capability 8.0 or later. It is float32 elsewhere.

    Raises:
        ValueError: for another dtype or word.
    """
    if wish is None:
        return torch.float32
    if isinstance(wish, str) and wish == "auto":
        return torch.bfloat16 if _computes_bfloat16(device) else torch.float32
    named = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
    found = named.get(wish) if isinstance(wish, str) else wish
    if not isinstance(found, torch.dtype) or found not in DTYPES:
        words = ", ".join(f'"{name}"' for name in (*named, "auto"))
        raise ValueError(f"dtype must be {', '.join(map(str, DTYPES))}, {words} or None, got {wish!r}")
    return found


def _computes_bfloat16(device: torch.device) -> bool:
    if device.type == "cpu":
        return cpu_computes(torch.bfloat16)
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _AMPERE:
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported()


def cpu_computes(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies ``dtype`` at least as fast as float32.

    It does so for bfloat16 with AVX512-BF16 or AMX. Otherwise PyTorch emulates it, like float16: convolutions then take
    ten times as long as in float32.
    """
    if dtype == torch.bfloat16:
        # Not every release of PyTorch has both.
        names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(bool(known()) for name in names if (known := getattr(torch.cpu, name, None)) is not None)
    return dtype in (torch.float32, torch.float64)


def autocasts(kind: str) -> bool:
    """Whether autocast is on for tensors on this kind of device."""
    # PyTorch raises an error for "meta".
    return kind != "meta" and torch.is_autocast_enabled(kind)


def without_autocast(kind: str) -> AbstractContextManager[object]:
    """A context in which autocast is off for tensors on this kind of device."""
    return nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)
