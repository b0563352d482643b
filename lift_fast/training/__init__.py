"""Train a LiFT for a frozen backbone from a folder of images, without labels.

``lift-fast train`` runs :func:`train` with :class:`TrainingSettings`; :func:`split` chooses the held out images.
Importing this package imports neither PyTorch nor timm.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

# Not lazily: a later first import of the submodule of the same name would hide the function.
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


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
