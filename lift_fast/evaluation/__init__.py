"""Evaluation of dense features: methods that are compared, published protocols, results with their provenance.

The protocols are packages below this one; each is imported at its first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PROTOCOLS = ("cka", "cost", "davis", "discovery", "spair", "warp")


def __getattr__(name: str) -> Any:
    if name in _PROTOCOLS:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PROTOCOLS})
