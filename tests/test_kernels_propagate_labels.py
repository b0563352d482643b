"""The Triton kernel of ``propagate_labels`` against the plain version: on a GPU, else in Triton's interpreter."""

import math
import os

import pytest
import torch

from lift_fast.ops import propagate_labels as op

triton = pytest.importorskip("triton")

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 before Triton is imported", allow_module_level=True)

pytestmark = [
    # Of NumPy, which the interpreter computes with.
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]
numeric = pytest.mark.numeric("propagate_labels")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def both(query, key, labels, *options):
    """The kernel's result, and the plain version's in float64."""
    ours = op.propagate_labels_triton(query.to(DEVICE), key.to(DEVICE), labels.to(DEVICE), *options)
    expected = op.propagate_labels_plain(query.double(), key.double(), labels.double(), *options)
    assert ours.dtype == torch.float32
    return ours.cpu().double(), expected


# (query grid, key grid, frames, radius, k, channels, objects, batch): patches cut by the border, unequal grids, windows
# of no key, of one and of all; channels and objects that fill no tile, and that need several.
CASES = [
    ((1, 1), (1, 1), 1, 0, 1, 4, 1, 1),
    ((5, 7), (5, 7), 2, 2, 5, 17, 3, 2),
    ((9, 6), (9, 6), 3, 12, 5, 70, 4, 1),
    ((4, 9), (7, 5), 2, 1, 3, 8, 2, 1),
    ((6, 6), (2, 2), 1, 0, 2, 5, 2, 1),
    ((2, 3), (9, 11), 1, 3, 32, 3, 35, 1),
    ((3, 3), (4, 17), 2, 40, 7, 130, 2, 1),
    ((1, 13), (1, 13), 2, 1, 4, 1, 5, 1),
    ((7, 1), (7, 1), 0, 2, 2, 4, 2, 1),
]


@numeric
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_plain_version(case):
    grid, key_grid, frames, radius, k, channels, objects, batch = case
    generator = torch.Generator().manual_seed(k)
    query = torch.randn(batch, math.prod(grid), channels, generator=generator)
    key = torch.randn(batch, frames * math.prod(key_grid), channels, generator=generator)
    labels = torch.rand(batch, key.shape[1], objects, generator=generator)
    ours, expected = both(query, key, labels, [radius, *grid, *key_grid], k, 0.1, True)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


@numeric
def test_a_radius_beyond_every_grid():
    query, key, labels = torch.randn(1, 6, 8), torch.randn(1, 12, 8), torch.rand(1, 12, 2)
    ours, expected = (
        op.propagate_labels_triton(
            *(part.to(DEVICE) for part in (query, key, labels)), [radius, 2, 3, 2, 3], 4, 0.1, True
        )
        for radius in (2**62, 3)
    )
    assert torch.equal(ours, expected)


@numeric
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    generator = torch.Generator().manual_seed(1)
    query, key = (torch.randn(1, count, 24, generator=generator).to(dtype) for count in (30, 60))
    labels = torch.rand(1, 60, 3, generator=generator).to(dtype)
    ours, expected = both(query, key, labels, [2, 5, 6, 5, 6], 4, 0.1, True)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


@numeric
@pytest.mark.parametrize("normalize", [True, False])
def test_ties_and_what_takes_no_part(normalize):
    """Small integers: their products are exact, so that every tie is one; the label rows name the keys chosen."""
    generator = torch.Generator().manual_seed(2)
    query, key = (torch.randn(2, count, 2, generator=generator).round() for count in (48, 144))
    query[0, 5, 1], key[0, 20, 0], key[1, 100, 1] = math.nan, math.inf, -math.inf
    if normalize:
        # All of one direction: cosines of exactly 0 and 1.
        query, key = query.where(~query.isfinite(), 1), key.where(~key.isfinite(), 1)
        key[:, ::3] *= 0
    labels = torch.eye(144).expand(2, -1, -1)
    ours, expected = both(query, key, labels, [2, 6, 8, 6, 8], 6, 1.0, normalize)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    assert bool((ours[0, 5] == 0).all())
    assert bool((ours[0, :, 20] == 0).all())
    assert bool((ours[1, :, 100] == 0).all())


@numeric
def test_large_products():
    query, key, labels = torch.full((1, 3, 2), 1e30), torch.full((1, 3, 2), 1e30), torch.eye(3)[None]
    key[0, 1] = 1
    ours, expected = both(query, key, labels, [3, 1, 3, 1, 3], 2, 0.1, True)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    # Dot products beyond float32 take no part.
    out = op.propagate_labels_triton(
        query.to(DEVICE), key.to(DEVICE), labels.to(DEVICE), [3, 1, 3, 1, 3], 2, 0.1, False
    )
    assert out.cpu().tolist() == [[[0.0, 1.0, 0.0]] * 3]


@numeric
@pytest.mark.parametrize("temperature", [1e-300, 1e300])
def test_extreme_temperatures(temperature):
    generator = torch.Generator().manual_seed(3)
    query, key, labels = (torch.randn(1, 9, size, generator=generator) for size in (4, 4, 3))
    ours, expected = both(query, key, labels, [3, 3, 3, 3, 3], 3, temperature, True)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


@numeric
def test_large_enough_for_wide_patches(monkeypatch):
    from lift_fast.kernels import propagate_labels as kernel

    monkeypatch.setattr(kernel, "_FULL", 4)
    generator = torch.Generator().manual_seed(4)
    query, key = (torch.randn(1, count, 9, generator=generator) for count in (130, 260))
    labels = torch.rand(1, 260, 3, generator=generator)
    ours, expected = both(query, key, labels, [3, 10, 13, 10, 13], 5, 0.1, True)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
def test_the_user_function_takes_this_way_on_a_gpu(monkeypatch):
    from lift_fast import propagate_labels

    query, key, labels = (torch.randn(12, size, device=DEVICE) for size in (4, 4, 2))
    expected = op.propagate_labels_triton(query[None], key[None], labels[None], [1, 3, 4, 3, 4], 5, 0.1, True)[0]
    monkeypatch.setattr(op, "propagate_labels_plain", None)
    assert torch.equal(propagate_labels(query, key, labels, grid=(3, 4), radius=1), expected)
