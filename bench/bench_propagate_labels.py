"""``propagate_labels`` against the dense affinity of published evaluation code: one step of DAVIS 2017."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lift_fast import propagate_labels

# The first frame and the 7 before the query, 448 pixels at patch 8.
GRID, FRAMES, RADIUS, K, TEMPERATURE = (56, 56), 8, 12, 5, 0.1


def smooth_frames(count, device):
    """Frames that resemble each other, with the neighbourhood correlation of ViT features: [count * 56 * 56, 384]."""
    rough = torch.randn(1, 384, 28, 28, device=device)
    maps = F.interpolate(rough, scale_factor=2, mode="bilinear") + 0.3 * torch.randn(count, 384, *GRID, device=device)
    return maps.flatten(2).transpose(1, 2).reshape(-1, 384)


@pytest.mark.parametrize("objects", [4])
def test_video_step(benchmark, compare, device, objects):
    benchmark.group = f"propagate_labels, {device}, {FRAMES} frames of 56 x 56, C 384, radius {RADIUS}, top {K}"
    torch.manual_seed(0)
    frames = smooth_frames(FRAMES + 1, device)
    query, key = frames[: GRID[0] * GRID[1]], frames[GRID[0] * GRID[1] :]
    labels = F.one_hot(torch.randint(objects, (len(key),), device=device), objects).float()
    # Computed once for a video, as in published code.
    at = torch.arange(GRID[0] * GRID[1], device=device)
    y, x = at // GRID[1], at % GRID[1]
    near = ((y[:, None] - y).abs() <= RADIUS) & ((x[:, None] - x).abs() <= RADIUS)
    outside = ~near.repeat(1, FRAMES)

    def ours():
        return propagate_labels(query, key, labels, grid=GRID, radius=RADIUS, k=K, temperature=TEMPERATURE)

    def plain():
        similarity = F.normalize(query, dim=1) @ F.normalize(key, dim=1).T
        top, index = similarity.masked_fill_(outside, -torch.inf).topk(K, dim=1)
        weight = torch.softmax(top / TEMPERATURE, dim=1)
        return torch.zeros_like(similarity).scatter_(1, index, weight) @ labels

    # Random labels: two keys that tie within rounding may be exchanged, and with them their labels.
    off = (ours() - plain()).abs().amax(1)
    error = float(off.sort().values[: int(0.999 * len(off))].max())
    compare(ours, plain, error=error, limit=1e-4)
