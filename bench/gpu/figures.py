"""The figures, the most valuable first: ceilings, LiFT, matching, a pair, the loss, training, the rest."""

from __future__ import annotations

import copy
import importlib.util
import math
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.bench_cosine_loss import embedding_loss
from bench.bench_cosine_loss import run as loss_step
from bench.training_pair import build_ours, build_plain, losses_and_gradients
from lift_fast import LiFT, ViTLiFTExtractor, cosine_loss, devices
from lift_fast.ops import propagate_labels as propagate_op
from lift_fast.ops.dense_match import op as dense_op
from lift_fast.ops.lift_forward import gpu as gpu_plan
from lift_fast.ops.lift_forward import image_encoder_cuda
from lift_fast.ops.lift_forward.plan import build_plan
from lift_fast.ops.nearest import gpu as nearest_gpu
from lift_fast.ops.nearest.op import nearest_by
from lift_fast.testing import randomize, relative_error
from lift_fast.training.step import tuned_convolutions

from .clock import host_milliseconds, milliseconds, peak_bytes, recorded, replay_milliseconds
from .context import Context, Job, Row, Skip
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
# Inputs take turns until together they are larger than any second-level cache.
_ROTATED_BYTES = 256 << 20
# Sets of this many descriptors: all pixels of a quarter of a 448-pixel picture; width of ViT-S.
DESCRIPTORS, CHANNELS = 50176, 384
# Maps of cells and pictures of pixels.
GRID, SIDE, POINTS = 56, 448, 30
LOSS_SHAPE, TINY_LOSS = (256, 384, 28, 28), (2, 3, 4, 5)
TRAINING, TINY_TRAINING = ("dino_vits16", 64, 448), ("vit_tiny_patch16_224", 2, 64)
# Of losses and of all gradients. Divisions by BatchNorm's small deviations let the rounding of early layers grow.
TRAINING_LIMITS = {torch.float32: (1e-4, 1e-2), torch.bfloat16: (1e-2, 0.25)}
PHOTOGRAPHS = Path(__file__).resolve().parents[2] / "examples" / "photographs"
# What publishes an exact search on the GPU; measured where it is installed.
# Of the candidates for the search, which no device has run yet: each in a process of its own.
FEEDS = ("tma", "warp", "threads")
PEERS = ("faiss", "flash_kmeans", "pykeops")


def jobs(rehearse: bool) -> list[Job]:
    """Every figure's job in the order in which they are worth having."""
    first = [
        Job("ceilings", _ceilings, 5),
        *(Job(f"forward {work[0]}", partial(_forward, work), 4) for work in (ONE, MANY, LARGE)),
        Job("dense_match", _dense_match, 4),
        Job("nearest bf16", _nearest_half, 4),
        Job("pair", _pair, 15),
        Job("cosine loss", _loss, 4),
        Job("training", _training, 35),
        Job("nearest fp32", _nearest_float32, 4),
        Job("propagate_labels", _propagation, 4),
        Job("dense_match, other ways", _dense_match_more, 8),
    ]
    first += [Job(f"forward {work[0]}", partial(_forward, work), 4) for work in FURTHER]
    first += [
        Job("plain forms of nearest", _nearest_plain, 4),
        Job("tiles of LiFT", _tiles_of_lift, 30),
        *(Job(f"streams of nearest, {feed}", partial(_streams_of_nearest, feed), 15) for feed in FEEDS),
        Job("tiles of nearest", _tiles_of_nearest, 20),
        Job("plain forms compiled", _compiled, 150),
        Job("training compiled", _training_compiled, 150),
        *(Job(f"peer {name}", partial(_peer, name), 30) for name in PEERS),
    ]
    # One network of every size is the same at a rehearsal's size.
    return [job for job in first if not rehearse or job.name not in {f"forward {work[0]}" for work in (MANY, *FURTHER)}]


