"""Which engine computes a frozen backbone: the wish, what stands against it, and what was taken."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ...precision import autocasts
from . import compiled, openvino
from .errors import EngineError
from .graph import Network, parts_of

ENGINES = ("auto", "torch", "openvino", "compile")
# Below, the conversion takes longer than most uses would gain; above, it keeps the first image waiting for long.
_WORTHWHILE = (1_000_000, 120_000_000)
# How often "auto" compiles changed weights anew.
_MOST_REBUILDS = 2


class Engine:
    """Computes a :class:`FrozenViT` by the engine that was wished for, or leaves it to PyTorch.

    Copies and pickles keep the wish only.

    Attributes:
        wish: ``"auto"``, ``"torch"``, ``"openvino"`` or ``"compile"``.
        used: what computed the last call; None before the first.
        reason: why.
    """

    def __init__(self, wish: str) -> None:
        self.wish = wish
        self.used: str | None = None
        self.reason = "no call yet"
        self._lock = threading.Lock()
        self.forget()

    def forget(self) -> None:
        """Drop what was compiled, for example after the backbone has moved."""
        self._network: Network | None = None
        self._built: Any = None
        self._refused: str | None = None
        self._rebuilds = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return Engine, (self.wish,)

    def require(self, vit: Any) -> None:
        """Check that an engine that was wished for by name can run.

        Raises:
            EngineError: with the reason, if this machine or this network cannot.
        """
        if self.wish in ("auto", "torch"):
            return
        # The weights may be on their way to a GPU, where other compilers count.
        moves = self.wish == "compile" and vit.device.type == "cpu" and torch.cuda.is_available()
        reason = (None if moves else self._missing(vit)) or self._look(vit).obstacle
        if reason is not None:
            raise EngineError(f"engine={self.wish!r} cannot run {vit.name}: {reason}; use engine='auto' or 'torch'")

    def __call__(self, vit: Any, imgs: Tensor) -> tuple[Tensor | None, Any]:
        """``[B, h * w, C]`` of checked images, or None: then PyTorch computes, in the native core where one was found.

        The second result is what the native core computes of this backbone, None if it was not asked for or cannot:
        to look at all weights twice would cost more than some calls.

        Raises:
            EngineError: if the engine that was wished for by name turns out not to run.
        """
        if torch.compiler.is_compiling():
            return None, None
        name, reason, native = self._choose(vit, imgs)
        out = None
        if name != "torch":
            out, otherwise = self._run(name, vit, imgs)
            reason = otherwise or reason
        self.used, self.reason = name if out is not None else "torch", reason
        return out, native

    def _choose(self, vit: Any, imgs: Tensor) -> tuple[str, str, Any]:
        """The engine for this call, why, and what the native core computes if it was asked."""
        native = None
        if self.wish == "torch":
            return "torch", "as asked for", native
        reason = _not_plain(vit, imgs)
        if reason is None and self.wish == "auto":
            if vit.device.type == "cpu":
                native = vit.in_native_core()
            reason = _auto_keeps_torch(vit, native is not None, self._built is None)
        reason = reason or self._missing(vit)
        if reason is not None:
            return "torch", reason, native
        name, reason = ("openvino", "the fastest here") if self.wish == "auto" else (self.wish, "as asked for")
        return name, reason, native

    def _missing(self, vit: Any) -> str | None:
        """Why the engine does not run on this machine, or where the backbone is."""
        if self.wish == "compile":
            runs, reason = compiled.installed(vit.device.type)
            return None if runs else reason
        if vit.device.type != "cpu":
            return f"OpenVINO computes on the CPU, the backbone is on {vit.device}"
        if vit.dtype not in openvino.DTYPES:
            return f"OpenVINO computes float32 and bfloat16, the backbone is {vit.dtype}"
        if openvino.forked():
            return "this process was forked, which OpenVINO's threads do not survive"
        runs, reason = openvino.installed()
        return None if runs else reason

    def _look(self, vit: Any) -> Network:
        """The network as it is; what was compiled is dropped if it has changed."""
        known = self._network
        if known is not None and known.same_structure(vit):
            if known.same_weights():
                return known
            self._rebuilds += 1
        self._network, self._built, self._refused = Network(vit), None, None
        return self._network

    def _run(self, name: str, vit: Any, imgs: Tensor) -> tuple[Tensor | None, str | None]:
        with self._lock:
            network = self._look(vit)
            if network.obstacle is not None:
                return None, network.obstacle
            if torch.is_grad_enabled() and network.needs_gradients():
                return None, "weights require gradients"
            if self.wish == "auto" and self._rebuilds > _MOST_REBUILDS:
                return None, "the weights keep changing"
            if self._refused is not None:
                return None, self._refused
            if self._built is None:
                try:
                    self._built = (compiled.Compiled if name == "compile" else openvino.OpenVINO)(vit, network)
                except EngineError as error:
                    if self.wish != "auto":
                        raise
                    self._refused = str(error)
                    return None, self._refused
            built = self._built
        out = built(vit, imgs, parts_of(vit._position(vit.grid(*imgs.shape[2:])))[0])
        return out, "too many kinds of shapes" if out is None else None


def _auto_keeps_torch(vit: Any, native: bool, new: bool) -> str | None:
    """Why "auto" leaves this backbone to PyTorch, or None.

    ``native`` if the native core computes it, ``new`` if nothing has been compiled for it yet.
    """
    if vit.device.type != "cpu":
        return f"the fastest on {vit.device}"
    if native:
        return "the fastest for this network, in the native core"
    low, high = _WORTHWHILE
    if new and not low <= sum(weight.numel() for weight in vit.model.parameters()) <= high:
        return f"a conversion is only worthwhile from {low:,} to {high:,} weights"
    return None


def _not_plain(vit: Any, imgs: Tensor) -> str | None:
    """Why this call needs PyTorch's own operations, or None."""
    if type(imgs) is not Tensor:
        return f"the images are a {type(imgs).__name__}"
    if autocasts(imgs.device.type) or imgs.dtype != vit.dtype:
        return "autocast is on"
    if imgs.requires_grad and torch.is_grad_enabled():
        return "the images require gradients"
    if torch.jit.is_tracing():
        return "the call is traced"
    if is_in_torch_dispatch_mode() or torch._C._functorch.peek_interpreter_stack() is not None:
        return "a mode of PyTorch watches or changes every operation"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode gradients are on"
    return None
