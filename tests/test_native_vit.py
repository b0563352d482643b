"""Vision Transformers in the native core, against the plain modules in float64."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lift_fast import _native, testing
from lift_fast.backbones import FrozenViT, load_backbone, native

pytestmark = pytest.mark.skipif(_native.load() is None, reason="needs the native core")
ISAS = [isa for isa in (_native.load().vit_isas("float32") if _native.load() else []) if isa != "baseline"]
NARROW = pytest.mark.skipif(not ISAS, reason="needs AVX2")
FACETS = ("key", "query", "value", "token", "final")


def network(
    width: int = 96, depth: int = 3, heads: int = 3, patch: int = 8, grid: int = 4, **options: Any
) -> nn.Module:
    """A random ViT whose every weight and bias matters."""
    options = {"mlp_ratio": 2, "img_size": grid * patch, "dynamic_img_size": True, **options}
    model = VisionTransformer(patch_size=patch, embed_dim=width, depth=depth, num_heads=heads, num_classes=0, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.randn_like(parameter) * (0.5 if parameter.dim() == 1 else parameter[0].numel() ** -0.5)
            )
    return model.eval()


def right(model: nn.Module, imgs: Tensor, **options: Any) -> Tensor:
    """The plain modules in float64, where the native core does not run."""
    wide = FrozenViT(copy.deepcopy(model).double(), **options)
    with torch.no_grad():
        return wide(imgs.double())


def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with each native call."""
    calls: list[int] = []
    run = native._run
    monkeypatch.setattr(native, "_run", lambda *args: (calls.append(1), run(*args))[1])
    return calls


def check(got: Tensor, wanted: Tensor, dtype: torch.dtype = torch.float32) -> None:
    error = (got.double() - wanted).norm() / wanted.norm()
    assert error < (2e-6 if dtype is torch.float32 else 0.012), error


@NARROW
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "options", "made"),
    [
        ((1, 8, 8), {}, {}),
        ((2, 40, 24), {"facet": "query", "head_order": "interleaved"}, {"heads": 4}),
        ((3, 33, 56), {"facet": "value", "layer": 1}, {"width": 64, "heads": 8, "qkv_bias": False}),
        ((2, 24, 31), {"facet": "token", "stride": 3}, {"heads": 2, "init_values": 0.3}),
        ((1, 70, 28), {"facet": "final", "stride": 7}, {"patch": 14, "reg_tokens": 4, "class_token": True}),
        ((5, 20, 15), {"facet": "key", "layer": 0}, {"patch": 5, "class_token": False, "global_pool": "avg"}),
        ((1, 16, 16), {"facet": "token"}, {"patch": 16, "width": 160, "heads": 5, "no_embed_class": True}),
        # More keys than a chunk holds, and more images than one group.
        ((1, 280, 280), {"stride": 8, "facet": "token"}, {"depth": 2, "width": 32, "heads": 1}),
        ((67, 88, 96), {}, {"depth": 2, "width": 256, "heads": 8}),
    ],
)
def test_right_values(
    isa: str,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    options: dict[str, Any],
    made: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = network(**made).to(dtype)
    imgs = torch.randn(shape[0], 3, *shape[1:], dtype=dtype)
    calls = runs(monkeypatch)
    monkeypatch.setenv("LIFT_FAST_CPU_ISA", isa)
    if isa == "avx512" and dtype is torch.bfloat16:
        # "auto" is avx512_bf16 where there is one; this one multiplies in float32.
        monkeypatch.setenv("LIFT_FAST_CPU_ISA", "avx512")
    with torch.inference_mode(), testing.poisoned_outputs():
        got = FrozenViT(model, **options)(imgs)
    assert calls == [1]
    assert got.dtype == dtype
    check(got, right(model, imgs, **options), dtype)


@NARROW
def test_auto_takes_bfloat16_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    model, imgs = network().bfloat16(), torch.randn(2, 3, 32, 40).bfloat16()
    calls = runs(monkeypatch)
    with torch.no_grad():
        check(FrozenViT(model)(imgs), right(model, imgs), torch.bfloat16)
    assert calls


@NARROW
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neither_threads_nor_the_batch_change_a_bit(dtype: torch.dtype) -> None:
    backbone = FrozenViT(network().to(dtype))
    imgs = torch.randn(7, 3, 72, 88, dtype=dtype)
    before = torch.get_num_threads()
    try:
        with torch.no_grad():
            found = []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                found += [backbone(imgs), torch.cat([backbone(image[None]) for image in imgs])]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found)


