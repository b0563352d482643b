"""TokenCut of one image against the published pipeline: dense affinity, dense generalised eigensolver."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lift_fast.evaluation.tokencut import EPS, second_eigenvector, similarity_graph, tokencut

# The published call is SciPy's.
linalg = pytest.importorskip("scipy.linalg")
ndimage = pytest.importorskip("scipy.ndimage")
TAU = 0.2


def feature_map(side):
    """[side * side, 384]: an object on a varying ground, with noise; about as dense a graph as DINO's."""
    ground = F.interpolate(torch.randn(1, 64, 7, 7), size=(side, side), mode="bicubic")[0]
    maps = torch.einsum("cd,dhw->chw", torch.randn(384, 64) / 8, ground) + 0.6 * torch.randn(384, side, side)
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    disk = ((y - 0.4 * side) ** 2 + (x - 0.6 * side) ** 2 < (0.2 * side) ** 2).float()
    return (maps + 1.8 * disk * torch.randn(384, 1, 1)).flatten(1).T.contiguous()


def dense_affinity(features):
    unit = F.normalize(features, p=2)
    weights = np.where((unit @ unit.T).numpy() > TAU, 1.0, EPS)
    return weights, np.diag(weights.sum(1))


def published(features, side):
    """Box in cells and eigenvector, with the calls of the published code."""
    weights, degree = dense_affinity(features)
    vector = linalg.eigh(degree - weights, degree, subset_by_index=[1, 2])[1][:, 0]
    mask = vector > vector.mean()
    seed = np.argmax(np.abs(vector))
    mask = mask if mask[seed] else ~mask
    labels, _ = ndimage.label(mask.reshape(side, side).astype(float))
    ys, xs = np.where(labels == labels[np.unravel_index(seed, (side, side))])
    return (ys.min(), xs.min(), ys.max() + 1, xs.max() + 1), vector


def off(x, y):
    """The largest difference of entries, signs aside, over the largest entry."""
    return min(np.abs(x - sign * y).max() for sign in (1, -1)) / np.abs(y).max()


@pytest.mark.parametrize("side", [28, 56])
def test_whole_pipeline(benchmark, compare, device, side):
    if device == "cuda":
        pytest.skip("the eigenproblem is solved on the CPU")
    benchmark.group = f"TokenCut, cpu, {side} x {side} map, C 384, features to box"
    torch.manual_seed(0)
    features = feature_map(side)
    result = tokencut(features, (side, side), tau=TAU)
    box, vector = published(features, side)
    error = off(result.eigenvector.ravel(), vector) if result.cells == box else np.inf
    compare(
        lambda: tokencut(features, (side, side), tau=TAU),
        lambda: published(features, side),
        error=float(error),
        limit=1e-4,
    )


@pytest.mark.parametrize("side", [28, 56])
def test_eigensolver(benchmark, compare, device, side):
    if device == "cuda":
        pytest.skip("the eigenproblem is solved on the CPU")
    benchmark.group = f"TokenCut, cpu, {side} x {side} map, second eigenvector alone"
    torch.manual_seed(0)
    features = feature_map(side)
    graph = similarity_graph(features, TAU)
    weights, degree = dense_affinity(features)

    def plain():
        return linalg.eigh(degree - weights, degree, subset_by_index=[1, 2])[1][:, 0]

    error = off(second_eigenvector(graph).vector.numpy(), plain())
    compare(lambda: second_eigenvector(graph), plain, error=float(error), limit=1e-4)
