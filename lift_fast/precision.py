"""Which dtypes the CPU computes natively, and autocast on any device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def cpu_computes(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies ``dtype`` at least as fast as float32.

    It does so for bfloat16 with AVX512-BF16. Otherwise PyTorch emulates it, like float16: convolutions then take ten
    times as long as in float32.
    """
    if dtype == torch.bfloat16:
        known = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
        return known is not None and bool(known())
    return dtype in (torch.float32, torch.float64)


def autocasts(kind: str) -> bool:
    """Whether autocast is on for tensors on this kind of device."""
    # PyTorch raises an error for "meta".
    return kind != "meta" and torch.is_autocast_enabled(kind)


def without_autocast(kind: str) -> AbstractContextManager[object]:
    """A context in which autocast is off for tensors on this kind of device."""
    return nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)
