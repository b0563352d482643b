"""Registers the operators ``torch.ops.lift_fast`` together with PyTorch, which the package does not import itself.

A program that only runs a saved graph (``torch.export``, ``torch.jit``) needs no name of the package: ``import
lift_fast`` is enough for it, before or after ``import torch``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType

_MODULES = ("cosine_loss.op", "dense_match.op", "lift_forward.op", "nearest.op", "propagate_labels")


def register_with_torch() -> None:
    """Register the operators now if PyTorch is imported, else at the end of its import."""
    if sys.modules.get("torch") is None:
        sys.meta_path.insert(0, _Watch())
    else:
        _register()


def _register() -> None:
    for name in _MODULES:
        import_module(f"lift_fast.ops.{name}")


class _Watch:
    """A finder that adds :func:`_register` to the import of PyTorch."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "torch":
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next((spec for finder in others if (spec := finder.find_spec(name, path, target)) is not None), None)
        loader = spec.loader if spec is not None else None
        if loader is not None:
            execute = loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                with suppress(ValueError):
                    sys.meta_path.remove(self)
                # An error here is not PyTorch's; the first use of the package shows it.
                with suppress(Exception):
                    _register()

            loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
