"""CUDA graphs: errors on any machine, and on a GPU the replay against the eager extractor."""

import pytest
import torch

from lift_fast import LiFT, ViTLiFTExtractor, capture, clear_plans, witnesses
from lift_fast.testing import relative_error

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def extractor(device, dtype=torch.float32):
    return ViTLiFTExtractor(
        "dino_vits16", random_weights=True, random_lift=True, device=device, dtype=dtype, silent=True
    )


@pytest.mark.parametrize("shape", [(1, 3, 32), (1, 4, 32, 32), (0, 3, 32, 32), (1, 3, 32.0, 32), (True, 3, 32, 32)])
def test_bad_shapes(shape):
    with pytest.raises(ValueError, match=r"shape must be \(B, 3, H, W\), got"):
        capture(torch.nn.Conv2d(3, 3, 1), shape)


def test_what_cannot_be_captured():
    with pytest.raises(TypeError, match=r"must be an nn\.Module"):
        capture(lambda x: x, (1, 3, 32, 32))
    with pytest.raises(TypeError, match="a LiFT alone takes images and features"):
        capture(LiFT(16, 8), (1, 3, 32, 32))
    with pytest.raises(RuntimeError, match=r"the extractor is on cpu; move it with \.cuda\(\)"):
        capture(torch.nn.Conv2d(3, 3, 1), (1, 3, 32, 32))
    with pytest.raises(RuntimeError, match="the extractor has no weights"):
        capture(torch.nn.Identity(), (1, 3, 32, 32))


def test_looking_for_a_plan_does_not_wait_during_a_capture(monkeypatch):
    """Weights made in inference mode are compared by their contents, which a capture cannot wait for."""
    with torch.inference_mode():
        weight = torch.randn(3)
    seen = witnesses.Witnesses([weight])
    assert seen.recognise([weight])

    def equal(*_):
        raise AssertionError("compared during a capture")

    monkeypatch.setattr(torch, "equal", equal)
    monkeypatch.setattr(witnesses, "capturing", lambda tensor: True)
    assert seen.recognise([weight])
    clear_plans()


@pytest.mark.gpu
@needs_gpu
class TestOnAGpu:
    @pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
    def test_replay_equals_eager(self, dtype, limit):
        module = extractor("cuda", dtype)
        captured = capture(module, (2, 3, 80, 112))
        for _ in range(3):
            batch = torch.randn(2, 3, 80, 112)
            with torch.no_grad():
                expected = module(batch)
            assert relative_error(captured(batch), expected) <= limit
            assert relative_error(captured(batch.cuda(), clone=True), expected) <= limit

    def test_other_streams_and_wrong_batches(self):
        module = extractor("cuda")
        captured = capture(module, (1, 3, 64, 64))
        batch = torch.randn(1, 3, 64, 64, device="cuda")
        with torch.no_grad():
            expected = module(batch)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            out = captured(batch, clone=True)
        stream.synchronize()
        assert relative_error(out, expected) <= 1e-5
        with pytest.raises(ValueError, match=r"must be \[1, 3, 64, 64\] as captured, got \[1, 3, 64, 80\]"):
            captured(torch.randn(1, 3, 64, 80))
        with pytest.raises(ValueError, match="floating point"):
            captured(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
        with torch.no_grad():
            module.lift.outc.weight.mul_(2)
        with pytest.raises(RuntimeError, match="capture again"):
            captured(batch)
        captured = capture(module, (1, 3, 64, 64))
        module.lift.outc.bias = torch.nn.Parameter(module.lift.outc.bias + 1)
        with pytest.raises(RuntimeError, match="capture again"):
            captured(batch)

    def test_nothing_is_allocated_or_waited_for_at_replay(self):
        captured = capture(extractor("cuda"), (1, 3, 64, 64))
        batch = torch.randn(1, 3, 64, 64, device="cuda")
        captured(batch)
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        torch.cuda.set_sync_debug_mode("error")
        try:
            captured(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
