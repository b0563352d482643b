"""The package's own Vision Transformer against timm's: the same state dict, bit for bit the same features."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.layers import resample_abs_pos_embed
from torch import nn

from lift_fast import demonstration
from lift_fast.backbones import OFFICIAL, FrozenViT, extract_hooked, load_backbone, pretrained
from lift_fast.backbones.checkpoints import load_state, read_checkpoint
from lift_fast.backbones.network import VisionTransformer
from lift_fast.backbones.position import timm_rule
from lift_fast.backbones.pretrained import find_pretrained


def pair(width=48, depth=3, heads=3, patch=8, grid=(5, 5)):
    """timm's network and ours with the same random weights, those that start at zero or one included."""
    theirs = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=grid[0] * patch,
        patch_size=patch,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        num_classes=0,
        dynamic_img_size=True,
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.3)
    ours = VisionTransformer(width, depth, heads, patch, grid).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


@pytest.mark.parametrize("size", [(40, 40), (8, 24), (56, 32)])
@torch.no_grad()
def test_the_whole_network_is_timms(size):
    theirs, ours = pair()
    assert list(theirs.state_dict()) == list(ours.state_dict())
    images = torch.randn(3, 3, *size)
    assert torch.equal(theirs.forward_features(images), ours.forward_features(images))
    assert torch.equal(theirs(images), ours(images))


@pytest.mark.parametrize("facet", ["key", "query", "value", "token", "final"])
@pytest.mark.parametrize("options", [{}, {"stride": 5, "layer": -2}, {"head_order": "interleaved"}])
@pytest.mark.parametrize("rule", ["timm", "dino"])
def test_frozen_features_are_timms(facet, options, rule):
    theirs, ours = (FrozenViT(network, facet=facet, position_rule=rule, **options) for network in pair())
    for size in ((40, 40), (43, 61), (8, 8)):
        images = torch.randn(2, 3, *size)
        # Without gradients blocks run in place; with them each block is called.
        with torch.no_grad():
            found = ours(images)
            assert torch.equal(theirs(images), found)
        images.requires_grad_()
        again = ours(images)
        assert torch.equal(theirs(images), again)
        assert torch.allclose(found, again, atol=1e-5)


@torch.no_grad()
def test_blocks_run_in_place_unless_they_are_edited(monkeypatch):
    backbone, images = FrozenViT(pair()[1], facet="token"), torch.randn(1, 3, 40, 40)
    before, calls, run = backbone(images), [], FrozenViT._run
    monkeypatch.setattr(FrozenViT, "_run", lambda self, block, *rest: calls.append(block) or run(self, block, *rest))
    edits = {
        "none": lambda block: None,
        "hook": lambda block: block.register_forward_hook(lambda *args: None),
        "activation": lambda block: setattr(block.mlp, "act", nn.ReLU()),
        "attention": lambda block: setattr(block, "attn", nn.Linear(48, 48)),
    }
    for name, edit in edits.items():
        edited = copy.deepcopy(backbone)
        calls.clear()
        edit(edited.model.blocks[1])
        expected = extract_hooked(edited.model, images, -1, "token")
        found = edited(images)
        assert torch.allclose(found, expected, atol=1e-5), name
        assert torch.allclose(found, before, atol=1e-5) == (name in ("none", "hook")), name
        assert len(calls) == (0 if name == "none" else 3), name


@torch.no_grad()
def test_the_demonstration_is_what_timm_builds_of_its_file():
    theirs = timm.create_model("vit_tiny_patch16_224", depth=6, num_classes=0, dynamic_img_size=True).eval()
    load_state(theirs, read_checkpoint(demonstration.backbone_file()))
    ours = load_backbone("demo_vitt16")
    images = torch.randn(2, 3, 160, 240)
    assert torch.equal(FrozenViT(theirs, position_rule="timm")(images), ours(images))
    assert ours(images).dtype == torch.float32


