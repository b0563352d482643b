"""Every figure's job, the most valuable first: ceilings, LiFT, matching, a pair, backbone, loss, training, the rest."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from bench.bench_cosine_loss import embedding_loss
from bench.bench_cosine_loss import run as loss_step
from lift_fast.ops.lift_forward import gpu as gpu_plan

from . import figures_backbone, figures_lift, figures_matching, figures_training
from .clock import milliseconds, replay_milliseconds
from .context import Context, Job, Row, Skip
from .workloads import (
    FURTHER,
    LARGE,
    LOSS_SHAPE,
    MANY,
    ONE,
    TINY,
    Network,
    descriptor_sets,
    half_sets,
    maps_like_features,
    products,
    timed,
)

# Feeds of the candidate searches that no device has run yet; each is a job of its own.
FEEDS = ("tma", "warp", "threads")
# Packages with an exact search on the GPU; measured if installed.
PEERS = ("faiss", "flash_kmeans", "pykeops")


def jobs(rehearse: bool) -> list[Job]:
    """The jobs of all figures, the most valuable first."""
    first = [
        Job("ceilings", _ceilings, 5),
        *(Job(f"forward {work[0]}", partial(figures_lift.forward, work), 4) for work in (ONE, MANY, LARGE)),
        Job("dense_match", figures_matching.dense_match, 4),
        Job("nearest bf16", figures_matching.nearest_half, 4),
        Job("pair", figures_matching.pair, 15),
        Job("captured pair", figures_matching.captured_pair, 20),
        Job("backbone", figures_backbone.keys, 6),
        Job("cosine loss", figures_training.loss, 4),
        Job("training", figures_training.training, 35),
        Job("nearest fp32", figures_matching.nearest_float32, 4),
        Job("propagate_labels", figures_matching.propagation, 4),
        Job("dense_match, other ways", figures_matching.dense_match_more, 8),
        Job("extract_images", figures_backbone.stream, 8),
    ]
    first += [Job(f"forward {work[0]}", partial(figures_lift.forward, work), 4) for work in FURTHER]
    first += [
        Job("plain forms of nearest", figures_matching.nearest_plain, 4),
        Job("tiles of LiFT", figures_lift.tiles_of_lift, 30),
        *(Job(f"streams of nearest, {feed}", partial(figures_matching.streams_of_nearest, feed), 15) for feed in FEEDS),
        Job("tiles of nearest", figures_matching.tiles_of_nearest, 20),
        Job("plain forms compiled", _compiled, 150),
        Job("training compiled", figures_training.training_compiled, 150),
        *(Job(f"peer {name}", partial(_peer, name), 30) for name in PEERS),
    ]
    # At a rehearsal's size all networks are the same.
    return [job for job in first if not rehearse or job.name not in {f"forward {work[0]}" for work in (MANY, *FURTHER)}]


def profiled(rehearse: bool) -> list[Job]:
    """Single launches for a profiler: the kernels that take most of the time."""
    sizes = {"upsample": " B64 448", "head": " B64 448", "image encoder": " B64 448", "nearest": " bf16"}
    return [Job(what + sizes.get(what, ""), partial(_one_launch, what), 10) for what in (*sizes, "dense_match")]


def _ceilings(context: Context) -> Iterator[Row]:
    """The device's best: copies, bfloat16 products, the least time of a launch."""
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
    half = half_sets(context)
    with torch.no_grad():
        search = torch.compile(figures_matching.chunked)
        yield timed("chunked matmul + max, bf16, compiled", lambda: search(*half), context, products(half))


@torch.no_grad()
def _peer(name: str, context: Context) -> Iterator[Row]:
    if importlib.util.find_spec(name) is None:
        raise Skip("not installed")
    if context.rehearse:
        raise Skip("some compile for minutes")
    exact, half = F.normalize(descriptor_sets(context), dim=-1), F.normalize(half_sets(context), dim=-1)
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
    yield timed(f"peer {name}", call, context, products(exact))


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
        call = figures_matching.nearest_call(half_sets(context))
    else:
        channels = 8 if context.rehearse else 193
        call = figures_matching.matcher(
            maps_like_features(channels, context), figures_matching.chosen_backend(context), context
        )
    call()
    if context.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()
        call()
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()
    yield {"what": f"profiled {what}", "ratio": math.nan if context.device.type == "cuda" else 0.0}
