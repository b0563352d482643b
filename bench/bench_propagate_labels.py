"""``propagate_labels`` against the dense affinity as in published evaluation code: one step of DAVIS 2017."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lift_fast import propagate_labels

from .maps import smooth_maps

# The first frame and the 7 before the query, 448 pixels at patch 8.
GRID, FRAMES, RADIUS, K, TEMPERATURE = (56, 56), 8, 12, 5, 0.1


def smooth_frames(count, device):
    """Similar frames with the neighbourhood correlation of ViT features: [count * 56 * 56, 384]."""
    return smooth_maps(count, 384, GRID[0], device, shared=True).flatten(2).transpose(1, 2).reshape(-1, 384)


def lift_frames(count, device):
    """The same with LiFT's structure: descriptors [count * 56 * 56, 384] and their 193 coordinates in its span."""
    hidden = smooth_frames(count, device)[:, :192].relu()
    weight, bias = torch.randn(384, 192, device=device) / 192**0.5, torch.randn(384, 1, device=device)
    basis, coordinates = torch.linalg.qr(torch.cat([weight, bias], dim=1))
    span = torch.cat([hidden, torch.ones_like(hidden[:, :1])], dim=1) @ coordinates.T
    return span @ basis.T, span


@pytest.mark.parametrize("features", ["any", "LiFT"])
def test_video_step(benchmark, compare, device, features):
    """``LiFT``: in the 193 coordinates of LiFT's span, as in the evaluation; the dense form has all 384 channels."""
    objects = 4
    benchmark.group = (
        f"propagate_labels, {device}, {FRAMES} frames of 56 x 56, C 384 ({features} features), radius {RADIUS}, top {K}"
    )
    torch.manual_seed(0)
    if features == "LiFT":
        frames, span = lift_frames(FRAMES + 1, device)
    else:
        frames = span = smooth_frames(FRAMES + 1, device)
    cells = GRID[0] * GRID[1]
    (query, key), (narrow_query, narrow_key) = ((rows[:cells], rows[cells:]) for rows in (frames, span))
    labels = F.one_hot(torch.randint(objects, (len(key),), device=device), objects).float()
    # Computed once for a video, as in published code.
    at = torch.arange(GRID[0] * GRID[1], device=device)
    y, x = at // GRID[1], at % GRID[1]
    near = ((y[:, None] - y).abs() <= RADIUS) & ((x[:, None] - x).abs() <= RADIUS)
    outside = ~near.repeat(1, FRAMES)

    def ours():
        return propagate_labels(
            narrow_query, narrow_key, labels, grid=GRID, radius=RADIUS, k=K, temperature=TEMPERATURE
        )

    def plain():
        similarity = F.normalize(query, dim=1) @ F.normalize(key, dim=1).T
        top, index = similarity.masked_fill_(outside, -torch.inf).topk(K, dim=1)
        weight = torch.softmax(top / TEMPERATURE, dim=1)
        return torch.zeros_like(similarity).scatter_(1, index, weight) @ labels

    # Two keys that tie within rounding may be exchanged, and so may their random labels.
    off = (ours() - plain()).abs().amax(1)
    error = float(off.sort().values[: int(0.999 * len(off))].max())
    compare(ours, plain, error=error, limit=1e-4)
