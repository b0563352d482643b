"""Two images in memory to dense mutual matches: this package against the usual parts, whole and by stage."""

from __future__ import annotations

import importlib.util
import statistics

import pytest
import torch

from lift_fast.precision import cpu_computes

from . import pair, wide

# Of the similarity. Bfloat16 has 8 bits, and the engines round in different places.
LIMITS = {"float32": 1e-4, "bfloat16": 2e-2}


@pytest.mark.parametrize(
    ("size", "dtype", "engine"),
    [
        *((448, dtype, engine) for dtype in LIMITS for engine in pair.ENGINES),
        *((896, dtype, "OpenVINO") for dtype in LIMITS),
    ],
)
def test_pair(benchmark, compare, device, size, dtype, engine):
    cast = getattr(torch, dtype)
    if device != "cpu":
        pytest.skip("on a GPU the report measures it (python -m bench.gpu_report)")
    if not cpu_computes(cast):
        pytest.skip(f"this CPU does not compute in {dtype}")
    if engine == "OpenVINO" and importlib.util.find_spec("openvino") is None:
        pytest.skip("OpenVINO is not installed")
    benchmark.group = (
        f"Two images of {size} x {size} to mutual matches, ViT-S/16 + LiFT, {dtype}; every pixel against "
        f"{pair.POINTS} x {pair.POINTS} points by {engine}, plain LiFT, chunked products"
    )
    extractor, images = wide.vit_s(cast), pair.photographs(size)
    ours, usual = pair.ours(extractor), pair.UsualParts(extractor, engine, size)
    laps = {"ours": [], "plain": []}

    def timed(run, name):
        found = run(*images)
        laps[name].append(found.seconds)
        return found

    error = pair.disagreement(ours(*images), usual(*images))
    compare(lambda: timed(ours, "ours"), lambda: timed(usual, "plain"), error=max(error, 0.0), limit=LIMITS[dtype])
    benchmark.extra_info["stages_ms"] = {
        stage: [1e3 * statistics.median(seconds[stage] for seconds in laps[name]) for name in ("plain", "ours")]
        for stage in pair.STAGES
    }
