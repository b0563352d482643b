"""A frozen backbone of a model that somebody edited against the same timm model, called in full by hand."""

from __future__ import annotations

import copy
import gc
import pickle
import types
import weakref
from collections.abc import Callable

import pytest
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import Attention, VisionTransformer
from torch import Tensor, nn
from torch.nn.modules import module as registry
from torch.nn.utils import parametrizations, prune, spectral_norm

from lift_fast.backbones import FrozenViT, extract_hooked, in_place

pytestmark = pytest.mark.usefixtures("one_thread")

Edit = Callable[[nn.Module], object]


def small(seed: int = 0, kind: type[nn.Module] = VisionTransformer, **extra: object) -> nn.Module:
    arguments = {"patch_size": 8, "img_size": 32, "embed_dim": 48, "depth": 3, "num_heads": 4, "num_classes": 0}
    model = kind(**{**arguments, "dynamic_img_size": True, **extra})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


class Negated(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return -0.5 * x


class OverTokens(nn.Module):
    """What a token becomes depends on all of them, the class token with them."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(1, keepdim=True)


class Adapted(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x).roll(1, -1)


class Lora(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(48, 4, bias=False), nn.Linear(4, 144, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def part(model: nn.Module, path: str) -> nn.Module:
    return model.get_submodule(path)


def own_forward(path: str) -> Edit:
    def edit(model: nn.Module) -> None:
        module = part(model, path)
        given = type(module).forward

        def forward(self: nn.Module, *args: object, **kwargs: object) -> Tensor:
            return 0.5 * given(self, *args, **kwargs).roll(1, -1)

        module.forward = types.MethodType(forward, module)  # type: ignore[method-assign]

    return edit


def hook(path: str) -> Edit:
    return lambda model: part(model, path).register_forward_hook(
        lambda module, args, out: 0.5 * out - out.mean(1, True)
    )


def pre_hook(path: str) -> Edit:
    return lambda model: part(model, path).register_forward_pre_hook(lambda module, args: (args[0].flip(-1), *args[1:]))


def replaced(path: str, by: Callable[[], nn.Module]) -> Edit:
    return lambda model: model.set_submodule(path, by())


def of_class(path: str, kind: type) -> Edit:
    return lambda model: setattr(part(model, path), "__class__", kind)


INSIDE = ["", ".attn", ".attn.qkv", ".attn.q_norm", ".attn.proj", ".attn.proj_drop", ".norm1", ".norm2", ".mlp"]
INSIDE += [".mlp.fc1", ".mlp.act", ".mlp.drop1", ".mlp.norm", ".mlp.fc2", ".mlp.drop2", ".ls1", ".ls2", ".drop_path1"]
EDITS: dict[str, Edit] = {
    **{f"own forward of block{path}": own_forward(f"blocks.1{path}") for path in INSIDE},
    **{f"hook of block{path}": hook(f"blocks.1{path}") for path in INSIDE},
    **{f"pre-hook of block{path}": pre_hook(f"blocks.1{path}") for path in INSIDE},
    **{
        f"other module for block{path}": replaced(f"blocks.1{path}", Negated)
        for path in INSIDE
        if path not in ("", ".attn", ".attn.qkv", ".mlp", ".mlp.fc1", ".mlp.fc2")
    },
    **{
        f"{name} of the last {path or 'block'}": make(f"blocks.2{path and '.' + path}")
        for path in ("", "attn", "attn.qkv", "norm1")
        for name, make in (("own forward", own_forward), ("hook", hook), ("pre-hook", pre_hook))
    },
    "norm over tokens": replaced("blocks.1.norm1", OverTokens),
    "last norm over tokens": replaced("blocks.2.norm1", OverTokens),
    "zeroed projection": lambda m: part(m, "blocks.2.attn.qkv").register_forward_hook(lambda q, args, out: out * 0 + 1),
    "adapter": lambda m: m.set_submodule("blocks.2.attn.qkv", Lora(part(m, "blocks.2.attn.qkv"))),
    "class of the projection": of_class("blocks.2.attn.qkv", Adapted),
    "spectral_norm of the projection": lambda m: spectral_norm(part(m, "blocks.2.attn.qkv")),
    "pruned projection": lambda m: prune.l1_unstructured(part(m, "blocks.2.attn.qkv"), "weight", 0.5),
    "parametrised projection": lambda m: parametrizations.spectral_norm(part(m, "blocks.2.attn.qkv")),
    "spectral_norm before": lambda m: spectral_norm(part(m, "blocks.1.mlp.fc1")),
    "pruned before": lambda m: prune.l1_unstructured(part(m, "blocks.1.attn.proj"), "weight", 0.5),
    "another scale": lambda m: setattr(part(m, "blocks.1.mlp.act"), "approximate", "tanh"),
    "no fused attention": lambda m: setattr(part(m, "blocks.1.attn"), "fused_attn", False),
    **{
        f"{name} of {path}": make(path)
        for path in ("patch_embed", "patch_embed.proj", "patch_embed.norm", "norm_pre", "pos_drop")
        for name, make in (("own forward", own_forward), ("hook", hook), ("pre-hook", pre_hook))
    },
    "spectral_norm of the patches": lambda m: spectral_norm(part(m, "patch_embed.proj")),
    "pruned patches": lambda m: prune.l1_unstructured(part(m, "patch_embed.proj"), "weight", 0.5),
    "parametrised patches": lambda m: parametrizations.spectral_norm(part(m, "patch_embed.proj")),
    "weight of the patches": lambda m: parametrizations.weight_norm(part(m, "patch_embed.proj")),
}


def by_hand(model: nn.Module, imgs: Tensor, facet: str) -> Tensor:
    return model(imgs) if facet == "model" else extract_hooked(model, imgs, -1, facet)


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max()) <= 1e-5 * float(theirs.abs().max())


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_model_gives_what_it_gives_by_hand(name: str) -> None:
    imgs = images(2, 3, 32, 32)
    plain = small()
    edited = copy.deepcopy(plain)
    torch.manual_seed(0)
    EDITS[name](edited)
    edited.eval()
    with torch.no_grad():
        for facet in ("key", "query", "value", "token"):
            theirs = by_hand(edited, imgs, facet)
            before = FrozenViT(edited, facet=facet)
            assert_same(before(imgs), theirs)
            # Edited after it ran, and put back.
            after = FrozenViT(plain, facet=facet)
            unedited = after(imgs)
            torch.manual_seed(0)
            EDITS[name](after.model)
            after.train()
            assert_same(after(imgs), theirs)
            after.model = FrozenViT(plain).model
            assert torch.equal(after(imgs), unedited)
        assert (
            not torch.equal(theirs, by_hand(plain, imgs, "token"))
            or "last" in name
            or "projection" in name
            or ("adapter" in name)
        )


@pytest.mark.parametrize("kind", ["fused", "split", "separate"])
@pytest.mark.parametrize("path", ["blocks.2", "blocks.2.attn", "blocks.2.norm1", "blocks.1.mlp", "patch_embed.proj"])
@pytest.mark.parametrize("make", [own_forward, hook, pre_hook])
def test_an_edited_eva_too(kind: str, path: str, make: Callable[[str], Edit]) -> None:
    extra = {"fused": {}, "split": {"qkv_fused": False}, "separate": {}}[kind]
    model, imgs = small(kind=Eva, use_rot_pos_emb=True, **extra), images(2, 3, 32, 32)
    if kind == "separate":
        for block in model.blocks:
            block.attn.qkv_bias_separate = True
    make(path)(model)
    with torch.no_grad():
        for facet in ("key", "value", "token"):
            assert_same(FrozenViT(model, facet=facet)(imgs), by_hand(model, imgs, facet))


def test_interleaved_heads_of_an_edited_block() -> None:
    model, imgs = small(), images(1, 3, 32, 32)
    for path in ("blocks.2", "blocks.2.attn.qkv"):
        pre_hook(path)(model)
        with torch.no_grad():
            ours = FrozenViT(model, head_order="interleaved")(imgs)
            assert_same(ours, by_hand(model, imgs, "key").unflatten(-1, (4, -1)).transpose(-1, -2).flatten(2))


@pytest.mark.parametrize("register", ["register_module_forward_hook", "register_module_forward_pre_hook"])
def test_hooks_of_every_module_run(register: str) -> None:
    backbone, imgs = FrozenViT(small()), images(1, 3, 32, 32)
    called: list[nn.Module] = []
    with torch.no_grad():
        plain = backbone(imgs)
        handle = getattr(registry, register)(lambda module, *rest: called.append(module))
        try:
            assert_same(backbone(imgs), plain)
        finally:
            handle.remove()
    model = backbone.model
    needed = [model.patch_embed, model.patch_embed.proj, *model.blocks[1].modules(), model.blocks[2].attn.qkv]
    # Fused attention reads the rate of this one alone.
    needed = [module for module in needed if module not in (model.blocks[1].attn.attn_drop,)]
    assert {id(module) for module in needed} <= {id(module) for module in called}


def test_a_class_that_was_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    model, imgs = small(), images(1, 3, 32, 32)
    given = Attention.forward
    backbone = FrozenViT(model, facet="token")
    with torch.no_grad():
        backbone(imgs)
        monkeypatch.setattr(Attention, "forward", lambda self, x, **kwargs: given(self, x.flip(1), **kwargs))
        assert_same(backbone(imgs), by_hand(model, imgs, "token"))


@pytest.mark.parametrize("size", [(32, 32), (40, 24), (43, 29)])
@pytest.mark.parametrize("stride", [8, 4, 3])
@pytest.mark.parametrize("strict", [True, False])
def test_hooks_of_the_patch_embedding_at_every_size_and_stride(
    size: tuple[int, int], stride: int, strict: bool
) -> None:
    extra = {"dynamic_img_size": False, "dynamic_img_pad": True} if not strict else {"dynamic_img_size": False}
    model, imgs = small(**extra), images(1, 3, *size)
    with torch.no_grad():
        plain = FrozenViT(model, stride=stride)(imgs)
        for path in ("patch_embed", "patch_embed.proj"):
            calls: list[int] = []
            edited = copy.deepcopy(model)
            part(edited, path).register_forward_hook(lambda module, args, out, calls=calls: calls.append(1))
            assert_same(FrozenViT(edited, stride=stride)(imgs), plain)
            assert calls == [1]
            assert edited.patch_embed.proj.stride == (8, 8)
            assert edited.patch_embed.img_size == (32, 32)


def test_an_own_forward_of_the_patches_that_knows_no_stride() -> None:
    model = small()
    own_forward("patch_embed.proj")(model)
    with pytest.raises(ValueError, match=r"edited patch embedding gives .* where stride 4 needs 7 x 7"):
        FrozenViT(model, stride=4)(images(1, 3, 32, 32))


def test_an_edited_block_that_calls_no_projection() -> None:
    backbone = FrozenViT(small())
    backbone.model.blocks[2].forward = lambda x: x
    with pytest.raises(ValueError, match=r"'key' cannot be read: the edited block calls .* 0 times.*facet='token'"):
        backbone(images(1, 3, 32, 32))
    backbone.model.blocks[2] = nn.Identity()
    with pytest.raises(ValueError, match=r"from the Identity now in the model.*facet='token'"):
        backbone(images(1, 3, 32, 32))
    for block in backbone.model.blocks[:2]:
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in block.modules())


def test_a_model_whose_own_forward_features_is_replaced() -> None:
    model = small()
    model.forward_features = lambda x: x
    with pytest.raises(ValueError, match="changes forward_features of timm's VisionTransformer"):
        FrozenViT(model)


def test_a_pruned_model_with_a_graph_can_be_wrapped() -> None:
    model, imgs = small(), images(1, 3, 32, 32)
    prune.l1_unstructured(model.blocks[2].attn.qkv, "weight", 0.5)
    prune.l1_unstructured(model.blocks[1].mlp.fc1, "weight", 0.5)
    model(imgs)
    assert model.blocks[2].attn.qkv.weight.grad_fn is not None
    backbone = FrozenViT(model)
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight_orig.mul_(2)
        assert_same(backbone(imgs), by_hand(model, imgs, "key"))


def test_plain_blocks_run_in_place_and_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIFT_FAST_DISABLE_NATIVE", "1")
    runs, looks = [], []
    run, look = in_place.run, in_place.is_standard
    monkeypatch.setattr(in_place, "run", lambda *args: (runs.append(1), run(*args))[1])
    monkeypatch.setattr(in_place, "is_standard", lambda block: (looks.append(1), look(block))[1])
    backbone, imgs = FrozenViT(small(init_values=0.5, drop_path_rate=0.2)), images(1, 3, 32, 32)
    with torch.no_grad():
        for _ in range(3):
            backbone(imgs)
        assert (len(runs), len(looks)) == (3, 2)
        handle = backbone.model.blocks[0].mlp.drop1.register_forward_hook(lambda *args: None)
        backbone(imgs)
        assert len(runs) == 3
        handle.remove()
        backbone(imgs)
        assert len(runs) == 4
        for other in (copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))):
            assert torch.equal(other(imgs), backbone(imgs))
            other.model.blocks[0].mlp.act.forward = lambda x: 0 * x
            assert not torch.equal(other(imgs), backbone(imgs))
    gone = weakref.ref(backbone)
    del backbone
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(
    ("name", "value"), [("facet", "query"), ("head_order", "interleaved"), ("position_rule", "dino")]
)
def test_what_a_backbone_reads_is_fixed(name: str, value: str) -> None:
    backbone = FrozenViT(small(), position_rule="timm")
    was = getattr(backbone, name)
    with pytest.raises(AttributeError, match=rf"{name} of a backbone is fixed.*{was}.*FrozenViT\(.*{name}='{value}'"):
        setattr(backbone, name, value)
    assert getattr(backbone, name) == was
    assert getattr(FrozenViT(backbone.model, **{name: value}), name) == value
