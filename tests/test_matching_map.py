"""LiFT in the basis of its span: inner products, norms and matches of the wide descriptors in half the width."""

import copy

import pytest
import torch
from torch.nn import functional as F

from lift_fast import LiFT, dense_match, nearest
from lift_fast.testing import randomize, relative_error

# (C, patch, H, W, options): both plan shapes, a resized patch size, sizes that are not multiples, odd C, every variant.
CASES = [
    (384, 16, 48, 80, {}),
    (64, 8, 30, 41, {}),
    (33, 14, 45, 70, {}),
    (7, 16, 16, 33, {}),
    (2, 8, 8, 8, {}),
    (3, 8, 16, 24, {"use_image": False}),
    (32, 16, 48, 32, {"image_channels": 24, "extra_image_blocks": 1}),
]


def network(channels, patch, **options):
    return randomize(LiFT(channels, patch, **options), seed=channels).eval()


def inputs(patch, height, width, channels, batch=2, dtype=torch.float32):
    grid = (height // patch) * (width // patch)
    return torch.randn(batch, 3, height, width, dtype=dtype), torch.randn(batch, grid, channels, dtype=dtype)


def exact_rows(lift, imgs, x):
    """The wide descriptors ``[n, C]`` of the plain graph in float64."""
    twin = copy.deepcopy(lift).double().eval()
    twin.fused = False
    with torch.no_grad():
        return twin(imgs.double(), x.double()).flatten(0, 1)


def rows(narrow):
    return narrow.permute(0, 2, 3, 1).flatten(0, 2).double()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("channels", "patch", "height", "width", "options"), CASES)
