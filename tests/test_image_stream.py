"""``extract_images``: the same descriptors as one by one, in order, batches that time does not change."""

from __future__ import annotations

import contextlib
import gc
import io
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

import lift_fast
from lift_fast import image_stream, images, memory
from lift_fast.images import bounded_size

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = [(40, 64), (64, 40), (33, 97), (40, 64), (16, 16), (64, 40), (40, 64), (61, 40), (40, 64)]


def make_extractor(**options):
    common = dict.fromkeys(("channel", "patch", "stride", "layer"))
    options = {"random_lift": True, **options}
    return lift_fast.ViTLiFTExtractor(
        "vit_tiny_patch16_224", random_weights=True, device="cpu", silent=True, **common, **options
    )


@pytest.fixture(scope="module")
def extractor():
    return make_extractor()


@pytest.fixture
def seen(extractor, monkeypatch):
    """The shape of each batch that goes through the networks."""
    found, compute = [], extractor.extract_descriptors_iterative_lift

    def spy(batch, lift_iter):
        found.append(tuple(batch.shape))
        return compute(batch, lift_iter)

    monkeypatch.setattr(extractor, "extract_descriptors_iterative_lift", spy)
    return found


def noise(height, width):
    return np.random.default_rng().integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Images of SIZES, numbered in order."""
    for number, size in enumerate(SIZES):
        Image.fromarray(noise(*size)).save(tmp_path / f"{number}.png")
    return tmp_path


def readers():
    return [thread for thread in threading.enumerate() if "lift_fast reader" in thread.name]


@pytest.mark.parametrize("batch_size", [None, 1, 2, 3])
@pytest.mark.parametrize("lift_iter", [0, 1, 2])
def test_equals_one_by_one(folder, extractor, lift_iter, batch_size):
    results = list(
        lift_fast.extract_images(folder, extractor=extractor, size=32, lift_iter=lift_iter, batch_size=batch_size)
    )
    assert [found.position for found in results] == list(range(len(SIZES)))
    for found, size in zip(results, SIZES, strict=True):
        width, height = bounded_size(size[::-1], 32)
        batch, loaded = extractor.preprocess(folder / f"{found.position}.png", (height, width))
        with torch.no_grad():
            expected = extractor.extract_descriptors_iterative_lift(batch, lift_iter)[0]
        cells = (height // 16) << lift_iter, (width // 16) << lift_iter
        assert (found.file_size, found.image_size) == (size, (loaded.height, loaded.width))
        assert found.descriptors.shape == (*cells, 192)
        torch.testing.assert_close(found.descriptors.flatten(0, 1), expected, atol=2e-4, rtol=1e-4)
        assert not found.descriptors.is_inference()
    assert readers() == []


def test_without_lift_and_in_half_precision(folder):
    extractor = make_extractor(random_lift=False)
    wide = list(lift_fast.extract_images(folder, extractor=extractor, size=None))
    half = list(lift_fast.extract_images(folder, extractor=extractor, size=None, dtype=torch.float16))
    for one, other, (height, width) in zip(wide, half, SIZES, strict=True):
        assert one.descriptors.shape == (height // 16, width // 16, 192)
        assert one.descriptors.dtype == torch.float32
        assert torch.equal(one.descriptors.half(), other.descriptors)


def test_any_form_of_an_image(folder, extractor):
    array = np.array(Image.open(folder / "0.png"))
    encoded = (folder / "0.png").read_bytes()
    forms = [folder / "0.png", str(folder / "0.png"), encoded, io.BytesIO(encoded), Image.open(folder / "0.png"), array]
    forms += [torch.from_numpy(array).permute(2, 0, 1), array / np.float32(255)]
    results = list(lift_fast.extract_images((form for form in forms), extractor=extractor, size=32, batch_size=1))
    assert len(results) == len(forms)
    assert all(torch.equal(found.descriptors, results[0].descriptors) for found in results)
    (alone,) = lift_fast.extract_images(folder / "0.png", extractor=extractor, size=32)
    assert torch.equal(alone.descriptors, results[0].descriptors)
    assert list(lift_fast.extract_images([], extractor=extractor)) == []


def test_results_say_where_they_come_from(folder, extractor):
    array = noise(40, 64)
    for given, expected in ((folder, str(folder / "0.png")), ([str(folder / "0.png")], str(folder / "0.png"))):
        found = next(lift_fast.extract_images(given, extractor=extractor, size=32))
        assert found.file == expected
        assert repr(found) == (
            f"ImageDescriptors(0, {expected}: 4 x 6 x 192 float32, loaded at 51 x 32 of 64 x 40 pixels)"
        )
    (found,) = lift_fast.extract_images([array], extractor=extractor, size=None, dtype=torch.float16)
    assert found.file is None
    assert repr(found) == "ImageDescriptors(0: 4 x 8 x 192 float16, loaded at 64 x 40 of 64 x 40 pixels)"


def test_without_extractor_the_demonstration_pair_of_match_images(folder, monkeypatch):
    # Loaded before the class is replaced, or its module would keep the replacement.
    match_images = lift_fast.match_images
    own, made = make_extractor(), []
    monkeypatch.setattr(lift_fast.extractor, "ViTLiFTExtractor", lambda *names, **options: made.append(names) or own)
    lift_fast.extractor.demonstration_extractor.cache_clear()
    try:
        (found,) = lift_fast.extract_images(folder / "0.png", size=32)
        match_images(folder / "0.png", folder / "1.png", size=32)
    finally:
        lift_fast.extractor.demonstration_extractor.cache_clear()
    assert made == [("demo_vitt16", "lift_demo_vitt16")]
    (expected,) = lift_fast.extract_images(folder / "0.png", extractor=own, size=32)
    assert torch.equal(found.descriptors, expected.descriptors)


def test_images_of_one_size_go_together_past_others(extractor, seen):
    arrays = [noise(32, 48 if number % 2 else 64) for number in range(12)]
    results = list(lift_fast.extract_images(arrays, extractor=extractor, size=None, batch_size=4))
    assert [found.position for found in results] == list(range(12))
    assert seen == [(4, 3, 32, 64), (4, 3, 32, 48), (2, 3, 32, 64), (2, 3, 32, 48)]


def test_the_default_batch_has_448_pixels_squared(extractor, seen):
    list(lift_fast.extract_images([noise(112, 224)] * 10, extractor=extractor, size=None))
    list(lift_fast.extract_images([noise(448, 464)] * 2, extractor=extractor, size=None))
    assert seen == [(8, 3, 112, 224), (2, 3, 112, 224), (1, 3, 448, 464), (1, 3, 448, 464)]


def test_time_changes_no_batch(folder, extractor, seen, monkeypatch):
    load = image_stream.as_image

    def slow(image, name):
        time.sleep(float(np.random.default_rng().uniform(0, 0.02)))
        return load(image, name)

    runs = []
    for _ in range(3):
        seen.clear()
        list(lift_fast.extract_images(folder, extractor=extractor, size=32, batch_size=3))
        runs.append(list(seen))
        monkeypatch.setattr(image_stream, "as_image", slow)
    assert runs[1:] == runs[:1] * 2


def test_an_image_waits_for_others_within_a_bound(extractor, monkeypatch):
    """Of one odd image among many: results behind it would pile up to the end."""
    one = 32 * 48 * 3 + 4 * 6 * 192 * 4
    monkeypatch.setattr(image_stream, "_WINDOW_BYTES", 7 * one)
    arrays = [noise(48, 32), *(noise(32, 48) for _ in range(40))]
    given = 0

    def give():
        nonlocal given
        for array in arrays:
            given += 1
            yield array

    monkeypatch.setattr(image_stream, "_HEADERS_AHEAD", 1)
    monkeypatch.setattr(image_stream, "_AHEAD_BYTES", 0)
    most = 0
    for count, _ in enumerate(lift_fast.extract_images(give(), extractor=extractor, size=None, batch_size=2)):
        most = max(most, given - count)
    # The eighth is more than the window; one more is decoded, and the header of another read.
    assert 7 <= most <= 10


@pytest.mark.parametrize("kind", ["path", "file", "stream"])
def test_memory_of_decoding_is_bounded(kind, folder, extractor, monkeypatch):
    """Headers are read first: no more is decoded ahead than fits, but always one."""
    content = (folder / "0.png").read_bytes()
    given = {"path": lambda: folder / "0.png", "file": lambda: io.BytesIO(content), "stream": lambda: Stream(content)}
    one = image_stream._BYTES_OF_A_PIXEL * (40 * 64 + 32 * 51)
    load, lock, decoded = image_stream.as_image, threading.Lock(), 0
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)

    def count(image, name):
        nonlocal decoded
        with lock:
            decoded += 1
        return load(image, name)

    monkeypatch.setattr(image_stream, "as_image", count)
    for room, most in ((3 * one, 1 if kind == "stream" else 3), (1, 1), (one - 1, 1)):
        monkeypatch.setattr(image_stream, "_AHEAD_BYTES", room)
        decoded = 0
        forms = [given[kind]() for _ in range(30)]
        for number, _ in enumerate(
            lift_fast.extract_images(forms, extractor=extractor, size=32, batch_size=1), start=1
        ):
            time.sleep(0.01)
            assert decoded <= number + most
        assert decoded == 30


class Stream(io.BytesIO):
    """As an answer of the network: it cannot go back."""

    def seekable(self):
        return False

    def seek(self, *_):
        raise OSError("cannot go back")


def test_headers(folder):
    file = io.BytesIO((folder / "2.png").read_bytes())
    array = np.array(Image.open(file))
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    for image in (folder / "2.png", file.getvalue(), Image.open(file), array, array[..., 0], tensor, tensor[0]):
        assert images.stored_size(image) == (97, 33)
    for place in (0, 5):
        file.seek(place)
        assert images.stored_size(file) == (97, 33)
        assert (file.tell(), file.closed) == (place, False)
    with (folder / "2.png").open("rb") as opened:
        assert images.stored_size(opened) == (97, 33)
        assert opened.tell() == 0
    for image in (
        Stream(file.getvalue()),
        io.StringIO("text"),
        folder,
        folder / "none.png",
        b"no image",
        b"",
        3,
        np.zeros(3),
        None,
    ):
        assert images.stored_size(image) is None


def test_unusable_images_are_told_in_order(folder, extractor):
    (folder / "1.png").write_bytes(b"no image")
    Image.fromarray(noise(1, 3000)).save(folder / "3.png")
    (folder / "7.png").unlink()
    paths = [folder / f"{number}.png" for number in range(9)]
    told = []
    results = list(
        lift_fast.extract_images(
            [*paths, np.zeros(3), 7],
            extractor=extractor,
            size=32,
            on_error=lambda image, message: told.append((image, message)),
        )
    )
    assert [found.position for found in results] == [0, 2, 4, 5, 6, 8]
    assert [image for image, _ in told[:3]] == [paths[1], paths[3], paths[7]]
    assert f"{paths[1]} cannot be read as an image" in told[0][1]
    assert f"{paths[3]}: an image of 3000 x 1 pixels is too long" in told[1][1]
    assert told[2][1] == f"no image at {paths[7]}"
    assert told[3][1] == "images[9] must be [H, W, 3], [H, W, 1] or [H, W], got [3]"
    assert told[4][1].startswith("images[10] must be a path, bytes")
    with pytest.raises(ValueError, match=r"1\.png cannot be read"):
        list(lift_fast.extract_images(paths, extractor=extractor, size=32))
    assert readers() == []


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"extractor": "dino_vits16"}, TypeError, "extractor must be a ViTLiFTExtractor or None, got str"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"batch_size": 1.5}, ValueError, "batch_size"),
        ({"max_side": -1}, ValueError, "max_side"),
        ({"size": 0}, ValueError, "load_size must be pixels"),
        ({"size": "448"}, ValueError, "load_size must be pixels"),
        ({"size": (448, 0)}, ValueError, "load_size must be"),
        ({"size": (448, 64), "max_side": 100}, ValueError, "more than max_side"),
        ({"on_error": "skip"}, TypeError, "on_error must be a function or None, got 'skip'"),
        ({"images": noise(16, 16)}, TypeError, "got one ndarray; put it in a list"),
        ({"images": torch.zeros(3, 16, 16)}, TypeError, "got one Tensor; put it in a list"),
        ({"images": Image.new("RGB", (16, 16))}, TypeError, "got one Image; put it in a list"),
        ({"images": b"content"}, TypeError, "got one bytes; put it in a list"),
        ({"images": io.BytesIO(b"content")}, TypeError, "got one BytesIO; put it in a list"),
        ({"images": 3}, TypeError, "got one int; put it in a list"),
        ({"lift_iter": -1}, ValueError, "lift_iter"),
        ({"dtype": torch.int8}, ValueError, "dtype must be"),
        ({"images": "nowhere"}, FileNotFoundError, "nowhere"),
    ],
)
def test_options_are_checked_at_once(folder, extractor, options, error, named):
    with pytest.raises(error, match=named):
        lift_fast.extract_images(**{"images": folder, "extractor": extractor, **options})


def test_no_thread_outlives_the_iterator(folder, extractor):
    results = lift_fast.extract_images([folder / "0.png"] * 200, extractor=extractor, size=32)
    next(results)
    assert len(readers()) == 1
    results.close()
    assert readers() == []
    results = lift_fast.extract_images([folder / "0.png"] * 200, extractor=extractor, size=32)
    next(results)
    del results
    gc.collect()
    assert readers() == []


def test_a_program_may_end_before_the_iterator(folder):
    code = f"""
