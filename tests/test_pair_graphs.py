"""A pair from pixels to matches as one CUDA graph: its plumbing, and that nothing in it waits for the host."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode, unset_fake_temporarily
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from lift_fast import (
    ViTLiFTExtractor,
    capture,
    capture_pair,
    clear_plans,
    devices,
    graphs,
    load_backbone,
    match_images,
    memory,
)
from lift_fast.kernels.strips import Strips
from lift_fast.ops.dense_match import bilinear, op
from lift_fast.ops.dense_match import cuda as dense_match_cuda
from lift_fast.ops.dense_match import gpu as dense_match_gpu
from lift_fast.ops.lift_forward import cache

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def network(device="cpu", dtype=torch.float32, **options):
    return ViTLiFTExtractor(
        "vit_tiny_patch16_224",
        random_weights=True,
        random_lift=True,
        device=device,
        dtype=dtype,
        silent=True,
        **options,
    )


@pytest.fixture
def replayed(monkeypatch):
    """Recording on the CPU: a replay runs the call again and writes to the result of the first."""

    def record(call, device):
        with torch.no_grad():
            output = call()

        def replay():
            with torch.no_grad():
                again = call()
                pairs = [(output, again)] if isinstance(output, torch.Tensor) else zip(output, again, strict=True)
                for place, value in pairs:
                    place.copy_(value)

        return replay, output

    monkeypatch.setattr(graphs, "_record", record)
    monkeypatch.setattr(graphs, "_require_cuda", lambda device: None)


@pytest.mark.usefixtures("replayed", "one_thread")
@pytest.mark.parametrize("normalize", ["pixel", "grid"])
@pytest.mark.parametrize(
    ("size_a", "size_b", "stride"), [((32, 48), None, None), ((32, 48), (48, 64), None), ((48, 37), (40, 64), 8)]
)
def test_matches_are_those_of_match_images(size_a, size_b, stride, normalize):
    extractor = network(stride=stride)
    captured = capture_pair(extractor, size_a, size_b, normalize=normalize)
    size_b = size_b or size_a
    for _ in range(2):
        images = [torch.randint(256, (3, *size), dtype=torch.uint8) for size in (size_a, size_b)]
        found = captured(*[extractor.preprocess(_pil(image))[0] for image in images])
        expected = match_images(*images, extractor=extractor, size=None, normalize=normalize)
        if stride is None:
            assert expected.covered_a == (0, 0, *size_a)
        # match_images rounds to whole patches, which a recording does not.
        if (expected.picture_a.height, expected.picture_a.width) != size_a:
            top, left, height, width = extractor.covered(*size_a)
            assert found.xy.shape == (height, width, 2)
            (top, left, height, width) = extractor.covered(*size_b)
            lost = found.xy[..., 0] < 0
            inside = (found.xy >= torch.tensor([left, top])) & (found.xy < torch.tensor([left + width, top + height]))
            assert (inside.all(-1) | lost).all()
            continue
        assert torch.equal(found.xy.float(), expected.xy_b)
        assert torch.equal(found.similarity, expected.similarity)
        assert torch.equal(found.distance, expected.distance)
        assert torch.equal(found.valid, expected.valid)


def _pil(image):
    from PIL import Image

    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


@pytest.mark.usefixtures("replayed", "one_thread")
def test_results_are_overwritten_unless_cloned():
    captured = capture_pair(network(), (32, 32), mutual=False)
    images = torch.randn(3, 1, 3, 32, 32)
    kept, first = captured(images[0], images[1], clone=True), captured(images[0], images[1])
    assert all(torch.equal(a, b) for a, b in zip(kept, first, strict=True))
    second = captured(images[0], images[2].double())
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(first, second, strict=True))
    assert not torch.equal(kept.xy, second.xy)
    assert second.valid.all()


@pytest.mark.usefixtures("replayed", "one_thread")
def test_wrong_images_and_changed_weights_are_refused():
    extractor = network()
    captured = capture_pair(extractor, (32, 48), (48, 32))
    a, b = torch.zeros(1, 3, 32, 48), torch.zeros(1, 3, 48, 32)
    with pytest.raises(ValueError, match=r"b must be \[1, 3, 48, 32\] as captured, got \[1, 3, 32, 48\]"):
        captured(a, a)
    with pytest.raises(ValueError, match=r"a must be floating point and normalised, got torch\.uint8"):
        captured(a.byte(), b)
    with pytest.raises(ValueError, match="got list"):
        captured([a], b)
    captured(a, b)
    with torch.no_grad():
        extractor.lift.outc.weight.mul_(2)
    with pytest.raises(RuntimeError, match="capture again"):
        captured(a, b)


def test_what_cannot_be_captured():
    extractor = network()
    with pytest.raises(RuntimeError, match=r"the extractor is on cpu; move it with \.cuda\(\)"):
        capture_pair(extractor, (32, 32))
    with pytest.raises(TypeError, match="must be a ViTLiFTExtractor, got Linear"):
        capture_pair(torch.nn.Linear(1, 1), (32, 32))
    with pytest.raises(TypeError, match="mutual must be True or False"):
        capture_pair(extractor, (32, 32), mutual=1)
    for options, message in (
        ({"size_a": 32}, r"size_a must be \(H, W\)"),
        ({"size_b": (32, 0)}, r"size_b\[1\] must be an integer >= 1"),
        ({"size_b": (8, 32)}, "smaller than one patch"),
        ({"normalize": None}, 'must be "grid" or "pixel"'),
        ({"lift_iter": -1}, "lift_iter"),
    ):
        with pytest.raises(ValueError, match=message):
            capture_pair(extractor, **{"size_a": (32, 32), **options})


@pytest.mark.usefixtures("replayed", "one_thread")
@pytest.mark.parametrize("whole", ["pair", "extractor"])
def test_what_a_graph_reads_stays_alive(whole, monkeypatch):
    """Weights of a module that is dropped or moved, and what caches made of them and forget."""
    # Position embeddings are cached where PyTorch's modules run, as on a GPU.
    monkeypatch.setenv("LIFT_FAST_DISABLE_NATIVE", "1")
    extractor = network(engine="torch")
    recorded = capture_pair(extractor, (32, 48)) if whole == "pair" else capture(extractor, (1, 3, 32, 48))
    tensors = [*extractor.parameters(), *extractor.buffers()]
    [(_, position)] = extractor.backbone._positions.values()
    tensors += [one for one in position if one is not None]
    storages = [StorageWeakRef(one.untyped_storage()) for one in tensors]
    plan = weakref.ref(cache.holder(extractor.lift._plan_sources()[0]))
    extractor.to(torch.float64)
    clear_plans()
    del extractor, tensors, position
    gc.collect()
    assert not any(one.expired() for one in storages)
    assert plan() is not None
    del recorded
    gc.collect()
    assert all(one.expired() for one in storages)
    assert plan() is None


@pytest.mark.usefixtures("replayed", "one_thread")
def test_recorded_in_inference_mode_and_called_with_gradients():
    extractor = network()
    with torch.inference_mode():
        captured, features = capture_pair(extractor, (32, 32)), capture(extractor, (1, 3, 32, 32))
        batch = torch.randn(1, 3, 32, 32)
        captured(batch, batch)
    images = torch.randn(2, 1, 3, 32, 32, requires_grad=True)
    for _ in range(2):
        assert not captured(images[0], images[1]).similarity.requires_grad
        assert not features(images[0]).requires_grad


class NothingFromTheHost(TorchDispatchMode):
    """Refuses what waits for a device or breaks a recording: copies between devices."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        places = {value.device.type for value in (*args, out) if isinstance(value, torch.Tensor) and value.dim()}
        if func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_, torch.ops.aten._local_scalar_dense):
            assert len(places) <= 1, f"{func} from one device to another"
        return out


