"""Local checkpoint files: layouts of the projects, conversion, and clear words for files that do not fit."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lift_fast import load_lift
from lift_fast.backbones import (
    FrozenViT,
    WeightsNotFoundError,
    extract_hooked,
    load_backbone,
    pretrained,
    read_checkpoint,
    registry,
)

pytestmark = pytest.mark.usefixtures("one_thread")

NAME = "vit_tiny_patch16_224"
IMAGENET_MEAN = (0.485, 0.456, 0.406)


def tiny(seed: int = 0, **extra: object) -> nn.Module:
    model = timm.create_model(NAME, num_classes=0, dynamic_img_size=True, **extra)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny()


@pytest.fixture(scope="module")
def other() -> nn.Module:
    return tiny(1)


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + k: v for k, v in state.items()}


def dino_head(prefix: str) -> dict[str, Tensor]:
    return prefixed(prefix + "head.", {"mlp.0.weight": torch.zeros(4, 192), "last_layer.weight_g": torch.ones(4, 1)})


def plain(good: dict, bad: dict) -> dict:
    return good


def timm_with_classifier(good: dict, bad: dict) -> dict:
    return {**good, "head.weight": torch.zeros(10, 192), "head.bias": torch.zeros(10)}


def deit(good: dict, bad: dict) -> dict:
    return {"model": timm_with_classifier(good, bad)}


def dino_full(good: dict, bad: dict) -> dict:
    return {
        "student": {**prefixed("module.backbone.", bad), **dino_head("module.")},
        "teacher": {**prefixed("backbone.", good), **dino_head("")},
        "optimizer": {"state": {}, "param_groups": []},
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_tiny", patch_size=16),
        "dino_loss": {"center": torch.zeros(1, 4)},
    }


def dino_teacher_under_ddp(good: dict, bad: dict) -> dict:
    return {"teacher": {**prefixed("module.backbone.", good), **dino_head("module.")}}


def moco(good: dict, bad: dict) -> dict:
    heads = {"head.0.weight": torch.zeros(8, 192), "head.1.running_mean": torch.zeros(8)}
    return {
        "epoch": 300,
        "arch": "vit_tiny",
        "state_dict": {
            **prefixed("module.base_encoder.", {**good, **heads}),
            **prefixed("module.momentum_encoder.", {**bad, **heads}),
            "module.predictor.0.weight": torch.zeros(8, 8),
        },
        "optimizer": {},
    }


def leopart_heads() -> dict[str, Tensor]:
    return {"projection_head.0.weight": torch.zeros(8, 192), "prototypes.weight": torch.zeros(4, 8)}


def leopart(good: dict, bad: dict) -> dict:
    return prefixed("model.", {**good, **leopart_heads()})


def leopart_lightning(good: dict, bad: dict) -> dict:
    state = {**prefixed("teacher.", {**bad, **leopart_heads()}), **prefixed("model.", {**good, **leopart_heads()})}
    return {"epoch": 1, "pytorch-lightning_version": "1.3", "state_dict": state, "lr_schedulers": []}


LAYOUTS: dict[str, tuple[Callable[[dict, dict], dict], str]] = {
    "plain": (plain, "plain"),
    "timm_with_classifier": (timm_with_classifier, "plain"),
    "deit": (deit, "plain"),
    "dino_full": (dino_full, "dino"),
    "dino_teacher_under_ddp": (dino_teacher_under_ddp, "dino"),
    "moco": (moco, "moco_v3"),
    "leopart": (leopart, "leopart"),
    "leopart_lightning": (leopart_lightning, "leopart"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, model: nn.Module, other: nn.Module, tmp_path: Path) -> None:
    write, expected = LAYOUTS[layout]
    file = tmp_path / "checkpoint.pth"
    torch.save(write(model.state_dict(), other.state_dict()), file)
    assert read_checkpoint(file).layout == expected
    backbone = load_backbone(NAME, weights=file)
    imgs = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.allclose(backbone(imgs), extract_hooked(model, imgs), rtol=1e-5, atol=1e-5)
    assert not backbone.random_weights
    if expected != "plain":
        assert backbone.mean == IMAGENET_MEAN
        assert backbone.position_rule == "dino"


def test_safetensors_and_choice_of_key(model: nn.Module, other: nn.Module, tmp_path: Path) -> None:
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    torch.save(dino_full(model.state_dict(), other.state_dict()), tmp_path / "full.pth")
    imgs = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        for file, key, source in (("a.safetensors", None, model), ("full.pth", "student", other)):
            backbone = load_backbone(NAME, weights=tmp_path / file, checkpoint_key=key)
            assert torch.allclose(backbone(imgs), extract_hooked(source, imgs), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"full\.pth has no entry 'ema'.*student, teacher"):
        load_backbone(NAME, weights=tmp_path / "full.pth", checkpoint_key="ema")


def test_tensors_do_not_lie_in_a_mapping_of_the_file(model: nn.Module, tmp_path: Path) -> None:
    """Whoever shortens or rewrites the file would end the process, or change its weights."""
    file = tmp_path / "a.safetensors"
    save_file(model.state_dict(), file)
    state = read_checkpoint(file).state
    with file.open("r+b") as opened:
        opened.write(bytes(file.stat().st_size))
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_selfpatch_has_neither_class_token_nor_final_norm(tmp_path: Path) -> None:
    model = tiny(class_token=False, global_pool="avg", fc_norm=False)
    model.norm = nn.Identity()
    heads = {"ca_head.cls_token": torch.zeros(1, 1, 192), "c_head.mlp.0.weight": torch.zeros(4, 192)}
    heads["ca_head.cls_blocks.0.attn.q.weight"] = torch.zeros(192, 192)
    full = {"teacher": {**prefixed("backbone.", model.state_dict()), **heads}, "args": argparse.Namespace()}
    imgs = torch.randn(1, 3, 224, 224)
    for content in (full, {**model.state_dict(), **heads}, model.state_dict()):
        torch.save(content, tmp_path / "selfpatch.pth")
        assert read_checkpoint(tmp_path / "selfpatch.pth").layout == "selfpatch"
        backbone = load_backbone(NAME, weights=tmp_path / "selfpatch.pth")
        with torch.no_grad():
            assert torch.allclose(backbone(imgs), extract_hooked(model, imgs), rtol=1e-5, atol=1e-5)
        assert backbone.mean == IMAGENET_MEAN


def test_mocov3_small_gets_twelve_heads(tmp_path: Path) -> None:
    model = timm.create_model("vit_small_patch16_224", num_classes=0, num_heads=12)
    torch.save(moco(model.state_dict(), model.state_dict()), tmp_path / "vit-s-300ep.pth.tar")
    for name in ("mocov3_vits16", "vit_small_patch16_224"):
        backbone = load_backbone(name, weights=tmp_path / "vit-s-300ep.pth.tar")
        assert backbone.model.blocks[0].attn.num_heads == 12
        assert backbone.mean == IMAGENET_MEAN


@pytest.mark.parametrize("rule", ["dino", "timm"])
def test_position_embeddings_of_another_grid(rule: str, tmp_path: Path) -> None:
    model = tiny(img_size=160)
    torch.save({"teacher": model.state_dict()}, tmp_path / "small.pth")
    backbone = load_backbone(NAME, weights=tmp_path / "small.pth", position_rule=rule)
    for size in (160, 224):
        imgs = torch.randn(1, 3, size, size)
        with torch.no_grad():
            assert torch.equal(backbone(imgs), FrozenViT(model, position_rule=rule)(imgs))


def test_half_precision_file_and_dinov3_names(tmp_path: Path) -> None:
    torch.save({k: v.half() for k, v in tiny().state_dict().items()}, tmp_path / "half.pth")
    backbone = load_backbone(NAME, weights=tmp_path / "half.pth")
    assert backbone(torch.randn(1, 3, 32, 32)).dtype == torch.float32
    name = "vit_small_patch16_dinov3"
    dinov3 = timm.create_model(name, num_classes=0, dynamic_img_size=True).eval()
    torch.save(dinov3.state_dict(), tmp_path / "dinov3.pth")
    imgs = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        backbone = load_backbone(name, weights=tmp_path / "dinov3.pth", engine="torch")
        assert torch.equal(backbone(imgs), extract_hooked(dinov3, imgs))


def without(state: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if k not in names}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: without(s, "blocks.1.attn.qkv.bias"), r"1 missing \(blocks\.1\.attn\.qkv\.bias\)"),
        (lambda s: {**s, "blocks.0.adapter.weight": torch.zeros(1)}, r"1 unexpected \(blocks\.0\.adapter\.weight\)"),
        (lambda s: {**s, "norm.weight": torch.zeros(7)}, r"norm\.weight: file \[7\], model \[192\]"),
        (lambda s: {**s, "cls_token": torch.full((1, 1, 192), float("nan"))}, "192 of 192 values of 'cls_token'"),
        (lambda s: {"layer1.conv.weight": torch.zeros(1)}, "no ViT backbone.*layer1.conv.weight"),
        (lambda s: {"epoch": 3}, "contains no tensors; its entries are epoch"),
        (lambda s: [1, 2], "contains a list"),
        (lambda s: {"model": nn.Linear(1, 1)}, r"objects other than tensors \(torch\.nn\.modules\.linear\.Linear\)"),
        (lambda s: {**s, "cls_token": s["cls_token"].to_sparse()}, "'cls_token' is sparse"),
        (lambda s: {**s, "cls_token": s["cls_token"].cfloat()}, r"'cls_token' is torch\.complex64"),
        (lambda s: {**s, "cls_token": s["cls_token"].int()}, r"integer and floating point differ in: cls_token$"),
        (lambda s: {**s, "cls_token": s["cls_token"].to(torch.float8_e4m3fn)}, "'cls_token' is torch.float8_e4m3fn"),
        (lambda s: {**s, "cls_token": s["cls_token"].to("meta")}, "'cls_token' is without values"),
        (lambda s: {**s, "norm.weight": torch.ones(1).expand(192)}, r"'norm\.weight' is of overlapping elements"),
        (
            lambda s: {**s, "pos_embed": torch.zeros(1, 10**10, 0)},
            r"'pos_embed' has shape \[1, 10000000000, 0\], expected \[1, tokens, 192\]",
        ),
        (lambda s: {**s, 3: torch.zeros(1)}, "the name of a tensor is an int"),
        (lambda s: {**s, "patch_embed.proj.weight": torch.zeros(192, 3, 16)}, r"shape \[192, 3, 16\], expected"),
        (lambda s: {**s, **{f"x{i}" * 400: torch.zeros(1) for i in range(900)}}, r"900 unexpected \(.*\.\.\. 895 more"),
    ],
)
def test_files_that_do_not_fit(
    change: Callable[[dict], object], message: str, model: nn.Module, tmp_path: Path
) -> None:
    file = tmp_path / "wrong.pth"
    torch.save(change(model.state_dict()), file)
    with pytest.raises(ValueError, match=message) as caught:
        load_backbone(NAME, weights=file)
    words = str(caught.value)
    assert str(file) in words
    assert words.count("\n") == 0
    assert len(words) < 1500
    assert "weights_only" not in words


def test_file_of_another_architecture_says_which(model: nn.Module, tmp_path: Path) -> None:
    torch.save(model.state_dict(), tmp_path / "tiny.pth")
    with pytest.raises(ValueError, match=r"tiny.pth.*width 192, patch size 16, 12 blocks"):
        load_backbone("dino_vits16", weights=tmp_path / "tiny.pth")


def vit(name: str, **extra: object) -> dict[str, Tensor]:
    """Zeros of a model's shapes, without the time that random weights take."""
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0, **extra)
    return {k: torch.zeros(v.shape) for k, v in model.state_dict().items()}


