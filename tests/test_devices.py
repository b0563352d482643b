"""Which device a wish means, and what may run there."""

import pytest
import torch

from lift_fast import devices

CUDA = torch.device("cuda", 0)


@pytest.fixture
def gpus(monkeypatch):
    """As on a machine with that many GPUs; nothing may run on them."""

    def pretend(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return pretend


@pytest.mark.parametrize(
    ("count", "wish", "local_rank", "expected"),
    [
        (0, None, None, "cpu"),
        (0, "cpu", 3, "cpu"),
        (2, "cpu", 1, "cpu"),
        (2, "meta", 1, "meta"),
        # Without number: PyTorch's current one.
        (2, None, None, "cuda"),
        (2, "cuda", None, "cuda"),
        (2, None, 1, "cuda:1"),
        (2, "cuda", 1, "cuda:1"),
        (2, "cuda:0", 1, "cuda:0"),
        (2, torch.device("cuda", 1), None, "cuda:1"),
    ],
)
def test_a_wish_and_what_it_means(count, wish, local_rank, expected, gpus):
    gpus(count)
    assert devices.resolve(wish, local_rank) == torch.device(expected)


@pytest.mark.parametrize("wish", ["abacus", "cpu:x", "", 2.5, "hpu"])
def test_what_is_no_device(wish):
    with pytest.raises(ValueError, match=f"device {wish!r} does not exist: device must be cpu, cuda, cuda:1"):
        devices.resolve(wish)


@pytest.mark.parametrize(
    ("count", "wish", "local_rank", "message"),
    [
        (0, "cuda", None, "'cuda' was requested, but PyTorch sees no CUDA device; pass device='cpu'"),
        (2, "cuda:2", None, "'cuda:2' was requested, but PyTorch sees 2 CUDA devices"),
        (2, None, 2, "'cuda:2' was requested, but PyTorch sees 2 CUDA devices"),
    ],
)
@pytest.mark.parametrize("kind", [ValueError, RuntimeError])
def test_a_device_that_is_not_there(count, wish, local_rank, message, kind, gpus):
    gpus(count)
    with pytest.raises(kind, match=message):
        devices.resolve(wish, local_rank)


def test_kernels_say_why_they_do_not_serve(monkeypatch):
    cpu, half = torch.device("cpu"), torch.float16
    assert devices.kernels_run(cpu, half) == (False, "the tensors are on cpu, not on a CUDA device")
    monkeypatch.setattr(devices, "_probe_triton", lambda device: (True, f"Triton on {device}"))
    assert devices.kernels_run(CUDA, half) == (True, "Triton on cuda:0")
    assert "not in torch.float64" in devices.kernels_run(CUDA, torch.float64)[1]
    monkeypatch.setenv("LIFT_FAST_DISABLE_TRITON", "1")
    assert devices.kernels_run(CUDA, half) == (False, "switched off by LIFT_FAST_DISABLE_TRITON=1")


def test_the_native_core_says_why_it_does_not_run_on_a_device(monkeypatch):
    monkeypatch.setattr(devices, "_probe_core", lambda index: (index == 0, "asked"))
    monkeypatch.setattr(devices._native, "can_run", lambda: (True, ""))
    assert devices.cuda_runs(CUDA) == (True, "asked")
    assert devices.cuda_runs(torch.device("cuda", 1)) == (False, "asked")
    assert devices.cuda_runs(torch.device("cpu")) == (False, "needs a CUDA device, got cpu")
    monkeypatch.setattr(devices._native, "can_run", lambda: (False, "no core"))
    assert devices.cuda_runs(CUDA) == devices.native_runs() == (False, "no core")
