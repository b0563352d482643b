"""ONNX files and torch.export programs against the networks themselves, on engines that do not know this package."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import onnx
import onnxruntime
import openvino
import pytest
import torch
import torch.nn.functional as F
from lift_networks import inputs, network
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

from lift_fast import FrozenViT, ViTLiFTExtractor, dense_match, export_onnx
from lift_fast._exporting import resize_patches
from lift_fast.backbones.position import RULES, _by_products, _dino_weights, _timm_weights
from lift_fast.export import compare_onnx, export_program

pytestmark = pytest.mark.usefixtures("one_thread")

PHOTOGRAPHS = Path(__file__).resolve().parents[1] / "examples" / "photographs"
MOST_ERROR = 1e-5


def vit(**options) -> VisionTransformer:
    torch.manual_seed(3)
    model = VisionTransformer(
        img_size=32, embed_dim=24, depth=2, num_heads=3, num_classes=0, dynamic_img_size=True, **options
    )
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape)
    return model


def on_engines(path, *arrays) -> list[torch.Tensor]:
    """The file's output in ONNX Runtime and in OpenVINO."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_inputs()]
    given = dict(zip(["imgs", "tokens"], [array.numpy() for array in arrays], strict=False))
    given = {name: given[name] for name in names}
    model = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return [torch.from_numpy(session.run(None, given)[0]), torch.from_numpy(model(given)[0])]


def assert_equal(path, expected, *arrays, most=MOST_ERROR):
    for given in on_engines(path, *arrays):
        assert given.shape == expected.shape
        assert float((given - expected).abs().max() / expected.abs().max()) <= most


LIFTS = {
    "published": (16, {}, {}),
    "patch 8, maps, deeper": (8, {"pre_shape": False, "post_shape": False, "extra_image_blocks": 1}, {}),
    "patch 14, matching map": (14, {"image_channels": 5}, {"output": "matching_map", "normalize": True}),
    "patch 20, no token output": (20, {"post_shape": False}, {}),
    "no image": (16, {"use_image": False}, {"output": "matching_map"}),
}


