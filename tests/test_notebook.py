"""What a notebook asks for: results that show themselves, arrays, bytes, file objects, and a device that is there."""

from __future__ import annotations

import gc
import http.server
import io
import re
import threading
import urllib.request
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from lift_fast import (
    DenseMatches,
    NearestResult,
    ViTLiFTExtractor,
    dense_match,
    images,
    match_images,
    nearest,
    propagate_labels,
)
from lift_fast.images import as_image, read_image

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def extractor():
    return ViTLiFTExtractor("vit_tiny_patch16_224", random_weights=True, device="cpu", silent=True, layer=0)


def pixels(height=48, width=64, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def png(array):
    out = io.BytesIO()
    Image.fromarray(array).save(out, "PNG")
    return out


def test_a_result_is_shown_in_one_line_and_as_its_sheet(extractor):
    found = match_images(pixels(48, 64), pixels(70, 90, 1), extractor=extractor, size=None)
    count = int(found.valid.sum())
    text = repr(found)
    assert text.startswith(
        f"ImageMatches(A 64 x 48, B 90 x 70 pixels: {count} of 3072 matches valid ({count / 3072:.0%})"
    )
    assert "random weights" in text
    assert "\n" not in text
    assert len(text) < 300
    with Image.open(io.BytesIO(found._repr_png_())) as shown:
        shown.load()
        assert shown.format == "PNG"
        drawn = found.draw()
        assert np.array_equal(np.asarray(shown.convert("RGB")), np.asarray(drawn.convert("RGB")))


def test_the_verdict_is_part_of_the_line(extractor):
    found = match_images(pixels(), pixels(seed=1), extractor=extractor, size=None, step=8)
    object.__setattr__(found, "verification", SimpleNamespace(verdict="not verified"))
    object.__setattr__(found, "trust", SimpleNamespace(warning="few matches lead back"))
    assert re.search(r"matches valid \(\d+%\); not verified; few matches lead back; random weights\)$", repr(found))


def test_a_result_of_points_has_no_sheet(extractor):
    for points in ([[1, 1], [20, 30], [5.5, 7]], np.zeros((0, 2))):
        found = match_images(pixels(), pixels(seed=1), extractor=extractor, size=None, points=points)
        assert found._repr_png_() is None
        assert f" of {len(points)} matches valid" in repr(found)


def test_results_of_tensors_are_shown_in_one_line():
    rows = torch.randn(200, 16)
    rows[3] = torch.nan
    found = nearest(rows, rows, k=2)
    assert repr(found) == (
        "NearestResult(similarity=float32[200, 2], index=int64[200, 2], valid=bool[200], 199 of 200 valid, on cpu)"
    )
    maps = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    assert repr(dense_match(maps, maps, (5, 6), (7, 8))) == (
        "DenseMatches(similarity=float64[2, 30], xy=int64[2, 30, 2], valid=bool[2, 30], 60 of 60 valid, on cpu)"
    )
    meta = nearest(rows.to("meta"), rows.to("meta"))
    assert repr(meta) == "NearestResult(similarity=float32[200, 1], index=int64[200, 1], valid=bool[200])"
    # Still tuples, of whatever somebody puts into them.
    similarity, index, valid = found
    assert found == (similarity, index, valid)
    assert found._replace(valid=None)[1] is index
    assert repr(NearestResult(1, 2, 3)) == "NearestResult(similarity=1, index=2, valid=3)"
    assert repr(DenseMatches(None, "x", [])) == "DenseMatches(similarity=None, xy='x', valid=[])"


def views(array):
    """The same values in every form that NumPy has and PyTorch has not."""
    yield array
    yield np.asfortranarray(array)
    yield array[..., ::-1].copy()[..., ::-1]
    yield array.astype(array.dtype.newbyteorder(">"))
    frozen = array.copy()
    frozen.flags.writeable = False
    yield frozen
    # A field of packed records: rows lie an odd number of bytes apart.
    records = np.zeros(len(array), [("mark", "u1"), ("row", array.dtype, array.shape[1:])])
    records["row"] = array
    yield records["row"]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_arrays_are_matched_as_tensors(dtype, tmp_path):
    source = np.random.default_rng(1)
    query, key = (source.standard_normal((n, 12)).astype(dtype) for n in (31, 17))
    exact = query.astype(np.float64) / np.linalg.norm(query.astype(np.float64), axis=1, keepdims=True)
    cosines = exact @ (key.astype(np.float64) / np.linalg.norm(key.astype(np.float64), axis=1, keepdims=True)).T
    np.save(tmp_path / "key.npy", key)
    mapped = np.load(tmp_path / "key.npy", mmap_mode="r")
    for form in (*views(query), torch.from_numpy(query)):
        for other in (*views(key), mapped, torch.from_numpy(key)):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                found = nearest(form, other)
            assert all(type(part) is torch.Tensor for part in found)
            assert np.array_equal(found.index[:, 0].numpy(), cosines.argmax(1))


def test_maps_points_and_labels_may_be_arrays():
    source = np.random.default_rng(2)
    maps = [source.standard_normal((1, 6, 4, 5)).astype(np.float32) for _ in range(2)]
    points = source.integers(0, 20, (1, 7, 2))
    tensors = [torch.from_numpy(array) for array in maps]
    for mixed in ((maps[0], maps[1]), (maps[0], tensors[1]), (tensors[0], maps[1])):
        found = dense_match(*mixed, (20, 25), (21, 23), points=points)
        expected = dense_match(*tensors, (20, 25), (21, 23), points=torch.from_numpy(points))
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    rows, labels = source.standard_normal((12, 4)), source.random((12, 3))
    found = propagate_labels(rows, rows, labels, grid=(3, 4))
    assert torch.equal(
        found, propagate_labels(*(torch.from_numpy(array) for array in (rows, rows, labels)), grid=(3, 4))
    )


def test_a_large_array_is_not_copied():
    array = np.random.default_rng(3).standard_normal((5, 8)).astype(np.float32)
    array.flags.writeable = False
    from lift_fast.checks import as_tensor

    assert as_tensor("query", array).data_ptr() == array.ctypes.data


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones((2, 3), np.longdouble), "query cannot become a tensor"),
        (np.array([[1.0, None, 2.0]], object), "query cannot become a tensor"),
        (np.array([["a", "b", "c"]]), "query cannot become a tensor"),
        (np.ones((2, 3), np.int64), "query must be float32.*got torch.int64"),
        (np.ma.masked_invalid(np.ones((2, 3), np.float32)), "query is a masked array"),
    ],
)
def test_other_arrays_are_named(array, message):
    with pytest.raises(TypeError, match=message):
        nearest(array, torch.ones(2, 3))


