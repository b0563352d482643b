"""``lift-fast extract`` on a folder of photographs against a loop of decode, extract and ``np.savez``."""

from __future__ import annotations

import pytest
import torch

from lift_fast.precision import cpu_computes

from . import folder, wide

LIMITS = {"float32": 1e-5, "bfloat16": 2e-2}
COUNT = {"cpu": 8, "cuda": 256}


@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize("size", [224, 448])
def test_folder(benchmark, compare, device, tmp_path, size, dtype):
    cast = getattr(torch, dtype)
    if device == "cpu" and not cpu_computes(cast):
        pytest.skip(f"this CPU does not compute in {dtype}")
    count = COUNT[device]
    benchmark.group = f"{count} JPEG files of 2048 x 1536 to .npz, {device}, ViT-S/16 + LiFT at {size}, {dtype}"
    paths = folder.photographs(tmp_path / "in", count)
    extractor = wide.vit_s(cast, device)

    def ours():
        folder.by_command(tmp_path / "in", tmp_path / "ours", extractor, size)

    def plain():
        folder.by_loop(paths, tmp_path / "plain", extractor, size)

    ours(), plain()
    error = folder.difference(tmp_path / "ours", tmp_path / "plain")
    compare(ours, plain, error=error, limit=LIMITS[dtype])
    ms = {"images_per_second": "paired_ms", "plain_images_per_second": "plain_ms"}
    benchmark.extra_info.update({name: count / benchmark.extra_info[key] * 1e3 for name, key in ms.items()})
