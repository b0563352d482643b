"""Engines of frozen backbones against the modules in float64, on many shapes, and when they must step back."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.eva import Eva
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import lift_fast
from lift_fast.backbones import EngineError, FrozenViT, load_backbone
from lift_fast.backbones.engines import choice, openvino
from lift_fast.backbones.vit import shared_copy
from lift_fast.cli import main

pytestmark = pytest.mark.usefixtures("one_thread", "own_cache")


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory):
    """Networks that several tests use are compiled once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIFT_FAST_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("LIFT_FAST_ENGINE_CACHE")
        yield


def network(kind: type[nn.Module] = VisionTransformer, seed: int = 0, **extra: object) -> nn.Module:
    arguments = {"patch_size": 8, "img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 0}
    torch.manual_seed(seed)
    model = kind(**{**arguments, "dynamic_img_size": True, **extra})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


NETWORKS = {
    "plain": lambda: network(),
    "registers and scales": lambda: network(reg_tokens=4, no_embed_class=True, init_values=0.5, qkv_bias=False),
    "no class token, norms": lambda: network(class_token=False, global_pool="avg", pre_norm=True, qk_norm=True),
    "norms after": lambda: network(block_fn=ResPostBlock, init_values=0.3),
    "swiglu, rotary": lambda: network(Eva, use_rot_pos_emb=True, swiglu_mlp=True),
    "split, rotary": lambda: network(Eva, qkv_fused=False, use_rot_pos_emb=True, ref_feat_shape=(4, 4)),
    "dinov3": lambda: network(
        Eva, use_rot_pos_emb=True, use_abs_pos_emb=False, rope_type="dinov3", num_reg_tokens=4, init_values=0.5
    ),
    "mixed rotary": lambda: network(Eva, use_rot_pos_emb=True, rope_type="mixed", attn_type="rope"),
}
SHAPES = [(1, 3, 32, 32), (3, 3, 40, 17), (1, 3, 8, 8), (2, 3, 8, 90), (5, 3, 61, 32)]


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours.double() - theirs).abs().max() / theirs.abs().max())


def exact(model: nn.Module, imgs: Tensor, **options: object) -> Tensor:
    """The modules in float64, of the weights and images as they are."""
    with torch.no_grad():
        backbone = FrozenViT(copy.deepcopy(model).double(), engine="torch", **options)
        return backbone(imgs.double())


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("facet", ["key", "final"])
def test_openvino_equals_the_modules_on_every_shape(kind: str, facet: str) -> None:
    model = NETWORKS[kind]()
    options = {"facet": facet, "stride": 5, "head_order": "interleaved"}
    backbone = FrozenViT(model, engine="openvino", **options)
    for seed, shape in enumerate(SHAPES):
        imgs = images(*shape, seed=seed)
        with torch.inference_mode():
            ours = backbone(imgs)
        assert backbone.engine_used == "openvino", backbone.engine_reason
        assert ours.dtype == torch.float32
        # Real float32: bfloat16, which OpenVINO prefers where the processor has it, is a thousand times further away.
        assert relative_error(ours, exact(model, imgs, **options)) <= 1e-5


@pytest.mark.parametrize("kind", ["registers and scales", "dinov3"])
def test_bfloat16_is_as_near_as_pytorchs(kind: str) -> None:
    model = NETWORKS[kind]().to(torch.bfloat16)
    backbones = {engine: FrozenViT(model, layer=0, engine=engine) for engine in ("openvino", "torch")}
    for seed, shape in enumerate(SHAPES):
        imgs = images(*shape, seed=seed).to(torch.bfloat16)
        reference = exact(model, imgs, layer=0)
        with torch.no_grad():
            error = {engine: relative_error(backbone(imgs), reference) for engine, backbone in backbones.items()}
        assert backbones["openvino"].engine_used == "openvino"
        assert error["openvino"] <= 2 * error["torch"] + 2e-3


def test_layouts_and_nan() -> None:
    model = NETWORKS["plain"]()
    backbone, imgs = FrozenViT(model, engine="openvino"), images(2, 3, 24, 40)
    wide = torch.zeros(2, 3, 24, 80)
    wide[..., ::2] = imgs
    with torch.no_grad():
        plain = backbone(imgs)
        assert torch.equal(backbone(imgs.to(memory_format=torch.channels_last)), plain)
        assert torch.equal(backbone(wide[..., ::2]), plain)
        imgs[1, 0, 3, 3] = float("nan")
        out = backbone(imgs)
    assert backbone.engine_used == "openvino"
    assert torch.equal(out[0], plain[0])
    assert out[1].isnan().any()


