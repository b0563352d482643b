"""Keys of ViT-S/16's last block: early exit against hooking the keys of the whole network."""

from __future__ import annotations

import copy

import pytest
import torch

from lift_fast import load_backbone
from lift_fast.backbones.reference import extract_hooked
from lift_fast.evaluation.cost import flop_counter
from lift_fast.testing import relative_error


def flops(function):
    with flop_counter() as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("batch", "size"), [(1, 224), (1, 448), (4, 224)], ids=lambda value: str(value))
def test_early_exit(benchmark, compare, device, batch, size, dtype):
    benchmark.group = f"Keys of ViT-S/16, {device}, B{batch} {size}, {dtype}"
    # timm's position rule, because the hooked network is timm's own.
    backbone = load_backbone("dino_vits16", random_weights=True, position_rule="timm").to(device, getattr(torch, dtype))
    imgs = torch.randn(batch, 3, size, size, device=device, dtype=getattr(torch, dtype))
    whole = copy.deepcopy(backbone.model)
    with torch.inference_mode():
        hooked = lambda: extract_hooked(whole, imgs, backbone.layer, "key")  # noqa: E731  one expression, timed as is
        error = relative_error(backbone(imgs), hooked())
        benchmark.extra_info["flops_ratio"] = flops(hooked) / flops(lambda: backbone(imgs))
        compare(lambda: backbone(imgs), hooked, error=error, limit=1e-5 if dtype == "float32" else 2e-2)