@pytest.fixture
def fake_gpu(monkeypatch):
    """Tensors on a GPU without values: whatever asks for one fails, as does an output whose size depends on them."""
    monkeypatch.setattr(devices, "cuda_runs", lambda device: (True, "as if"))
    launched = []
    monkeypatch.setattr(dense_match_cuda, "match", lambda *given, **options: launched.append("match"))
    monkeypatch.setattr(
        dense_match_cuda, "spans", lambda gram, strips, high: memory.new_empty(high, (high.shape[0], 16))
    )
    real = bilinear.cut_strips

    def cut_strips(cells, pixels, device, part=None, joined=False):
        """Known from an earlier call, as they are while a graph is recorded."""
        with unset_fake_temporarily():
            strips = real(cells, pixels, torch.device("cpu"), part, joined)
        if device.type == "cpu":
            return strips
        there = (torch.empty(one.shape, dtype=one.dtype, device=device) for one in strips[2:6])
        return Strips(*strips[:2], *there, strips.longest)

    for module in (bilinear, dense_match_gpu):
        monkeypatch.setattr(module, "cut_strips", cut_strips)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield launched


def fake_maps(dtype=torch.bfloat16, grid=(4, 6)):
    return [torch.empty((1, 9, *grid), dtype=dtype, device="cuda") for _ in range(2)]