def test_nothing_of_a_call_is_kept() -> None:
    backbone = FrozenViT(NETWORKS["plain"](), engine="openvino")
    with torch.no_grad():
        imgs = images(2, 3, 24, 40)
        out = backbone(imgs)
    held = [weakref.ref(imgs.untyped_storage()), weakref.ref(out.untyped_storage())]
    copied = out.clone()
    with torch.no_grad():
        backbone(images(2, 3, 24, 40, seed=1))
    assert torch.equal(out, copied)
    del imgs, out
    assert [ref() for ref in held] == [None, None]


def test_changed_weights_are_noticed() -> None:
    model, imgs = NETWORKS["dinov3"](), images(1, 3, 32, 24)
    backbone = FrozenViT(model, engine="openvino")
    with torch.no_grad():
        before = backbone(imgs)
        model.load_state_dict({name: 1.1 * value for name, value in model.state_dict().items()})
        after = backbone(imgs)
        assert backbone.engine_used == "openvino"
        assert relative_error(after, exact(model, imgs)) <= 1e-5
        assert relative_error(before, after.double()) > 1e-2
        backbone.model.blocks[0].attn.proj.weight = nn.Parameter(torch.zeros(48, 48), requires_grad=False)
        model.blocks[0].attn.proj.weight.zero_()
        assert relative_error(backbone(imgs), exact(model, imgs)) <= 1e-5


def test_changed_settings_are_noticed() -> None:
    model, imgs = NETWORKS["plain"](), images(1, 3, 32, 24)
    backbone = FrozenViT(model, engine="openvino")
    with torch.no_grad():
        backbone(imgs)
        for twin in (model, backbone.model):
            twin.blocks[0].norm1.eps = 0.5
        assert relative_error(backbone(imgs), exact(model, imgs)) <= 1e-5
        assert backbone.engine_used == "openvino"
        backbone.stride = 4
        assert relative_error(backbone(imgs), exact(model, imgs, stride=4)) <= 1e-5


def test_auto_leaves_weights_that_keep_changing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_WORTHWHILE", (0, 1 << 60))
    model, imgs = NETWORKS["dinov3"](), images(1, 3, 32, 24)
    backbone = FrozenViT(model)
    used = []
    for _ in range(4):
        with torch.no_grad():
            assert relative_error(backbone(imgs), exact(model, imgs)) <= 1e-5
            model.blocks[0].mlp.fc1.weight.mul_(1.5)
        used.append(backbone.engine_used)
    assert used == ["openvino"] * 3 + ["torch"]
    assert backbone.engine_reason == "the weights keep changing"


class Halved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x


EDITS = {
    "has hooks": lambda m: m.blocks[0].mlp.register_forward_hook(lambda module, args, out: 2 * out),
    "which no engine knows": lambda m: m.blocks[0].set_submodule("ls1", Halved()),
    "is in training mode": lambda m: m.blocks[1].norm1.train(),
}


@pytest.mark.parametrize("reason", EDITS)
def test_an_edited_network_runs_in_pytorch(reason: str) -> None:
    model, imgs = NETWORKS["plain"](), images(1, 3, 32, 24)
    backbone = FrozenViT(model, engine="openvino")
    with torch.no_grad():
        backbone(imgs)
        assert backbone.engine_used == "openvino"
        for twin in (model, backbone.model):
            EDITS[reason](twin)
        # float64 has the same hooks.
        assert relative_error(backbone(imgs), exact(model, imgs)) <= 1e-5
    assert (backbone.engine_used, reason in backbone.engine_reason) == ("torch", True)
    for name in ("openvino", "compile"):
        backbone = FrozenViT(NETWORKS["plain"](), engine=name)
        EDITS[reason](backbone.model)
        with pytest.raises(EngineError, match=f"engine='{name}' cannot run .*{reason}.*use engine='auto'"):
            backbone.require_engine()


