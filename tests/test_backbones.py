"""Frozen backbones against timm's own forward pass, DINO's position rule, and an analytic FLOP count."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.eva import Eva
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock, VisionTransformer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lift_fast.backbones import OFFICIAL, FrozenViT, WeightsNotFoundError, extract_hooked, load_backbone

pytestmark = pytest.mark.usefixtures("one_thread")

FACETS = ("key", "query", "value", "token")


@pytest.fixture(scope="module")
def dino() -> nn.Module:
    return load_backbone("dino_vits16", random_weights=True).model


def small_vit(seed: int = 0, **extra: object) -> VisionTransformer:
    """Three blocks, width 48, all parameters random (timm's own initialisation leaves biases and scales trivial)."""
    arguments = {"patch_size": 8, "img_size": 32, "embed_dim": 48, "depth": 3, "num_heads": 4, "num_classes": 0}
    return randomised(VisionTransformer(**{**arguments, "dynamic_img_size": True, **extra}), seed)


def small_eva(seed: int = 0, **extra: object) -> Eva:
    arguments = {"patch_size": 8, "img_size": 32, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 0}
    return randomised(Eva(**{**arguments, "dynamic_img_size": True, **extra}), seed)


def randomised(model: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative_error(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max())


MODELS = {
    "plain": lambda: small_vit(),
    "registers": lambda: small_vit(reg_tokens=4, no_embed_class=True, init_values=0.5),
    "registers_with_position": lambda: small_vit(reg_tokens=2),
    "no_class_token": lambda: small_vit(class_token=False, global_pool="avg"),
    "pre_norm_qk_norm": lambda: small_vit(pre_norm=True, qk_norm=True),
    "post_norm": lambda: small_vit(block_fn=ResPostBlock, init_values=0.3),
    "no_position": lambda: small_vit(pos_embed="none"),
    "no_bias": lambda: small_vit(qkv_bias=False),
    "distilled": lambda: randomised(
        timm.create_model("deit_tiny_distilled_patch16_224", depth=2, num_classes=0, dynamic_img_size=True), 0
    ),
    "eva_fused": lambda: small_eva(use_rot_pos_emb=True, swiglu_mlp=True),
    "eva_split": lambda: small_eva(qkv_fused=False, use_rot_pos_emb=True, ref_feat_shape=(4, 4)),
    "eva_dinov3": lambda: small_eva(
        use_rot_pos_emb=True, use_abs_pos_emb=False, rope_type="dinov3", num_reg_tokens=4, init_values=0.5
    ),
    "eva_mixed": lambda: small_eva(use_rot_pos_emb=True, rope_type="mixed", attn_type="rope"),
    "eva_post_norm": lambda: small_eva(use_post_norm=True),
}


@pytest.mark.parametrize("kind", MODELS)
def test_every_facet_and_layer_equals_the_hooked_forward(kind: str) -> None:
    release = tuple(int(part) for part in timm.__version__.split(".")[:3] if part.isdigit())
    if kind in ("no_position", "eva_post_norm") and release < (1, 0, 31):
        pytest.skip(f"timm {timm.__version__} cannot build or run this model itself")
    model = MODELS[kind]()
    size = 224 if kind == "distilled" else 32
    imgs = images(2, 3, size, size)
    with torch.no_grad():
        for facet in FACETS:
            for layer in (0, -1):
                ours = FrozenViT(model, facet=facet, layer=layer)(imgs)
                assert relative_error(ours, extract_hooked(model, imgs, layer, facet)) <= 1e-5, (facet, layer)


@pytest.mark.parametrize("kind", ["plain", "registers", "no_class_token", "eva_split", "eva_dinov3", "eva_mixed"])
@pytest.mark.parametrize("size", [(40, 16), (8, 8), (64, 64)])
def test_other_grids_follow_timm(kind: str, size: tuple[int, int]) -> None:
    model = MODELS[kind]()
    imgs = images(1, 3, *size)
    with torch.no_grad():
        ours = FrozenViT(model, position_rule="timm")(imgs)
        assert relative_error(ours, extract_hooked(model, imgs)) <= 1e-5


@pytest.mark.parametrize(
    "name",
    [
        "vit_small_patch8_224.dino",
        "vit_small_patch14_dinov2",
        "vit_small_patch14_reg4_dinov2",
        "vit_small_patch16_dinov3",
        "vit_base_patch16_224.mae",
        "vit_xsmall_patch16_clip_224",
        "vit_base_patch16_siglip_224",
        "eva02_tiny_patch14_224",
        "vit_small_patch16_rope_224",
    ],
)
def test_named_models(name: str) -> None:
    model = timm.create_model(name, depth=2, num_classes=0, dynamic_img_size=True).eval()
    backbone = FrozenViT(model, position_rule="timm")
    p = backbone.patch_size
    imgs = images(1, 3, 5 * p, 3 * p)
    with torch.no_grad():
        assert relative_error(backbone(imgs), extract_hooked(model, imgs)) <= 1e-5
    assert (backbone.grid(5 * p, 3 * p), backbone.layer) == ((5, 3), 1)


def test_normalisation_of_official_names() -> None:
    half = (0.5, 0.5, 0.5)
    for name in ("dino_vits16", "vit_small_patch16_224", "vit_small_patch8_224"):
        backbone = load_backbone(name, random_weights=True)
        assert (backbone.mean == half, backbone.std == half) == ("dino" not in name,) * 2
        assert backbone.position_rule == "dino"
    assert len(OFFICIAL) >= 8
    assert load_backbone("vit_xsmall_patch16_clip_224", random_weights=True).mean[0] == pytest.approx(0.4815, abs=1e-3)


def dino_positions(pos_embed: Tensor, height: int, width: int, patch: int, stride: int) -> Tensor:
    """DINO's rule for an image in pixels, written out on its own: class position first."""
    count = pos_embed.shape[1] - 1
    side = math.sqrt(count)
    rows, columns = 1 + (height - patch) // stride, 1 + (width - patch) // stride
    square = pos_embed[:, 1:].reshape(1, int(side), int(side), -1).permute(0, 3, 1, 2)
    resized = F.interpolate(square, scale_factor=((rows + 0.1) / side, (columns + 0.1) / side), mode="bicubic")
    assert resized.shape[-2:] == (rows, columns)
    return torch.cat([pos_embed[:, :1], resized.permute(0, 2, 3, 1).reshape(1, rows * columns, -1)], dim=1)


@pytest.mark.parametrize("stride", [8, 4, 3])
@pytest.mark.parametrize("size", [(48, 48), (40, 24), (37, 51), (16, 64)])
def test_dino_rule_and_stride(size: tuple[int, int], stride: int) -> None:
    model = small_vit()
    imgs = images(2, 3, *size)
    backbone = FrozenViT(model, stride=stride, position_rule="dino")
    tokens = F.conv2d(imgs, model.patch_embed.proj.weight, model.patch_embed.proj.bias, stride=stride)
    h, w = tokens.shape[-2:]
    assert backbone.grid(*size) == (h, w)
    with torch.no_grad():
        x = torch.cat([model.cls_token.expand(2, -1, -1), tokens.flatten(2).transpose(1, 2)], dim=1)
        x = x + dino_positions(model.pos_embed, *size, 8, stride)
        for block in model.blocks[:-1]:
            x = block(x)
        last = model.blocks[-1]
        expected = last.attn.qkv(last.norm1(x)).chunk(3, dim=-1)[1][:, 1:]
        assert relative_error(backbone(imgs), expected) <= 1e-5


def test_native_grid_keeps_position_embeddings_untouched() -> None:
    model = small_vit()
    imgs = images(1, 3, 32, 32)
    with torch.no_grad():
        dino, plain = (FrozenViT(model, position_rule=rule)(imgs) for rule in ("dino", "timm"))
        assert torch.equal(dino, plain)
        other = images(1, 3, 48, 48)
        assert not torch.equal(*(FrozenViT(model, position_rule=rule)(other) for rule in ("dino", "timm")))


def test_interleaved_head_order_is_that_of_the_published_extractor() -> None:
    model, imgs = small_vit(), images(1, 3, 32, 32)
    heads = 4
    with torch.no_grad():
        for facet in FACETS:
            ours = FrozenViT(model, facet=facet, head_order="interleaved")(imgs)
            plain = extract_hooked(model, imgs, -1, facet)
            if facet != "token":
                # Amir et al. hold [B, heads, T, d], permute it to [B, T, d, heads], and flatten.
                plain = plain.unflatten(-1, (heads, -1)).permute(0, 2, 1, 3).permute(0, 2, 3, 1).flatten(2)
            assert relative_error(ours, plain) <= 1e-5
        split = small_eva(qkv_fused=False)
        ours = FrozenViT(split, head_order="interleaved")(imgs)
        assert (
            relative_error(ours, extract_hooked(split, imgs).unflatten(-1, (3, -1)).transpose(-1, -2).flatten(2)) < 1e-5
        )


@pytest.mark.parametrize("order", ["concatenated", "interleaved"])
def test_wrapped_projections_run_whole(order: str) -> None:
    class Adapted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    imgs = images(1, 3, 32, 32)
    for model in (small_vit(), small_eva(use_rot_pos_emb=True)):
        plain = FrozenViT(model, head_order=order, layer=1)(imgs)
        separate = getattr(model.blocks[1].attn, "q_bias", None) is not None
        model.blocks[1].attn.qkv.__class__ = Adapted
        adapted = FrozenViT(model, head_order=order, layer=1)(imgs)
        bias = model.blocks[1].attn.k_bias if separate else 0
        assert relative_error(adapted, 2 * plain - bias) <= 1e-5


def test_overlapping_patches_with_rotary_embedding() -> None:
    model = MODELS["eva_dinov3"]()
    backbone = FrozenViT(model, stride=4)
    assert backbone(images(1, 3, 32, 40)).shape == (1, 7 * 9, 48)


def block_flops(tokens: int, width: int, hidden: int) -> int:
    linear = 2 * tokens * width * (3 * width + width + 2 * hidden)
    return linear + 2 * 2 * tokens * tokens * width


@pytest.mark.parametrize(("facet", "layer"), [("key", 11), ("value", 11), ("query", 4), ("token", 11), ("token", 3)])
def test_flops_are_exactly_those_of_the_needed_layers(facet: str, layer: int, dino: nn.Module) -> None:
    backbone = FrozenViT(dino, facet=facet, layer=layer)
    width, patches = 384, 10 * 7
    imgs = images(1, 3, 160, 112)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        backbone(imgs)
    expected = 2 * patches * 3 * 16 * 16 * width
    blocks = layer + 1 if facet == "token" else layer
    expected += blocks * block_flops(patches + 1, width, 4 * width)
    if facet != "token":
        expected += 2 * patches * width * width
    assert counter.get_total_flops() == expected


def test_early_exit_saves_exactly_the_skipped_layers(dino: nn.Module) -> None:
    backbone = FrozenViT(dino)
    imgs = images(1, 3, 224, 224)
    flops = []
    for run in (lambda: backbone(imgs), lambda: extract_hooked(backbone.model, imgs)):
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            run()
        flops.append(counter.get_total_flops())
    width, tokens = 384, 197
    assert flops[1] - flops[0] == block_flops(tokens, width, 4 * width) - 2 * (tokens - 1) * width * width


def test_nothing_of_later_blocks_runs() -> None:
    model = small_vit()
    backbone = FrozenViT(model, layer=1)

    def fail(*args: object) -> None:
        raise AssertionError("ran")

    vit = backbone.model
    for module in (vit.blocks[2], vit.norm, vit.blocks[1].attn.proj, vit.blocks[1].mlp, vit.blocks[1].norm2):
        module.forward = fail
    backbone(images(1, 3, 32, 32))


def test_in_place_blocks_change_no_bit() -> None:
    model = small_vit(init_values=0.5, qk_norm=True)
    imgs = images(2, 3, 48, 32)
    backbone = FrozenViT(model, facet="token")
    calls = []
    with torch.no_grad():
        fast = backbone(imgs)
        # A hook on a submodule must be honoured, which forces the calls of the modules themselves.
        backbone.model.blocks[0].mlp.register_forward_hook(lambda *args: calls.append(1))
        assert torch.equal(backbone(imgs), fast)
    assert calls == [1]


def test_frozen_and_always_in_evaluation_mode() -> None:
    model = small_vit(drop_rate=0.5, proj_drop_rate=0.5).train()
    backbone = FrozenViT(model)
    parent = nn.Sequential(backbone).train()
    assert parent.training
    assert not any(m.training for m in backbone.modules())
    assert model.training, "the given model must not change"
    assert all(p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for p in backbone.parameters())
    imgs = images(1, 3, 32, 32).requires_grad_()
    assert torch.equal(backbone(imgs), backbone(imgs))
    backbone(imgs).sum().backward()
    assert imgs.grad is not None
    assert bool(imgs.grad.abs().sum() > 0)


def test_weights_are_shared_and_updates_reach_cached_positions() -> None:
    model = small_vit()
    backbone = FrozenViT(model, position_rule="dino")
    imgs = images(1, 3, 48, 48)
    before = backbone(imgs)
    assert torch.equal(backbone(imgs), before)
    assert backbone.model.pos_embed.data_ptr() == model.pos_embed.data_ptr()
    with torch.no_grad():
        model.pos_embed.mul_(2)
    after = backbone(imgs)
    assert not torch.equal(after, before)
    assert torch.equal(FrozenViT(model, position_rule="dino")(imgs), after)


@pytest.mark.parametrize("made_in_inference_mode", [True, False])
def test_cached_positions_see_every_change_in_inference_mode(made_in_inference_mode: bool) -> None:
    with torch.inference_mode(made_in_inference_mode):
        model = small_vit()
    imgs = images(1, 3, 48, 40)

    def fresh() -> Tensor:
        return FrozenViT(backbone.model, position_rule="dino")(imgs)

    with torch.inference_mode():
        backbone = FrozenViT(model, position_rule="dino")
        before = backbone(imgs)
        model.pos_embed.add_(0.5)
        changed = backbone(imgs)
        assert not torch.equal(changed, before)
        assert torch.equal(changed, fresh())
        model.load_state_dict({name: value * 1.1 for name, value in model.state_dict().items()})
        assert torch.equal(backbone(imgs), fresh())
    for inference in (True, False):
        with torch.inference_mode(inference), torch.no_grad():
            for _ in range(10):
                # The allocator hands out the address of the one that is gone.
                backbone.model.pos_embed = None
                backbone.model.pos_embed = nn.Parameter(torch.randn(model.pos_embed.shape), requires_grad=False)
                assert torch.equal(backbone(imgs), fresh())


def test_cached_positions_follow_an_inner_model_that_was_moved_alone() -> None:
    backbone = FrozenViT(small_vit(), position_rule="dino")
    imgs = images(1, 3, 48, 40)
    backbone(imgs)
    backbone.model.double()
    assert backbone(imgs.double()).dtype == torch.float64


def test_device_and_dtype_follow_the_weights_that_see_the_image() -> None:
    backbone = FrozenViT(small_vit())
    assert (backbone.device, backbone.dtype) == (torch.device("cpu"), torch.float32)
    backbone.to(torch.bfloat16)
    assert backbone.dtype == torch.bfloat16
    # Moved behind the wrapper's back, and with a projection whose weight is computed.
    backbone.model.to("meta", torch.float16)
    assert (backbone.device, backbone.dtype) == (torch.device("meta"), torch.float16)
    nn.utils.parametrizations.weight_norm(backbone.model.patch_embed.proj)
    assert (backbone.device, backbone.dtype) == (torch.device("meta"), torch.float16)


def test_position_cache_is_bounded_and_dropped_by_to() -> None:
    backbone = FrozenViT(small_vit(), position_rule="dino")
    for n in range(1, 20):
        backbone(images(1, 3, 8 * n, 8))
    assert 0 < len(backbone._positions) <= 8
    backbone.double()
    assert not backbone._positions
    assert backbone(images(1, 3, 48, 48).double()).dtype == torch.float64


def test_copies_pickle_and_inference_mode() -> None:
    backbone = FrozenViT(small_vit())
    imgs = images(1, 3, 40, 32)
    with torch.inference_mode():
        inside = backbone(imgs)
    outside = backbone(imgs)
    assert torch.equal(inside, outside)
    assert not outside.is_inference()
    for other in (copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))):
        assert torch.equal(other(imgs), outside)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    model, imgs = small_vit(), images(2, 3, 40, 32)
    exact = FrozenViT(model)(imgs)
    low = FrozenViT(model).to(dtype)(imgs.to(dtype))
    assert low.dtype == dtype
    assert relative_error(low.float(), exact) <= 5e-2


