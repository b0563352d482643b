"""The backbone through ``torch.compile``, its weights frozen into the program on the CPU."""

from __future__ import annotations

import logging
import shutil
import threading
import types
from typing import Any

import torch
from torch import Tensor

from ... import _env
from ..._text import said
from ...precision import without_autocast
from .errors import EngineError
from .graph import Network, PlainGraph, parts_of


def installed(kind: str) -> tuple[bool, str]:
    """Whether ``torch.compile`` builds programs for this kind of device, and with which compiler, or why not."""
    if kind == "cuda":
        from ...devices import triton_runs

        return triton_runs()
    if kind != "cpu":
        return False, f"needs a CPU or a CUDA device, got {kind}"
    # PyTorch's own search imports its compiler, which takes seconds.
    name = _env.compiler()
    found = shutil.which(name)
    if found is None and len(name.split()) > 1:
        return False, f"torch.compile takes the name of a program as CXX, without arguments, got {name!r}; set another"
    if found is None:
        return False, f"torch.compile needs a C++ compiler on the CPU, and {name} is not found; install one or set CXX"
    return True, f"torch.compile with {found}"


class Compiled:
    """One backbone as it is now; a program is compiled when the first image of its kind comes."""

    def __init__(self, vit: Any, network: Network) -> None:
        self._lock = threading.Lock()
        _import_cuda_search()
        graph = PlainGraph(vit, parts_of(vit._position((1, 1)))[1])
        self._program = _program(graph, frozen=vit.device.type == "cpu")

    def __call__(self, vit: Any, imgs: Tensor, parts: tuple[Tensor, ...]) -> Tensor | None:
        """As :class:`OpenVINO`'s; None if there are too many programs already and none fits."""
        from torch._dynamo.exc import FailOnRecompileLimitHit

        # One at a time: PyTorch's compiler is not meant for several threads.
        with self._lock, torch.inference_mode(False), torch.no_grad(), without_autocast(imgs.device.type):
            try:
                out: Tensor = self._program(imgs, *parts)
            except FailOnRecompileLimitHit:
                return None
            except Exception as error:
                raise EngineError(f"torch.compile failed for {vit.name}: {said(error)}") from error
        return out


def _import_cuda_search() -> None:
    """Import what PyTorch's compiler imports later; it warns where CUDA is installed on a machine without a GPU."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import torch.utils.cpp_extension  # noqa: F401
    finally:
        logger.setLevel(level)


def _program(graph: PlainGraph, frozen: bool) -> Any:
    def run(*inputs: Tensor) -> Tensor:
        out: Tensor = graph(*inputs)
        return out

    # PyTorch counts programs by code, and all backbones would share this function's.
    own = types.FunctionType(run.__code__.replace(), run.__globals__, "run", None, run.__closure__)
    return torch.compile(own, fullgraph=True, dynamic=True, options={"freezing": frozen})
