"""Figures of the frozen backbone, and of a folder's images on their way through it."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lift_fast import ViTLiFTExtractor, extract_images, load_backbone

from .clock import milliseconds
from .context import Context, Row
from .cost import keys_flops
from .workloads import both_ways


@torch.no_grad()
def keys(context: Context) -> Iterator[Row]:
    """Keys of ViT-S/16's last block in bfloat16, for one image and for a pair."""
    backbone = load_backbone("dino_vits16", random_weights=True).to(context.device, torch.bfloat16)
    for size in (32,) if context.rehearse else (448, 896):
        tokens = (size // backbone.patch_size) ** 2
        for batch in (1, 2):
            imgs = torch.randn(batch, 3, size, size, device=context.device, dtype=torch.bfloat16)
            flops = batch * keys_flops(tokens, backbone.embed_dim, backbone.depth, backbone.patch_size)
            for row in both_ways(f"keys of ViT-S/16 B{batch} {size}", lambda: backbone(imgs), context):  # noqa: B023
                yield {**row, "flops": flops}


def stream(context: Context) -> Iterator[Row]:
    """``extract_images`` with its copies, from images in memory, per image; the networks alone beside it."""
    count, size = (4, 32) if context.rehearse else (256, 448)
    extractor = ViTLiFTExtractor(
        "dino_vits16",
        random_weights=True,
        random_lift=True,
        device=context.device,
        dtype=torch.bfloat16,
        silent=True,
    )
    images = [image.numpy() for image in torch.randint(256, (count, size, size, 3), dtype=torch.uint8)]

    def whole() -> None:
        for _ in extract_images(images, extractor=extractor, size=size, dtype=torch.float16):
            pass

    batch = torch.randn(min(16, count), 3, size, size, device=context.device, dtype=torch.bfloat16)
    with torch.no_grad():
        alone = milliseconds(extractor, [(batch,)], context.device)
    yield {"what": f"backbone and LiFT B{len(batch)} {size}, an image", "ms": alone / len(batch)}
    yield {"what": f"extract_images {size}, an image", "ms": milliseconds(whole, [()], context.device) / count}
