"""Whatever PyTorch's default dtype and device: images, matches, sheets, propagation and training stay the same."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

import lift_fast
from lift_fast import demonstration, show
from lift_fast.backbones import load_backbone
from lift_fast.evaluation.methods import build_methods
from lift_fast.images import as_image, preprocess
from lift_fast.training import TrainingSettings, train
from lift_fast.training.data import GlobalBatches, TrainingImages, build_loader

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DEFAULTS = ["bfloat16", "float64", "meta"]
pytestmark = pytest.mark.usefixtures("one_thread")


@contextlib.contextmanager
def default(name: str) -> Iterator[None]:
    """A default dtype, or a default device: nothing computes on meta, so that a tensor made there is noticed."""
    if name == "meta":
        with torch.device("meta"):
            yield
        return
    torch.set_default_dtype(getattr(torch, name))
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def photographs() -> list[Image.Image]:
    images = [Image.fromarray(skimage.data.astronaut()), Image.fromarray(skimage.data.coffee())]
    return [image.resize((96, 80)) for image in images]


@pytest.fixture(scope="module")
def extractor() -> lift_fast.ViTLiFTExtractor:
    return lift_fast.ViTLiFTExtractor(demonstration.BACKBONE, demonstration.LIFT, device="cpu", silent=True)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)


@pytest.mark.parametrize("name", DEFAULTS)
def test_preprocess(name, photographs, extractor):
    image = photographs[0]
    expected = extractor.preprocess(image, 64)[0]
    assert (expected.dtype, expected.device.type) == (torch.float32, "cpu")
    floats = np.asarray(image) / 255
    tensor = torch.from_numpy(floats).permute(2, 0, 1)
    with default(name):
        assert same(extractor.preprocess(image, 64)[0], expected)
        assert same(preprocess(image, 64, MEAN, STD), expected)
        for form in (floats, floats.astype(np.float32), tensor, tensor.float()):
            assert np.array_equal(np.asarray(as_image(form)), np.asarray(image))


@pytest.mark.parametrize("name", DEFAULTS)
@pytest.mark.parametrize("options", [{"step": 2}, {"points": [[1, 2], [50.5, 60]]}, {"normalize": "pixel", "step": 3}])
def test_match_images(name, options, photographs, extractor):
    expected = lift_fast.match_images(*photographs, extractor=extractor, size=64, **options)
    with default(name):
        found = lift_fast.match_images(*photographs, extractor=extractor, size=64, **options)
        arrays = found.numpy()
        sheet = None if "points" in options else found.draw(caption="c")
    for field in ("xy_a", "xy_b", "similarity", "distance", "confidence", "valid"):
        assert same(getattr(found, field), getattr(expected, field)), field
    for key, value in expected.numpy().items():
        assert arrays[key].dtype == value.dtype, key
        assert np.array_equal(arrays[key], value), key
    if sheet is not None:
        assert np.array_equal(np.asarray(sheet), np.asarray(expected.draw(caption="c")))


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_random_lift_of_the_extractor(name):
    backbone = load_backbone(demonstration.BACKBONE)

    def build():
        return lift_fast.ViTLiFTExtractor(model=backbone, random_lift=True, device="cpu", silent=True, channel=None,
                                          patch=None, stride=None, layer=None)  # fmt: skip

    expected = build().lift.state_dict()
    with default(name):
        found = build().lift.state_dict()
    assert all(same(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("name", DEFAULTS)
def test_show(name, photographs):
    backbone = load_backbone(demonstration.BACKBONE, head_order="interleaved")
    methods = build_methods(["backbone", "lift"], backbone, demonstration.LIFT, 0)

    def draw():
        shown = [show.load(str(n), image, 64, backbone, methods) for n, image in enumerate(photographs)]
        sheet = show.draw_sheet(shown, [(10.5, 20.5)], ("similarity", "pca"))
        return np.asarray(sheet), show.build_page(shown, dimensions=8)

    sheet, page = draw()
    with default(name):
        found = draw()
    assert np.array_equal(found[0], sheet)
    assert found[1] == page


@pytest.mark.parametrize("name", DEFAULTS)
def test_propagation(name):
    generator = torch.Generator().manual_seed(0)
    query, key, labels = (torch.rand(*shape, generator=generator) for shape in ((30, 16), (60, 16), (60, 4)))
    expected = lift_fast.propagate_labels(query, key, labels, grid=(5, 6), radius=2)
    with default(name):
        found = lift_fast.propagate_labels(query, key, labels, grid=(5, 6), radius=2)
    assert same(found, expected)


@pytest.fixture
def folder(tmp_path: Path, photographs) -> Path:
    for number in range(4):
        photographs[number % 2].rotate(90 * number).save(tmp_path / f"{number}.png")
    (tmp_path / "broken.png").write_text("not an image")
    return tmp_path


@pytest.mark.parametrize("name", DEFAULTS)
@pytest.mark.parametrize("workers", [0, 1])
def test_training_images(name, workers, folder):
    def batches():
        files = TrainingImages(sorted(folder.glob("*.png")), 32, "crop", 0.2, 0)
        loader = build_loader(files, GlobalBatches(5, 5, 0), workers, pin=False)
        broken = TrainingImages([folder / "broken.png"], 32, "crop", 0.2, 0)
        return [sample.pixels for sample in loader], broken[0, 0].pixels

    expected = batches()
    with default(name):
        found = batches()
    assert [same(*pair) for pair in zip(found[0], expected[0], strict=True)] == [True]
    assert same(found[1], expected[1])


@pytest.mark.parametrize("name", DEFAULTS)
def test_training(name, folder, tmp_path):
    def losses(out: str) -> list[float]:
        settings = TrainingSettings(
            data=folder, out=tmp_path / out, model=demonstration.BACKBONE, image_size=64, batch_size=5, epochs=2,
            device="cpu", precision="float32", workers=0,
        )  # fmt: skip
        return train(settings, quiet=True)["epoch_losses"]

    expected = losses("expected")
    with default(name):
        assert losses("found") == expected
        assert (tmp_path / "found" / "log.csv").exists()
    assert json.dumps(expected) != "[]"
