"""The launches of each operator for a shape, recorded and not run: for compilation ahead of time.

Operators run on meta tensors, which hold no memory, with a recorder in place of each kernel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from types import ModuleType
from typing import Any

import torch

from lift_fast import LiFT
from lift_fast.kernels import (
    cosine_loss,
    dense_match,
    launch,
    nearest,
    nearest_float32,
    nearest_groups,
    nearest_pingpong,
    nearest_rows,
    propagate_labels,
)
from lift_fast.kernels import lift_forward_head as head
from lift_fast.kernels import lift_forward_image_encoder as image_encoder
from lift_fast.kernels import lift_forward_upsample as upsample
from lift_fast.kernels.tiles import Tile
from lift_fast.ops.dense_match import gpu as dense_match_gpu
from lift_fast.ops.dense_match import op as dense_match_op
from lift_fast.ops.lift_forward import gpu as gpu_plan
from lift_fast.ops.lift_forward import tiles as tile_table
from lift_fast.ops.lift_forward.plan import Plan, build_plan
from lift_fast.ops.nearest import gpu as nearest_gpu
from lift_fast.ops.nearest.op import depth_of, nearest_by

# (kernel, args, options) of a launcher's call.
Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]
CPU = torch.device("cpu")
_NEAREST = [(nearest_rows, "prepare_kernel")]
_NEAREST += [(nearest, name) for name in ("search_kernel", "finish_kernel", "mutual_kernel")]
_NEAREST += [(nearest_float32, name) for name in ("blocks_kernel", "rescore_kernel")]
_GROUPS = [(nearest_groups, "groups_kernel"), (nearest_groups, "resolve_kernel"), (nearest_pingpong, "pingpong_kernel")]
_STAGES = [(upsample, "upsample_kernel"), (upsample, "upsample_wide_kernel")]
_STAGES += [(head, "head_kernel"), (head, "head_wide_kernel")]


class Recorder:
    """Replaces a kernel and keeps the arguments of each call."""

    def __init__(self, module: ModuleType, name: str) -> None:
        self.module, self.name, self.kernel, self.calls = module, name, getattr(module, name), []

    def __getitem__(self, grid: Any) -> Any:
        def note(*args: Any, **options: Any) -> None:
            self.calls.append((self.kernel, args, options))

        return note


@contextmanager
def recording(capability: int, *kernels: tuple[ModuleType, str]) -> Iterator[list[Recorder]]:
    """Replace the kernels by recorders, and the device by one of this compute capability, such as 90."""
    recorders = [Recorder(module, name) for module, name in kernels]
    real = launch.capability
    for recorder in recorders:
        setattr(recorder.module, recorder.name, recorder)
    launch.capability = lambda device: divmod(capability, 10)
    tile_table.forget()
    try:
        yield recorders
    finally:
        for recorder in recorders:
            setattr(recorder.module, recorder.name, recorder.kernel)
        launch.capability = real
        tile_table.forget()


def _calls(recorders: list[Recorder]) -> list[Launch]:
    return [call for recorder in recorders for call in recorder.calls]


@cache
def _network(channels: int, patch: int, use_image: bool) -> Plan:
    lift = LiFT(channels, patch, use_image=use_image).eval().requires_grad_(False)
    return build_plan(*lift._plan_sources(), lift.architecture)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _prepared(n: int, m: int, channels: int, dtype: torch.dtype, depth: int) -> list[Any]:
    """Query and key, ready for a search in half precision."""
    return [nearest_rows.prepare(_empty(1, count, channels, dtype=dtype), True, dtype, depth) for count in (n, m)]


def lift_forward(
    channels: int,
    patch: int,
    batch: int,
    side: int | tuple[int, int],
    dtype: torch.dtype,
    capability: int,
    normalize: bool = False,
    use_image: bool = True,
    tile: Sequence[int] | None = None,
) -> list[Launch]:
    """One forward pass with the default tiles of a device of this capability.

    With ``tile`` only its two last stages with this tile, where it is a candidate.
    """
    if tile is not None:
        return lift_tiles(channels, patch, batch, side, dtype, capability, normalize, Tile(*tile))
    network = _network(channels, patch, use_image)
    height, width = (side, side) if isinstance(side, int) else side
    h, w = height // patch, width // patch
    kernels = [(image_encoder, "fine_kernel"), (image_encoder, "coarse_kernel"), *_STAGES]
    with recording(capability, *kernels) as recorders, torch.no_grad():
        plan = gpu_plan.prepare_gpu(network, CPU, dtype, "triton")
        pixels = 8 if patch == 8 else 16
        imgs = _empty(batch, 3, pixels * h, pixels * w, dtype=dtype)
        gpu_plan.run_gpu_plan(plan, imgs, _empty(batch, h, w, channels, dtype=dtype), normalize)
    return _calls(recorders)


def nearest_search(
    n: int,
    m: int,
    channels: int,
    dtype: torch.dtype,
    capability: int,
    k: int = 1,
    mutual: bool = False,
    ratio: float | None = None,
    window: list[int] | None = None,
    normalize: bool = True,
    fast: bool = False,
    feed: str = "",
) -> list[Launch]:
    """One call of ``nearest``, with ``feed`` by the search of groups; each kernel once for each set of options."""
    stream = None
    if feed:
        stream = nearest_groups.default_stream(channels, divmod(capability, 10), depth_of(k, ratio), mutual, feed)
    query, key = (_empty(1, count, channels, dtype=dtype) for count in (n, m))
    with recording(capability, *_NEAREST, *_GROUPS) as recorders:
        search = partial(nearest_gpu.search, stream=stream)
        nearest_by(search, query, key, k, mutual, ratio, window, normalize, fast)
    found: dict[Any, Launch] = {}
    for call in _calls(recorders):
        found.setdefault((call[0], *sorted(call[2].items())), call)
    return list(found.values())


def dense_search(
    grid: Sequence[int],
    size: Sequence[int],
    normalize: str,
    points: int | None,
    capability: int,
    dtype: torch.dtype = torch.float32,
) -> list[Launch]:
    """Every pixel (``points`` None) or some points of one image, matched to itself."""
    image = dense_match_op.stretch(torch.randn(8, *grid, dtype=dtype), (size[0], size[1]), normalize)
    at = None if points is None else torch.zeros(points, 2, dtype=torch.int64)
    with recording(capability, (dense_match, "spans_kernel"), (dense_match, "match_kernel")) as recorders:
        dense_match_gpu.match(image, image, at, normalize == "pixel")
    return [call for one in recorders for call in one.calls[:1]]


def propagation(
    channels: int,
    grid: tuple[int, int],
    frames: int,
    batch: int,
    k: int,
    objects: int,
    dtype: torch.dtype,
    capability: int,
    radius: int = 12,
) -> list[Launch]:
    """One label propagation."""
    n, m = grid[0] * grid[1], frames * grid[0] * grid[1]
    shapes = ((n, channels), (m, channels), (n,), (m,), (m, objects))
    tensors = [_empty(batch, *shape, dtype=dtype) for shape in shapes]
    with recording(capability, (propagate_labels, "propagate_labels_kernel")) as recorders:
        propagate_labels.propagate_labels(*tensors, [radius, *grid, *grid], k, 0.1)
    return recorders[0].calls


def loss(shape: Sequence[int], dtype: torch.dtype, capability: int, tokens: bool = False) -> list[Launch]:
    """One loss with its gradient, [outer, C, inner], and the scaling of the gradient; in float16 also the gradients
    with an upstream factor."""
    outer, channels, inner = shape
    x = _empty(outer, inner, channels, dtype=dtype).transpose(1, 2) if tokens else _empty(*shape, dtype=dtype)
    each = _empty(outer, inner)
    with recording(capability, (cosine_loss, "cosine_loss_kernel"), (cosine_loss, "scale_kernel")) as recorders:
        cosine_loss.cosine_loss(x, x, x, each, 0.5, 1e-12)
        cosine_loss.scale_in_place(x, each[0, 0])
        for upstream in (each, each[0, 0]) if dtype == torch.float16 else ():
            cosine_loss.cosine_loss(x, x, x, each, 0.5, 1e-12, upstream)
    return _calls(recorders)


def lift_tiles(
    channels: int,
    patch: int,
    batch: int,
    side: int | tuple[int, int],
    dtype: torch.dtype,
    capability: int,
    normalize: bool = False,
    only: Tile | None = None,
) -> list[Launch]:
    """Both stages of LiFT with every tile worth measuring, or with one of them."""
    assert isinstance(side, int)
    with recording(capability, *_STAGES) as recorders, torch.no_grad():
        plan = gpu_plan.prepare_gpu(_network(channels, patch, True), CPU, dtype, "triton")
        h = side // patch
        x, g = _empty(batch, h, h, channels, dtype=dtype), _empty(batch, h, h, 32, dtype=dtype)
        f = _empty(batch, 2 * h, 2 * h, 32, dtype=dtype)
        u = _empty(batch, 2 * h, 2 * h, channels // 2, dtype=dtype)
        for tile in tile_table.candidates(gpu_plan.upsample_work(plan, x), CPU):
            if only in (None, tile):
                gpu_plan.upsample(plan, x, f, g, tile)
        for tile in tile_table.candidates(gpu_plan.head_work(plan, u), CPU):
            if only in (None, tile):
                gpu_plan.head(plan, u, normalize, tile)
    return _calls(recorders)


def nearest_tiles(n: int, m: int, channels: int, dtype: torch.dtype, capability: int) -> list[Launch]:
    """The search for one best key with every tile worth measuring, in one direction and in both."""
    with recording(capability, (nearest, "search_kernel"), (nearest_rows, "prepare_kernel")) as recorders:
        for tile in nearest.candidates(channels, divmod(capability, 10)):
            for both in (False, True):
                nearest.search(*_prepared(n, m, channels, dtype, tile.depth), 1, tile, mutual=both)
    return recorders[0].calls


def nearest_streams(n: int, m: int, channels: int, dtype: torch.dtype, capability: int) -> list[Launch]:
    """The search of groups with every stream worth measuring, and what follows it in the whole call."""
    found = []
    for both in (False, True):
        streams = nearest_groups.candidates(channels, divmod(capability, 10), both)
        with recording(capability, *_GROUPS, (nearest_rows, "prepare_kernel")) as recorders:
            for stream in streams.values():
                nearest_groups.search(*_prepared(n, m, channels, dtype, stream.tile.depth), 1, stream, both)
        found += _calls(recorders[:-1])
        for feed in dict.fromkeys(stream.feed for stream in streams.values()):
            found += nearest_search(n, m, channels, dtype, capability, mutual=both, feed=feed)
    return found


OPERATORS = {
    "cosine_loss": loss,
    "lift_forward": lift_forward,
    "nearest": nearest_search,
    "dense_match": dense_search,
    "propagate_labels": propagation,
    "lift_tiles": lift_tiles,
    "nearest_tiles": nearest_tiles,
    "nearest_streams": nearest_streams,
}