@NARROW
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_reach_all_tokens_of_their_image_only(value: float) -> None:
    backbone, imgs = FrozenViT(network(), facet="token"), torch.randn(2, 3, 40, 40)
    clean = imgs.clone()
    imgs[1, 2, 17, 9] = value
    with torch.no_grad():
        got = backbone(imgs)
        assert torch.equal(got[0], backbone(clean)[0])
    assert got[1].isnan().all()


@NARROW
def test_scores_far_apart_and_large_values() -> None:
    """Softmax over scores of hundreds, GELU over both tails."""
    model = network(depth=1, width=64, heads=2)
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight.mul_(30)
        model.blocks[0].mlp.fc1.weight.mul_(50)
    imgs = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        got = FrozenViT(model, facet="token")(imgs)
    wanted = right(model, imgs, facet="token")
    # Scores of hundreds have errors of 1e-5.
    assert (got.double() - wanted).norm() / wanted.norm() < 2e-5


@NARROW
def test_any_layout_of_images(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, imgs = FrozenViT(network()), torch.randn(2, 3, 40, 56)
    calls = runs(monkeypatch)
    with torch.no_grad():
        plain = backbone(imgs)
        assert torch.equal(backbone(imgs.to(memory_format=torch.channels_last)), plain)
        assert torch.equal(backbone(torch.randn(2, 3, 80, 56)[:, :, ::2].copy_(imgs)), plain)
    assert len(calls) == 3


@NARROW
def test_changed_weights_and_settings_count(monkeypatch: pytest.MonkeyPatch) -> None:
    model, imgs = network(init_values=0.5), torch.randn(1, 3, 32, 32)
    backbone = FrozenViT(model, facet="token")
    calls = runs(monkeypatch)

    def both() -> None:
        with torch.no_grad():
            check(backbone(imgs), right(backbone.model, imgs, facet="token"))

    both()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("norm."):
                parameter.mul_(1.1)
                both()
    model.load_state_dict(network(init_values=0.5).state_dict())
    both()
    backbone.model.blocks[1].norm1.eps = 0.5
    both()
    backbone.model.blocks[1].attn.qkv.weight = nn.Parameter(torch.randn(288, 96) / 10, requires_grad=False)
    both()
    backbone.bfloat16()
    with torch.no_grad():
        check(backbone(imgs.bfloat16()), right(backbone.model, imgs.bfloat16(), facet="token"), torch.bfloat16)
    assert len(calls) == 4 + 1 + sum(not n.startswith("norm.") for n, _ in model.named_parameters())


def _hook(backbone: FrozenViT) -> None:
    backbone.model.blocks[1].mlp.register_forward_hook(lambda module, args, out: out)


def _forward(backbone: FrozenViT) -> None:
    layer = backbone.model.blocks[0].attn.proj
    layer.forward = type(layer).forward.__get__(layer)


def _norm(backbone: FrozenViT) -> None:
    backbone.model.blocks[0].attn.q_norm = nn.LayerNorm(32)


def _tanh(backbone: FrozenViT) -> None:
    backbone.model.blocks[2].mlp.act = nn.GELU("tanh")


@NARROW
@pytest.mark.parametrize("edit", [_hook, _forward, _norm, _tanh])
@pytest.mark.parametrize("late", [False, True])
def test_edited_networks_run_their_modules(edit: Any, late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, imgs = FrozenViT(network(), facet="token"), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        if late:
            backbone(imgs)
        edit(backbone)
        calls = runs(monkeypatch)
        assert backbone._native.why_not(backbone)
        got = backbone(imgs)
        assert not calls
        check(got, right(backbone.model, imgs, facet="token"))


def _norm_pre(backbone: FrozenViT) -> None:
    backbone.model.norm_pre = nn.LayerNorm(96)


def _embed(backbone: FrozenViT) -> None:
    backbone.model.patch_embed.register_forward_hook(lambda module, args, out: 2 * out)


@NARROW
@pytest.mark.parametrize("edit", [_norm_pre, _embed])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_run_after_an_edited_start(
    edit: Any, late: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, imgs = FrozenViT(network().to(dtype)), torch.randn(2, 3, 44, 32, dtype=dtype)
    with torch.no_grad():
        if late:
            backbone(imgs)
        edit(backbone)
        backbone.to(dtype)
        calls = runs(monkeypatch)
        got = backbone(imgs)
        assert calls == [1]
        check(got, right(backbone.model, imgs), dtype)


@NARROW
def test_calls_that_are_not_plain_inference_run_the_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, imgs = FrozenViT(network()), torch.randn(2, 3, 32, 32)
    calls = runs(monkeypatch)
    with torch.no_grad():
        wanted = backbone(imgs)
    assert calls == [1]
    wants = imgs.clone().requires_grad_()
    backbone(wants).sum().backward()
    assert wants.grad is not None
    with torch.autocast("cpu", torch.bfloat16):
        backbone(imgs)
    with FlopCounterMode(display=False) as counter:
        backbone(imgs)
    assert counter.get_total_flops() > 0
    mapped = torch.vmap(lambda image: backbone(image[None])[0])(imgs)
    torch.testing.assert_close(mapped, wanted, rtol=1e-4, atol=1e-4)
    first = FrozenViT(network(), layer=0)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(imgs, torch.ones_like(imgs))
        assert torch.autograd.forward_ad.unpack_dual(first(dual)).tangent is not None
    with monkeypatch.context() as patch:
        patch.setenv("LIFT_FAST_DISABLE_NATIVE", "1")
        assert "LIFT_FAST_DISABLE_NATIVE" in backbone._native.why_not(backbone)
        backbone(imgs)
    with monkeypatch.context() as patch:
        patch.setenv("LIFT_FAST_CPU_ISA", "baseline")
        assert "AVX2" in backbone._native.why_not(backbone)
        backbone(imgs)
    with monkeypatch.context() as patch:
        patch.setattr(native, "_has_tiles", lambda: True)
        assert "AMX" in backbone._native.why_not(backbone, torch.bfloat16)
        assert not backbone._native.why_not(backbone)
    assert "float64" in FrozenViT(network().double())._native.why_not(backbone, torch.float64)
    assert calls == [1]
    for parameter in backbone.parameters():
        parameter.requires_grad_()
    assert backbone(imgs).requires_grad
    assert calls == [1]
    with torch.no_grad():
        backbone(imgs)
    assert calls == [1, 1]


@NARROW
def test_packed_weights_are_shared_with_other_strides_and_freed() -> None:
    model, imgs = network(), torch.randn(1, 3, 32, 32)
    first, third = FrozenViT(model), FrozenViT(model)
    second = first.strided(4)
    with torch.no_grad():
        for backbone in (first, second, third):
            backbone(imgs)
    blocks = [b._native._network.blocks for b in (first, second, third)]
    assert blocks[1][0] is blocks[0][0]
    assert blocks[2][0] is not blocks[0][0]
    for other in (copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        assert other._native._network is None
        with torch.no_grad():
            assert torch.equal(other(imgs), first(imgs))
    # The part of one network must not serve another after a change.
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.mul_(2)
        check(second(imgs), right(model, imgs, stride=4))
        check(first(imgs), right(model, imgs))
    packed = weakref.ref(first._native._network.blocks[-1])
    del blocks, first, second, third, backbone, other
    gc.collect()
    assert packed() is None


@NARROW
def test_edits_that_leave_no_trace_count_after_eval() -> None:
    model, imgs = network(), torch.randn(1, 3, 32, 32)
    first, second = FrozenViT(model), FrozenViT(model)
    with torch.no_grad():
        first(imgs), second(imgs)
        model.blocks[0].mlp.fc1.weight.data.mul_(2)
        model.pos_embed.data.mul_(2)
        check(first.eval()(imgs), right(model, imgs))
        check(FrozenViT(model)(imgs), right(model, imgs))
        check(nn.Sequential(second).train()(imgs), right(model, imgs))


@NARROW
@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.bfloat16(),
        lambda o: o.double(),
        lambda o: o[..., :32].contiguous(),
        lambda o: o[:1],
        lambda o: o.flatten(0, 1),
        lambda o: o.requires_grad_(),
    ],
)
def test_tokens_that_are_not_plain_go_to_the_modules(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a hook makes of the first block's tokens: the modules' result, or their error."""
    model = network(width=64, heads=2)
    model.norm_pre.register_forward_hook(lambda module, args, out: change(out))
    found: list[Any] = []
    imgs = torch.randn(2, 3, 64, 80)
    for disabled in ("0", "1"):
        monkeypatch.setenv("LIFT_FAST_DISABLE_NATIVE", disabled)
        try:
            found.append(FrozenViT(model)(imgs))
        except Exception as error:
            found.append(type(error))
    if isinstance(found[1], Tensor):
        torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)
        assert found[0].requires_grad == found[1].requires_grad
    else:
        assert found[0] == found[1]


@NARROW
def test_tokens_of_any_layout_and_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts behind the class token, transposed tokens; what made the tokens may keep them."""
    model, imgs, kept = network(), torch.randn(2, 3, 40, 24), []
    prompts = torch.randn(3, 96)

    def insert(module: Any, args: Any, out: Tensor) -> Tensor:
        more = torch.cat([out[:, :1], prompts.to(out).expand(len(out), -1, -1), out[:, 1:]], dim=1)
        kept.append(more.transpose(1, 2).contiguous().transpose(1, 2))
        return kept[-1]

    model.norm_pre.register_forward_hook(insert)
    calls = runs(monkeypatch)
    with torch.no_grad():
        got = FrozenViT(model, facet="token")(imgs)
        before = kept[-1].clone()
        check(got, right(model, imgs, facet="token"))
        assert calls == [1]
        assert got.shape[1] == 3 + 15
        monkeypatch.setenv("LIFT_FAST_DISABLE_NATIVE", "1")
        check(FrozenViT(model, facet="token")(imgs), right(model, imgs, facet="token"))
    assert all(torch.equal(tokens, before) for tokens in kept if tokens.dtype == before.dtype)


@NARROW
def test_trainable_parts_before_the_blocks_get_gradients() -> None:
    backbone, imgs = FrozenViT(network(pre_norm=True)), torch.randn(1, 3, 32, 32)
    backbone.model.norm_pre.weight.requires_grad_()
    backbone(imgs).sum().backward()
    assert backbone.model.norm_pre.weight.grad.abs().max() > 0


def _set_none(owner: str, name: str) -> Any:
    return lambda backbone: setattr(backbone.model.get_submodule(owner), name, None)


def _set(owner: str, name: str, value: Any) -> Any:
    return lambda backbone: setattr(backbone.model.get_submodule(owner), name, value)


@NARROW
@pytest.mark.parametrize(
    "edit",
    [
        _set_none("blocks.1.attn.qkv", "bias"),
        _set_none("blocks.0.mlp.fc1", "bias"),
        _set_none("patch_embed.proj", "bias"),
        _set("blocks.0.ls1", "gamma", nn.Parameter(torch.tensor([0.7]))),
        _set("blocks.0.attn.proj", "bias", nn.Parameter(torch.tensor([0.7]))),
        _set("", "pos_embed", nn.Parameter(torch.randn(1, 17, 1))),
        _set("blocks.1.mlp.drop1", "training", True),
    ],
)
@pytest.mark.parametrize("late", [False, True])
def test_parameters_that_are_missing_or_stretched(edit: Any, late: bool) -> None:
    backbone, imgs = FrozenViT(network(init_values=0.5), facet="token"), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        if late:
            backbone(imgs)
        edit(backbone)
        check(backbone(imgs), right(backbone.model, imgs, facet="token"))
        wider = torch.randn(1, 3, 40, 32)
        check(backbone(wider), right(backbone.model, wider, facet="token"))


@NARROW
def test_lazily_negated_images_and_weights() -> None:
    backbone, imgs = FrozenViT(network()), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        check(backbone(torch._neg_view(imgs)), right(backbone.model, -imgs))
        layer = backbone.model.blocks[0].attn.qkv
        layer.weight = nn.Parameter(torch._neg_view(layer.weight.detach().clone()), requires_grad=False)
        check(backbone(imgs), right(backbone.model, imgs))


@NARROW
def test_a_projection_whose_weight_is_no_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, imgs = FrozenViT(network()), torch.randn(1, 3, 32, 32)
    projection = backbone.model.patch_embed.proj
    weight = projection.weight.detach().clone()
    del projection.weight
    projection.weight = weight
    with torch.no_grad():
        for factor in (1, 3):
            weight.mul_(factor)
            monkeypatch.setenv("LIFT_FAST_DISABLE_NATIVE", "0")
            got = backbone(imgs)
            monkeypatch.setenv("LIFT_FAST_DISABLE_NATIVE", "1")
            check(got, backbone(imgs).double())


@NARROW
@pytest.mark.parametrize("engine", ["auto", "torch"])
def test_a_call_looks_at_the_weights_once(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, imgs = FrozenViT(network(), engine=engine), torch.randn(1, 3, 32, 32)
    looks, ready = [], native.NativeTransformer.ready
    monkeypatch.setattr(native.NativeTransformer, "ready", lambda self, vit: (looks.append(1), ready(self, vit))[1])
    with torch.no_grad():
        for count in (1, 2, 3):
            backbone(imgs)
            assert len(looks) == count


@NARROW
def test_threads_of_python_share_one_backbone() -> None:
    backbone, imgs = FrozenViT(network()), torch.randn(8, 1, 3, 56, 40)
    with torch.no_grad():
        wanted = [FrozenViT(backbone.model)(image) for image in imgs]
    found: dict[int, Tensor] = {}

    def work(index: int) -> None:
        with torch.no_grad():
            for _ in range(5):
                found[index] = backbone(imgs[index])

    workers = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(found[i], wanted[i]) for i in range(8))


@NARROW
@pytest.mark.parametrize(
    "name", ["dino_vits16", "vit_small_patch14_dinov2.lvd142m", "vit_base_patch16_clip_224.openai"]
)
def test_networks_of_the_field(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = load_backbone(name, random_weights=True, layer=1)
    side = 4 * backbone.patch_size
    imgs = torch.randn(1, 3, side, side)
    calls = runs(monkeypatch)
    with torch.no_grad():
        got = backbone(imgs)
        assert len(calls) == 1
        check(got, backbone.double()(imgs.double()))


def test_the_core_refuses_what_does_not_fit() -> None:
    core = _native.require()
    sizes = (32, 2, 16, 64)
    with pytest.raises(ValueError, match="C and hidden are multiples of 32"):
        core.vit_block_bytes((33, 2, 16, 64), "float32")
    for bad in ((32, 0, 16, 64), (32, 2, -1, 64), (1 << 40, 2, 16, 64), (32, 1 << 10, 1 << 10, 64)):
        with pytest.raises(ValueError, match="out of range"):
            core.vit_block_bytes(bad, "float32")
    with pytest.raises(ValueError, match="4 integers, got 3"):
        core.vit_block_bytes((1, 2, 3), "float32")
    with pytest.raises(ValueError, match="dtype must be"):
        core.vit_isas("float16")
    with pytest.raises(ValueError, match="matrix out of range"):
        core.vit_linear_bytes(0, 32, "float32")
    size = core.vit_block_bytes(sizes, "float32", "baseline")
    packed = torch.zeros(size, dtype=torch.uint8)
    weights = [torch.zeros(4096) for _ in range(14)]
    addresses = [w.data_ptr() for w in weights]
    with pytest.raises(ValueError, match=f"needs {size} bytes, got {size - 1}"):
        core.vit_pack_block(addresses, (0.0, 0.0), sizes, "float32", packed.data_ptr(), size - 1, "baseline")
    with pytest.raises(ValueError, match="14 arrays, got 13"):
        core.vit_pack_block(addresses[1:], (0.0, 0.0), sizes, "float32", packed.data_ptr(), size, "baseline")
    with pytest.raises(ValueError, match="address is null"):
        core.vit_pack_block([0] * 14, (0.0, 0.0), sizes, "float32", packed.data_ptr(), size, "baseline")
    core.vit_pack_block(addresses, (0.0, 0.0), sizes, "float32", packed.data_ptr(), size, "baseline")
    x = torch.zeros(1, 3, 32)

    def call(**changes: Any) -> None:
        given = {
            "x": x.data_ptr(),
            "images": None,
            "head": (0, 0),
            "blocks": [(packed.data_ptr(), size)],
            "tail": (0, 0),
        }
        given |= {"tail_width": 0, "y": x.data_ptr(), "batch": 1, "tokens": 3, "skipped": 1, "sizes": sizes}
        core.vit(**{**given, "dtype": "float32", "threads": 1, "isa": "baseline", **changes})

    call()
    call(batch=0)
    for changes, message in (
        ({"tokens": 0}, "tokens and threads >= 1"),
        ({"skipped": 4}, "skipped <= tokens"),
        ({"threads": 0}, "threads >= 1"),
        ({"tokens": 1 << 62}, "overflow"),
        ({"blocks": [(packed.data_ptr(), size - 1)]}, "needs .* bytes"),
        ({"sizes": (32, 1, 32, 64)}, "was not packed for this call"),
        ({"y": 0}, "is null"),
        ({"x": 0, "images": (x.data_ptr(), 4, 4, 2, 2, 3, 2, 0, 0, 1)}, "do not make 3 tokens"),
        ({"x": 0, "images": (x.data_ptr(), 4, 4, 0, 2, 1, 2, 0, 0, 1)}, "do not make 3 tokens"),
        ({"x": 0, "images": (x.data_ptr(), 4, 4)}, "10 integers, got 3"),
        ({"tail": (packed.data_ptr(), size), "tail_width": 32}, "was not packed for this call"),
    ):
        with pytest.raises(ValueError, match=message):
            call(**changes)
