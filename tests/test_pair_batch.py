"""A pair of one size is one batch without copies: decoded side by side, written in place, matched where it lies."""

from __future__ import annotations

import io
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lift_fast import ViTLiFTExtractor, match_images, memory
from lift_fast._threads import side_by_side
from lift_fast.images import to_tensor
from lift_fast.map_cache import MapCache
from lift_fast.ops.dense_match import op as dense_op

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def network(request):
    return ViTLiFTExtractor(
        "vit_tiny_patch16_224",
        random_weights=True,
        random_lift=True,
        device="cpu",
        dtype=request.param,
        silent=True,
    )


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng().integers(0, 255, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(1, 1), (7, 13), (32, 5)])
def test_an_image_is_written_into_its_place(size, dtype):
    pixels = noise(*size)
    expected = ((pixels.astype(np.float64) / 255 - MEAN) / STD).transpose(2, 0, 1)[None]
    batch = torch.full((3, 3, *size), torch.nan, dtype=dtype)
    found = to_tensor(Image.fromarray(pixels), MEAN, STD, out=batch[1:2])
    assert found.data_ptr() == batch[1].data_ptr()
    assert batch[::2].isnan().all()
    # Rounded once, from float32.
    exact = to_tensor(Image.fromarray(pixels), MEAN, STD)
    assert torch.equal(batch[1:2], exact.to(dtype))
    assert np.abs(exact.numpy() - expected).max() < 1e-6
    across = torch.full((1, *size, 3), torch.nan, dtype=dtype).permute(0, 3, 1, 2)
    assert torch.equal(to_tensor(Image.fromarray(pixels), MEAN, STD, out=across), exact.to(dtype))