@pytest.mark.parametrize(
    ("source", "name", "words"),
    [
        ("vit_small_patch16_224", "dino_vits8", "its patch size is 16, dino_vits8 has 8"),
        ("vit_small_patch8_224", "dino_vits16", "its patch size is 8, dino_vits16 has 16"),
        ("vit_small_patch16_224", "vit_small_patch32_224", "its patch size is 16, vit_small_patch32_224 has 32"),
        ("vit_small_patch14_dinov2", "dino_vits16", "its patch size is 14, dino_vits16 has 16"),
        ("vit_small_patch16_224", "vit_small_patch14_dinov2", "its patch size is 16, vit_small_patch14_dinov2 has 14"),
        ("vit_tiny_patch16_224", "vit_small_patch16_dinov3", "its width is 192, vit_small_patch16_dinov3 has 384"),
        ("vit_tiny_patch16_224", "demo_vitt16", "its depth is 12, demo_vitt16 has 6"),
    ],
)
def test_another_architecture_is_named_and_never_resampled(source: str, name: str, words: str, tmp_path: Path) -> None:
    state = vit(source)
    for content in (state, {"teacher": prefixed("backbone.", state)}):
        torch.save(content, tmp_path / "other.pth")
        with pytest.raises(ValueError, match=r"other\.pth does not fit .*choose the model name that matches") as caught:
            load_backbone(name, weights=tmp_path / "other.pth")
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)


