"""The cache of compiled backbones: taken again, bounded, and harmless where damaged or not writable."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lift_fast.backbones import FrozenViT
from lift_fast.backbones.engines import openvino, store
from lift_fast.backbones.network import VisionTransformer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LIFT_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LIFT_FAST_ENGINE_CACHE", raising=False)
    return tmp_path / "cache" / "engines"


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with each conversion."""
    made: list[int] = []
    convert = openvino._convert
    monkeypatch.setattr(openvino, "_convert", lambda vit: (made.append(1), convert(vit))[1])
    return made


def network(seed: int = 0, heads: int = 2) -> VisionTransformer:
    torch.manual_seed(seed)
    model = VisionTransformer(32, 2, heads, 8, (4, 4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


IMAGES = torch.randn(2, 3, 24, 40, generator=torch.Generator().manual_seed(1))


def compute(model: VisionTransformer, **options: object) -> Tensor:
    """The result of a new backbone in OpenVINO, checked against PyTorch's."""
    openvino._models.clear()
    backbone, plain = (FrozenViT(model, engine=engine, **options) for engine in ("openvino", "torch"))
    with torch.no_grad():
        ours, theirs = backbone(IMAGES), plain(IMAGES)
    assert backbone.engine_used == "openvino"
    assert float((ours - theirs).abs().max()) <= 1e-4 * float(theirs.abs().max())
    return ours


def test_a_compiled_backbone_is_taken_again(folder: Path, conversions: list[int]) -> None:
    first = compute(network())
    assert len(conversions) == 1
    assert len([*folder.glob("*.engine")]) == 1
    assert torch.equal(compute(network()), first)
    assert len(conversions) == 1
    # Whatever changes the result is another entry; heads stand in no weight's shape.
    for other in (
        lambda: compute(network(seed=1)),
        lambda: compute(network(heads=4)),
        lambda: compute(network(), layer=0),
        lambda: compute(network(), facet="query"),
        lambda: compute(network(), stride=4),
        lambda: compute(network(), head_order="interleaved"),
    ):
        before = len(conversions)
        assert other().shape != first.shape or not torch.equal(other(), first)
        assert len(conversions) == before + 1
    assert len([*folder.glob("*.engine")]) == 7


def flip(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


DAMAGES = {
    "one bit of the model": lambda content: flip(content, len(content) // 2),
    "one bit of the digest": lambda content: flip(content, len(store._MARK) + 3),
    "another mark": lambda content: flip(content, 0),
    "cut": lambda content: content[: len(content) // 2],
    "only a mark": lambda content: content[: len(store._MARK)],
    "empty": lambda content: b"",
    "longer": lambda content: content + b"x",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_rebuilt(damage: str, folder: Path, conversions: list[int]) -> None:
    first = compute(network())
    (file,) = folder.glob("*.engine")
    whole = file.read_bytes()
    file.write_bytes(DAMAGES[damage](whole))
    assert torch.equal(compute(network()), first)
    assert len(conversions) == 2
    assert store.read(file.stem) is not None


def test_a_model_that_openvino_refuses_is_rebuilt(folder: Path, conversions: list[int]) -> None:
    first = compute(network())
    (file,) = folder.glob("*.engine")
    store.write(file.stem, b"no model, but the right digest")
    assert torch.equal(compute(network()), first)
    assert len(conversions) == 2
    assert torch.equal(compute(network()), first)
    assert len(conversions) == 2


@pytest.mark.parametrize("kind", ["folder", "link", "pipe"])
def test_what_is_no_file_is_left_alone(kind: str, folder: Path, tmp_path: Path, conversions: list[int]) -> None:
    first = compute(network())
    (file,) = folder.glob("*.engine")
    target = tmp_path / "elsewhere"
    target.write_bytes(file.read_bytes())
    file.unlink()
    {"folder": file.mkdir, "link": lambda: file.symlink_to(target), "pipe": lambda: os.mkfifo(file)}[kind]()
    assert torch.equal(compute(network()), first)
    assert len(conversions) == 2
    assert target.exists()


@pytest.mark.parametrize("kind", ["file", "read-only", "no home"])
def test_without_a_folder_there_is_no_cache(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, conversions: list[int]
) -> None:
    if kind == "file":
        (tmp_path / "cache").write_text("in the way")
    elif kind == "read-only":
        # Root may write anywhere, so a folder that nobody can make.
        monkeypatch.setenv("LIFT_FAST_CACHE", "/proc/no-such-folder")
    else:
        monkeypatch.delenv("LIFT_FAST_CACHE")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert torch.equal(compute(network()), compute(network()))
    assert len(conversions) == 2


def test_the_cache_can_be_switched_off(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIFT_FAST_ENGINE_CACHE", "0")
    compute(network())
    assert not folder.exists()
    monkeypatch.setenv("LIFT_FAST_ENGINE_CACHE", "a lot")
    with pytest.raises(ValueError, match="LIFT_FAST_ENGINE_CACHE must be a whole number of MiB, got 'a lot'"):
        compute(network())


def test_the_longest_unused_are_removed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIFT_FAST_ENGINE_CACHE", "1")
    third = bytes(300_000)
    for number in range(3):
        store.write(f"k{number}", third)
        os.utime(folder / f"k{number}.engine", (number, number))
    assert store.read("k0") == third
    (folder / "notes.txt").write_bytes(bytes(900_000))
    store.write("k3", third)
    assert sorted(path.stem for path in folder.glob("*.engine")) == ["k0", "k2", "k3"]
    assert (folder / "notes.txt").exists()
    store.write("k4", bytes(1 << 20))
    assert store.read("k4") is None
    assert store.read("k0") == third
    monkeypatch.setenv("LIFT_FAST_ENGINE_CACHE", "2")
    store.write("k5", bytes(1 << 20))
    monkeypatch.setenv("LIFT_FAST_ENGINE_CACHE", "1")
    assert store.read("k5") is None


def test_nothing_is_unpickled(folder: Path) -> None:
    compute(network())
    (file,) = folder.glob("*.engine")
    content = file.read_bytes()
    head = len(store._MARK) + store._DIGEST
    assert content[:head].startswith(store._MARK)
    assert not content[head:].startswith((b"\x80", b"PK"))
    assert io.BytesIO(content[head:]).read(1)


def test_two_processes_at_once(folder: Path) -> None:
    code = "from test_engine_store import compute, network; compute(network()); compute(network(1))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    running = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(2)]
    assert [process.wait(120) for process in running] == [0, 0]
    assert len([*folder.glob("*.engine")]) == 2
    assert not [*folder.glob(".*tmp*")]
