"""One optimiser step on ViT-S/16: ours against the published loop in float32."""

from __future__ import annotations

import pytest
import torch

from lift_fast.testing import relative_error
from lift_fast.training.step import resolve_precision

from .training_pair import build_ours, build_plain, losses_and_gradients

# Of losses and gradients. Adam's and BatchNorm's divisions let bfloat16's 8 bits grow in the gradients of early layers.
LIMITS = {"float32": (1e-5, 1e-3), "bfloat16": (1e-2, 0.25)}


@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize(("batch", "size"), [(4, 256)], ids=str)
def test_training_step(benchmark, compare, device, batch, size, dtype):
    place = torch.device(device)
    if dtype == "bfloat16" and resolve_precision("auto", place) != torch.bfloat16:
        pytest.skip("this device does not compute in bfloat16")
    # A quarter of the image must be whole patches; a quarter of 224 pixels is not.
    benchmark.group = f"Training step of ViT-S/16, {device}, B{batch} {size}, {dtype} against float32"
    pixels = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=device)
    ours, plain = build_ours("dino_vits16", place, getattr(torch, dtype)), build_plain("dino_vits16", place)
    own, expected = losses_and_gradients(ours, pixels), losses_and_gradients(plain, pixels)
    errors = [relative_error(a, b) for a, b in zip(own, expected, strict=True)]
    benchmark.extra_info["errors of losses and gradients"] = errors
    worst = max(error / limit for error, limit in zip(errors, LIMITS[dtype], strict=True))
    compare(lambda: ours(pixels), lambda: plain(pixels), error=worst, limit=1.0)
