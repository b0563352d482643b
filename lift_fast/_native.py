"""Loads the native core ``lift_fast._C``; keeps the reason when it cannot be loaded."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType

import torch  # first, so that the core shares PyTorch's OpenMP runtime instead of loading another
from torch import Tensor

from . import _env

# csrc/bindings/module.cpp has the same number; a change of what the core takes raises both.
INTERFACE = 4


@cache
def _load() -> tuple[ModuleType | None, str]:
    try:
        module = import_module("lift_fast._C")
    except ImportError as error:
        return None, f"lift_fast._C cannot be imported: {error}"
    return _checked(module)


def _checked(module: ModuleType) -> tuple[ModuleType | None, str]:
    # The core reads and writes at the addresses that it gets, in the order that its own release gives them.
    found = getattr(module, "interface", 1)
    if found == INTERFACE:
        return module, ""
    return None, (
        f"{module.__file__} was built from another version of lift_fast (interface {found}, expected {INTERFACE}); "
        "build it again: pip install -e ."
    )


def load() -> ModuleType | None:
    """The native core, or None if it cannot be used; :func:`can_run` gives the reason."""
    return None if _env.native_disabled() else _load()[0]


def can_run() -> tuple[bool, str]:
    """Whether the native core can be used, and the reason if not."""
    if _env.native_disabled():
        return False, "switched off by LIFT_FAST_DISABLE_NATIVE=1"
    module, reason = _load()
    return module is not None, reason


def require() -> ModuleType:
    """The native core; RuntimeError with the reason if it cannot be used."""
    module = load()
    if module is None:
        raise RuntimeError(f"this needs the native core: {can_run()[1]}; reinstall lift_fast with a C++ compiler")
    return module


def address(tensor: Tensor) -> int:
    """The address of ``tensor``'s values; ValueError if it is lazily negated, sparse, or not on the CPU."""
    if tensor.is_neg() or tensor.layout is not torch.strided or tensor.device.type != "cpu":
        raise ValueError(
            f"the native core needs a plain dense CPU tensor, got {tensor.layout} {tensor.dtype} on {tensor.device}"
        )
    return tensor.data_ptr()
