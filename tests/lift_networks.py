"""Small LiFTs, their inputs, and their plain graph in another dtype."""

import copy

import torch

from lift_fast import LiFT
from lift_fast.testing import randomize


def network(channels, patch, seed, **options):
    torch.manual_seed(seed)
    return randomize(LiFT(channels, patch, **options), seed).eval()


def inputs(patch, height, width, channels, batch=2):
    return torch.randn(batch, 3, height, width), torch.randn(batch, (height // patch) * (width // patch), channels)


def plain(lift, imgs, x, dtype):
    twin = copy.deepcopy(lift).to(dtype)
    twin.fused = False
    with torch.no_grad():
        return twin(imgs.to(dtype), x.to(dtype))