import lift_fast
from lift_fast.demonstration import BACKBONE
extractor = lift_fast.ViTLiFTExtractor(BACKBONE, None, None, None, None, None, device="cpu", silent=True)
results = lift_fast.extract_images([{str(folder / "0.png")!r}] * 500, extractor=extractor, size=32)
print(next(results).position)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")


class Recorder:
    """Streams and events that only say what was asked of them."""

    def __init__(self, said):
        self.said = said

    def __call__(self, *_):
        return self

    def wait_stream(self, other):
        self.said.append("the copy waits for the networks")

    def record_event(self):
        self.said.append("recorded")
        return self

    def synchronize(self):
        self.said.append("the host waits")


def test_the_way_of_a_gpu_without_one(folder, extractor, monkeypatch):
    """In order: the next batch is queued before the host waits for the one before."""
    said = []
    recorder, nothing = Recorder(said), contextlib.nullcontext()
    monkeypatch.setattr(image_stream, "_on_cpu", image_stream._on_gpu)
    for name, found in (("Stream", recorder), ("current_stream", recorder)):
        monkeypatch.setattr(torch.cuda, name, found)
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda _: nothing)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: said.append("kept"))
    empty = memory.empty
    monkeypatch.setattr(memory, "empty", lambda *shape, pin_memory=False, **options: empty(*shape, **options))
    results = list(lift_fast.extract_images(folder, extractor=extractor, size=32, batch_size=3))
    monkeypatch.undo()
    queued = ["the copy waits for the networks", "kept", "recorded"]
    count = said.count("recorded")
    assert said == [*queued, *([*queued, "the host waits"]) * (count - 1), "the host waits"]
    expected = list(lift_fast.extract_images(folder, extractor=extractor, size=32, batch_size=3))
    for found, other in zip(results, expected, strict=True):
        assert found.position == other.position
        assert torch.equal(found.descriptors, other.descriptors)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(folder, extractor):
    gpu = make_extractor().to("cuda")
    expected = list(lift_fast.extract_images(folder, extractor=extractor, size=32))
    for batch_size in (None, 1, 3):
        results = list(lift_fast.extract_images(folder, extractor=gpu, size=32, batch_size=batch_size))
        assert [found.position for found in results] == list(range(len(SIZES)))
        for found, other in zip(results, expected, strict=True):
            assert found.descriptors.is_pinned()
            torch.testing.assert_close(found.descriptors, other.descriptors, atol=5e-2, rtol=5e-2)