def test_inner_products_and_norms_are_those_of_the_wide_descriptors(channels, patch, height, width, options, fused):
    lift = network(channels, patch, **options)
    lift.fused = fused
    imgs, x = inputs(patch, height, width, channels)
    wide = exact_rows(lift, imgs, x)
    with torch.no_grad():
        narrow, unit = lift.matching_map(imgs, x), lift.matching_map(imgs, x, normalize=True)
    assert narrow.shape == unit.shape == (2, channels // 2 + 1, 2 * (height // patch), 2 * (width // patch))
    assert narrow.dtype == torch.float32
    assert relative_error(rows(narrow) @ rows(narrow).T, wide @ wide.T) <= 2e-5
    assert relative_error(rows(narrow).norm(dim=1), wide.norm(dim=1)) <= 2e-5
    directions = F.normalize(wide, dim=1)
    assert relative_error(rows(unit) @ rows(unit).T, directions @ directions.T) <= 2e-5


def test_every_path_gives_the_same_coordinates():
    lift = network(48, 16)
    imgs, x = inputs(16, 50, 64, 48)
    with torch.no_grad():
        fused = lift.matching_map(imgs, x)
        lift.fused = False
        assert relative_error(lift.matching_map(imgs, x), fused) <= 2e-5
        lift.fused = True
    with_gradients = lift.matching_map(imgs, x)
    assert with_gradients.requires_grad
    assert relative_error(with_gradients, fused) <= 2e-5
    as_maps = LiFT(48, 16, pre_shape=False, post_shape=False).eval()
    as_maps.load_state_dict(lift.state_dict())
    with torch.no_grad():
        again = as_maps.matching_map(imgs, x.transpose(1, 2).unflatten(2, (3, 4)))
    assert relative_error(again, fused) <= 2e-5


def test_training_mode_projects_the_training_output():
    lift = network(24, 8).double().train()
    imgs, x = inputs(8, 24, 32, 24, dtype=torch.float64)
    wide = lift(imgs, x).flatten(0, 1)
    narrow = rows(lift.matching_map(imgs, x))
    assert relative_error(narrow @ narrow.T, wide @ wide.T) <= 1e-12


def test_gradients_of_inner_products_are_those_of_the_wide_descriptors():
    lift = network(12, 8).double()
    imgs, x = inputs(8, 16, 24, 12, dtype=torch.float64)
    wide = lift(imgs, x)
    (wide @ wide.transpose(1, 2)).tanh().sum().backward()
    expected = [parameter.grad.clone() for parameter in lift.parameters()]
    lift.zero_grad()
    narrow = lift.matching_map(imgs, x).flatten(2)
    (narrow.transpose(1, 2) @ narrow).tanh().sum().backward()
    for parameter, gradient in zip(lift.parameters(), expected, strict=True):
        assert (parameter.grad - gradient).norm() <= 1e-9 * (1 + gradient.norm())


@pytest.mark.parametrize("fused", [True, False])
def test_autocast_computes_in_its_dtype(fused):
    lift = network(64, 16)
    lift.fused = fused
    imgs, x = inputs(16, 48, 64, 64)
    wide = exact_rows(lift, imgs, x)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = lift.matching_map(imgs, x)
    assert narrow.dtype == torch.bfloat16
    assert relative_error(rows(narrow) @ rows(narrow).T, wide @ wide.T) <= 5e-2


def test_the_basis_follows_the_weights():
    lift = network(16, 8)
    imgs, x = inputs(8, 16, 16, 16)
    with torch.no_grad():
        lift.matching_map(imgs, x)
        lift.outc.weight.mul_(1.5)
        lift.outc.bias.sub_(0.3)
        narrow = rows(lift.matching_map(imgs, x))
    wide = exact_rows(lift, imgs, x)
    assert relative_error(narrow @ narrow.T, wide @ wide.T) <= 2e-5


@pytest.mark.parametrize("normalize", ["grid", "pixel"])
def test_matches_are_those_of_the_wide_descriptors(normalize):
    channels, grid, size = 40, (6, 8), (19, 30)
    lift = network(channels, 8)
    pairs = [inputs(8, 24, 32, channels) for _ in range(2)]
    with torch.no_grad():
        maps = [lift.matching_map(*pair) for pair in pairs]
        found = dense_match(*maps, size, size, normalize=normalize)
        tokens = [m.flatten(2).transpose(1, 2) for m in maps]
        neighbours = nearest(*tokens)
    wide = [exact_rows(lift, *pair).unflatten(0, (2, -1)) for pair in pairs]
    unit = [F.normalize(w, dim=-1) for w in wide]
    cosines = unit[0] @ unit[1].transpose(1, 2)
    # Errors of 1e-5 of the descriptors' length change a cosine by twice that; the factor allows for single channels.
    at_match = cosines.gather(2, neighbours.index)
    assert (at_match[..., 0] >= cosines.amax(2) - 1e-4).all()
    assert (at_match - neighbours.similarity).abs().max() <= 1e-4
    pixels = []
    for descriptors in wide if normalize == "pixel" else unit:
        fine = F.interpolate(descriptors.transpose(1, 2).unflatten(2, grid), size=size, mode="bilinear").flatten(2)
        pixels.append((F.normalize(fine, dim=1) if normalize == "pixel" else fine).transpose(1, 2))
    similarities = pixels[0] @ pixels[1].transpose(1, 2)
    index = found.xy[..., 1] * size[1] + found.xy[..., 0]
    assert found.valid.all()
    assert (similarities.gather(2, index[..., None])[..., 0] >= similarities.amax(2) - 1e-4).all()
    direct = dense_match(*(w.transpose(1, 2).unflatten(2, grid) for w in wide), size, size, normalize=normalize)
    # Random descriptors do not tie: nearly all matches are the same pixel.
    assert (direct.xy == found.xy).all(-1).float().mean() > 0.95


def test_bad_input_is_named():
    lift = network(8, 16)
    for imgs, x, message in (
        (torch.zeros(1, 3, 32, 32), torch.zeros(1, 5, 8), r"\[1, 4, 8\].*got \[1, 5, 8\]"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), torch.zeros(1, 4, 8), "uint8"),
        (torch.zeros(0, 3, 32, 32), torch.zeros(0, 4, 8), "empty batch"),
        (torch.zeros(1, 3, 32, 32), torch.zeros(1, 4, 8).bfloat16(), "one dtype"),
    ):
        with torch.no_grad(), pytest.raises(ValueError, match=message):
            lift.matching_map(imgs, x)


@pytest.mark.parametrize("fused", [True, False])
def test_compile_full_graph(fused):
    lift = network(16, 8)
    lift.fused = fused
    imgs, x = inputs(8, 24, 16, 16)
    torch._dynamo.reset()
    compiled = torch.compile(lift.matching_map, fullgraph=True, backend="aot_eager", dynamic=False)
    with torch.no_grad():
        torch.testing.assert_close(compiled(imgs, x), lift.matching_map(imgs, x), rtol=1e-4, atol=1e-5)