class Unseekable(io.RawIOBase):
    """As a response of the network: forwards only, in small parts."""

    def __init__(self, content):
        self.rest = io.BytesIO(content)

    def readable(self):
        return True

    def read(self, size=-1):
        return self.rest.read(min(size, 100) if size > 0 else size)


def test_every_form_of_a_file_gives_the_same_image(tmp_path):
    array = pixels()
    buffer = png(array)
    content = buffer.getvalue()
    (tmp_path / "x.png").write_bytes(content)
    # As it is after writing: at its end.
    assert buffer.tell() == len(content)
    with (tmp_path / "x.png").open("rb") as file:
        forms = [content, bytearray(content), memoryview(content), buffer, buffer, file, Unseekable(content)]
        for form in forms:
            assert np.array_equal(np.asarray(as_image(form)), array)
        assert np.array_equal(np.asarray(read_image(file)), array)
        assert not file.closed
    strided = memoryview(bytes(byte for value in content for byte in (value, 0)))[::2]
    assert np.array_equal(np.asarray(as_image(strided)), array)


def test_bytes_and_file_objects_are_matched(extractor):
    a, b = pixels(), pixels(seed=1)
    expected = match_images(a, b, extractor=extractor, size=32)
    found = match_images(png(a), png(b).getvalue(), extractor=extractor, size=32)
    assert torch.equal(found.xy_b, expected.xy_b)
    batch, image = extractor.preprocess(png(a), 32)
    wanted = extractor.preprocess(Image.fromarray(a), 32)
    assert torch.equal(batch, wanted[0])
    assert image.tobytes() == wanted[1].tobytes()


