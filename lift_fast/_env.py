"""The one place where environment variables are read at run time. Build-time variables: see setup.py."""

from __future__ import annotations

import os

_CPU_ISAS = ("auto", "avx512", "avx2", "baseline")
# Every variable with what it does, for ``lift-fast info`` and the documentation.
VARIABLES = {
    "LIFT_FAST_DISABLE_NATIVE": "1: run without the native core, as if it were not installed",
    "LIFT_FAST_CPU_ISA": f"instruction set of the native core on the CPU: {', '.join(_CPU_ISAS)}",
}


def _choice(name: str, allowed: tuple[str, ...]) -> str:
    value = os.environ.get(name, "") or allowed[0]
    if value not in allowed:
        raise ValueError(f"environment variable {name} must be one of {', '.join(allowed)}, got {value!r}")
    return value


def native_disabled() -> bool:
    """LIFT_FAST_DISABLE_NATIVE.

    Raises:
        ValueError: for another value than 0 or 1.
    """
    return _choice("LIFT_FAST_DISABLE_NATIVE", ("0", "1")) == "1"


def cpu_isa() -> str:
    """LIFT_FAST_CPU_ISA: auto, avx512, avx2 or baseline.

    Raises:
        ValueError: for any other value.
    """
    return _choice("LIFT_FAST_CPU_ISA", _CPU_ISAS)
