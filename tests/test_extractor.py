"""The drop-in extractor: arguments, return layout, grids, and LiFT behind strided and repeated application."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from lift_fast.backbones import FrozenViT, extract_hooked
from lift_fast.demonstration import LIFT
from lift_fast.extractor import ViTLiFTExtractor
from lift_fast.lift import LiFT
from lift_fast.testing import relative_error

pytestmark = pytest.mark.usefixtures("one_thread")


def small_vit(patch: int = 8) -> VisionTransformer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = VisionTransformer(
            patch_size=patch,
            img_size=4 * patch,
            embed_dim=48,
            depth=3,
            num_heads=4,
            num_classes=0,
            dynamic_img_size=True,
        )
        for parameter in model.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def random_lift(patch: int = 8) -> LiFT:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return LiFT(48, patch).eval()


def extractor(**options: object) -> ViTLiFTExtractor:
    settings = {"model": small_vit(), "device": "cpu", "silent": True, **options}
    return ViTLiFTExtractor(**settings)  # type: ignore[arg-type]


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def interleaved(tokens: Tensor, heads: int = 4) -> Tensor:
    return tokens.unflatten(-1, (heads, -1)).transpose(-1, -2).flatten(2)


def test_published_defaults_work(capsys: pytest.CaptureFixture[str]) -> None:
    made = ViTLiFTExtractor(device="cpu", random_weights=True)
    assert (made.channel, made.patch, made.stride, made.layer, made.facet) == (384, 8, 8, 11, "key")
    assert made.mean == (0.485, 0.456, 0.406)
    assert not made.training
    assert "dino_vits8 (random weights)" in capsys.readouterr().out
    out = made.extract_descriptors(images(1, 3, 32, 48))
    assert out.shape == (1, 24, 384)
    assert (made.load_size, made.num_patches) == ((32, 48), (4, 6))


def test_none_and_left_out_are_read_from_the_backbone(capsys: pytest.CaptureFixture[str]) -> None:
    common = {"device": "cpu", "random_weights": True, "silent": True}
    for options in ({}, {"channel": None, "patch": 16, "stride": None, "layer": None}):
        made = ViTLiFTExtractor("dino_vits16", **options, **common)  # type: ignore[arg-type]
        assert (made.channel, made.patch, made.stride, made.layer) == (384, 16, 16, 11)
    assert capsys.readouterr().out == ""
    for options, message in (
        ({"channel": 768}, "channel=768 does not fit VisionTransformer, whose channel is 48"),
        ({"patch": 16}, "patch=16 does not fit VisionTransformer"),
        ({"layer": 11}, "from -3 to 2"),
        ({"stride": 9}, "1 to the patch size 8"),
        ({"facet": "attn"}, "facet must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            extractor(**options)


def test_channel_order_is_the_published_one_wherever_lift_follows() -> None:
    model, imgs = small_vit(), images(2, 3, 32, 32)
    with torch.no_grad():
        plain = extract_hooked(model, imgs)
    alone = extractor()
    assert torch.allclose(alone(imgs), plain, rtol=1e-5, atol=1e-5)
    assert torch.allclose(extractor(head_order="interleaved")(imgs), interleaved(plain), rtol=1e-5, atol=1e-5)
    stages = extractor(lift=random_lift()).extract_descriptors_iterative_lift(imgs, return_inter=True)
    assert torch.allclose(stages["back"], interleaved(plain), rtol=1e-5, atol=1e-5)
    described = alone.descriptor_map(imgs)
    assert described.shape == (2, 48, 4, 4)
    assert torch.equal(described[:, :, 1, 2], alone(imgs)[:, 6])


def test_lift_doubles_the_grid(tmp_path: Path) -> None:
    lift, imgs = random_lift(), images(2, 3, 32, 48)
    made = extractor(lift=lift)
    out = made.extract_descriptors(imgs)
    assert out.shape == (2, 96, 48)
    assert made.grid(32, 48) == (8, 12)
    with torch.no_grad():
        expected = lift(imgs, extractor(head_order="interleaved")(imgs))
    assert torch.allclose(out, expected, rtol=1e-4, atol=1e-4)
    assert not any(p.requires_grad for p in made.lift.parameters())  # type: ignore[union-attr]
    torch.save({f"module.{k}": v for k, v in lift.state_dict().items()}, tmp_path / "lift.pth")
    loaded = extractor(lift_path=tmp_path / "lift.pth")
    assert torch.allclose(loaded(imgs), expected, rtol=1e-4, atol=1e-4)
    assert torch.allclose(extractor(lift=random_lift(), fused=False)(imgs), expected, rtol=1e-4, atol=1e-4)
    assert extractor(random_lift=True)(imgs).shape == out.shape


def test_repeated_lift_follows_the_published_loop() -> None:
    lift, imgs = random_lift(), images(1, 3, 32, 32)
    stages = extractor(lift=lift).extract_descriptors_iterative_lift(imgs, lift_iter=3, return_inter=True)
    assert list(stages) == ["back", "lift_1", "lift_2", "lift_3"]
    tokens, batch = extractor(head_order="interleaved")(imgs), imgs
    with torch.no_grad():
        for step in (1, 2, 3):
            tokens = lift(batch, tokens)
            assert stages[f"lift_{step}"].shape == (1, 16 * 4**step, 48)
            assert torch.allclose(stages[f"lift_{step}"], tokens, rtol=1e-3, atol=1e-3)
            size = (2 * batch.shape[-2], 2 * batch.shape[-1])
            batch = F.interpolate(batch, size=size, mode="bilinear", align_corners=False)
    made = extractor(lift=lift)
    assert torch.equal(made.extract_descriptors_iterative_lift(imgs, 3), stages["lift_3"])
    assert torch.equal(made.extract_descriptors_iterative_lift(imgs, 0), stages["back"])
    assert list(extractor().extract_descriptors_iterative_lift(imgs, 2, return_inter=True)) == ["back"]
    with pytest.raises(ValueError, match="lift_iter"):
        made.extract_descriptors_iterative_lift(imgs, -1)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("stride", [8, 4])
@pytest.mark.parametrize("lift_iter", [1, 2])
def test_matching_map_has_the_products_of_the_wide_descriptors(lift_iter: int, stride: int, fused: bool) -> None:
    imgs = images(2, 3, 36, 45)
    made = extractor(lift=random_lift(), stride=stride, fused=fused)
    narrow = made.matching_map(imgs, lift_iter)
    h, w = made.backbone.grid(36, 45)
    assert narrow.shape == (2, 25, h << lift_iter, w << lift_iter)
    rows = narrow.permute(0, 2, 3, 1).flatten(0, 2).double()
    wide = made.extract_descriptors_iterative_lift(imgs, lift_iter).flatten(0, 1).double()
    assert relative_error(rows @ rows.T, wide @ wide.T) <= 2e-5


def test_matching_map_without_lift_is_the_backbones_map() -> None:
    imgs = images(1, 3, 32, 48)
    alone, made = extractor(), extractor(lift=random_lift())
    assert torch.equal(alone.matching_map(imgs), alone.descriptor_map(imgs))
    back = made.extract_descriptors_iterative_lift(imgs, 0)
    assert torch.equal(made.matching_map(imgs, 0), back.transpose(1, 2).unflatten(2, (4, 6)))
    with pytest.raises(ValueError, match="lift_iter"):
        made.matching_map(imgs, -1)
    with pytest.raises(ValueError, match="uint8"):
        made.matching_map(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_matching_map_of_a_foreign_lift_keeps_its_channels() -> None:
    class Foreign(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lift = random_lift()

        def forward(self, imgs: Tensor, x: Tensor) -> Tensor:
            out: Tensor = self.lift(imgs, x)
            return out

    imgs = images(1, 3, 32, 48)
    made = extractor(lift=Foreign())
    assert made.matching_map(imgs).shape == (1, 48, 8, 12)
    assert torch.equal(made.matching_map(imgs), made.descriptor_map(imgs))


def test_covered_pixels_and_random_weights() -> None:
    assert extractor().covered(36, 45) == (0, 0, 32, 40)
    assert extractor(stride=4).covered(40, 32) == (2, 2, 36, 28)
    assert not extractor().random_weights
    assert extractor(random_lift=True).random_weights
    assert ViTLiFTExtractor("dino_vits16", device="cpu", random_weights=True, silent=True).random_weights


@pytest.mark.parametrize("size", [(36, 45), (39, 32)])
def test_sizes_that_are_no_multiple_of_the_patch(size: tuple[int, int]) -> None:
    lift, imgs = random_lift(), images(1, 3, *size)
    h, w = size[0] // 8, size[1] // 8
    # The patches begin at the top left corner.
    crop = imgs[:, :, : 8 * h, : 8 * w]
    made = extractor(lift=lift)
    stages = made.extract_descriptors_iterative_lift(imgs, 2, return_inter=True)
    with torch.no_grad():
        one = lift(crop, extractor(head_order="interleaved")(imgs))
        two = lift(F.interpolate(crop, scale_factor=2, mode="bilinear", align_corners=False), one)
    assert torch.allclose(stages["lift_1"], one, rtol=1e-4, atol=1e-4)
    assert torch.allclose(made(imgs), one, rtol=1e-4, atol=1e-4)
    assert torch.allclose(stages["lift_2"], two, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("stride", [4, 2])
def test_lift_sees_what_overlapping_patches_stand_for(stride: int) -> None:
    imgs = images(1, 3, 40, 32)
    h, w = 1 + (40 - 8) // stride, 1 + (32 - 8) // stride
    seen: list[Tensor] = []
    lift = random_lift()
    lift.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    made = extractor(stride=stride, lift=lift)
    assert made(imgs).shape == (1, 4 * h * w, 48)
    assert made.grid(40, 32) == (2 * h, 2 * w)
    assert made.extract_descriptors_iterative_lift(imgs, 2).shape == (1, 16 * h * w, 48)
    assert seen[0].shape == (1, 3, 8 * h, 8 * w)
    # A ramp stays a ramp: cell i of the enlarged image is centred on the centre of patch i.
    ramp = torch.arange(40.0).view(1, 1, 40, 1).expand(1, 3, 40, 32).contiguous()
    seen.clear()
    made(ramp)
    cells = seen[0][0, 0, :, 0].view(h, 8).mean(1)
    centres = torch.arange(h) * stride + 3.5
    assert torch.allclose(cells[1:-1], centres[1:-1], atol=1e-3)


def test_low_precision() -> None:
    imgs = images(1, 3, 32, 32)
    exact = extractor(lift=random_lift())(imgs)
    made = extractor(lift=random_lift(), dtype=torch.bfloat16)
    low = made(imgs)
    assert low.dtype == made.dtype == torch.bfloat16
    assert F.cosine_similarity(low.float(), exact, dim=-1).mean() > 0.99


def test_preprocess(tmp_path: Path) -> None:
    Image.fromarray(np.full((60, 90, 3), 200, np.uint8)).save(tmp_path / "a.png")
    made = extractor()
    batch, image = made.preprocess(tmp_path / "a.png", 32)
    assert (batch.shape, image.size, image.mode) == ((1, 3, 32, 48), (48, 32), "RGB")
    again, _ = made.preprocess(Image.open(tmp_path / "a.png"), (32, 48))
    assert torch.equal(batch, again)
    assert made(batch).shape == (1, 24, 48)
    with pytest.raises(FileNotFoundError, match=r"b\.png"):
        made.preprocess(tmp_path / "b.png", 32)


def test_a_given_frozen_vit_keeps_its_settings_and_place() -> None:
    backbone = FrozenViT(small_vit(), facet="token", layer=1)
    made = extractor(model=backbone, facet="token", dtype=torch.bfloat16)
    assert (made.layer, made.facet) == (1, "token")
    assert next(backbone.parameters()).dtype == torch.float32
    assert extractor(model=backbone, facet="token", layer=-2).layer == 1
    with pytest.raises(ValueError, match="facet='key' does not fit the given FrozenViT"):
        extractor(model=backbone)
    with pytest.raises(ValueError, match="layer=2 does not fit"):
        extractor(model=backbone, facet="token", layer=2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lift_path": "nowhere.pth"}, FileNotFoundError, "nowhere.pth"),
        ({"lift": LiFT(64, 8)}, ValueError, "in_channels=64.*needs 48"),
        ({"lift": LiFT(48, 16)}, ValueError, "patch_size=16.*needs 8"),
        ({"lift": LiFT(48, 8, post_shape=False)}, ValueError, "tokens"),
        ({"lift": LiFT(48, 8), "random_lift": True}, ValueError, "lift and random_lift exclude"),
        ({"random_weights": True}, ValueError, "do not apply to model="),
        ({"dtype": torch.int8}, ValueError, "int8"),
        ({"channel": 384}, ValueError, "channel=384"),
    ],
)
def test_bad_arguments(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        extractor(**options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("device", ["meta", "cuda"])
@pytest.mark.parametrize("name", ["demo_vitt16", "vit_small_patch16_dinov3", "vit_base_patch32_clip_224"])
def test_defaults_of_the_program_change_no_bit(dtype: torch.dtype, device: str, name: str) -> None:
    demonstration = name == "demo_vitt16"
    imgs = torch.randn(1, 3, 64, 96)

    def outcome() -> tuple[list[torch.Tensor], torch.Tensor]:
        extractor = ViTLiFTExtractor(
            name, LIFT if demonstration else None, channel=None, patch=None, stride=None, layer=None, device="cpu",
            silent=True, random_weights=not demonstration, random_lift=not demonstration,
        )  # fmt: skip
        with torch.no_grad():
            return list(extractor.state_dict().values()), extractor.extract_descriptors_iterative_lift(imgs, 2)

    weights, expected = outcome()
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            found, descriptors = outcome()
    finally:
        torch.set_default_dtype(before)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, weights, strict=True))
    assert torch.equal(descriptors, expected)


def test_bad_batches_and_missing_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    made = extractor()
    with pytest.raises(ValueError, match="uint8"):
        made(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(TypeError, match="ndarray"):
        made(np.zeros((1, 3, 32, 32)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="no CUDA device; pass device='cpu'"):
        extractor(device="cuda")
    assert extractor(device=None).device.type == "cpu"
