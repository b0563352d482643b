"""LiFT's plan on the GPU for input sizes seen before: three launches, two allocations and little else.

:func:`lift_fast.ops.lift_forward.gpu.run_gpu_plan` looks up tiles, creates five tensors and binds forty arguments; at
batch 1 that takes the host longer than the kernels take on the device. Between calls only the addresses of the inputs,
of the intermediate memory and of the result change, so a recorded pass fills in only those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import memory
from ...kernels import launch

# The addresses that change, in this order: imgs, x, f, g, u and the result.
_IMGS, _X, _F, _G, _U, _OUT = range(6)
# The alignment of PyTorch's allocator in bytes, kept for the parts of one allocation.
_ALIGNMENT = 512


class _Launch(NamedTuple):
    """One kernel's launch without the addresses."""

    run: Callable[..., Any]
    grid: tuple[int, ...]
    rest: tuple[Any, ...]
    nested: bool
    arguments: list[Any]
    places: tuple[tuple[int, int], ...]
    """(position among the arguments, number of the address)"""
    held: launch.Ready


class Pass:
    """One forward pass of a plan with inputs of given sizes, strides and alignment."""

    def __init__(
        self,
        device: int,
        encode: Callable[..., None] | None,
        launches: Sequence[_Launch],
        sizes: dict[int, int],
        shape: torch.Size,
    ) -> None:
        self._device, self._encode, self._launches, self._shape = device, encode, launches, shape
        # f, g and u share one allocation of elements of the inputs' dtype.
        offsets, size = [0, 0, 0], 0
        for which, own in sizes.items():
            offsets[which - _F] = size
            size += -(-own // _ALIGNMENT) * _ALIGNMENT
        self._offsets, self._bytes = tuple(offsets), size

    def run(self, imgs: Tensor, x: Tensor) -> Tensor:
        """As :func:`lift_fast.ops.lift_forward.gpu.run_gpu_plan`, for inputs with the :func:`key` of this pass."""
        device = self._device
        if not launch.is_current(device):
            with torch.cuda.device(device):
                return self.run(imgs, x)
        stream = launch.current_stream(device)
        base = memory.new_empty(x, (self._bytes // x.itemsize,))
        out = memory.new_empty(x, self._shape)
        f, g, u = self._offsets
        at = base.data_ptr()
        addresses = (imgs.data_ptr(), x.data_ptr(), at + f, at + g, at + u, out.data_ptr())
        if self._encode is not None:
            self._encode(imgs, addresses[_F], addresses[_G], stream)
        for run, grid, rest, nested, arguments, places, _ in self._launches:
            given = arguments.copy()
            for place, which in places:
                given[place] = addresses[which]
            if nested:
                run(*grid, stream, *rest, tuple(given))
            else:
                run(*grid, stream, *rest, *given)
        return out


def key(imgs: Tensor, x: Tensor, normalize: bool, *settings: Any) -> tuple[Any, ...] | None:
    """What a pass depends on in addition to its plan; None if no pass can run these inputs or a profiler is active."""
    if (imgs.data_ptr() | x.data_ptr()) % launch.ALIGNMENT or not x.is_contiguous() or launch.watched():
        return None
    return (imgs.shape, imgs.stride(), x.shape, normalize, *settings)


def build(
    launches: Sequence[launch.Launch | None],
    tensors: Sequence[Tensor | None],
    weights: Iterable[Any],
    encode: Callable[..., None] | None,
) -> Pass | None:
    """A pass that repeats the recorded ``launches``; None if they cannot be repeated.

    Args:
        launches: from :func:`lift_fast.kernels.launch.journal`; None for a launch made by Triton.
        tensors: imgs, x, f, g, u and the result; f and g None for a network without image.
        weights: everything else that the launches may read.
        encode: ``encode(imgs, f, g, stream)`` for an image encoder that is not among the launches.
    """
    constant = {id(weight) for weight in weights}
    which = {id(tensor): number for number, tensor in enumerate(tensors) if tensor is not None}
    ours = []
    if not launches:
        return None
    for one in launches:
        if one is None:
            return None
        arguments, places = [], []
        for at, argument in enumerate(one.args):
            if id(argument) in which:
                places.append((at, which[id(argument)]))
            elif isinstance(argument, Tensor) and id(argument) not in constant:
                # Unknown memory: its address may belong to another tensor the next time.
                return None
            arguments.append(argument.data_ptr() if isinstance(argument, Tensor) else argument)
        ready = one.ready
        arguments += ready.constants
        grid = (*one.grid, *ready.fill)
        ours.append(_Launch(ready.run, grid, ready.rest, ready.nested, arguments, tuple(places), ready))
    x, out = tensors[_X], tensors[_OUT]
    assert x is not None
    assert out is not None
    between = {number: tensors[number] for number in (_F, _G, _U)}
    sizes = {number: prod(t.shape) * t.element_size() for number, t in between.items() if t is not None}
    return Pass(launch.device_of(x), encode, ours, sizes, out.shape)
