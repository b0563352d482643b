"""LiFT's forward pass: every kernel and the whole, against the plain module three ways, and judged by the ceilings."""

from __future__ import annotations

import copy
from typing import Any

import torch

from lift_fast import LiFT
from lift_fast.ops import gpu_plan, image_encoder_cuda
from lift_fast.plan import build_plan
from lift_fast.testing import randomize

from .clock import host_milliseconds, milliseconds, replay_milliseconds
from .cost import Cost, forward_cost
from .state import State

# (name, B, pixels, patch, C)
WORK = [
    ("B1 448", 1, 448, 16, 384),
    ("B64 448", 64, 448, 16, 384),
    ("B1 224", 1, 224, 16, 384),
    ("B1 896", 1, 896, 16, 384),
    ("B8 448 patch 8", 8, 448, 8, 384),
    ("B8 448 C768", 8, 448, 16, 768),
]
TINY = [("B1 32", 1, 32, 16, 32)]
# torch.compile takes a minute or so for each.
COMPILED = ("B1 448", "B64 448")
# UPLiFT's Fast Mode, one 2x step, as published for an H100 PCIe in bfloat16; milliseconds.
UPLIFT = {"B1 224": 0.31, "B1 448": 1.14, "B1 896": 4.04}
# Inputs take turns until together they are larger than any second-level cache.
_ROTATED_BYTES = 256 << 20