def test_orientation_is_that_of_the_bytes():
    out, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels(20, 30)).save(out, "PNG", exif=exif)
    assert as_image(out.getvalue()).size == (20, 30)
    assert read_image(out.getvalue(), upright=False).size == (30, 20)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (b"", ValueError, "b holds no bytes; an answer of the network can be read only once"),
        (io.BytesIO(), ValueError, "b holds no bytes"),
        (b"nonsense", ValueError, "b cannot be read as an image: its format is not known"),
        (png(pixels()).getvalue()[:-200], ValueError, "b cannot be read as an image"),
        (io.StringIO("text"), TypeError, "b must be a binary file object.*mode 'rb'"),
        (Unseekable(b"x" * 1000), ValueError, "b cannot be read as an image: its format is not known"),
        (3, TypeError, "b must be a path, bytes, a binary file object.*got int"),
        (
            "https://example.org/b.jpg",
            FileNotFoundError,
            "no image at https://example.org/b.jpg; nothing is downloaded",
        ),
        ("HTTP://example.org/b.jpg", FileNotFoundError, "fetch it first, or in Python pass its bytes"),
    ],
)
def test_what_is_no_image_is_named(source, error, message, extractor):
    with pytest.raises(error, match=message) as caught:
        match_images(pixels(), source, extractor=extractor)
    assert "0x" not in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_failing_file_object_is_named():
    class Broken:
        def read(self, size):
            raise ConnectionResetError("the other side hung up")

    closed = io.BytesIO(b"x")
    closed.close()
    for source, message in ((Broken(), "the other side hung up"), (closed, "closed file")):
        with pytest.raises(ValueError, match=f"^photo cannot be read: .*{message}"):
            as_image(source, "photo")


def test_a_stream_without_end_is_left(monkeypatch):
    class Endless:
        given = 0

        def read(self, size):
            self.given += size
            return bytes(size)

    endless = Endless()
    monkeypatch.setattr(images, "_BYTES_BESIDE", 1 << 22)
    with images.pixel_limit(1000), pytest.raises(ValueError, match="image is too large: more than"):
        as_image(endless)
    assert endless.given < 1 << 23


def test_the_largest_file_passes_the_bound_on_bytes():
    """16 bits in four channels without compression, at the most pixels that a file may have."""
    with images.pixel_limit(250):
        out = io.BytesIO()
        Image.fromarray(pixels(20, 50)).save(out, "TIFF")
        assert len(out.getvalue()) < 8 * 1000
        assert as_image(out).size == (50, 20)
        out = io.BytesIO()
        Image.fromarray(pixels(20, 51)).save(out, "TIFF")
        with pytest.raises(ValueError, match="image is too large: 51 x 20 pixels"):
            as_image(out)


def test_an_answer_of_the_network_is_an_image():
    content = png(pixels()).getvalue()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://127.0.0.1:{server.server_port}/x.png") as answer:
            assert np.array_equal(np.asarray(as_image(answer)), pixels())
        server.shutdown()
    gc.collect()


def build(**options):
    return ViTLiFTExtractor("vit_tiny_patch16_224", random_weights=True, silent=True, layer=0, **options)


def test_the_published_device_falls_back_with_one_warning(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.warns(UserWarning, match="no CUDA device.*computes on the CPU; pass device=None") as seen:
        made = build()
    assert len(seen) == 1
    # It points at the caller's line.
    assert seen[0].filename == __file__
    assert made.device.type == "cpu"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build(device=None).device.type == "cpu"
    # Who asks for it by name, means it.
    for wish in ("cuda", "cuda:0", torch.device("cuda")):
        with pytest.raises(RuntimeError, match="PyTorch sees no CUDA device"):
            build(device=wish)


def test_the_command_line_never_replaces_a_device(monkeypatch, tmp_path, capsys):
    from lift_fast.cli import main

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    Image.fromarray(pixels()).save(tmp_path / "a.png")
    file = str(tmp_path / "a.png")
    assert main(["match", file, file, "--out", str(tmp_path / "m.png"), "--device", "cuda"]) == 2
    assert "no CUDA device" in capsys.readouterr().err
