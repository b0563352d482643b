"""``dense_match`` against interpolate-then-argmax as in published evaluation code, on 448 x 448 pixels."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lift_fast import dense_match
from lift_fast.ops.lift_forward.plan import span_basis

from .maps import nearly_flat, photograph_maps, smooth_maps

SIZE = 448


def lifted_maps(device):
    """LiFT's maps of two images, ``[1, 384, 56, 56]`` each, and the same maps in the basis of their span."""
    hidden = smooth_maps(2, 384, 56, device)[:, :192].relu()
    weight, bias = torch.randn(384, 192, device=device) / 14, torch.randn(384, device=device) / 4
    basis, _ = span_basis(weight, bias)
    wide = F.conv2d(hidden, weight[:, :, None, None], bias)
    narrow = (wide.permute(0, 2, 3, 1).double() @ basis.double()).float().permute(0, 3, 1, 2)
    return wide.split(1), narrow.split(1)


@pytest.mark.parametrize("features", ["maps", "LiFT's basis"])
@pytest.mark.parametrize("count", [30, 200])
def test_points(benchmark, compare, device, count, features):
    benchmark.group = f"dense_match, {device}, {count} points against {SIZE} x {SIZE}, 56 x 56 {features}, C 384"
    torch.manual_seed(0)
    (query_map, key_map), given = lifted_maps(device)
    if features == "maps":
        query_map, key_map = given = smooth_maps(2, 384, 56, device).split(1)
    points = torch.randint(SIZE, (1, count, 2), device=device)
    size = (SIZE, SIZE)

    def ours():
        return dense_match(*given, size, size, points=points)

    def plain():
        query, key = (
            F.interpolate(F.normalize(m, dim=1), size=size, mode="bilinear").flatten(2)[0] for m in (query_map, key_map)
        )
        rows = points[0, :, 1] * SIZE + points[0, :, 0]
        return (query[:, rows].T @ key).max(dim=1)

    values = plain().values
    error = float((ours().similarity[0] - values).abs().max())
    compare(ours, plain, error=error, limit=1e-5)


# Queries for the measured brute force; for all of them it takes minutes.
SAMPLE = 64


FEATURES = {
    "random": lambda device: smooth_maps(2, 384, 56, device),
    "of photographs": lambda device: photograph_maps(SIZE, device),
    "nearly flat": lambda device: nearly_flat(photograph_maps(SIZE, device)),
}


@pytest.mark.parametrize("mutual", [False, True])
@pytest.mark.parametrize("normalize", ["grid", "pixel"])
@pytest.mark.parametrize("features", FEATURES)
def test_every_pixel(benchmark, compare, device, normalize, mutual, features):
    torch.manual_seed(0)
    maps = FEATURES[features](device)
    query_map, key_map = maps.split(1)
    benchmark.group = (
        f"dense_match, {device}, every pixel of {SIZE} x {SIZE} against every one, features {features}, "
        f"C {maps.shape[1]}"
    )
    size = (SIZE, SIZE)
    rows = torch.randint(SIZE * SIZE, (SAMPLE,), device=device)

    def wide(maps):
        maps = F.normalize(maps, dim=1) if normalize == "grid" else maps
        maps = F.interpolate(maps, size=size, mode="bilinear").flatten(2)[0]
        return F.normalize(maps, dim=0) if normalize == "pixel" else maps

    # Outside the timing: only the products and the maximum of brute force are timed.
    query, key = wide(query_map)[:, rows].T.contiguous(), wide(key_map)

    def ours():
        return dense_match(query_map, key_map, size, size, normalize=normalize, mutual=mutual)

    result, best = ours(), (query @ key).max(dim=1)
    found = result.xy[0, rows, 1] * SIZE + result.xy[0, rows, 0]
    # A different pixel of equal similarity is right too.
    chosen = (query * key[:, found].T).sum(dim=1)
    error = max(float((result.similarity[0, rows] - best.values).abs().max()), float((best.values - chosen).max()))
    compare(
        ours,
        lambda: (query @ key).max(dim=1),
        error=error,
        limit=1e-5,
        name=f'lift_fast normalize="{normalize}"{", mutual" if mutual else ""}',
        share=SAMPLE / (SIZE * SIZE),
    )
