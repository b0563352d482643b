"""What dtype="auto" means on each processor, in the extractor and on the command line."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from lift_fast import ViTLiFTExtractor, cli, env_report, precision
from lift_fast.precision import resolve_dtype

CPU = torch.device("cpu")
NETWORK = ("--model", "vit_tiny_patch16_224", "--random-weights", "--random-lift", "--device", "cpu", "--size", "32")


def processor(monkeypatch, avx512: bool | None, amx: bool | None) -> None:
    """A CPU with or without an instruction set; None is a release of PyTorch that cannot tell."""
    for name, has in (("_is_avx512_bf16_supported", avx512), ("_is_amx_tile_supported", amx)):
        if has is None:
            monkeypatch.delattr(torch.cpu, name, raising=False)
        else:
            monkeypatch.setattr(torch.cpu, name, lambda has=has: has, raising=False)


@pytest.mark.parametrize(
    ("avx512", "amx", "expected"),
    [
        (True, False, torch.bfloat16),
        (False, True, torch.bfloat16),
        (None, True, torch.bfloat16),
        (False, False, torch.float32),
        (None, None, torch.float32),
    ],
)
def test_auto_on_a_cpu(avx512, amx, expected, monkeypatch):
    processor(monkeypatch, avx512, amx)
    assert resolve_dtype("auto", CPU) == expected


@pytest.mark.parametrize(
    ("capability", "supported", "expected"),
    [
        ((7, 5), True, torch.float32),
        ((8, 0), True, torch.bfloat16),
        ((8, 0), False, torch.float32),
        ((12, 0), True, torch.bfloat16),
    ],
)
def test_auto_on_a_gpu(capability, supported, expected, monkeypatch):
    # PyTorch calls bfloat16 supported where it is emulated, too. The answer is of the current device.
    entered = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: bool(entered) and supported)
    monkeypatch.setattr(torch.cuda, "device", lambda device: _Entering(entered, device))
    assert resolve_dtype("auto", torch.device("cuda:1")) == expected
    assert entered in ([], [torch.device("cuda:1")])


class _Entering:
    def __init__(self, entered, device):
        self.entered, self.device = entered, device

    def __enter__(self):
        self.entered.append(self.device)

    def __exit__(self, *_):
        return None


def test_only_what_is_asked_for_changes(monkeypatch):
    processor(monkeypatch, True, True)
    assert resolve_dtype(None, CPU) == torch.float32
    for dtype in precision.DTYPES:
        assert resolve_dtype(dtype, CPU) == dtype
    for name in ("float32", "bfloat16", "float16", "float64"):
        assert resolve_dtype(name, CPU) == getattr(torch, name)
    assert resolve_dtype("auto", torch.device("meta")) == torch.float32
    for wrong in ("int8", "torch.bfloat16", "Auto", "", torch.int8, torch.complex64, 32, float):
        with pytest.raises(ValueError, match=r'dtype must be torch.float32, .*"float64", "auto" or None, got'):
            resolve_dtype(wrong, CPU)


@pytest.mark.parametrize("computes", [True, False])
def test_the_extractor_and_the_command_line_resolve_it(computes, monkeypatch, tmp_path, capsys):
    processor(monkeypatch, computes, False)
    expected = torch.bfloat16 if computes else torch.float32
    options = {"random_weights": True, "random_lift": True, "device": "cpu", "silent": True}
    made = ViTLiFTExtractor("vit_tiny_patch16_224", dtype="auto", **options)
    assert made.dtype == made.lift.outc.weight.dtype == expected
    assert ViTLiFTExtractor("vit_tiny_patch16_224", **options).dtype == torch.float32
    assert ViTLiFTExtractor("vit_tiny_patch16_224", dtype="float64", **options).dtype == torch.float64
    Image.fromarray(np.random.default_rng().integers(0, 255, (48, 64, 3), dtype=np.uint8)).save(tmp_path / "a.png")

    def run(out: str, *more: str) -> int:
        return cli.main(["extract", str(tmp_path / "a.png"), "--out", str(tmp_path / out), *NETWORK, "--quiet", *more])

    assert run("auto", "--dtype", "auto") == 0
    # What is kept names the dtype, so that another machine does not take it for its own.
    with np.load(next((tmp_path / "auto").glob("*.npz"))) as data:
        assert json.loads(str(data["settings"]))["dtype"] == str(expected).removeprefix("torch.")
    other = "float32" if computes else "bfloat16"
    assert run("auto", "--dtype", other) == 2
    assert "other settings (dtype)" in capsys.readouterr().err
    assert run("auto", "--dtype", str(expected).removeprefix("torch.")) == 0
    assert run("nowhere", "--dtype", "auto", "--device", "cuda:99") == 2
    assert "cuda:99" in capsys.readouterr().err


@pytest.mark.parametrize("computes", [True, False])
def test_the_report_of_a_machine_says_it(computes, monkeypatch):
    processor(monkeypatch, computes, False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    name = "bfloat16" if computes else "float32"
    assert env_report.report()["dtype auto"] == {"cpu": name}
    assert f"dtype auto       {name} on cpu" in env_report.report_text().splitlines()
