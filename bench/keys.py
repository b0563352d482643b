"""Keys of a ViT's last block by other engines, built from timm's modules without this package's code.

Each stops where the keys are known, as :class:`lift_fast.FrozenViT` does, so that engines are compared and not work.
"""

from __future__ import annotations

import copy
import os
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Engine = Callable[[Tensor], Tensor]


class Keys(nn.Module):
    """``[B, 3, H, W]`` to ``[B, T, C]``, heads concatenated, in plain PyTorch; for images of one size.

    Args:
        vit: a timm VisionTransformer with a class token, whose modules are copied.
        size: (height, width) of the images.
    """

    def __init__(self, vit: Any, size: tuple[int, int]) -> None:
        super().__init__()
        vit = copy.deepcopy(vit)
        self.patches, blocks = vit.patch_embed.proj, list(vit.blocks)
        self.blocks, self.norm = nn.Sequential(*blocks[:-1]), blocks[-1].norm1
        weight, bias = (part.detach().chunk(3)[1] for part in (blocks[-1].attn.qkv.weight, blocks[-1].attn.qkv.bias))
        self.keys = nn.Linear(weight.shape[1], weight.shape[0])
        self.keys.weight, self.keys.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
        position = vit.pos_embed.detach()
        side = int((position.shape[1] - 1) ** 0.5)
        grid = position[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        cells = [n // k for n, k in zip(size, self.patches.kernel_size, strict=True)]
        if cells != [side, side]:
            # DINO's rule, with its published program's small addition.
            grid = F.interpolate(grid, scale_factor=[(n + 0.1) / side for n in cells], mode="bicubic")
        self.register_buffer("first", vit.cls_token.detach() + position[:, :1])
        self.register_buffer("position", grid.flatten(2).transpose(1, 2).contiguous())
        self.eval().requires_grad_(False)

    def forward(self, imgs: Tensor) -> Tensor:
        x = self.patches(imgs).flatten(2).transpose(1, 2) + self.position
        x = self.blocks(torch.cat([self.first.expand(x.shape[0], -1, -1), x], dim=1))
        return self.keys(self.norm(x[:, 1:]))


def plain(keys: Keys, imgs: Tensor) -> Engine:
    """Eager PyTorch in the dtype of ``imgs``."""
    return copy.deepcopy(keys).to(imgs.device, imgs.dtype)


def compiled(keys: Keys, imgs: Tensor) -> Engine:
    """``torch.compile`` of the plain module."""
    torch._dynamo.reset()
    return torch.compile(plain(keys, imgs), dynamic=False)


def openvino(keys: Keys, imgs: Tensor) -> Engine:
    """OpenVINO for the shape of ``imgs``, for the least latency, in float32 or with bfloat16 products."""
    import openvino as ov

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = ov.convert_model(keys, example_input=imgs.float(), input=[list(imgs.shape)])
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "bf16" if imgs.dtype == torch.bfloat16 else "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    request = ov.Core().compile_model(model, "CPU", options).create_infer_request()

    def run(imgs: Tensor) -> Tensor:
        found = request.infer([imgs.float().numpy()], share_inputs=True, share_outputs=True)[0]
        return torch.from_numpy(found)

    return run


def onnxruntime(keys: Keys, imgs: Tensor) -> Engine:
    """ONNX Runtime, whose CPU engine computes these networks in float32."""
    import onnxruntime as ort

    if imgs.dtype != torch.float32:
        raise ValueError(f"ONNX Runtime computes in float32 on the CPU, not in {imgs.dtype}")
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "keys.onnx")
        torch.onnx.export(keys, (imgs,), path, input_names=["imgs"], dynamo=True, verbose=False)
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda imgs: torch.from_numpy(session.run(None, {"imgs": imgs.numpy()})[0])
