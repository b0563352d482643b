"""Figures of matching: nearest, dense_match, a pair of photographs, label propagation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lift_fast import ViTLiFTExtractor, capture_pair, devices
from lift_fast.ops import propagate_labels as propagate_op
from lift_fast.ops.dense_match import op as dense_op
from lift_fast.ops.dense_match.bilinear import pixel_grid
from lift_fast.ops.nearest import gpu as nearest_gpu
from lift_fast.ops.nearest.op import nearest_by

from .clock import recorded
from .context import Context, Row, Skip
from .cost import Cost
from .predictions import CAPTURED
from .workloads import (
    CHANNELS,
    GRID,
    POINTS,
    SIDE,
    both_ways,
    descriptor_sets,
    half_sets,
    maps_like_features,
    products,
    tile_row,
    timed,
)

PHOTOGRAPHS = Path(__file__).resolve().parents[2] / "examples" / "photographs"


def matcher(maps: Tensor, backend: str | None, context: Context, at: Tensor | None = None, **options: Any) -> Any:
    size = [5, 5] if context.rehearse else [SIDE, SIDE]
    normalize, mutual = options.get("normalize", "grid"), options.get("mutual", False)
    return lambda: dense_op.dense_match(maps[:1], maps[1:], size, size, at, normalize, mutual, backend=backend)


def chosen_backend(context: Context) -> str:
    """The package's choice."""
    return "cuda" if devices.cuda_runs(context.device)[0] else "triton"


@torch.no_grad()
def dense_match(context: Context) -> Iterator[Row]:
    torch.manual_seed(context.seed)
    backend = chosen_backend(context)
    for channels in (8,) if context.rehearse else (193, CHANNELS):
        maps = maps_like_features(channels, context)
        what = f"dense_match {SIDE}, {channels} channels, {backend}"
        for mutual in (False, True):
            call = matcher(maps, backend, context, mutual=mutual)
            yield from both_ways(f"{what}{', mutual' if mutual else ''}", call, context)
    table = maps.flatten(2)
    yield timed("dense_match's table alone, fp32", lambda: table[0].t().contiguous() @ table[1], context)


@torch.no_grad()
def dense_match_more(context: Context) -> Iterator[Row]:
    torch.manual_seed(context.seed)
    channels = 8 if context.rehearse else CHANNELS
    maps = maps_like_features(channels, context)
    side = 5 if context.rehearse else SIDE
    points = torch.randint(side, (1, 3 if context.rehearse else POINTS, 2), device=context.device)
    flat = 1 + 0.05 * torch.randn_like(maps)
    backends = ("cuda", "triton") if devices.cuda_runs(context.device)[0] else ("triton",)
    for backend in backends:
        what = f"dense_match {SIDE}, {channels} channels, {backend}"
        for normalize, kind in (("grid", ""), ("pixel", ", cosines of pixels")):
            if normalize == "grid" and backend == chosen_backend(context):
                continue
            for mutual in (False, True):
                call = matcher(maps, backend, context, normalize=normalize, mutual=mutual)
                yield timed(f"{what}{kind}{', mutual' if mutual else ''}", call, context)
        yield from both_ways(f"{what}, {POINTS} points", matcher(maps, backend, context, points), context)
        yield timed(f"{what}, flat features", matcher(flat, backend, context), context)

    def plain() -> Tensor:
        query, key = F.interpolate(F.normalize(maps, dim=1), size=(side, side), mode="bilinear").flatten(2)
        rows = points[0, :, 1] * side + points[0, :, 0]
        return (query[:, rows].T @ key).argmax(dim=1)

    yield timed(f"interpolate + argmax, {POINTS} points", plain, context)


def nearest_call(sets: Tensor, stream: Any = None, **options: Any) -> Callable[[], Any]:
    search = partial(nearest_gpu.search, stream=stream)
    arguments = {"k": 1, "mutual": False, "ratio": None, "window": None, "normalize": True, **options}
    return lambda: nearest_by(search, sets[:1], sets[1:], **arguments)


@torch.no_grad()
def nearest_half(context: Context) -> Iterator[Row]:
    half = half_sets(context)
    flops = products(half)
    for name, options in (("", {}), (", mutual", {"mutual": True}), (", ratio", {"ratio": 0.9}), (", k 5", {"k": 5})):
        yield timed(f"nearest bf16{name}", nearest_call(half, **options), context, flops)
    side, frames = (3, 2) if context.rehearse else (56, 7)
    some = half[:1, : side * side]
    video = torch.randn(1, frames * side * side, half.shape[2], device=context.device).to(half.dtype)
    window = [1 if context.rehearse else 12, side, side, side, side]
    call = lambda: nearest_by(nearest_gpu.search, some, video, 5, False, None, window, True)  # noqa: E731
    yield timed("nearest bf16, 56 x 56 against 7 frames, radius 12, k 5", call, context)