def test_autocast_and_channels_last() -> None:
    backbone, imgs = FrozenViT(small_vit()), images(2, 3, 40, 32)
    exact = backbone(imgs)
    with torch.autocast("cpu", torch.bfloat16):
        low = backbone(imgs)
    assert low.dtype == torch.bfloat16
    assert relative_error(low.float(), exact) <= 5e-2
    strided = torch.zeros(2, 3, 80, 64)
    strided[:, :, ::2, ::2] = imgs
    for other in (imgs.to(memory_format=torch.channels_last), strided[:, :, ::2, ::2]):
        assert relative_error(backbone(other), exact) <= 1e-5


@pytest.mark.parametrize("kind", ["plain", "eva_dinov3"])
def test_compiles_as_one_graph(kind: str) -> None:
    backbone = FrozenViT(MODELS[kind](), position_rule="dino")
    imgs = images(1, 3, 40, 32)
    compiled = torch.compile(backbone, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert relative_error(compiled(imgs), backbone(imgs)) <= 1e-5


def test_random_weights_are_seeded_and_leave_the_global_state() -> None:
    before = torch.get_rng_state()
    a, b, c = (load_backbone("vit_tiny_patch16_224", random_weights=True, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    weights = [m.model.blocks[3].mlp.fc1.weight for m in (a, b, c)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_mocov3_small_has_twelve_heads_and_selfpatch_no_class_token() -> None:
    assert load_backbone("mocov3_vits16", random_weights=True).model.blocks[0].attn.num_heads == 12
    backbone = load_backbone("selfpatch_vits16", random_weights=True)
    assert backbone.model.cls_token is None
    with pytest.raises(WeightsNotFoundError, match=r"MoCo v3 weights are not in timm.*--weights FILE"):
        load_backbone("mocov3_vits16")


@pytest.mark.parametrize(
    ("imgs", "error", "message"),
    [
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), ValueError, "floating point.*uint8"),
        (torch.zeros(3, 32, 32), ValueError, r"\[3, 32, 32\]"),
        (torch.zeros(1, 1, 32, 32), ValueError, r"\[1, 1, 32, 32\]"),
        (torch.zeros(0, 3, 32, 32), ValueError, "empty batch"),
        (torch.zeros(1, 3, 7, 32), ValueError, "32 x 7 pixels are smaller than one patch of 8 x 8"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.float64), ValueError, "float64.*float32"),
        (torch.zeros(1, 3, 32, 32, device="meta"), ValueError, "meta.*cpu"),
        ("picture.jpg", TypeError, "str"),
    ],
)
def test_bad_images(imgs: object, error: type[Exception], message: str) -> None:
    backbone = FrozenViT(small_vit())
    with pytest.raises(error, match=message):
        backbone(imgs)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"facet": "keys"}, "facet must be one of.*'keys'"),
        ({"layer": 3}, "from -3 to 2.*got 3"),
        ({"layer": 1.5}, "got 1.5"),
        ({"stride": 9}, "1 to the patch size 8, got 9"),
        ({"stride": 0}, "got 0"),
        ({"head_order": "mixed"}, "head_order"),
        ({"position_rule": "linear"}, "position_rule"),
        ({"mean": (0.5,)}, "three values"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FrozenViT(small_vit(), **arguments)


def test_models_that_are_no_vit() -> None:
    with pytest.raises(ValueError, match=r"ResNet is not a supported Vision Transformer.*supported are"):
        FrozenViT(timm.create_model("resnet18"))
    with pytest.raises(ValueError, match=r"'resnet18' is not a supported Vision Transformer.*dino_vits16"):
        load_backbone("resnet18", random_weights=True)
    with pytest.raises(ValueError, match=r"unknown backbone 'dino_vits61'.*did you mean dino_vits16"):
        load_backbone("dino_vits61", random_weights=True)
    with pytest.raises(ValueError, match=r"unknown backbone 'nonsense'\. Official names"):
        load_backbone("nonsense", random_weights=True)
    with pytest.raises(ValueError, match=r"no pretrained tag 'nonsense'.*dino"):
        load_backbone("vit_small_patch16_224.nonsense", random_weights=True)
    with pytest.raises(TypeError, match=r"nn.Module"):
        FrozenViT("dino_vits16")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"ParallelScalingBlock.*facet='token'"):
        FrozenViT(small_vit(block_fn=ParallelScalingBlock))