@pytest.mark.parametrize("budget", [None, 40 * 24], ids=["one table", "bands"])
@pytest.mark.parametrize("normalize", ["pixel", "grid"])
@pytest.mark.parametrize("sizes", [((32, 48), (32, 48)), ((13, 21), (8, 30)), ((2, 3), (40, 60))], ids=str)
def test_nothing_waits_between_the_maps_and_the_matches(sizes, normalize, budget, fake_gpu, monkeypatch):
    if budget is not None:
        monkeypatch.setattr(dense_match_gpu, "_TABLE_BUDGET", budget)
    maps = fake_maps()
    size = sizes[0]
    at = bilinear.pixel_grid(size, 0, size[0] * size[1], torch.device("cuda")).view(*size, 2)
    with NothingFromTheHost():
        found = op.match_pixels(maps, *sizes, at, normalize, True)
    assert [tuple(part.shape) for part in found] == [(*size, 2), size, size, size]
    assert {part.device.type for part in found} == {"cuda"}
    assert len(fake_gpu) >= 2


@pytest.mark.usefixtures("fake_gpu")
def test_the_guard_sees_what_waits():
    values = torch.empty(3, device="cuda")
    for wrong in (
        lambda: values.sum().item(),
        lambda: bool((values > 0).any()),
        lambda: values[values > 0],
        lambda: torch.tensor([1.0, 2.0], device="cuda"),
        lambda: values.cpu(),
        lambda: torch.unique(values),
    ):
        with NothingFromTheHost(), pytest.raises((AssertionError, DynamicOutputShapeException, RuntimeError)):
            wrong()


def test_a_vector_is_filled_on_its_device():
    for dtype in (torch.float32, torch.float64, torch.int64):
        made = bilinear.vector(3, -7, dtype, torch.device("cpu"))
        assert torch.equal(made, torch.tensor([3, -7], dtype=dtype))


@pytest.mark.parametrize("name", ["demo_vitt16", "vit_tiny_patch16_224"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_is_in_the_form_of_the_flash_kernels(name, dtype, monkeypatch):
    """Blocks as a GPU runs them. PyTorch's flash kernels take heads with adjacent channels and without a mask."""
    monkeypatch.setenv("LIFT_FAST_DISABLE_NATIVE", "1")
    vit = load_backbone(name, random_weights=name != "demo_vitt16", engine="torch").to(torch.device("cpu"), dtype)
    monkeypatch.setattr(vit, "_standard", lambda blocks, tokens: False)
    seen, attention = [], torch.nn.functional.scaled_dot_product_attention

    def record(*heads, **options):
        seen.append((heads, options))
        return attention(*heads, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    with torch.no_grad():
        vit(torch.randn(2, 3, 48, 64, dtype=dtype))
    # The keys of the last block need no attention.
    assert len(seen) == vit.depth - 1
    for heads, options in seen:
        assert len(heads) == 3
        assert {tuple(part.shape) for part in heads} == {(2, 3, 13, 64)}
        assert all(part.stride(-1) == 1 and part.dtype == dtype for part in heads)
        # Views of the projection's result: nothing was copied to separate them.
        assert len({part.untyped_storage().data_ptr() for part in heads}) == 1
        assert options.get("attn_mask") is None
        assert not options.get("dropout_p")
        assert not options.get("is_causal")


@pytest.mark.gpu
@needs_gpu
class TestOnAGpu:
    @pytest.mark.parametrize("normalize", ["pixel", "grid"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(("size_a", "size_b"), [((64, 96), None), ((80, 64), (64, 112))])
    def test_replay_equals_eager(self, size_a, size_b, dtype, normalize):
        extractor = network("cuda", dtype)
        captured = capture_pair(extractor, size_a, size_b, normalize=normalize)
        for _ in range(2):
            images = [torch.randint(256, (3, *size), dtype=torch.uint8) for size in (size_a, size_b or size_a)]
            found = captured(*[extractor.preprocess(_pil(image))[0] for image in images])
            expected = match_images(*images, extractor=extractor, size=None, normalize=normalize)
            assert (found.xy.float() == expected.xy_b).all(-1).float().mean() > 0.98
            assert (found.valid == expected.valid).float().mean() > 0.98

    def test_nothing_is_allocated_or_waited_for_at_replay(self):
        captured = capture_pair(network("cuda"), (64, 64))
        images = torch.randn(2, 1, 3, 64, 64, device="cuda")
        captured(*images)
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        torch.cuda.set_sync_debug_mode("error")
        try:
            captured(*images)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