def test_old_files_with_a_linear_patch_embedding(model: nn.Module, tmp_path: Path) -> None:
    state = model.state_dict()
    name = "patch_embed.proj.weight"
    torch.save({**state, name: state[name].flatten(1)}, tmp_path / "flat.pth")
    assert torch.equal(load_backbone(NAME, weights=tmp_path / "flat.pth").model.patch_embed.proj.weight, state[name])
    torch.save({**state, name: torch.zeros(192, 3 * 8 * 8)}, tmp_path / "flat.pth")
    with pytest.raises(ValueError, match="its patch size is 8, vit_tiny_patch16_224 has 16"):
        load_backbone(NAME, weights=tmp_path / "flat.pth")


def dinov2(registers: int) -> dict[str, Tensor]:
    """As the project's published files: random values, the names of its own code."""
    name = "vit_small_patch14_reg4_dinov2" if registers else "vit_small_patch14_dinov2"
    state = vit(name, img_size=56)
    generator = torch.Generator().manual_seed(0)
    state = {k: 0.05 * torch.randn(v.shape, generator=generator) for k, v in state.items()}
    if registers:
        state["register_tokens"] = state.pop("reg_token")
        state["pos_embed"] = 0.05 * torch.randn(1, 17, 384, generator=generator)
    state["mask_token"] = torch.zeros(1, 384)
    return state