def test_calls_that_need_pytorch_get_it() -> None:
    model, imgs = NETWORKS["dinov3"](), images(1, 3, 32, 24)
    backbone, plain = FrozenViT(model, engine="openvino"), FrozenViT(model, engine="torch")

    def check(reason: str) -> None:
        assert (backbone.engine_used, reason in backbone.engine_reason) == ("torch", True), backbone.engine_reason

    wanting = imgs.clone().requires_grad_()
    backbone(wanting).sum().backward()
    check("images require gradients")
    assert wanting.grad is not None
    with torch.no_grad():
        backbone(wanting)
    assert backbone.engine_used == "openvino"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(backbone(imgs), plain(imgs))
    check("autocast")
    with FlopCounterMode(display=False) as ours:
        backbone(imgs)
    with FlopCounterMode(display=False) as theirs:
        plain(imgs)
    check("mode of PyTorch")
    assert ours.get_total_flops() == theirs.get_total_flops() > 0
    assert torch.vmap(backbone)(imgs[None]).shape == (1, *plain(imgs).shape)
    check("mode of PyTorch")
    with sdpa_kernel(SDPBackend.MATH):
        _, tangent = torch.func.jvp(backbone, (imgs,), (imgs,))
    assert tangent.abs().sum() > 0
    with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        dual = forward_ad.unpack_dual(backbone(forward_ad.make_dual(imgs, imgs)))
        assert relative_error(dual.tangent, tangent.double()) <= 1e-5
    check("forward-mode")
    backbone.model.blocks[0].norm1.weight.requires_grad_(True)
    assert backbone(imgs).requires_grad
    check("weights require gradients")
    with torch.no_grad():
        backbone(imgs)
    assert backbone.engine_used == "openvino"


def test_other_dtypes_run_in_pytorch_or_are_refused() -> None:
    backbone = FrozenViT(NETWORKS["plain"](), engine="openvino").to(torch.float16)
    assert backbone(images(1, 3, 32, 32).half()).dtype == torch.float16
    assert backbone.engine_used == "torch"
    assert "float32 and bfloat16" in backbone.engine_reason
    with pytest.raises(EngineError, match=r"OpenVINO computes float32 and bfloat16, the backbone is torch\.float16"):
        lift_fast.ViTLiFTExtractor(
            "demo_vitt16", device="cpu", stride=None, patch=None, layer=None, channel=None, dtype=torch.float16,
            engine="openvino", silent=True,
        )  # fmt: skip


def test_results_are_usable_outside_inference_mode_and_inside() -> None:
    backbone, imgs = FrozenViT(NETWORKS["plain"](), engine="openvino"), images(1, 3, 32, 32)
    outside = backbone(imgs)
    assert not outside.is_inference()
    outside.add_(1)
    with torch.inference_mode():
        assert torch.equal(backbone(imgs.clone()) + 1, outside)


def test_threads_are_followed() -> None:
    backbone, imgs = FrozenViT(NETWORKS["plain"](), engine="openvino"), images(2, 3, 32, 48)
    results = {}
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            with torch.no_grad():
                results[threads] = backbone(imgs)
            assert [*backbone._engine._built._compiled][-1] == threads
            model = backbone._engine._built._compiled[threads]._model
            # OpenVINO takes no more than there are cores.
            assert model.get_property("INFERENCE_NUM_THREADS") == min(threads, len(os.sched_getaffinity(0)))
        assert len(backbone._engine._built._compiled) == 2
    finally:
        torch.set_num_threads(1)
    assert relative_error(results[2], results[1].double()) <= 1e-5