@pytest.mark.parametrize("new", [(14, 14), (28, 28), (3, 17), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_positions_are_resampled_as_timm_does(new, dtype):
    position = torch.randn(1, 14 * 14, 10).to(dtype)
    expected = resample_abs_pos_embed(position, new_size=list(new), old_size=[14, 14], num_prefix_tokens=0)
    assert torch.equal(timm_rule(position, (14, 14), new), expected)


OFFICIAL_FILES = {
    "dino_vits16": ("vit_small_patch16_224", {}),
    "dino_vits8": ("vit_small_patch8_224", {"img_size": 112}),
    "mocov3_vits16": ("vit_small_patch16_224", {"num_heads": 12}),
}


@pytest.mark.parametrize("name", OFFICIAL_FILES)
@torch.no_grad()
def test_official_files_make_the_network_that_timm_makes_of_them(name, tmp_path):
    architecture, options = OFFICIAL_FILES[name]
    theirs = timm.create_model(architecture, num_classes=0, dynamic_img_size=True, **options).eval()
    theirs.pos_embed.normal_()
    theirs.cls_token.normal_()
    torch.save({"teacher": {f"module.backbone.{k}": v for k, v in theirs.state_dict().items()}}, tmp_path / "x.pth")
    ours = load_backbone(name, weights=tmp_path / "x.pth", layer=2)
    assert type(ours.model) is VisionTransformer
    images = torch.randn(1, 3, 64, 96)
    assert torch.equal(FrozenViT(theirs, layer=2, position_rule="dino")(images), ours(images))


def test_files_that_are_not_plain_are_timms_affair(tmp_path):
    """A layer scale, which no official network has: refused with timm's entries named, as ever."""
    state = timm.create_model("vit_small_patch16_224", num_classes=0).state_dict()
    torch.save({**state, "blocks.0.ls1.gamma": torch.ones(384)}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"1 unexpected \(blocks\.0\.ls1\.gamma\)"):
        load_backbone("dino_vits16", weights=tmp_path / "x.pth")
    torch.save({**state, "norm.bias": torch.ones(384, dtype=torch.int64)}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"integer and floating point differ in: norm\.bias"):
        load_backbone("dino_vits16", weights=tmp_path / "x.pth")


@pytest.mark.parametrize("name", ["dino_vits16", "dino_vits8", "dino_vitb16", "dino_vitb8"])
def test_pretrained_names_are_timms(name, monkeypatch):
    config = timm.get_pretrained_cfg(OFFICIAL[name].architecture)
    asked = []
    monkeypatch.setattr(pretrained, "_cached", lambda *question: asked.append(question) or __file__)
    assert str(find_pretrained(OFFICIAL[name].architecture)) == __file__
    assert asked == [(config.hf_hub_id, "model.safetensors", None)]
    assert config.hf_hub_filename is None


def test_dino_is_loaded_without_timm(tmp_path):
    state = VisionTransformer(384, 12, 6, 16, (14, 14)).state_dict()
    torch.save(state, tmp_path / "x.pth")
    code = """
        import json, sys, torch
        from lift_fast import load_backbone
        found = load_backbone("dino_vits16", weights=sys.argv[1], layer=1)(torch.zeros(1, 3, 64, 96))
        print(json.dumps([list(found.shape), "timm" in sys.modules, "torch._dynamo" in sys.modules]))
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "x.pth")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [[1, 24, 384], False, False]


def test_the_global_random_state_is_not_touched():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    load_backbone("demo_vitt16")
    assert torch.equal(torch.rand(4), expected)


def test_matching_two_images_loads_neither_timm_nor_a_compiler(tmp_path):
    for name in ("a.png", "b.png"):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 80, 3), np.uint8)).save(tmp_path / name)
    code = """
        import json, sys
        from lift_fast.cli import main
        status = main(["match", *sys.argv[1:3], "--out", sys.argv[3], "--size", "64", "--device", "cpu", "--quiet"])
        heavy = ("timm", "torchvision", "torch._dynamo", "torch._inductor", "sympy", "triton", "matplotlib")
        print(json.dumps([status, [name for name in heavy if name in sys.modules]]))
    """
    files = [str(tmp_path / name) for name in ("a.png", "b.png", "out.png")]
    command = [sys.executable, "-c", textwrap.dedent(code), *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [0, []]