@pytest.mark.parametrize("registers", [0, 4])
def test_register_tokens_must_agree(registers: int, tmp_path: Path) -> None:
    torch.save(dinov2(registers), tmp_path / "dinov2.pth")
    names = ("vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2")
    right, wrong = names if registers == 0 else names[::-1]
    assert load_backbone(right, weights=tmp_path / "dinov2.pth").patch_size == 14
    words = rf"dinov2\.pth .*number of register tokens is {registers}, {wrong} has {4 - registers}"
    with pytest.raises(ValueError, match=words):
        load_backbone(wrong, weights=tmp_path / "dinov2.pth")


@pytest.mark.parametrize("registers", [0, 4])
def test_training_files_of_dinov2_with_blocks_in_chunks(registers: int, tmp_path: Path) -> None:
    name = "vit_small_patch14_reg4_dinov2" if registers else "vit_small_patch14_dinov2"
    plain = dinov2(registers)
    chunked: dict[str, Tensor] = {}
    for entry, value in plain.items():
        first, _, rest = entry.partition("blocks.")
        # Four chunks of three, numbered through.
        chunked[f"blocks.{int(rest.split('.')[0]) // 3}.{rest}" if not first else entry] = value
    assert "blocks.3.11.attn.qkv.weight" in chunked
    torch.save(plain, tmp_path / "plain.pth")
    expected = load_backbone(name, weights=tmp_path / "plain.pth", position_rule="dino")
    other = {k: v + 1 for k, v in chunked.items()}
    heads = {"dino_head.mlp.0.weight": torch.zeros(4, 384)}
    for content in (
        {"teacher": {**prefixed("backbone.", chunked), **heads}, "iteration": 3},
        prefixed("teacher.backbone.", chunked),
        {"model": {**prefixed("student.backbone.", other), **prefixed("teacher.backbone.", chunked)}},
        {"model": prefixed("_orig_mod.", chunked)},
    ):
        torch.save(content, tmp_path / "training.pth")
        found = load_backbone(name, weights=tmp_path / "training.pth", position_rule="dino").model.state_dict()
        assert all(torch.equal(found[k], v) for k, v in expected.model.state_dict().items())
    torch.save({**chunked, "blocks.0.11.attn.qkv.weight": torch.zeros(1)}, tmp_path / "twice.pth")
    with pytest.raises(ValueError, match=r"'blocks\.11\.attn\.qkv\.weight' exists twice"):
        load_backbone(name, weights=tmp_path / "twice.pth")