@pytest.mark.parametrize("name", LIFTS)
def test_lift(name, tmp_path):
    patch, options, keywords = LIFTS[name]
    lift = network(6, patch, seed=1, **options)
    path = export_onnx(lift, tmp_path / "lift.onnx", **keywords)
    for batch, height, width in ((1, 3 * patch + 1, 5 * patch), (3, 2 * patch, 2 * patch + 1)):
        imgs, tokens = inputs(patch, height, width, 6, batch)
        if not lift.pre_shape:
            tokens = tokens.transpose(1, 2).unflatten(2, (height // patch, width // patch)).contiguous()
        with torch.no_grad():
            if keywords:
                expected = lift.matching_map(imgs, tokens, normalize=keywords.get("normalize", False))
            else:
                expected = lift(imgs, tokens)
        assert_equal(path, expected, imgs, tokens)
    operators = onnx.load(path)
    assert {node.domain for node in operators.graph.node} == {""}
    assert [entry.version for entry in operators.opset_import if entry.domain == ""] == [18]


BACKBONES = {
    "dino's rule, interleaved": lambda: FrozenViT(
        vit(patch_size=8), position_rule="dino", head_order="interleaved", layer=1
    ),
    "registers, timm's rule, overlapping patches": lambda: FrozenViT(
        vit(patch_size=14, reg_tokens=2, no_embed_class=True, init_values=0.5), facet="final", stride=9
    ),
    "rotary": lambda: FrozenViT(
        Eva(
            img_size=32,
            patch_size=16,
            embed_dim=24,
            depth=2,
            num_heads=3,
            num_classes=0,
            use_rot_pos_emb=True,
            dynamic_img_size=True,
        ),
        facet="query",
    ),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_backbone(name, tmp_path):
    torch.manual_seed(7)
    backbone = BACKBONES[name]()
    path = export_onnx(backbone, tmp_path / "backbone.onnx")
    # The pretrained grid, larger and smaller ones, and one patch.
    for batch, height, width in ((1, 32, 32), (3, 71, 32), (1, 33, 90), (2, backbone.patch_size, 40)):
        imgs = torch.randn(batch, 3, height, width)
        assert_equal(path, backbone(imgs), imgs)


def test_extractor_of_overlapping_patches_applies_lift_twice(tmp_path):
    extractor = ViTLiFTExtractor(
        model=FrozenViT(vit(patch_size=16), stride=11), random_lift=True, device="cpu", silent=True
    )
    path = export_onnx(extractor, tmp_path / "extractor.onnx", iterations=2, output="matching_map", normalize=True)
    for shape in ((1, 3, 50, 41), (3, 3, 38, 38)):
        imgs = torch.randn(shape)
        assert_equal(path, F.normalize(extractor.matching_map(imgs, 2), dim=1), imgs)
    assert (extractor.load_size, extractor.num_patches) == ((38, 38), (3, 3))
    # Another network than the one of the file, and another program's file.
    other = ViTLiFTExtractor(model=extractor.backbone, random_lift=True, seed=1, device="cpu", silent=True)
    for net, least, most in ((extractor, 0, MOST_ERROR), (other, 0.01, 10)):
        found = compare_onnx(path, net, [(2, 38, 60), (1, 27, 27)], engine="openvino")
        assert [each.shape for each in found] == [(2, 38, 60), (1, 27, 27)]
        assert all(least <= each.relative_error <= most for each in found)
    with pytest.raises(ValueError, match="engine must be 'onnxruntime' or 'openvino', got 'tvm'"):
        compare_onnx(path, extractor, [], engine="tvm")
    with pytest.raises(ValueError, match=r"onnxruntime gives \[1, 13, 20, 20\] for images \(1, 64, 64\), the network"):
        compare_onnx(path, network(6, 16, 0), [(1, 64, 64)])
    with pytest.raises(ValueError, match="smaller than one patch"):
        compare_onnx(path, extractor, [(1, 5, 5)])
    (tmp_path / "other.onnx").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="cannot be read as an ONNX file"):
        compare_onnx(tmp_path / "other.onnx", extractor, [])
    onnx.save(onnx.ModelProto(), tmp_path / "other.onnx")
    with pytest.raises(ValueError, match=r"was not written by lift_fast\.export_onnx"):
        compare_onnx(tmp_path / "other.onnx", extractor, [])


@pytest.fixture(scope="module")
def demonstration():
    return ViTLiFTExtractor("demo_vitt16", "lift_demo_vitt16", device="cpu", silent=True)


@pytest.fixture(scope="module")
def photographs(demonstration):
    names = ("cat.jpg", "cat_second_view.jpg")
    return [demonstration.preprocess(PHOTOGRAPHS / name, size)[0] for name, size in zip(names, (160, 131), strict=True)]


@pytest.fixture(scope="module")
def matching_file(demonstration, tmp_path_factory):
    return export_onnx(demonstration, tmp_path_factory.mktemp("onnx") / "maps.onnx", output="matching_map")


def test_demonstration_pair_on_photographs(demonstration, photographs, matching_file):
    maps = []
    for imgs in photographs:
        with torch.no_grad():
            expected = demonstration.matching_map(imgs)
        assert_equal(matching_file, expected, imgs)
        maps.append((on_engines(matching_file, imgs)[0], expected))
    # NumPy arrays of an engine are matched like this package's own maps.
    sizes = [imgs.shape[2:] for imgs in photographs]
    theirs, ours = (
        dense_match(maps[0][i].numpy(), maps[1][i].numpy(), sizes[0], sizes[1], normalize="grid") for i in (0, 1)
    )
    assert (theirs.xy == ours.xy).float().mean() > 0.999


def test_what_a_file_says(demonstration, matching_file):
    session = onnxruntime.InferenceSession(matching_file)
    assert [(i.name, i.shape, i.type) for i in session.get_inputs()] == [
        ("imgs", ["batch", 3, "height", "width"], "tensor(float)")
    ]
    assert [(o.name, o.shape) for o in session.get_outputs()] == [("matching_map", ["batch", 97, "rows", "columns"])]
    about = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    assert about["lift_fast.mean"] == list(demonstration.mean)
    assert about["lift_fast.std"] == list(demonstration.std)
    expected = {"patch_size": 16, "stride": 16, "model": "demo_vitt16", "facet": "key", "random_weights": False}
    assert expected.items() <= {key.removeprefix("lift_fast."): value for key, value in about.items()}.items()
    # Neither sources nor folders of the machine that wrote it.
    assert b".py" not in matching_file.read_bytes()


def test_fixed_size(tmp_path):
    extractor = ViTLiFTExtractor(model=vit(patch_size=16), random_lift=True, device="cpu", silent=True)
    path = export_onnx(extractor, tmp_path / "fixed.onnx", False, size=(50, 37), batch=2, opset=20)
    session = onnxruntime.InferenceSession(path)
    assert [item.shape for item in session.get_inputs()] == [[2, 3, 50, 37]]
    assert [item.shape for item in session.get_outputs()] == [[2, 24, 24]]
    imgs = torch.randn(2, 3, 50, 37)
    assert_equal(path, extractor(imgs), imgs)
    assert [entry.version for entry in onnx.load(path).opset_import if entry.domain == ""] == [20]


def test_pytorch_exports_a_frozen_lift_as_it_stands(tmp_path):
    """Without our operator, whose kernels run for the same call outside an export."""
    lift = network(6, 16, seed=2).requires_grad_(False)
    imgs, tokens = inputs(16, 40, 70, 6)
    free = torch.export.Dim.DYNAMIC
    torch.onnx.export(
        lift,
        (imgs, tokens),
        tmp_path / "new.onnx",
        input_names=["imgs", "tokens"],
        dynamic_shapes={"imgs": {0: free, 2: free, 3: free}, "x": {0: free, 1: free}},
        verbose=False,
    )
    imgs, tokens = inputs(16, 64, 33, 6, batch=3)
    assert_equal(tmp_path / "new.onnx", lift(imgs, tokens), imgs, tokens)


@pytest.mark.parametrize("part", ["lift", "backbone", "extractor"])
def test_pytorchs_older_exporter(part, tmp_path, demonstration):
    """It traces: what writes into buffers, or chooses by a cache, would be lost in silence."""
    if part == "lift":
        net = network(6, 14, seed=2).requires_grad_(False)
        given = inputs(14, 30, 60, 6)
    else:
        net = demonstration.backbone if part == "backbone" else demonstration
        given = (torch.randn(1, 3, 40, 70),)
        net(*given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(net, given, tmp_path / "old.onnx", input_names=["imgs", "tokens"][: len(given)], dynamo=False)
    assert_equal(tmp_path / "old.onnx", net(*given), *given)


def test_programs_are_plain_pytorch(tmp_path):
    """Saved, then loaded and run by a process without this package; a user's own call of torch.export as well."""
    extractor = ViTLiFTExtractor(model=vit(patch_size=16), random_lift=True, device="cpu", silent=True)
    program = export_program(extractor)
    imgs = torch.randn(1, 3, 33, 70)
    own = torch.export.export(extractor, (imgs,))
    lift = network(6, 14, seed=5).requires_grad_(False)
    given = inputs(14, 30, 60, 6)
    for recorded, expected, values in (
        (program, extractor(imgs), (imgs,)),
        (own, extractor(imgs), (imgs,)),
        (torch.export.export(lift, given), lift(*given), given),
    ):
        torch.testing.assert_close(recorded.module()(*values), expected, rtol=1e-5, atol=1e-5)
        assert not [node for node in recorded.graph.nodes if "lift_fast" in str(node.target)]
    torch.export.save(program, tmp_path / "program.pt2")
    torch.save(imgs, tmp_path / "imgs.pt")
    code = """import sys, torch
imgs = torch.load("imgs.pt")
torch.save(torch.export.load("program.pt2").module()(imgs), "out.pt")
assert "lift_fast" not in sys.modules"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), extractor(imgs), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_compiled_ahead_of_time(tmp_path):
    lift = network(6, 14, seed=5)
    package = torch._inductor.aoti_compile_and_package(export_program(lift), package_path=str(tmp_path / "lift.pt2"))
    loaded = torch._inductor.aoti_load_package(package)
    for batch, height, width in ((1, 30, 29), (3, 56, 100)):
        given = inputs(14, height, width, 6, batch)
        with torch.no_grad():
            torch.testing.assert_close(loaded(*given), lift(*given), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("patch", [1, 5, 16, 17, 20, 32, 100])
@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (5, 1)])
def test_resizing_patches_in_a_program(patch, grid):
    imgs = torch.randn(2, 3, patch * grid[0], patch * grid[1])
    expected = F.interpolate(imgs, size=(16 * grid[0], 16 * grid[1]), mode="bilinear", antialias=True)
    torch.testing.assert_close(resize_patches(imgs, patch, 16), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("old", [(14, 14), (5, 7), (1, 1)])
def test_position_embeddings_in_a_program(rule, old):
    position = torch.randn(1, old[0] * old[1], 6)
    for new in ((14, 14), (5, 7), (1, 1), (3, 1), (29, 17), (14, 5), (64, 3)):
        given = _by_products(position, old, new, {"dino": _dino_weights, "timm": _timm_weights}[rule])
        torch.testing.assert_close(given, RULES[rule](position, old, new), rtol=1e-4, atol=5e-5)
