"""Inputs of the figures (networks, descriptors, maps) and their rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bench.maps import smooth_maps
from lift_fast import LiFT
from lift_fast.ops.lift_forward import gpu as gpu_plan
from lift_fast.ops.lift_forward.plan import build_plan
from lift_fast.testing import randomize, relative_error

from .clock import milliseconds, peak_bytes, recorded, replay_milliseconds
from .context import Context, Row
from .cost import Cost, forward_cost

# (name, B, pixels, patch, C)
Work = tuple[str, int, int, int, int]
ONE: Work = ("B1 448", 1, 448, 16, 384)
MANY: Work = ("B64 448", 64, 448, 16, 384)
LARGE: Work = ("B1 896", 1, 896, 16, 384)
FURTHER: tuple[Work, ...] = (
    ("B1 224", 1, 224, 16, 384),
    ("B8 448 patch 8", 8, 448, 8, 384),
    ("B8 448 C768", 8, 448, 16, 768),
)
TINY: Work = ("B1 32", 1, 32, 16, 32)
# Inputs take turns; together they are larger than any L2 cache.
_ROTATED_BYTES = 256 << 20
# Sets of this many descriptors: all pixels of a quarter of a 448-pixel image; width of ViT-S.
DESCRIPTORS, CHANNELS = 50176, 384
# Maps of cells and images of pixels.
GRID, SIDE, POINTS = 56, 448, 30
LOSS_SHAPE, TINY_LOSS = (256, 384, 28, 28), (2, 3, 4, 5)


class Network:
    """A random LiFT in one dtype, its kernels' plan, and inputs for the operator."""

    def __init__(self, work: Work, dtype: torch.dtype, device: torch.device) -> None:
        self.name, self.batch, side, self.patch, self.channels = work
        self.h = side // self.patch
        torch.manual_seed(0)
        self.lift = randomize(LiFT(self.channels, self.patch), 0).eval().requires_grad_(False)
        self.composed = build_plan(*self.lift._plan_sources(), self.lift.architecture)
        self.plan = gpu_plan.prepare_gpu(self.composed, device, dtype)
        self.lift = self.lift.to(device, dtype)
        self.dtype, self.device = dtype, device
        one = (3 * side**2 + self.h**2 * self.channels) * self.batch * dtype.itemsize
        count = 1 if device.type != "cuda" else max(2, min(32, _ROTATED_BYTES // one))
        self.inputs = [
            (
                torch.randn(self.batch, 3, side, side, device=device, dtype=dtype),
                torch.randn(self.batch, self.h**2, self.channels, device=device, dtype=dtype),
            )
            for _ in range(count)
        ]
        pool = self.patch != 8
        self.cost = forward_cost(self.batch, self.h, self.h, self.channels, pool=pool, itemsize=dtype.itemsize)

    def tokens(self, x: Tensor) -> Tensor:
        return x.view(self.batch, self.h, self.h, self.channels)

    def forward(self, imgs: Tensor, x: Tensor) -> Tensor:
        """The kernels alone, without the module's checks."""
        return gpu_plan.run_gpu_plan(self.plan, imgs, self.tokens(x))

    def time(self, run: Callable[..., Any], inputs: list[Any]) -> float:
        """One image as a graph, a batch by events over rotated inputs."""
        if self.batch == 1:
            return replay_milliseconds(run, inputs[0], self.device)
        return milliseconds(run, inputs, self.device)


def maps_like_features(channels: int, context: Context) -> Tensor:
    """``[2, C, h, w]`` with the neighbourhood correlation of ViT features."""
    return smooth_maps(2, channels, 2 if context.rehearse else GRID, context.device)


@cache
def descriptor_sets(context: Context) -> Tensor:
    """``[2, N, C]`` float32 descriptors."""
    torch.manual_seed(context.seed)
    count, channels = (20, 8) if context.rehearse else (DESCRIPTORS, CHANNELS)
    return torch.randn(2, count, channels, device=context.device)


def half_sets(context: Context) -> Tensor:
    return descriptor_sets(context).bfloat16()


def products(sets: Tensor) -> float:
    return 2.0 * sets.shape[1] ** 2 * sets.shape[2]


def row_of(what: str, time: float, cost: Cost) -> Row:
    return {"what": what, "ms": time, "flops": cost.flops, "bytes": cost.bytes}


def timed(what: str, call: Callable[[], Any], context: Context, flops: float | None = None, memory: bool = True) -> Row:
    row: Row = {"what": what, "ms": milliseconds(call, [()], context.device)}
    if flops is not None:
        row["flops"] = flops
    if memory:
        row["peak bytes"] = peak_bytes(call, context.device)
    return row


def both_ways(what: str, call: Callable[[], Any], context: Context) -> Iterator[Row]:
    """As a graph, and eager, where the host may take the time."""
    yield timed(f"{what}, graph", recorded(call, context.device), context, memory=False)
    yield timed(what, call, context)


def tile_row(what: str, run: Callable[[], Tensor], expected: Tensor, cost: Cost) -> Iterator[Row]:
    """One tile's time, or the reason why it has none: the compiler may refuse an odd tile."""
    try:
        error = relative_error(run(), expected)
        # As a graph: the host launches small kernels more slowly than they run.
        time = replay_milliseconds(run, (), expected.device, replays=5)
    except Exception as reason:
        if "CUDA error" in str(reason):
            raise
        yield {"what": what, "note": f"{type(reason).__name__}: {str(reason)[:80]}"}
        return
    yield {**row_of(what, time, cost), "error": error, "limit": 1e-2}
