"""Keys of a ViT's last block, by engine: this package's, and others used directly, against eager PyTorch."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch

from lift_fast import load_backbone
from lift_fast.backbones.engines import EngineError
from lift_fast.backbones.reference import extract_hooked
from lift_fast.evaluation.cost import flop_counter
from lift_fast.precision import cpu_computes
from lift_fast.testing import relative_error

from . import keys

LIMITS = {"float32": 1e-5, "bfloat16": 2e-2}
OTHERS = {
    "torch.compile of eager PyTorch": (keys.compiled, "torch"),
    "OpenVINO": (keys.openvino, "openvino"),
    "ONNX Runtime": (keys.onnxruntime, "onnxruntime"),
}
OURS = {f"lift_fast {engine}": engine for engine in ("torch", "openvino", "compile")}
# Compiling takes longer than measuring, so the larger networks meet the fastest engine only.
WORK = [
    *(("dino_vits16", 448, variant) for variant in (*OURS, *OTHERS)),
    *(
        (*work, variant)
        for work in (("dino_vitb16", 448), ("dino_vits8", 224))
        for variant in ("lift_fast torch", "OpenVINO")
    ),
]


def flops(function):
    with flop_counter() as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize(("batch", "size"), [(1, 224), (1, 448), (4, 224)], ids=lambda value: str(value))
def test_early_exit(benchmark, compare, device, batch, size, dtype):
    """Against hooking the keys of the whole network, as is usual."""
    benchmark.group = f"Keys of ViT-S/16, {device}, B{batch} {size}, {dtype}"
    # timm's position rule, because the hooked network is timm's own.
    backbone = load_backbone("dino_vits16", random_weights=True, position_rule="timm").to(device, getattr(torch, dtype))
    imgs = torch.randn(batch, 3, size, size, device=device, dtype=getattr(torch, dtype))
    whole = copy.deepcopy(backbone.model)
    with torch.inference_mode():
        hooked = lambda: extract_hooked(whole, imgs, backbone.layer, "key")  # noqa: E731  one expression, timed as is
        error = relative_error(backbone(imgs), hooked())
        benchmark.extra_info["flops_ratio"] = flops(hooked) / flops(lambda: backbone(imgs))
        compare(lambda: backbone(imgs), hooked, error=error, limit=LIMITS[dtype])


@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize(("model", "size", "variant"), WORK, ids=str)
def test_engines(benchmark, compare, device, model, size, dtype, variant):
    """One image; eager PyTorch, too, stops where the keys are known."""
    cast = getattr(torch, dtype)
    if device == "cpu" and not cpu_computes(cast):
        pytest.skip(f"this CPU does not compute in {dtype}")
    benchmark.group = f"Keys of {model}, engines, {device}, B1 {size}, {dtype}"
    network = load_backbone(model, random_weights=True)
    plain_keys = keys.Keys(network.model, (size, size))
    imgs = torch.randn(1, 3, size, size, device=device, dtype=cast)
    plain = keys.plain(plain_keys, imgs)
    if variant in OURS:
        try:
            other = load_backbone(model, random_weights=True, engine=OURS[variant]).to(device, cast)
            other.require_engine()
        except EngineError as error:
            pytest.skip(str(error))
    else:
        build, package = OTHERS[variant]
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
        if build in (keys.openvino, keys.onnxruntime) and device != "cpu":
            pytest.skip("measured on the CPU")
        if build is keys.onnxruntime and dtype != "float32":
            pytest.skip("ONNX Runtime computes in float32 on the CPU")
        other = build(plain_keys, imgs)
    with torch.inference_mode():
        error = relative_error(other(imgs).float(), plain(imgs).float())
        compare(lambda: other(imgs), lambda: plain(imgs), error=error, limit=LIMITS[dtype])
