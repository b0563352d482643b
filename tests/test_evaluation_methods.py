"""Where LiFT's image branch stands in evaluations of images that are no whole patches."""

import pytest
import torch
from evaluation_data import published_lift, tiny_backbone
from timm.models.vision_transformer import VisionTransformer

from lift_fast import LiFT
from lift_fast.backbones import FrozenViT
from lift_fast.evaluation.methods import Batch, build_methods, published_offset
from lift_fast.testing import randomize

pytestmark = pytest.mark.usefixtures("one_thread")


def backbone_of(patch):
    if patch == 16:
        return tiny_backbone()
    torch.manual_seed(0)
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=0)
    return FrozenViT(model, head_order="interleaved").double()


def cosines(maps):
    unit = torch.nn.functional.normalize(maps[0].flatten(1), dim=0)
    return unit.T @ unit


# Every size at which the published program runs, and reads no less than the tokens.
@pytest.mark.parametrize(("patch", "size"), [*((16, s) for s in (48, 50, 52, 53, 54, 55, 56)), (8, 24), (8, 28)])
def test_lift_sees_what_the_published_program_shows_it(patch, size):
    backbone = backbone_of(patch)
    lift = randomize(LiFT(24, patch), 3).eval().double()
    imgs = torch.randn(1, 3, size, size, dtype=torch.float64)
    tokens = backbone(imgs).transpose(1, 2).unflatten(2, backbone.grid(size, size))
    with torch.no_grad():
        expected = cosines(published_lift(lift, imgs, tokens))
    (published,) = build_methods(["lift"], backbone, lift)
    found = published(Batch(imgs))
    assert found.map.shape[2:] == (2 * (size // patch),) * 2
    assert found.covered == (0, 0, patch * (size // patch), patch * (size // patch))
    torch.testing.assert_close(cosines(found.map), expected, rtol=0, atol=1e-9)
    (aligned,) = build_methods(["lift"], backbone, lift, image_branch="aligned")
    other = cosines(aligned(Batch(imgs)).map)
    moved = size % patch in (range(5, 9) if patch == 16 else [4])
    assert bool((other - expected).abs().max() > 1e-3) == moved
    assert published_offset(size, size, patch) == (2 if moved else 0)


def test_both_sides_must_have_such_a_remainder():
    assert published_offset(56, 56, 16) == published_offset(56, 53, 16) == 2
    assert published_offset(56, 64, 16) == published_offset(50, 56, 16) == published_offset(57, 57, 16) == 0
    assert published_offset(56, 56, 14) == published_offset(63, 63, 32) == 0


def test_overlapping_patches_and_repetition_are_as_before():
    backbone = tiny_backbone()
    lift = randomize(LiFT(24, 16), 3).eval().double()
    imgs = torch.randn(1, 3, 56, 56, dtype=torch.float64)
    strided = [
        build_methods(["lift"], backbone.strided(8), lift, image_branch=name)[0](Batch(imgs)).map
        for name in ("published", "aligned")
    ]
    torch.testing.assert_close(*strided, rtol=0, atol=0)
    (twice,) = build_methods(["lift-2"], backbone, lift)
    assert twice(Batch(imgs)).map.shape[2:] == (12, 12)


def test_an_unknown_branch_is_named():
    with pytest.raises(ValueError, match="image_branch must be published or aligned, got 'centred'"):
        build_methods(["backbone"], tiny_backbone(), image_branch="centred")
