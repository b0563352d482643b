"""Reads every environment variable of run time; setup.py reads those of build time."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

_CPU_ISAS = ("auto", "avx512", "avx2", "baseline")
# Every variable and its effect, for ``lift-fast info`` and the documentation.
VARIABLES = {
    "LIFT_FAST_DISABLE_NATIVE": "1: run without the native core, as if it were not installed",
    "LIFT_FAST_DISABLE_TRITON": "1: run without the Triton kernels, on PyTorch's own convolutions",
    "LIFT_FAST_DISABLE_CUDA": "1: run without the native core's CUDA kernels, on the Triton ones",
    "LIFT_FAST_DISABLE_DIRECT_LAUNCH": "1: every Triton kernel through Triton's own launcher; read at its first launch",
    "LIFT_FAST_DISABLE_OPENVINO": "1: run without OpenVINO, as if it were not installed",
    "LIFT_FAST_CACHE": "folder for tiles and compiled backbones; by default lift_fast in XDG_CACHE_HOME or ~/.cache",
    "LIFT_FAST_ENGINE_CACHE": "most MiB of compiled backbones in that folder (2048); 0: keep none",
    "LIFT_FAST_CPU_ISA": f"instruction set of the native core on the CPU: {', '.join(_CPU_ISAS)}",
}


_SWITCHES = tuple(name for name in VARIABLES if name.startswith("LIFT_FAST_DISABLE_"))
_ENCODED = frozenset(map(os.environ.encodekey, _SWITCHES))


def switches() -> tuple[str, ...]:
    """The values of the switches, to be compared; () if none is set."""
    # os.environ takes 0.8 us for each variable that is not set, its dictionary 0.1 us for all.
    known = getattr(os.environ, "_data", None)
    if known is not None and _ENCODED.isdisjoint(known):
        return ()
    return tuple(os.environ.get(name, "") for name in _SWITCHES)


def _choice(name: str, allowed: tuple[str, ...]) -> str:
    value = os.environ.get(name, "") or allowed[0]
    if value not in allowed:
        raise ValueError(f"environment variable {name} must be one of {', '.join(allowed)}, got {value!r}")
    return value


def _on(name: str) -> bool:
    """Whether a switch is on; ValueError for another value than 0 or 1."""
    return _choice(name, ("0", "1")) == "1"


native_disabled = partial(_on, "LIFT_FAST_DISABLE_NATIVE")
triton_disabled = partial(_on, "LIFT_FAST_DISABLE_TRITON")
cuda_disabled = partial(_on, "LIFT_FAST_DISABLE_CUDA")
openvino_disabled = partial(_on, "LIFT_FAST_DISABLE_OPENVINO")
direct_launch_disabled = partial(_on, "LIFT_FAST_DISABLE_DIRECT_LAUNCH")


def cache_folder() -> Path:
    """LIFT_FAST_CACHE, or lift_fast in the user's cache folder; it may not exist yet."""
    given = os.environ.get("LIFT_FAST_CACHE", "")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lift_fast"


def engine_cache_bytes() -> int:
    """LIFT_FAST_ENGINE_CACHE in bytes; ValueError unless it is a whole number of at most 15 digits."""
    value = os.environ.get("LIFT_FAST_ENGINE_CACHE", "") or "2048"
    if not (value.isascii() and value.isdecimal() and len(value) <= 15):
        raise ValueError(f"environment variable LIFT_FAST_ENGINE_CACHE must be a whole number of MiB, got {value!r}")
    return int(value) << 20


def compiler() -> str:
    """The C++ compiler that ``torch.compile`` calls: CXX, or the system's usual one."""
    usual = {"win32": "cl", "darwin": "clang++"}.get(sys.platform, "g++")
    return os.environ.get("CXX") or usual


def check() -> None:
    """Check every variable, also those that nothing would read; ValueError for an unknown value."""
    for name in _SWITCHES:
        _on(name)
    engine_cache_bytes()
    cpu_isa()


def cpu_isa() -> str:
    """LIFT_FAST_CPU_ISA: auto, avx512, avx2 or baseline; ValueError for any other value."""
    return _choice("LIFT_FAST_CPU_ISA", _CPU_ISAS)
