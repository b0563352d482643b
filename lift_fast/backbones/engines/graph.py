"""A frozen backbone as a plain graph that an engine compiles, and whether it still is what was compiled."""

from __future__ import annotations

import hashlib
import types
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from ...untouched import Unchanged, is_untouched
from ...witnesses import Witnesses

# Whose modules compute what their class says; others may do anything.
_KNOWN = ("torch.nn.modules.", "timm.", "lift_fast.backbones.network")
_SIMPLE = (bool, int, float, str, type(None), torch.dtype)
Position = tuple[Tensor | None, Tensor | None, Tensor | None]


class PlainGraph(nn.Module):
    """:class:`FrozenViT`'s arithmetic with the position embeddings of the grid as inputs, so that it serves every grid.

    Args:
        vit: the backbone, whose modules it calls.
        given: which of class and register tokens, patch positions and rotary embedding the network has.
    """

    def __init__(self, vit: Any, given: tuple[bool, bool, bool]) -> None:
        super().__init__()
        # Its modules are this module's, itself is not: a tracer would follow its properties.
        self._vit: tuple[Any, ...] = (vit,)
        self.model = vit.model
        self._given = given
        self.train(False)

    def forward(self, imgs: Tensor, *parts: Tensor) -> Tensor:
        (vit,) = self._vit
        rest = list(parts)
        position = tuple(rest.pop(0) if there else None for there in self._given)
        out: Tensor = vit._in_torch(imgs, vit.grid(*imgs.shape[2:]), position)
        return out


def parts_of(position: Position) -> tuple[tuple[Tensor, ...], tuple[bool, bool, bool]]:
    """The inputs of :class:`PlainGraph` beside the images, and which they are."""
    prefix, patches, rotary = (part is not None for part in position)
    return tuple(part for part in position if part is not None), (prefix, patches, rotary)


class Network:
    """What an engine compiles of a backbone: modules, settings and weights at this moment.

    Attributes:
        obstacle: why no engine may compile it: hooks, edits, modules of other libraries; None if one may.
    """

    def __init__(self, vit: Any) -> None:
        self._roots, self._constants = _roots(vit), constants_of(vit)
        self._modules = [module for root in self._roots for module in root.modules()]
        self.obstacle = _obstacle(vit, self._modules)
        settings: dict[tuple[str, ...], list[Any]] = {}
        for module in self._modules:
            settings.setdefault(_settings(module), []).append(module.__dict__)
        self._settings = [(names, dictionaries) for names, dictionaries in settings.items() if names]
        self._structure = Unchanged(self._roots, [(itemgetter(*names), entries) for names, entries in self._settings])
        self._held = [held for m in self._modules for held in (m._parameters, m._buffers) if held]
        self._weights = Witnesses(self.weights())

    def weights(self) -> list[Tensor]:
        """Every parameter and buffer, as they are now."""
        return [tensor for held in self._held for tensor in held.values() if tensor is not None]

    def same_structure(self, vit: Any) -> bool:
        """Whether no module of the backbone was edited, hooked or exchanged."""
        return constants_of(vit) == self._constants and self._structure.still(_roots(vit))

    def same_weights(self) -> bool:
        """Whether no weight has changed."""
        return self._weights.recognise(self.weights())

    def needs_gradients(self) -> bool:
        """Whether somebody wants gradients of the weights."""
        return any(weight.requires_grad for weight in self.weights())

    def fingerprint(self, *extra: object) -> str | None:
        """A hash of modules, settings and weights; None if a setting has no text that says all of it."""
        digest = hashlib.sha256(repr((self._constants, *extra)).encode())
        for module in self._modules:
            kind = type(module)
            digest.update(f"\n{kind.__module__}.{kind.__qualname__} {[*module._modules]}".encode())
            for name in _settings(module):
                value = _text(module.__dict__[name])
                if value is None:
                    return None
                digest.update(f" {name}={value}".encode())
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    if tensor is not None:
                        digest.update(f" {name} {tensor.dtype} {[*tensor.shape]}".encode())
                        plain = tensor.detach().contiguous().reshape(-1)
                        digest.update(memoryview(plain.view(torch.uint8).numpy()))
        return digest.hexdigest()


def constants_of(vit: Any) -> tuple[object, ...]:
    """What of the backbone's own settings goes into its graph."""
    model = vit.model
    mixed = getattr(model, "rope_mixed", False)
    return vit.facet, vit.layer, vit.stride, vit.head_order, model.num_prefix_tokens, mixed


def _roots(vit: Any) -> list[Any]:
    model = vit.model
    last = [model.norm] if vit.facet == "final" else []
    return [model.patch_embed, model.pos_drop, model.norm_pre, *model.blocks[: vit.layer + 1], *last]


def _obstacle(vit: Any, modules: list[Any]) -> str | None:
    names = {id(module): name for name, module in vit.model.named_modules()}
    for module in modules:
        kind, name = type(module), names.get(id(module), "")
        if not all(origin.startswith(_KNOWN) for origin in (kind.__module__, kind.forward.__module__)):
            return f"{name} is a {kind.__name__} of {kind.__module__}, which no engine knows"
        if not is_untouched(module):
            return f"{name} has hooks or a forward of its own"
        if module.training:
            return f"{name} is in training mode"
        if any(isinstance(value, Tensor) for value in module.__dict__.values()):
            return f"{name} holds tensors that are neither parameters nor buffers"
    return None


def _settings(module: nn.Module) -> tuple[str, ...]:
    """The module's own attributes, without PyTorch's dictionaries."""
    return tuple(name for name, value in module.__dict__.items() if not (name[0] == "_" and isinstance(value, dict)))


def _text(value: object) -> str | None:
    if isinstance(value, _SIMPLE):
        return repr(value)
    if isinstance(value, (tuple, list, torch.Size)):
        parts = [_text(part) for part in value]
        return None if None in parts else f"[{','.join(map(str, parts))}]"
    if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, (set, frozenset)):
        return _text(sorted(value, key=repr))
    return None
