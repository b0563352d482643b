"""Train a LiFT for a frozen backbone, without labels: a folder of images is all it needs.

:func:`train` with :class:`TrainingSettings` is what ``lift-fast train`` runs; :func:`split` says which images are
held out. Importing this package imports neither PyTorch nor timm.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

# At once: a first import of the submodule of the same name, by another one, would hide the function.
from .split import split

if TYPE_CHECKING:
    from .lift import train
    from .loop import Interrupted
    from .settings import TrainingSettings
    from .state import NotSaved

__all__ = ["Interrupted", "NotSaved", "TrainingSettings", "split", "train"]

_HOME = {"Interrupted": ".loop", "NotSaved": ".state", "TrainingSettings": ".settings", "train": ".lift"}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(_HOME[name], __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