def test_places_that_do_not_fit_are_refused():
    image = Image.fromarray(noise(4, 6))
    for out in (torch.zeros(1, 3, 6, 4), torch.zeros(3, 4, 6), torch.zeros(1, 3, 4, 6, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"out must be \[1, 3, 4, 6\] and floating point, got"):
            to_tensor(image, MEAN, STD, out=out)
    with pytest.raises(TypeError, match="out must be a tensor or None, got ndarray"):
        to_tensor(image, MEAN, STD, out=np.zeros((1, 3, 4, 6)))


def test_both_tasks_run_at_the_same_time(threads):
    if threads == 2:
        # Each waits for the other one.
        meet = threading.Barrier(2, timeout=20)
        assert side_by_side(lambda: meet.wait() >= 0, lambda: meet.wait() >= 0) == (True, True)
    assert side_by_side(lambda: 1, lambda: "two") == (1, "two")


def test_the_error_of_a_comes_first(threads, network, tmp_path):
    broken, good = tmp_path / "broken.jpg", tmp_path / "good.png"
    broken.write_bytes(b"no image")
    Image.fromarray(noise(40, 40)).save(good)
    for a, b, named in (
        ("missing.png", broken, "missing.png"),
        (broken, "missing.png", "broken.jpg"),
        (good, broken, "broken.jpg"),
        (b"nothing", good, "a cannot be read"),
        (good, b"nothing", "b cannot be read"),
        (broken, 7, "broken.jpg"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=named):
            match_images(a, b, extractor=network, size=32)


def test_what_is_read_does_not_depend_on_threads(network, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise(61, 83)).save(tmp_path / "a.jpg", exif=exif)
    Image.fromarray(noise(83, 61)).save(tmp_path / "b.png")
    stream = io.BytesIO((tmp_path / "a.jpg").read_bytes())
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            # The same stream twice can only be read in turn.
            pairs = [(tmp_path / "a.jpg", tmp_path / "b.png"), (stream, stream)]
            found.append([match_images(a, b, extractor=network, size=(48, 32), step=4) for a, b in pairs])
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*found, strict=True):
        assert one.orientations == two.orientations
        assert one.size_a == two.size_a == (83, 61)
        for name in ("picture_a", "picture_b"):
            assert np.array_equal(np.asarray(getattr(one, name)), np.asarray(getattr(two, name)))
    assert found[0][0].orientations == (6, 1)
    assert found[0][1].orientations == (6, 6)


@pytest.mark.parametrize("points", [None, [[3, 4], [30.5, 9]]])
def test_nothing_is_copied_on_the_way(points, network, monkeypatch):
    """Pixels are written where the backbone reads them, and the matcher reads the maps where LiFT wrote them."""
    batches, maps, tokens = [], [], []
    own, lifted, stretch = ViTLiFTExtractor._backbone_tokens, ViTLiFTExtractor.lift_map, dense_op.stretch

    def backbone(self, batch, count):
        out = own(self, batch, count)
        batches.append((batch, out[0]))
        return out

    def lift(self, *given):
        maps.append(lifted(self, *given))
        return maps[-1]

    def stretched(*given, **options):
        tokens.append(stretch(*given, **options))
        return tokens[-1]

    monkeypatch.setattr(ViTLiFTExtractor, "_backbone_tokens", backbone)
    monkeypatch.setattr(ViTLiFTExtractor, "lift_map", lift)
    monkeypatch.setattr(dense_op, "stretch", stretched)

    made, allocate = [], memory.empty

    def empty(*size, **options):
        made.append(allocate(*size, **options))
        return made[-1]

    monkeypatch.setattr(memory, "empty", empty)
    images = noise(50, 70), noise(32, 48)
    found = match_images(*images, extractor=network, size=(32, 48), points=points)
    monkeypatch.undo()
    [(batch, seen)], [lifted_map] = batches, maps
    assert tuple(batch.shape) == (2, 3, 32, 48)
    assert batch.dtype == network.dtype
    # float32 is normalised in place; other dtypes are rounded from one image at a time.
    assert seen is batch
    assert [one.shape[0] for one in made if batch.shape[1:] == one.shape[1:] and one.dtype == batch.dtype] == [2]
    assert batch.data_ptr() in [one.data_ptr() for one in made]
    for place, image in zip(batch.split(1), (found.picture_a, found.picture_b), strict=True):
        assert torch.equal(place, network.preprocess(image)[0].to(network.dtype))
    # Points are matched besides the centres of cells, which tell how far their neighbours agree.
    assert len(tokens) == (2 if points is None else 4)
    for number, side in zip((0, 1) * 2, tokens, strict=False):
        assert torch.equal(side.tokens, lifted_map[number].flatten(1).t().float())
        if network.dtype == torch.float32:
            assert side.tokens.data_ptr() == lifted_map[number].data_ptr()


def test_other_sizes_and_the_cache_see_one_image_at_a_time(network, monkeypatch):
    seen, own = [], ViTLiFTExtractor._backbone_tokens

    def backbone(self, batch, count):
        seen.append(tuple(batch.shape))
        return own(self, batch, count)

    monkeypatch.setattr(ViTLiFTExtractor, "_backbone_tokens", backbone)
    a, b = noise(32, 48), noise(48, 32)
    match_images(a, b, extractor=network, size=None)
    assert seen == [(1, 3, 32, 48), (1, 3, 48, 32)]
    seen.clear()
    cache = MapCache()
    first = match_images(a, b, extractor=network, size=(32, 32), cache=cache)
    assert seen == [(1, 3, 32, 32)] * 2
    again = match_images(a, b, extractor=network, size=(32, 32), cache=cache)
    assert seen == [(1, 3, 32, 32)] * 2
    assert torch.equal(first.xy_b, again.xy_b)
    seen.clear()
    match_images(a, a, extractor=network, size=(32, 32))
    assert seen == [(2, 3, 32, 32)]


def test_matches_of_a_batch_are_those_of_single_images(network):
    folder = Path(__file__).resolve().parents[1] / "examples/photographs"
    a, b = folder / "cat.jpg", folder / "cat_second_view.jpg"
    together = match_images(a, b, extractor=network, size=(96, 128))
    apart = match_images(a, b, extractor=network, size=(96, 128), cache=MapCache())
    assert (together.xy_b == apart.xy_b).all(-1).float().mean() > 0.9
    limit = 1e-4 if network.dtype == torch.float32 else 2e-2
    assert (together.similarity - apart.similarity).abs().max() < limit