class Network:
    """A random LiFT in one dtype, its kernels' plan, and inputs as the operator takes them."""

    def __init__(self, work: tuple[str, int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.name, self.batch, side, self.patch, self.channels = work
        self.h = side // self.patch
        torch.manual_seed(0)
        lift = randomize(LiFT(self.channels, self.patch), 0).eval().requires_grad_(False)
        composed = build_plan(*lift._plan_sources(), lift.architecture)
        self.plan = gpu_plan.prepare_gpu(composed, device, dtype)
        self.other_encoder = gpu_plan.prepare_gpu(composed, device, dtype, "triton")
        self.lift = lift.to(device, dtype)
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
        self.cost = forward_cost(
            self.batch, self.h, self.h, self.channels, pool=self.patch != 8, itemsize=dtype.itemsize
        )

    def tokens(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(self.batch, self.h, self.h, self.channels)


@torch.no_grad()
def run(state: State) -> None:
    """Writes ``forward``: times, shares of the ceilings, memory; and judges the goals."""
    rows: list[dict[str, Any]] = []
    state.results["forward"] = rows
    for work in TINY if state.rehearse else WORK:
        if state.left() < 20:
            state.skipped.append(f"forward {work[0]}: no time left")
            continue
        network = Network(work, torch.float32 if state.rehearse else torch.bfloat16, state.device)
        rows += _stages(state, network)
        row = _whole(state, network)
        rows.append(row)
        _print(row)
        if work[0] in ("B1 448", "B64 448"):
            exact = Network(work, torch.float32, state.device)
            rows.append({"work": work[0], "what": "forward, float32 as TF32", "ms": _ours(exact)})
        state.write()
    _judge(state, {(row["work"], row["what"]): row for row in rows})


def _ours(network: Network) -> float:
    """The kernels alone: one picture as a graph, a batch by events over rotated inputs."""

    def forward(imgs: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return gpu_plan.run_gpu_plan(network.plan, imgs, network.tokens(x))

    if network.batch == 1:
        return replay_milliseconds(forward, network.inputs[0], network.device)
    return milliseconds(forward, network.inputs, network.device)


def _stages(state: State, network: Network) -> list[dict[str, Any]]:
    plan, device = network.plan, network.device
    imgs, x = network.inputs[0]
    tokens = network.tokens(x)
    f, g = gpu_plan.encode_image(plan, imgs)
    u = gpu_plan.upsample(plan, tokens, f, g)
    rows = []
    for name, function, arguments in (
        ("image encoder", gpu_plan.encode_image, (plan, imgs)),
        ("upsample", gpu_plan.upsample, (plan, tokens, f, g)),
        ("head", gpu_plan.head, (plan, u)),
    ):
        time = replay_milliseconds(function, arguments, device, replays=200 if network.batch == 1 else 20)
        rows.append(_row(state, network, name, time, network.cost[name]))
        _print(rows[-1])
        if name == "image encoder":
            rows[-1]["encoder"] = plan.encoder
    if plan.encoder != "triton":
        replays = 200 if network.batch == 1 else 20
        time = replay_milliseconds(gpu_plan.encode_image, (network.other_encoder, imgs), device, replays=replays)
        rows.append(_row(state, network, "image encoder, Triton", time, network.cost["image encoder"]))
        _print(rows[-1])
    if plan.encoder == "cuda":
        for cut in ("walk", "stream", "spread"):
            arguments = (imgs, plan.encoder_weights, cut)
            time = replay_milliseconds(
                image_encoder_cuda.encode_image, arguments, device, replays=200 if network.batch == 1 else 20
            )
            rows.append(_row(state, network, f"image encoder, {cut}", time, network.cost["image encoder"]))
            _print(rows[-1])
    time = replay_milliseconds(lambda: gpu_plan.head(plan, u, normalize=True), (), device, replays=20)
    rows.append({"work": network.name, "what": "head, normalised", "ms": time})
    return rows


def _row(state: State, network: Network, what: str, time: float, cost: Cost) -> dict[str, Any]:
    row: dict[str, Any] = {"work": network.name, "what": what, "ms": time, "flops": cost.flops, "bytes": cost.bytes}
    ceilings = state.results.get("ceilings")
    if ceilings and not state.rehearse:
        flops, copy = ceilings["bf16 flops per second"], ceilings["copy bytes per second"]
        row["floor ms"] = 1e3 * cost.floor(flops, copy)
        row["of matmul"] = cost.flops / (time / 1e3) / flops
        row["of copy"] = cost.bytes / (time / 1e3) / copy
    return row


def _whole(state: State, network: Network) -> dict[str, Any]:
    device, inputs = network.device, network.inputs
    total = network.cost["image encoder"] + network.cost["upsample"] + network.cost["head"]
    row = _row(state, network, "forward", _ours(network), total)
    row["eager ms"] = milliseconds(network.lift, inputs, device)
    row["host ms"] = host_milliseconds(network.lift, inputs[0], device)
    row["scratch bytes"] = _scratch(network)
    row["least scratch bytes"] = _least_scratch(network)

    plain = copy.deepcopy(network.lift)
    plain.fused = False
    single = copy.deepcopy(plain).float()
    row["plain float32 ms"] = milliseconds(single, [(i.float(), x.float()) for i, x in inputs[:4]], device)
    last = plain.to(memory_format=torch.channels_last)
    nhwc = [(i.to(memory_format=torch.channels_last), x) for i, x in inputs]
    row["plain bfloat16 channels_last ms"] = milliseconds(last, nhwc, device)
    if network.name in COMPILED and not state.rehearse:
        if state.left() < 150:
            state.skipped.append(f"compiled {network.name}: {state.left():.0f} s left")
        else:
            compiled = torch.compile(last, mode="max-autotune", fullgraph=True)
            row["plain compiled ms"] = milliseconds(compiled, nhwc, device)
            torch._dynamo.reset()
    return row


def _scratch(network: Network) -> int | None:
    """Bytes at the peak of one forward pass beyond its inputs, weights and output."""
    if network.device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = network.lift(*network.inputs[0])
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - out.numel() * out.element_size()


def _least_scratch(network: Network) -> int:
    """f, g and the c-channel fine map."""
    coarse = network.batch * network.h**2
    return network.dtype.itemsize * (4 * coarse * 32 + coarse * 32 + 4 * coarse * (network.channels // 2))


def _print(row: dict[str, Any]) -> None:
    share = f"  {row['of matmul']:.0%} of matmul, {row['of copy']:.0%} of copy" if "of matmul" in row else ""
    print(f"{row['work']:16} {row['what']:16} {1e3 * row['ms']:10.1f} us{share}", flush=True)


def _judge(state: State, rows: dict[tuple[str, str], dict[str, Any]]) -> None:
    if state.rehearse:
        return

    def value(work: str, what: str, key: str) -> float | None:
        return rows.get((work, what), {}).get(key)

    def ratio(work: str, key: str) -> float | None:
        other, ours = value(work, "forward", key), value(work, "forward", "ms")
        return None if other is None or ours is None else other / ours

    one = value("B1 448", "forward", "ms")
    state.goal("forward B1 448, graph replay, us", None if one is None else 1e3 * one, 35, at_least=False)
    for work, channels_last, compiled in (("B1 448", 6, 2), ("B64 448", 3, 1.5)):
        key = "plain bfloat16 channels_last ms"
        state.goal(f"forward {work} over plain bf16 channels_last", ratio(work, key), channels_last, at_least=True)
        state.goal(f"forward {work} over compiled", ratio(work, "plain compiled ms"), compiled, at_least=True)
    state.goal("forward B64 448, share of matmul ceiling", value("B64 448", "forward", "of matmul"), 0.6, at_least=True)
    share = value("B64 448", "image encoder", "of copy")
    state.goal("image encoder B64 448, share of copy ceiling", share, 0.6, at_least=True)
    scratch, least = (value("B64 448", "forward", key) for key in ("scratch bytes", "least scratch bytes"))
    excess = None if scratch is None or least is None else scratch / least
    state.goal("scratch memory B64 448 over f, g and u", excess, 1.01, at_least=False)
    for work, published in UPLIFT.items():
        ours = value(work, "forward", "ms")
        goal = f"forward {work} against UPLiFT Fast Mode as published for an H100 PCIe ({published} ms)"
        state.goal(goal, None if ours is None else ours / published, 0.1, at_least=False)