def test_copies_share_one_model(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    convert = openvino._convert
    monkeypatch.setattr(openvino, "_convert", lambda vit: (made.append(1), convert(vit))[1])
    monkeypatch.setenv("LIFT_FAST_ENGINE_CACHE", "0")
    imgs = images(1, 3, 32, 24)
    one = FrozenViT(network(seed=5), engine="openvino")
    two = copy.deepcopy(one)
    with torch.no_grad():
        assert torch.equal(one(imgs), two(imgs))
        assert len(made) == 1
        expected = two(imgs)
        # The model has a copy of the weights: those of the backbone that it was made from may change.
        for parameter in one.model.parameters():
            parameter.mul_(1.5)
        assert torch.equal(two(imgs), expected)
        assert not torch.equal(one(imgs), expected)
        assert torch.equal(two(imgs), expected)
    assert len(made) == 2
    model = weakref.ref(one._engine._built._compiled[1])
    del one, two
    assert model() is None


def test_calls_from_several_threads_do_not_mix() -> None:
    backbone = FrozenViT(NETWORKS["swiglu, rotary"](), engine="openvino")
    work = [images(1 + i % 3, 3, 8 * (1 + i % 4), 8 * (1 + i % 5), seed=i) for i in range(24)]
    with torch.no_grad():
        alone = [backbone(imgs) for imgs in work]
    together: dict[int, Tensor] = {}

    def run(start: int) -> None:
        for index in range(start, len(work), 4):
            with torch.no_grad():
                together[index] = backbone(work[index])

    threads = [threading.Thread(target=run, args=(start,)) for start in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert all(torch.equal(together[index], alone[index]) for index in range(len(work)))


def test_copies_moves_and_strides_keep_the_wish() -> None:
    model, imgs = NETWORKS["plain"](), images(1, 3, 32, 32)
    backbone = FrozenViT(model, engine="openvino")
    with torch.no_grad():
        expected = backbone(imgs)
        twins = (pickle.loads(pickle.dumps(backbone)), copy.deepcopy(backbone), shared_copy(backbone))
        for twin in (*twins, backbone.strided(8)):
            assert twin.engine == "openvino"
            assert twin.engine_used is None
            assert torch.equal(twin(imgs), expected)
            assert twin.engine_used == "openvino"
        backbone.to(torch.bfloat16)
        assert backbone(imgs.bfloat16()).dtype == torch.bfloat16
        assert backbone.engine_used == "openvino"
        assert torch.equal(backbone.float()(imgs).argmax(-1), backbone(imgs).argmax(-1))
    assert lift_fast.ViTLiFTExtractor(
        model=backbone, device="cpu", channel=None, patch=None, stride=None, layer=None, silent=True
    ).backbone.engine == "openvino"  # fmt: skip
    with pytest.raises(ValueError, match=r"engine must be one of 'auto', 'torch', 'openvino', 'compile', got 'onnx'"):
        FrozenViT(model, engine="onnx")


def test_a_compiled_or_traced_program_holds_pytorchs_operations() -> None:
    backbone, imgs = FrozenViT(NETWORKS["plain"](), engine="openvino", position_rule="timm"), images(1, 3, 32, 32)
    exported = torch.export.export(backbone, (imgs,))
    with torch.no_grad():
        assert relative_error(exported.module()(imgs), backbone(imgs).double()) <= 1e-5


def wide(**extra: object) -> nn.Module:
    """Enough weights for "auto" to convert it."""
    return network(Eva, embed_dim=192, depth=3, use_rot_pos_emb=True, **extra)


def test_auto_takes_openvino_where_the_native_core_has_no_blocks() -> None:
    imgs = images(1, 3, 32, 32)
    with torch.no_grad():
        rotary = FrozenViT(wide())
        first = rotary(imgs)
        assert rotary.engine_used == "openvino", rotary.engine_reason
        assert relative_error(first, exact(wide(), imgs)) <= 1e-5
        assert all(torch.equal(rotary(imgs), first) for _ in range(3))
        plain = FrozenViT(network(embed_dim=192, depth=3))
        plain(imgs)
        assert plain.engine_used == "torch"
        assert "native core" in plain.engine_reason
        tiny = FrozenViT(NETWORKS["dinov3"]())
        tiny(imgs)
        assert tiny.engine_used == "torch"
        assert "worthwhile" in tiny.engine_reason


def test_auto_without_the_native_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIFT_FAST_DISABLE_NATIVE", "1")
    model, imgs = network(embed_dim=192, depth=3), images(1, 3, 32, 32)
    backbone = FrozenViT(model)
    with torch.no_grad():
        assert relative_error(backbone(imgs), exact(model, imgs)) <= 1e-5
    assert backbone.engine_used == "openvino"


@pytest.mark.parametrize("wish", ["auto", "openvino"])
def test_a_wrong_result_is_never_served(wish: str, monkeypatch: pytest.MonkeyPatch) -> None:
    convert = openvino._convert

    def spoilt(vit: FrozenViT) -> object:
        other = copy.deepcopy(vit)
        with torch.no_grad():
            other.model.blocks[0].norm1.weight.mul_(1.5)
        return convert(other)

    monkeypatch.setattr(openvino, "_convert", spoilt)
    openvino._models.clear()
    monkeypatch.setenv("LIFT_FAST_ENGINE_CACHE", "0")
    model, imgs = wide(), images(1, 3, 32, 32)
    backbone = FrozenViT(model, engine=wish)
    if wish == "auto":
        assert relative_error(backbone(imgs), exact(model, imgs)) <= 1e-5
        assert backbone.engine_used == "torch"
        assert "off by" in backbone.engine_reason
    else:
        with pytest.raises(EngineError, match=r"OpenVINO's result for .* is off by"):
            backbone(imgs)


@pytest.mark.parametrize("way", ["absent", "switched off"])
def test_without_openvino(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "absent":
        monkeypatch.setitem(sys.modules, "openvino", None)
        reason = r'OpenVINO cannot be imported: .*; pip install "lift_fast\[openvino\]"'
    else:
        monkeypatch.setenv("LIFT_FAST_DISABLE_OPENVINO", "1")
        reason = "switched off by LIFT_FAST_DISABLE_OPENVINO=1"
    for cached in (openvino._openvino, openvino._core, openvino._probe):
        cached.cache_clear()
    try:
        with pytest.raises(EngineError, match=f"engine='openvino' cannot run Eva: {reason}"):
            FrozenViT(wide(), engine="openvino")
        backbone = FrozenViT(wide())
        backbone(images(1, 3, 32, 32))
        assert backbone.engine_used == "torch"
        part = lift_fast.backends()["openvino"]
        assert not part.runs
        assert backbone.engine_reason == part.detail
    finally:
        for cached in (openvino._openvino, openvino._core, openvino._probe):
            cached.cache_clear()


def test_openvino_reports_no_usage() -> None:
    code = """
        import sys, torch
        from lift_fast.backbones import load_backbone
        backbone = load_backbone("demo_vitt16", engine="openvino")
        assert "openvino" not in sys.modules or "openvino_telemetry" not in sys.modules
        backbone(torch.zeros(1, 3, 32, 32))
        assert backbone.engine_used == "openvino"
        assert not [name for name in sys.modules if name.startswith("openvino_telemetry")]
    """
    lines = "\n".join(line.strip() for line in code.splitlines())
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_computes_in_pytorch(tmp_path: Path) -> None:
    # In a process of its own: forking one with threads may block it.
    code = """
        import os, sys, torch
        from lift_fast.backbones import load_backbone
        torch.set_num_threads(1)
        backbone, imgs = load_backbone("demo_vitt16", engine="openvino"), torch.ones(1, 3, 32, 32)
        there = backbone(imgs)
        child = os.fork()
        if child == 0:
            here = backbone(imgs)
            ok = backbone.engine_used == "torch" and "forked" in backbone.engine_reason
            os._exit(0 if ok and float((here - there).abs().max()) < 1e-3 else 3)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    """
    lines = "\n".join(line[8:] for line in code.splitlines())
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_table_of_parts_names_the_engines() -> None:
    parts = lift_fast.backends()
    assert parts["openvino"].runs
    assert "engine auto takes it" in parts["openvino"].detail
    assert "never by itself" in parts["compile"].detail or not parts["compile"].runs


def test_load_backbone_and_extractor_take_the_engine() -> None:
    imgs = images(1, 3, 64, 48)
    one = load_backbone("demo_vitt16", engine="openvino")
    two = lift_fast.ViTLiFTExtractor(
        "demo_vitt16", device="cpu", channel=None, patch=None, stride=None, layer=None, engine="openvino", silent=True
    )
    with torch.no_grad():
        assert torch.equal(one(imgs), two(imgs))
        plain = load_backbone("demo_vitt16", engine="torch")(imgs)
    assert one.engine_used == two.backbone.engine_used == "openvino"
    assert relative_error(one(imgs), plain.double()) <= 1e-5


def test_the_command_line_takes_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").mkdir()
    pixels = torch.randint(0, 256, (48, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(pixels.numpy()).save(tmp_path / "images" / "a.png")
    used: list[str | None] = []
    forward = FrozenViT.forward
    monkeypatch.setattr(
        FrozenViT, "forward", lambda self, imgs: (forward(self, imgs), used.append(self.engine_used))[0]
    )

    def extract(engine: str, out: str) -> int:
        words = ["extract", str(tmp_path / "images"), "--out", str(tmp_path / out), "--size", "48", "--threads", "1"]
        return main([*words, "--device", "cpu", "--dtype", "float32", "--engine", engine])

    assert extract("openvino", "one") == extract("torch", "two") == 0
    assert used == ["openvino", "torch"]
    one, two = (np.load(next((tmp_path / out).glob("*.npz"))) for out in ("one", "two"))
    assert sorted(one.files) == sorted(two.files)
    (name,) = [name for name in one.files if one[name].dtype.kind == "f" and one[name].ndim == 3]
    assert not np.array_equal(one[name], two[name])
    assert np.abs(one[name] - two[name]).max() <= 1e-4 * np.abs(two[name]).max()
    # Another engine goes on where one ended: it is no setting of the features.
    assert extract("torch", "one") == 0
    assert used == ["openvino", "torch"]
    capsys.readouterr()
    monkeypatch.setenv("LIFT_FAST_DISABLE_OPENVINO", "1")
    assert extract("openvino", "three") == 2
    assert "engine='openvino' cannot run demo_vitt16: switched off by LIFT_FAST_DISABLE" in capsys.readouterr().err
    assert main(["info"]) == 0
    assert "openvino     no   switched off by LIFT_FAST_DISABLE_OPENVINO=1" in capsys.readouterr().out
