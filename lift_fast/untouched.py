"""Whether a module computes what its class defines, so that equivalent arithmetic may replace a call of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.nn.modules import module as _registry
from torch.utils.module_tracker import ModuleTracker

# PyTorch's own dictionaries of the hooks that run in every module's call.
_EVERYWHERE: tuple[dict[int, Any], ...] = (
    _registry._global_forward_hooks,
    _registry._global_forward_pre_hooks,
    _registry._global_backward_hooks,
    _registry._global_backward_pre_hooks,
)


def is_untouched(*modules: Any) -> bool:
    """Whether a call of any of ``modules`` runs only ``forward`` of its class: no ``forward`` of the instance, no hooks
    or pre-hooks, its own or global."""
    for module in modules:
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or "forward" in module.__dict__
        ):
            return False
    return all(_only_watches(hook) for hooks in _EVERYWHERE for hook in hooks.values())


def _only_watches(hook: Any) -> bool:
    """Whether this hook only names the module for PyTorch's operation counters, which must not change what runs."""
    return isinstance(getattr(hook, "__self__", None), ModuleTracker)


def is_original(module: nn.Module) -> bool:
    """Whether ``forward`` of the module's class is timm's own, or that of this package's twin of it."""
    return type(module).forward.__module__.startswith(("timm.", "lift_fast.backbones.network"))


class Unchanged:
    """A record of modules that detects later edits and hooks, except backward hooks.

    Checking it costs a fifth of inspecting the modules: :class:`lift_fast.LiFT` and the backbones check it before each
    forward pass.

    Args:
        roots: the modules, with all their submodules.
        settings: (reader, dictionaries): the values that the reader takes from the modules' dictionaries must not
            change.
    """

    def __init__(self, roots: list[Any], settings: Sequence[tuple[Callable[[Any], Any], list[Any]]]) -> None:
        modules = [module for root in roots if root is not None for module in root.modules()]
        self._roots = roots
        self._children = [module._modules for module in modules if module._modules]
        self._members = self._now()
        self._modules = modules
        self._types = [type(module) for module in modules]
        self._classes = list(dict.fromkeys(self._types))
        self._forwards = [kind.forward for kind in self._classes]
        self._attributes = [module.__dict__ for module in modules]
        # A ``forward`` set on an instance adds an entry.
        self._sizes = [len(entries) for entries in self._attributes]
        hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._hooks: list[dict[int, Any]] = [*hooks, *_EVERYWHERE]
        self._settings = [(read, entries, [*map(read, entries)]) for read, entries in settings]

    def _now(self) -> list[tuple[Any, ...]]:
        return [*map(tuple, map(dict.values, self._children))]

    def still(self, roots: list[Any]) -> bool:
        """Whether ``roots`` are the same modules, neither edited nor hooked since."""
        if not (
            roots == self._roots
            and not any(self._hooks)
            and self._now() == self._members
            and [*map(type, self._modules)] == self._types
            and [*map(len, self._attributes)] == self._sizes
            and [kind.forward for kind in self._classes] == self._forwards
        ):
            return False
        # A loop: each element of a generator costs as much as a call.
        for read, entries, values in self._settings:
            try:
                if [*map(read, entries)] != values:
                    return False
            except KeyError:
                return False
        return True
