"""Figures of training: the loss and whole steps, against the usual code."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bench.bench_cosine_loss import embedding_loss
from bench.bench_cosine_loss import run as loss_step
from bench.training_pair import build_ours, build_plain, losses_and_gradients
from lift_fast import cosine_loss
from lift_fast.testing import relative_error
from lift_fast.training.step import tuned_convolutions

from .clock import milliseconds, peak_bytes, replay_milliseconds
from .context import Context, Row, Skip
from .workloads import LOSS_SHAPE, TINY_LOSS, timed

TRAINING, TINY_TRAINING = ("dino_vits16", 64, 448), ("vit_tiny_patch16_224", 2, 64)
# Of losses and of all gradients. Divisions by BatchNorm's small deviations let the rounding of early layers grow.
TRAINING_LIMITS = {torch.float32: (1e-4, 1e-2), torch.bfloat16: (1e-2, 0.25)}


def loss(context: Context) -> Iterator[Row]:
    shape = TINY_LOSS if context.rehearse else LOSS_SHAPE
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(shape, device=context.device).to(dtype).requires_grad_()
        y = torch.randn(shape, device=context.device).to(dtype)
        name = "fp32" if dtype == torch.float32 else "bf16"
        size = x.numel() * x.element_size()
        for what, loss in (("cosine loss", cosine_loss), ("permuted copies and CosineEmbeddingLoss", embedding_loss)):

            def step(loss: Any = loss, x: Tensor = x, y: Tensor = y) -> None:
                loss_step(loss, x, y)

            # Two inputs read, one gradient written. As a graph, and eager with autograd's time on the host.
            x.grad = None
            row = {"what": f"{what} {name}", "ms": replay_milliseconds(step, (), context.device, 20), "bytes": 3 * size}
            x.grad = None
            step()
            x.grad = None
            peak = peak_bytes(step, context.device, warm=False)
            yield row if peak is None else {**row, "peak bytes": peak, "peak in gradients": peak / size}
            yield {"what": f"{what} {name}, eager", "ms": milliseconds(step, [()], context.device)}


def training_parts(context: Context) -> tuple[str, Tensor, torch.dtype]:
    model, batch, side = TINY_TRAINING if context.rehearse else TRAINING
    torch.manual_seed(context.seed)
    pixels = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8, device=context.device)
    return model, pixels, torch.float32 if context.rehearse else torch.bfloat16


def training(context: Context) -> Iterator[Row]:
    """A step against the published loop in float32 and under autocast; losses and gradients of the first step."""
    model, pixels, half = training_parts(context)
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
        yield training_row(name, build(), pixels, context)


def training_row(name: str, step: Any, pixels: Tensor, context: Context) -> Row:
    if context.device.type == "cuda":
        torch.cuda.empty_cache()
    with tuned_convolutions():
        row = timed(f"training step, {name}", lambda: step(pixels), context)
    return {**row, "images per second": 1e3 * len(pixels) / row["ms"]}


def training_compiled(context: Context) -> Iterator[Row]:
    if context.rehearse:
        raise Skip("compilation takes minutes")
    model, pixels, half = training_parts(context)
    yield training_row("ours compiled", build_ours(model, context.device, half, compiled=True), pixels, context)
