"""Figures of LiFT's forward pass: whole, by stage, by tile."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial

import torch

from lift_fast.ops.lift_forward import gpu as gpu_plan
from lift_fast.ops.lift_forward import image_encoder_cuda
from lift_fast.ops.lift_forward import tiles as tile_table

from .clock import host_milliseconds, milliseconds, peak_bytes, replay_milliseconds
from .context import Context, Row
from .workloads import MANY, ONE, TINY, Network, Work, row_of, tile_row


@torch.no_grad()
def forward(work: Work, context: Context) -> Iterator[Row]:
    work = TINY if context.rehearse else work
    network = Network(work, torch.bfloat16, context.device)
    name, cost, device, inputs = network.name, network.cost, context.device, network.inputs
    total = cost["image encoder"] + cost["upsample"] + cost["head"]
    yield row_of(f"forward {name}", network.time(network.forward, inputs), total)
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
        yield row_of(f"{what} {name}{encoder}", replay_milliseconds(run, arguments, device, replays), cost[what])
    if plan.encoder != "triton":
        other = gpu_plan.prepare_gpu(network.composed, device, network.dtype, "triton")
        time = replay_milliseconds(gpu_plan.encode_image, (other, imgs), device, replays)
        yield row_of(f"image encoder {name}, triton", time, cost["image encoder"])
    if plan.encoder == "cuda":
        # Cuts that nothing chooses yet.
        for cut in ("stream", "spread"):
            arguments = (imgs, plan.encoder_weights, cut)
            time = replay_milliseconds(image_encoder_cuda.encode_image, arguments, device, replays)
            yield row_of(f"image encoder {name}, cuda, {cut}", time, cost["image encoder"])

    peak = peak_bytes(lambda: network.lift(*inputs[0]), device)
    if peak is not None:
        # f, g, the c-channel fine map and the output.
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


@torch.no_grad()
def tiles_of_lift(context: Context) -> Iterator[Row]:
    """Every tile of both stages for one image and for a batch, to choose the defaults."""
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
                yield from tile_row(what, partial(run, tile), expected, network.cost[stage])
