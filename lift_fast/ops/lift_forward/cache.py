"""One plan per set of weights, looked up by the weights themselves and dropped when one of them changes.

The plan lives here and not in the module, so the operator is a pure function of its inputs: compiled and exported
graphs see the raw weights, and modules can be moved, copied and pickled as usual.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...witnesses import Witnesses
from .plan import Architecture, Plan, build_plan

_CAPACITY = 32


class _Entry:
    def __init__(self, weights: Sequence[Tensor], epsilons: Sequence[float], architecture: Architecture) -> None:
        self.witnesses = Witnesses(weights)
        self.epsilons = list(epsilons)
        self.architecture = architecture
        self.plan = build_plan(weights, epsilons, architecture)
        self.prepared: dict[Hashable, Any] = {}

    def fits(self, weights: Sequence[Tensor], epsilons: Sequence[float], architecture: Architecture) -> bool:
        return (
            architecture == self.architecture and list(epsilons) == self.epsilons and self.witnesses.recognise(weights)
        )


_entries: OrderedDict[tuple[torch.device, int], _Entry] = OrderedDict()
_lock = threading.Lock()


def _key(weights: Sequence[Tensor]) -> tuple[torch.device, int]:
    # outc.weight identifies its network. The storage's identity, unlike its address, also exists for fake tensors.
    return weights[-2].device, weights[-2].untyped_storage()._cdata


def prepared_plan(
    weights: Sequence[Tensor],
    epsilons: Sequence[float],
    architecture: Architecture,
    basis: bool,
    variant: Hashable,
    prepare: Callable[[Plan], Any],
) -> Any:
    """``prepare(plan)`` of these weights' plan, cached as ``variant`` until a weight changes.

    ``basis`` prepares :meth:`.plan.Plan.in_basis` instead. ValueError if the weights are not valid.
    """
    key = _key(weights)
    entry = _entries.get(key)
    if entry is None or not entry.fits(weights, epsilons, architecture):
        # Tensors made in inference mode cannot be used by every later call outside of it.
        with torch.inference_mode(False), torch.no_grad():
            entry = _Entry(weights, epsilons, architecture)
        with _lock:
            _entries[key] = entry
            _entries.move_to_end(key)
            for old in [name for name, other in _entries.items() if other.witnesses.expired()]:
                del _entries[old]
            while len(_entries) > _CAPACITY:
                _entries.popitem(last=False)
    name = (variant, basis)
    ready = entry.prepared.get(name)
    if ready is None:
        with torch.inference_mode(False), torch.no_grad():
            ready = entry.prepared[name] = prepare(entry.plan.in_basis() if basis else entry.plan)
    return ready


def holder(weights: Sequence[Tensor]) -> object:
    """What keeps the plan of these weights alive, for recorded graphs that read its tensors; None without a plan."""
    return _entries.get(_key(weights)) if weights else None


def clear_plans() -> None:
    """Forget every inference plan; the next forward pass in evaluation mode rebuilds its plan.

    Needed only after weights were changed in ways that PyTorch does not track: through ``.data``, NumPy or a raw
    pointer.
    """
    with _lock:
        _entries.clear()


def forget_plan(weights: Sequence[Tensor]) -> None:
    """Forget the plan of one network."""
    with _lock:
        _entries.pop(_key(weights), None)