def test_corrupt_and_missing_files(model: nn.Module, tmp_path: Path) -> None:
    torch.save(model.state_dict(), tmp_path / "whole.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:100_000])
    (tmp_path / "text.pth").write_text("not a checkpoint")
    (tmp_path / "empty.pth").touch()
    (tmp_path / "bad.safetensors").write_bytes(b"\x00" * 64)
    for name in ("cut.pth", "text.pth", "empty.pth", "bad.safetensors"):
        with pytest.raises(ValueError, match=f"{name} is not a readable checkpoint"):
            load_backbone(NAME, weights=tmp_path / name)
    (tmp_path / "words.pth").write_text("hello")
    for load in (lambda path: load_backbone(NAME, weights=path), lambda path: load_lift(path, patch_size=16)):
        with pytest.raises(ValueError, match=r"words.pth is not a readable checkpoint.*another kind"):
            load(tmp_path / "words.pth")
    with pytest.raises(FileNotFoundError, match=r"nowhere.pth"):
        load_backbone(NAME, weights=tmp_path / "nowhere.pth")
    with pytest.raises(ValueError, match="is a folder"):
        load_backbone(NAME, weights=tmp_path)
    with pytest.raises(ValueError, match="exclude each other"):
        load_backbone(NAME, weights=tmp_path / "whole.pth", random_weights=True)


def hub_cache(folder: Path, repository: str, model: nn.Module) -> None:
    """The cache folder as the hub's client writes it."""
    root = folder / ("models--" + repository.replace("/", "--"))
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("abc")
    (root / "snapshots" / "abc").mkdir(parents=True)
    save_file(model.state_dict(), root / "snapshots" / "abc" / "model.safetensors")


def test_cached_weights_are_used_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(url: str) -> str:
        raise AssertionError("asked the network")

    monkeypatch.setattr(pretrained, "_unreachable", no_network)
    source = timm.create_model("vit_small_patch16_224.dino", num_classes=0, dynamic_img_size=True).eval()
    hub_cache(tmp_path, "timm/vit_small_patch16_224.dino", source)
    monkeypatch.setattr(pretrained, "_cached", lambda repository, name, _: _lookup(tmp_path, repository, name))
    imgs = torch.randn(1, 3, 224, 224)
    backbone = load_backbone("dino_vits16")
    with torch.no_grad():
        torch.testing.assert_close(backbone(imgs), extract_hooked(source, imgs), rtol=1e-4, atol=1e-4)
    assert not backbone.random_weights


def _lookup(folder: Path, repository: str, name: str) -> str | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, name, cache_dir=folder)
    return found if isinstance(found, str) else None


def test_without_network_the_message_names_file_place_and_options(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pretrained, "_cached", lambda *args: None)
    monkeypatch.setattr(pretrained, "_unreachable", lambda url: "no route")
    with pytest.raises(WeightsNotFoundError) as caught:
        load_backbone("dino_vits16")
    message = str(caught.value)
    for part in (
        "'dino_vits16'",
        "model.safetensors of timm/vit_small_patch16_224.dino",
        "cache",
        "no route",
        "weights=FILE",
        "--weights FILE",
        "random_weights=True",
        "--random-weights",
    ):
        assert part in message
    with pytest.raises(WeightsNotFoundError, match="use 'dino_vits8'"):
        load_backbone("vit_small_patch8_224")


def test_unreachable_host_is_noticed_quickly() -> None:
    start = time.perf_counter()
    assert pretrained._unreachable("http://127.0.0.1:9/") is not None
    assert time.perf_counter() - start < 12


def test_offline_switch_forbids_the_download(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(pretrained, "_cached", lambda *args: None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsNotFoundError, match="HF_HUB_OFFLINE forbids"):
        load_backbone("dino_vits16")


def test_damaged_cached_file_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 64)
    monkeypatch.setattr(registry, "find_pretrained", lambda name: tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"cached weights .*model\.safetensors cannot be loaded"):
        load_backbone("dino_vits16")