def profiled(rehearse: bool) -> list[Job]:
    """Single launches for a profiler: the kernels that take most of the time."""
    return [
        Job("upsample B64 448", partial(_one_launch, "upsample"), 10),
        Job("head B64 448", partial(_one_launch, "head"), 10),
        Job("image encoder B64 448", partial(_one_launch, "image encoder"), 10),
        Job("nearest bf16", partial(_one_launch, "nearest"), 10),
        Job("dense_match", partial(_one_launch, "dense_match"), 10),
    ]


# Ceilings


def _ceilings(context: Context) -> Iterator[Row]:
    """What this device reaches at best: copies, bfloat16 products, the least time of a launch."""
    device = context.device
    megabytes, side = (1, 64) if context.rehearse else (1024, 8192)
    source = torch.randint(255, (megabytes << 20,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.numel()
    yield {"what": "ceiling: copy", "ms": milliseconds(target.copy_, [(source,)], device), "bytes": copied}
    del source, target
    pairs = [tuple(torch.randn(side, side, device=device).bfloat16() for _ in range(2)) for _ in range(2)]
    yield {"what": "ceiling: bf16 products", "ms": milliseconds(torch.mm, pairs, device), "flops": 2 * side**3}
    one = torch.ones(1, device=device)
    yield {"what": "ceiling: launch in a graph", "ms": replay_milliseconds(one.add_, (1,), device)}


# LiFT's forward pass


class Network:
    """A random LiFT in one dtype, its kernels' plan, and inputs as the operator takes them."""

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
        """One picture as a graph, a batch by events over rotated inputs."""
        if self.batch == 1:
            return replay_milliseconds(run, inputs[0], self.device)
        return milliseconds(run, inputs, self.device)


@torch.no_grad()
def _forward(work: Work, context: Context) -> Iterator[Row]:
    work = TINY if context.rehearse else work
    network = Network(work, torch.bfloat16, context.device)
    name, cost, device, inputs = network.name, network.cost, context.device, network.inputs
    total = cost["image encoder"] + cost["upsample"] + cost["head"]
    yield _row(f"forward {name}", network.time(network.forward, inputs), total)
    yield {"what": f"forward {name}, eager", "ms": milliseconds(network.lift, inputs, device)}
    yield {"what": f"forward {name}, host alone", "ms": host_milliseconds(network.lift, inputs[0], device)}

    imgs, x = inputs[0]
    tokens = network.tokens(x)
    f, g = gpu_plan.encode_image(network.plan, imgs)
    u = gpu_plan.upsample(network.plan, tokens, f, g)
    plan = network.plan
    replays = 200 if network.batch == 1 else 20
    for what, run, arguments in (
        ("image encoder", gpu_plan.encode_image, (plan, imgs)),
        ("upsample", gpu_plan.upsample, (plan, tokens, f, g)),
        ("head", gpu_plan.head, (plan, u)),
    ):
        encoder = f", {plan.encoder}" if what == "image encoder" else ""
        yield _row(f"{what} {name}{encoder}", replay_milliseconds(run, arguments, device, replays), cost[what])
    if plan.encoder != "triton":
        other = gpu_plan.prepare_gpu(network.composed, device, network.dtype, "triton")
        time = replay_milliseconds(gpu_plan.encode_image, (other, imgs), device, replays)
        yield _row(f"image encoder {name}, triton", time, cost["image encoder"])
    if plan.encoder == "cuda":
        # Those that nothing chooses yet.
        for cut in ("stream", "spread"):
            arguments = (imgs, plan.encoder_weights, cut)
            time = replay_milliseconds(image_encoder_cuda.encode_image, arguments, device, replays)
            yield _row(f"image encoder {name}, cuda, {cut}", time, cost["image encoder"])

    peak = peak_bytes(lambda: network.lift(*inputs[0]), device)
    if peak is not None:
        # Beside the output: f, g and the c-channel fine map.
        coarse, size = network.batch * network.h**2, network.dtype.itemsize
        least = size * coarse * (4 * 32 + 32 + 4 * (network.channels // 2) + 4 * network.channels)
        yield {"what": f"forward {name}, memory over the least", "ratio": peak / least}

    plain = copy.deepcopy(network.lift)
    plain.fused = False
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    nhwc = [(i.to(memory_format=torch.channels_last), x) for i, x in inputs]
    yield {"what": f"forward {name}, plain bf16 channels_last", "ms": milliseconds(last, nhwc, device)}
    if network.batch == 1:
        yield {
            "what": f"forward {name}, plain bf16 channels_last, graph",
            "ms": replay_milliseconds(last, nhwc[0], device),
        }
    yield {
        "what": f"forward {name}, plain fp32",
        "ms": milliseconds(plain.float(), [(i.float(), x.float()) for i, x in inputs[:4]], device),
    }


def _row(what: str, time: float, cost: Cost) -> Row:
    return {"what": what, "ms": time, "flops": cost.flops, "bytes": cost.bytes}


@torch.no_grad()
def _tiles_of_lift(context: Context) -> Iterator[Row]:
    """Every tile of both stages for one picture and for a batch: what the default should be."""
    from lift_fast.ops.lift_forward import tiles as tile_table

    for work in (TINY,) if context.rehearse else (ONE, MANY):
        network = Network(work, torch.bfloat16, context.device)
        plan, (imgs, x) = network.plan, network.inputs[0]
        tokens = network.tokens(x)
        f, g = gpu_plan.encode_image(plan, imgs)
        u = gpu_plan.upsample(plan, tokens, f, g)
        stages = (
            ("upsample", gpu_plan.upsample_work(plan, tokens), partial(gpu_plan.upsample, plan, tokens, f, g)),
            ("head", gpu_plan.head_work(plan, u), partial(gpu_plan.head, plan, u, False)),
        )
        for stage, piece, run in stages:
            candidates = tile_table.candidates(piece, context.device)[: 2 if context.rehearse else None]
            expected = run(tile_table.tile_for(piece, context.device))
            for tile in candidates:
                what = f"{stage} {network.name}, tile {tuple(tile)}"
                yield from _tile(what, partial(run, tile), expected, network.cost[stage])


def _tile(what: str, run: Callable[[], Tensor], expected: Tensor, cost: Cost) -> Iterator[Row]:
    """One tile's time, or the reason why it has none: an odd tile may be refused by the compiler."""
    try:
        error = relative_error(run(), expected)
        # As a graph: the host launches small kernels more slowly than they run.
        time = replay_milliseconds(run, (), expected.device, replays=5)
    except Exception as reason:
        if "CUDA error" in str(reason):
            raise
        yield {"what": what, "note": f"{type(reason).__name__}: {str(reason)[:80]}"}
        return
    yield {**_row(what, time, cost), "error": error, "limit": 1e-2}


# Matching


def maps_like_features(channels: int, context: Context) -> Tensor:
    """``[2, C, h, w]`` with the neighbourhood correlation of ViT features: rough noise enlarged from half the grid."""
    side = 2 if context.rehearse else GRID
    rough = torch.randn(2, channels, max(1, side // 2), max(1, side // 2), device=context.device)
    noise = torch.randn(2, channels, side, side, device=context.device)
    return F.interpolate(rough, size=(side, side), mode="bilinear") + 0.3 * noise


def _matcher(maps: Tensor, backend: str | None, context: Context, at: Tensor | None = None, **options: Any) -> Any:
    size = [5, 5] if context.rehearse else [SIDE, SIDE]
    normalize, mutual = options.get("normalize", "grid"), options.get("mutual", False)
    return lambda: dense_op.dense_match(maps[:1], maps[1:], size, size, at, normalize, mutual, backend=backend)


def _backend(context: Context) -> str:
    """The one that the package chooses."""
    return "cuda" if devices.cuda_runs(context.device)[0] else "triton"


@torch.no_grad()
def _dense_match(context: Context) -> Iterator[Row]:
    torch.manual_seed(context.seed)
    backend = _backend(context)
    for channels in (8,) if context.rehearse else (193, CHANNELS):
        maps = maps_like_features(channels, context)
        what = f"dense_match {SIDE}, {channels} channels, {backend}"
        for mutual in (False, True):
            call = _matcher(maps, backend, context, mutual=mutual)
            yield from _both(f"{what}{', mutual' if mutual else ''}", call, context)
    table = maps.flatten(2)
    yield _timed("dense_match's table alone, fp32", lambda: table[0].t().contiguous() @ table[1], context)


@torch.no_grad()
def _dense_match_more(context: Context) -> Iterator[Row]:
    torch.manual_seed(context.seed)
    channels = 8 if context.rehearse else CHANNELS
    maps = maps_like_features(channels, context)
    side = 5 if context.rehearse else SIDE
    points = torch.randint(side, (1, 3 if context.rehearse else POINTS, 2), device=context.device)
    flat = 1 + 0.05 * torch.randn_like(maps)
    backends = ("cuda", "triton") if devices.cuda_runs(context.device)[0] else ("triton",)
    for backend in backends:
        what = f"dense_match {SIDE}, {channels} channels, {backend}"
        if backend != _backend(context):
            yield _timed(what, _matcher(maps, backend, context), context)
            yield _timed(f"{what}, mutual", _matcher(maps, backend, context, mutual=True), context)
        yield _timed(f"{what}, cosines of pixels", _matcher(maps, backend, context, normalize="pixel"), context)
        yield _timed(
            f"{what}, cosines of pixels, mutual",
            _matcher(maps, backend, context, normalize="pixel", mutual=True),
            context,
        )
        yield from _both(f"{what}, {POINTS} points", _matcher(maps, backend, context, points), context)
        yield _timed(f"{what}, flat features", _matcher(flat, backend, context), context)

    def plain() -> Tensor:
        query, key = F.interpolate(F.normalize(maps, dim=1), size=(side, side), mode="bilinear").flatten(2)
        rows = points[0, :, 1] * side + points[0, :, 0]
        return (query[:, rows].T @ key).argmax(dim=1)

    yield _timed(f"interpolate + argmax, {POINTS} points", plain, context)


def _timed(
    what: str, call: Callable[[], Any], context: Context, flops: float | None = None, memory: bool = True
) -> Row:
    row: Row = {"what": what, "ms": milliseconds(call, [()], context.device)}
    if flops is not None:
        row["flops"] = flops
    if memory:
        row["peak bytes"] = peak_bytes(call, context.device)
    return row


def _both(what: str, call: Callable[[], Any], context: Context) -> Iterator[Row]:
    """As a graph, and eager, where the host may be what takes the time."""
    yield _timed(f"{what}, graph", recorded(call, context.device), context, memory=False)
    yield _timed(what, call, context)


@cache
def _sets(context: Context) -> Tensor:
    """``[2, N, C]`` float32 descriptors."""
    torch.manual_seed(context.seed)
    count, channels = (20, 8) if context.rehearse else (DESCRIPTORS, CHANNELS)
    return torch.randn(2, count, channels, device=context.device)


def _products(sets: Tensor) -> float:
    return 2.0 * sets.shape[1] ** 2 * sets.shape[2]


def _half(context: Context) -> Tensor:
    return _sets(context).bfloat16()


def _nearest(sets: Tensor, stream: Any = None, **options: Any) -> Callable[[], Any]:
    search = partial(nearest_gpu.search, stream=stream)
    arguments = {"k": 1, "mutual": False, "ratio": None, "window": None, "normalize": True, **options}
    return lambda: nearest_by(search, sets[:1], sets[1:], **arguments)


@torch.no_grad()
def _nearest_half(context: Context) -> Iterator[Row]:
    half = _half(context)
    flops = _products(half)
    yield _timed("nearest bf16", _nearest(half), context, flops)
    yield _timed("nearest bf16, mutual", _nearest(half, mutual=True), context, flops)
    yield _timed("nearest bf16, ratio", _nearest(half, ratio=0.9), context, flops)
    yield _timed("nearest bf16, k 5", _nearest(half, k=5), context, flops)
    side, frames = (3, 2) if context.rehearse else (56, 7)
    some = half[:1, : side * side]
    video = torch.randn(1, frames * side * side, half.shape[2], device=context.device).to(half.dtype)
    window = [1 if context.rehearse else 12, side, side, side, side]
    call = lambda: nearest_by(nearest_gpu.search, some, video, 5, False, None, window, True)  # noqa: E731
    yield _timed("nearest bf16, 56 x 56 against 7 frames, radius 12, k 5", call, context)


@torch.no_grad()
def _nearest_float32(context: Context) -> Iterator[Row]:
    sets = _sets(context)
    flops = _products(sets)
    yield _timed("nearest fp32", _nearest(sets), context, flops)
    yield _timed("nearest fp32, mutual", _nearest(sets, mutual=True), context, flops)
    yield _timed("nearest fp32, fast", _nearest(sets, fast=True), context, flops)


def chunked(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """What people write: normalise, multiply in portions, take the maximum."""
    unit, keys = F.normalize(query, dim=-1), F.normalize(key, dim=-1).t()
    parts = [(part @ keys).max(dim=1) for part in unit.split(4096)]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


@torch.no_grad()
def _nearest_plain(context: Context) -> Iterator[Row]:
    exact, half = _sets(context), _half(context)
    flops = _products(exact)
    yield _timed("chunked matmul + max, bf16", lambda: chunked(*half), context, flops)
    yield _timed("chunked matmul + max, fp32", lambda: chunked(*exact), context, flops)


@torch.no_grad()
def _tiles_of_nearest(context: Context) -> Iterator[Row]:
    """The search alone with every tile worth measuring."""
    from lift_fast.kernels import launch, nearest, nearest_rows

    half = _half(context)
    cost = Cost(int(_products(half)), half.numel() * 2)
    expected = None
    tiles = nearest.candidates(half.shape[2], launch.capability(context.device))
    for tile in tiles[: 1 if context.rehearse else None]:
        for both in (False, True):
            query, key = (nearest_rows.prepare(part[None], True, half.dtype, tile.depth) for part in half)
            run = lambda: nearest.search(query, key, 1, tile, mutual=both).values.amax(1)  # noqa: B023, E731
            if expected is None:
                expected = run()
            yield from _tile(f"nearest bf16{', mutual' if both else ''}, tile {tuple(tile)}", run, expected, cost)


@torch.no_grad()
def _streams_of_nearest(feed: str, context: Context) -> Iterator[Row]:
    """The same for the streams of groups that one kind of feed serves, and the whole call with the first of them."""
    from lift_fast.kernels import launch, nearest, nearest_groups, nearest_rows

    if context.rehearse and feed == "warp":
        raise Skip("no interpreter runs Gluon")
    half = _half(context)
    flops = _products(half)
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
            yield from _tile(f"{kind} {name}", run, expected, cost)
        for name, stream in list(streams.items())[:1]:
            # Whether it finds the same keys, and the time of the whole call.
            call, usual = _nearest(half, mutual=both, stream=stream), _nearest(half, mutual=both)
            differ = [float((one != other).float().mean()) for one, other in zip(call(), usual(), strict=True)]
            row = _timed(f"{kind} {name}, whole call", call, context, flops)
            yield {**row, "error": max(differ[1:]), "limit": 1e-3}


@torch.no_grad()
def _pair(context: Context) -> Iterator[Row]:
    """Two pictures in the device's memory to mutual matches of every pixel: the demonstration pair on photographs."""
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
    # Random weights give features that hardly differ: the matcher's worst case.
    yield from _pair_rows("ViT-S/16 of random weights", module, batch, context, graph=False)
    maps = recorded(lambda: module.matching_map(batch), context.device)
    yield _timed("backbone and LiFT, ViT-S/16, 2 pictures of 448, graph", maps, context, memory=False)


def _pair_rows(what: str, module: Any, batch: Tensor, context: Context, graph: bool = True) -> Iterator[Row]:
    size = [int(side) for side in batch.shape[2:]]

    def call() -> Any:
        maps = module.matching_map(batch)
        return dense_op.dense_match(maps[:1], maps[1:], size, size, None, "grid", True)

    yield _timed(f"pair to mutual matches, {what}", call, context)
    if graph:
        yield _timed(f"pair to mutual matches, {what}, graph", recorded(call, context.device), context, memory=False)
        maps = module.matching_map(batch).float()
        for normalize in ("grid", "pixel"):
            matcher = lambda: dense_op.dense_match(maps[:1], maps[1:], size, size, None, normalize, True)  # noqa: B023, E731
            yield _timed(f"dense_match of {what}, {normalize}, mutual", matcher, context)


@torch.no_grad()
def _propagation(context: Context) -> Iterator[Row]:
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
        yield _timed(f"{name}, 56 x 56, 8 frames, radius 12, top 5", run, context)


# Training


def _loss(context: Context) -> Iterator[Row]:
    shape = TINY_LOSS if context.rehearse else LOSS_SHAPE
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(shape, device=context.device).to(dtype).requires_grad_()
        y = torch.randn(shape, device=context.device).to(dtype)
        name = "fp32" if dtype == torch.float32 else "bf16"
        size = x.numel() * x.element_size()
        for what, loss in (("cosine loss", cosine_loss), ("permuted copies and CosineEmbeddingLoss", embedding_loss)):

            def step(loss: Any = loss, x: Tensor = x, y: Tensor = y) -> None:
                loss_step(loss, x, y)

            # Two inputs read, one gradient written. As a graph, and with the time that autograd takes on the host.
            x.grad = None
            row = {"what": f"{what} {name}", "ms": replay_milliseconds(step, (), context.device, 20), "bytes": 3 * size}
            x.grad = None
            step()
            x.grad = None
            peak = peak_bytes(step, context.device, warm=False)
            yield row if peak is None else {**row, "peak bytes": peak, "peak in gradients": peak / size}
            yield {"what": f"{what} {name}, eager", "ms": milliseconds(step, [()], context.device)}


def _training_parts(context: Context) -> tuple[str, Tensor, torch.dtype]:
    model, batch, side = TINY_TRAINING if context.rehearse else TRAINING
    torch.manual_seed(context.seed)
    pixels = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8, device=context.device)
    return model, pixels, torch.float32 if context.rehearse else torch.bfloat16


def _training(context: Context) -> Iterator[Row]:
    """A step against the published loop in float32 and under autocast; losses and gradients of the first step."""
    model, pixels, half = _training_parts(context)
    few = pixels[: max(2, len(pixels) // 8)]
    expected = losses_and_gradients(build_plain(model, context.device), few)
    for dtype in dict.fromkeys((torch.float32, half)):
        actual = losses_and_gradients(build_ours(model, context.device, dtype), few)
        for name, a, b, limit in zip(("losses", "gradients"), actual, expected, TRAINING_LIMITS[dtype], strict=True):
            yield {"what": f"training, {name} in {dtype}", "error": relative_error(a, b), "limit": limit}
    for name, build in (
        ("ours", lambda: build_ours(model, context.device, half)),
        ("plain autocast", lambda: build_plain(model, context.device, half)),
        ("plain fp32", lambda: build_plain(model, context.device)),
    ):
        yield _training_row(name, build(), pixels, context)


def _training_row(name: str, step: Any, pixels: Tensor, context: Context) -> Row:
    if context.device.type == "cuda":
        torch.cuda.empty_cache()
    with tuned_convolutions():
        row = _timed(f"training step, {name}", lambda: step(pixels), context)
    return {**row, "images per second": 1e3 * len(pixels) / row["ms"]}


def _training_compiled(context: Context) -> Iterator[Row]:
    if context.rehearse:
        raise Skip("compilation takes minutes")
    model, pixels, half = _training_parts(context)
    yield _training_row("ours compiled", build_ours(model, context.device, half, compiled=True), pixels, context)


def _compiled(context: Context) -> Iterator[Row]:
    """torch.compile of the plain forms."""
    if context.rehearse:
        raise Skip("compilation takes minutes")
    for work in (ONE, MANY):
        network = Network(work, torch.bfloat16, context.device)
        network.lift.fused = False
        last = network.lift.to(memory_format=torch.channels_last)
        nhwc = [(i.to(memory_format=torch.channels_last), x) for i, x in network.inputs]
        with torch.no_grad():
            compiled = torch.compile(last, mode="max-autotune", fullgraph=True)
            yield {"what": f"forward {work[0]}, plain compiled", "ms": milliseconds(compiled, nhwc, context.device)}
        torch._dynamo.reset()
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        x = torch.randn(LOSS_SHAPE, device=context.device).to(dtype).requires_grad_()
        y = torch.randn(LOSS_SHAPE, device=context.device).to(dtype)
        loss = torch.compile(embedding_loss, dynamic=False)
        time = milliseconds(lambda: loss_step(loss, x, y), [()], context.device)  # noqa: B023
        yield {"what": f"CosineEmbeddingLoss compiled {name}", "ms": time, "bytes": 3 * x.numel() * x.element_size()}
        torch._dynamo.reset()
    half = _half(context)
    with torch.no_grad():
        search = torch.compile(chunked)
        yield _timed("chunked matmul + max, bf16, compiled", lambda: search(*half), context, _products(half))


@torch.no_grad()
def _peer(name: str, context: Context) -> Iterator[Row]:
    if importlib.util.find_spec(name) is None:
        raise Skip("not installed")
    if context.rehearse:
        raise Skip("some compile for minutes")
    exact, half = F.normalize(_sets(context), dim=-1), F.normalize(_half(context), dim=-1)
    if name == "faiss":
        import faiss
        import faiss.contrib.torch_utils

        resources = faiss.StandardGpuResources()
        call = lambda: faiss.knn_gpu(resources, exact[0], exact[1], 1, metric=faiss.METRIC_INNER_PRODUCT)  # noqa: E731
    elif name == "flash_kmeans":
        from flash_kmeans.assign_euclid_triton import cosine_assign_triton

        call = lambda: cosine_assign_triton(half[:1], half[1:])  # noqa: E731
    else:
        from pykeops.torch import LazyTensor

        call = lambda: (LazyTensor(exact[0][:, None]) | LazyTensor(exact[1][None])).argmax(dim=1)  # noqa: E731
    yield _timed(f"peer {name}", call, context, _products(exact))


@torch.no_grad()
def _one_launch(what: str, context: Context) -> Iterator[Row]:
    """One call, warmed up, between the profiler's marks."""
    if what in ("upsample", "head", "image encoder"):
        work = TINY if context.rehearse else MANY
        network = Network(work, torch.bfloat16, context.device)
        imgs, x = network.inputs[0]
        f, g = gpu_plan.encode_image(network.plan, imgs)
        u = gpu_plan.upsample(network.plan, network.tokens(x), f, g)
        call: Callable[[], Any] = {
            "image encoder": lambda: gpu_plan.encode_image(network.plan, imgs),
            "upsample": lambda: gpu_plan.upsample(network.plan, network.tokens(x), f, g),
            "head": lambda: gpu_plan.head(network.plan, u),
        }[what]
    elif what == "nearest":
        call = _nearest(_half(context))
    else:
        channels = 8 if context.rehearse else 193
        call = _matcher(maps_like_features(channels, context), _backend(context), context)
    call()
    if context.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()
        call()
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()
    yield {"what": f"profiled {what}", "ratio": math.nan if context.device.type == "cuda" else 0.0}
