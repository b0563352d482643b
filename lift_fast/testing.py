"""Shared by tests and benchmarks of this package and of code built on it: shapes, weights, errors, guarded memory."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.dlpack import from_dlpack, to_dlpack

from . import memory
from .witnesses import capturing

Module = TypeVar("Module", bound=nn.Module)

# Shapes likely to show bugs: one element, primes, odd, rectangular, vector widths and tile sizes plus and minus one.
AWKWARD_COUNTS = (0, 1, 2, 3, 7, 13, 15, 16, 17, 31, 33, 64, 97, 131)
AWKWARD_GRIDS = ((1, 1), (1, 2), (2, 1), (1, 7), (5, 1), (2, 3), (3, 5), (7, 7), (8, 4), (13, 11))


def randomize(module: Module, seed: int) -> Module:
    """Give every BatchNorm random affine weights and statistics, in place.

    New modules have mean 0, variance 1, scale 1 and shift 0, which would hide a wrong fold.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            with torch.no_grad():
                for tensor, low, high in (
                    (norm.weight, 0.5, 1.5),
                    (norm.bias, -0.5, 0.5),
                    (norm.running_mean, -0.5, 0.5),
                    (norm.running_var, 0.3, 2.0),
                ):
                    if tensor is not None:
                        random = torch.empty(tensor.shape, dtype=torch.float32, device="cpu")
                        random.uniform_(low, high, generator=generator)
                        tensor.copy_(random)
    return module


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected| in the Euclidean norm, computed in float64; infinite if ``actual`` holds NaN."""
    actual, expected = actual.detach().double(), expected.detach().double()
    scale = torch.linalg.vector_norm(expected).clamp_min(torch.finfo(torch.float64).tiny)
    error = float(torch.linalg.vector_norm(actual - expected) / scale)
    return error if error == error else float("inf")


# Bytes before and after each tensor: a multiple of the allocators' alignment, so that a tensor keeps its alignment.
BAND = 512
# The value of each byte: of the bands; of floating point, NaN in every format; of others, a number far from any index.
_GUARD, _NAN, _WRONG = 0xA5, 0xFF, 0x81
# Bytes of unused memory that may wait for their check.
_MOST_KEPT = 1 << 30
_DOORS = {name: getattr(memory, name) for name in ("empty", "empty_like", "full", "new_empty", "zeros")}


class _Guarded(NamedTuple):
    """One tensor between its bands."""

    base: Tensor
    """[BAND + size + BAND] uint8"""
    size: int
    """bytes"""
    what: str
    owner: StorageWeakRef
    """of the memory between the bands; expired when it is no longer used"""

    def overruns(self, bands: Tensor) -> Iterator[str]:
        """One line for each side that was written to, given the ``[2, BAND]`` bytes of both."""
        for side, first, band in (("before its start", -BAND, bands[0]), ("after its end", self.size, bands[1])):
            changed = (band != _GUARD).nonzero().flatten()
            if len(changed):
                at = first + int(changed[0])
                yield f"{self.what}: {len(changed)} bytes written {side}, the first at byte {at} of {self.size}"


class _Guards:
    """All memory allocated within :func:`poisoned_outputs`, held so that freed memory is checked as well."""

    def __init__(self) -> None:
        self.kept: list[_Guarded] = []
        self.found: list[str] = []
        self.bytes = 0

    def door(self, allocate: Callable[..., Tensor], poison: bool) -> Callable[..., Tensor]:
        """``allocate`` with bands around its result; ``poison`` overwrites the contents."""

        def guarded(*args: Any, **kwargs: Any) -> Tensor:
            plain = allocate(*args, **kwargs)
            # Nothing runs on fake tensors, and a captured graph runs only when it is replayed.
            if type(plain) is not Tensor or plain.device.type not in ("cpu", "cuda") or capturing(plain):
                return plain
            caller = sys._getframe(1)
            out = self.place(plain, f"{caller.f_code.co_filename}:{caller.f_lineno}")
            return out if poison else out.copy_(plain)

        return guarded

    def place(self, plain: Tensor, where: str) -> Tensor:
        """A guarded tensor with the dtype, shape and strides of ``plain``."""
        size = plain.untyped_storage().nbytes()
        base = torch.full((BAND + size + BAND,), _GUARD, dtype=torch.uint8, device=plain.device)
        inner = base[BAND : BAND + size].fill_(_NAN if plain.is_floating_point() else _WRONG)
        dtype = str(plain.dtype).removeprefix("torch.")
        # Its own storage, which keeps the base alive: an operator's result is not a view and has storage offset 0.
        own = from_dlpack(to_dlpack(inner)).untyped_storage()
        what = f"{dtype} {list(plain.shape)} allocated at {where}"
        self.kept.append(_Guarded(base, size, what, StorageWeakRef(own)))
        self.bytes += len(base)
        if self.bytes > _MOST_KEPT:
            self.inspect()
        return torch.empty(0, dtype=plain.dtype, device=plain.device).set_(own, 0, plain.shape, plain.stride())

    def inspect(self) -> None:
        """Check all bands, and release memory that is no longer used."""
        for device in {one.base.device for one in self.kept}:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            kept = [one for one in self.kept if one.base.device == device]
            bands = torch.stack([torch.stack([one.base[:BAND], one.base[-BAND:]]) for one in kept]).cpu()
            if bool((bands != _GUARD).any()):
                lines = [line for one, both in zip(kept, bands, strict=True) for line in one.overruns(both)]
                self.found += [line for line in lines if line not in self.found]
        self.kept = [one for one in self.kept if not one.owner.expired()]
        self.bytes = sum(len(one.base) for one in self.kept)


@contextmanager
def poisoned_outputs() -> Iterator[None]:
    """Detect elements that kernels leave unwritten, and writes out of bounds.

    Within it, memory of :mod:`lift_fast.memory` is filled with NaN (integers and booleans: bytes 0x81, see
    :func:`unwritten`) and lies between guard bands of ``BAND`` bytes. At the end the bands of every such tensor are
    checked, also of those no longer used. Nothing is guarded while a CUDA graph is captured.

    Raises:
        AssertionError: if a band was written to; names the allocation, the side and the byte.
    """
    guards, before = _Guards(), {name: getattr(memory, name) for name in _DOORS}
    for name, allocate in _DOORS.items():
        setattr(memory, name, guards.door(allocate, poison="empty" in name))
    try:
        yield
    finally:
        for name, allocate in before.items():
            setattr(memory, name, allocate)
    guards.inspect()
    if guards.found:
        raise AssertionError("memory was overrun:\n" + "\n".join(guards.found))


def unwritten(tensor: Tensor) -> Tensor:
    """Which elements still hold the fill value of :func:`poisoned_outputs`: bool, in the shape of ``tensor``."""
    poison = _NAN if tensor.is_floating_point() else _WRONG
    # Viewed before any copy, which would turn a boolean into 0 or 1.
    plain = tensor.detach().view(torch.uint8) if tensor.dtype == torch.bool else tensor.detach()
    rows = plain.contiguous().flatten().view(torch.uint8).view(tensor.numel(), tensor.element_size())
    return (rows == poison).all(1).view(tensor.shape)