@torch.no_grad()
def nearest_float32(context: Context) -> Iterator[Row]:
    sets = descriptor_sets(context)
    flops = products(sets)
    yield timed("nearest fp32", nearest_call(sets), context, flops)
    yield timed("nearest fp32, mutual", nearest_call(sets, mutual=True), context, flops)
    yield timed("nearest fp32, fast", nearest_call(sets, fast=True), context, flops)


def chunked(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """The usual code: normalise, multiply in portions, take the maximum."""
    unit, keys = F.normalize(query, dim=-1), F.normalize(key, dim=-1).t()
    parts = [(part @ keys).max(dim=1) for part in unit.split(4096)]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


@torch.no_grad()
def nearest_plain(context: Context) -> Iterator[Row]:
    exact, half = descriptor_sets(context), half_sets(context)
    flops = products(exact)
    yield timed("chunked matmul + max, bf16", lambda: chunked(*half), context, flops)
    yield timed("chunked matmul + max, fp32", lambda: chunked(*exact), context, flops)


@torch.no_grad()
def tiles_of_nearest(context: Context) -> Iterator[Row]:
    """The search alone with every tile worth measuring."""
    from lift_fast.kernels import launch, nearest, nearest_rows

    half = half_sets(context)
    cost = Cost(int(products(half)), half.numel() * 2)
    expected = None
    tiles = nearest.candidates(half.shape[2], launch.capability(context.device))
    for tile in tiles[: 1 if context.rehearse else None]:
        for both in (False, True):
            query, key = (nearest_rows.prepare(part[None], True, half.dtype, tile.depth) for part in half)
            run = lambda: nearest.search(query, key, 1, tile, mutual=both).values.amax(1)  # noqa: B023, E731
            if expected is None:
                expected = run()
            yield from tile_row(f"nearest bf16{', mutual' if both else ''}, tile {tuple(tile)}", run, expected, cost)


@torch.no_grad()
def streams_of_nearest(feed: str, context: Context) -> Iterator[Row]:
    """The same for the streams of groups with one feed, and the whole call with the first of them."""
    from lift_fast.kernels import launch, nearest, nearest_groups, nearest_rows

    if context.rehearse and feed == "warp":
        raise Skip("no interpreter runs Gluon")
    half = half_sets(context)
    flops = products(half)
    cost = Cost(int(flops), half.numel() * 2)
    tile = nearest.default_tile(half.shape[2], 2, 1, False, False, launch.capability(context.device))
    pair = [nearest_rows.prepare(part[None], True, half.dtype, tile.depth) for part in half]
    expected = nearest.search(*pair, 1, tile).values.amax(1)
    for both in (False, True):
        kind = f"nearest bf16{', mutual' if both else ''}, tile"
        found = nearest_groups.candidates(half.shape[2], launch.capability(context.device), both)
        streams = {name: stream for name, stream in found.items() if stream.feed == feed}
        for name, stream in list(streams.items())[: 1 if context.rehearse else None]:
            query, key = (nearest_rows.prepare(part[None], True, half.dtype, stream.tile.depth) for part in half)
            run = lambda: nearest_groups.search(query, key, 1, stream, both).values.amax((1, 3))[:, :, None]  # noqa: B023, E731
            yield from tile_row(f"{kind} {name}", run, expected, cost)
        for name, stream in list(streams.items())[:1]:
            # Whether it finds the same keys, and the time of the whole call.
            call, usual = nearest_call(half, mutual=both, stream=stream), nearest_call(half, mutual=both)
            differ = [float((one != other).float().mean()) for one, other in zip(call(), usual(), strict=True)]
            row = timed(f"{kind} {name}, whole call", call, context, flops)
            yield {**row, "error": max(differ[1:]), "limit": 1e-3}


@torch.no_grad()
def pair(context: Context) -> Iterator[Row]:
    """Two images in the device's memory to mutual matches of every pixel: the demonstration pair on photographs."""
    from lift_fast.demonstration import BACKBONE, LIFT

    size = 32 if context.rehearse else SIDE
    dtype = torch.bfloat16
    module = ViTLiFTExtractor(BACKBONE, lift_path=LIFT, device=context.device, dtype=dtype, silent=True)
    names = ("cat.jpg", "cat_second_view.jpg")
    batch = torch.cat([module.preprocess(PHOTOGRAPHS / name, load_size=(size, size))[0] for name in names])
    batch = batch.to(context.device, dtype)
    yield from _pair_rows("demonstration pair, photographs", module, batch, context)
    if context.rehearse:
        return
    module = ViTLiFTExtractor(
        "dino_vits16", random_weights=True, random_lift=True, device=context.device, dtype=dtype, silent=True
    )
    # Features of random weights hardly differ, which is the matcher's worst case.
    yield from _pair_rows("ViT-S/16 of random weights", module, batch, context, graph=False)
    maps = recorded(lambda: module.matching_map(batch), context.device)
    yield timed("backbone and LiFT, ViT-S/16, 2 images of 448, graph", maps, context, memory=False)


def _pair_rows(what: str, module: Any, batch: Tensor, context: Context, graph: bool = True) -> Iterator[Row]:
    size = [int(side) for side in batch.shape[2:]]

    def call() -> Any:
        maps = module.matching_map(batch)
        return dense_op.dense_match(maps[:1], maps[1:], size, size, None, "grid", True)

    yield timed(f"pair to mutual matches, {what}", call, context)
    if graph:
        yield timed(f"pair to mutual matches, {what}, graph", recorded(call, context.device), context, memory=False)
        maps = module.matching_map(batch).float()
        for normalize in ("grid", "pixel"):
            matcher = lambda: dense_op.dense_match(maps[:1], maps[1:], size, size, None, normalize, True)  # noqa: B023, E731
            yield timed(f"dense_match of {what}, {normalize}, mutual", matcher, context)


@torch.no_grad()
def captured_pair(context: Context) -> Iterator[Row]:
    """The same as ``capture_pair`` records it, both ways; and at 896 what a ViT-S/16 would add to the matching."""
    from lift_fast.demonstration import BACKBONE, LIFT

    options = {"device": context.device, "dtype": torch.bfloat16, "silent": True}
    module = ViTLiFTExtractor(BACKBONE, lift_path=LIFT, **options)
    for side in (32,) if context.rehearse else (SIDE, 2 * SIDE):
        a, b = (
            module.preprocess(PHOTOGRAPHS / name, load_size=(side, side))[0].to(context.device, torch.bfloat16)
            for name in ("cat.jpg", "cat_second_view.jpg")
        )
        for normalize in ("grid", "pixel"):
            call = _captured(module, a, b, normalize)
            yield timed(f"{CAPTURED} {side}, {normalize}", call, context, memory=False)
    if not context.rehearse:
        module = ViTLiFTExtractor("dino_vits16", random_weights=True, random_lift=True, **options)
        batch = torch.cat([a, b])
        maps = recorded(lambda: module.matching_map(batch), context.device)
        yield timed("backbone and LiFT, ViT-S/16, 2 images of 896, graph", maps, context, memory=False)


def _captured(module: Any, a: Tensor, b: Tensor, normalize: str) -> Callable[[], Any]:
    if a.device.type == "cuda":
        captured = capture_pair(module, a.shape[2:], normalize=normalize)
        return lambda: captured(a, b)
    # A rehearsal on the CPU: what the graph would record.
    size = (a.shape[2], a.shape[3])
    at = pixel_grid(size, 0, size[0] * size[1], a.device).view(*size, 2)
    maps = module.matching_map(torch.cat([a, b])).split(1)
    return lambda: dense_op.match_pixels(maps, size, size, at, normalize, True)


@torch.no_grad()
def propagation(context: Context) -> Iterator[Row]:
    """A step of DAVIS 2017 at patch 8: the queue of 7 frames and the first."""
    side, frames, channels, objects = (2, 2, 8, 2) if context.rehearse else (GRID, 8, CHANNELS, 4)
    count, window = side * side, [12, side, side, side, side]
    query, key = (torch.randn(1, n, channels, device=context.device) for n in (count, frames * count))
    labels = torch.rand(1, frames * count, objects, device=context.device)
    for name, call in (
        ("propagate_labels", propagate_op.propagate_labels_triton),
        ("propagate_labels, plain", propagate_op.propagate_labels_plain),
    ):
        run = partial(call, query, key, labels, window, 5, 0.1, True)
        yield timed(f"{name}, 56 x 56, 8 frames, radius 12, top 5", run, context)
