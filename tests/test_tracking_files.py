"""Masks of every kind, files of points, folders and videos of frames, overlays, and films."""

from __future__ import annotations

import csv
import sys

import numpy as np
import pytest
from moving import camera
from PIL import Image

from lift_fast.images import pixel_limit
from lift_fast.tracking import FrameError, PointTracks, TrackedFrame, draw_overlay, open_video, read_objects
from lift_fast.tracking.frames import read_ahead
from lift_fast.tracking.masks import usual_palette, write_mask
from lift_fast.tracking.movie import write_movie
from lift_fast.tracking.point_files import COLUMNS, lines_of, read_points

NUMBERS = np.array([[0, 1, 3], [3, 3, 0]], dtype=np.uint8)
PALETTE = [(5 * i + 80 * channel) % 256 for i in range(256) for channel in range(3)]


def save(path, array, mode=None, **options):
    image = Image.fromarray(array)
    image = image if mode is None else image.convert(mode)
    image.save(path, **options)
    return path


def test_indexed_masks_keep_numbers_and_palette(tmp_path):
    write_mask(tmp_path / "a.png", NUMBERS, PALETTE)
    found = read_objects(tmp_path / "a.png")
    assert np.array_equal(found.numbers, NUMBERS)
    assert found.palette == PALETTE
    with_void = NUMBERS.copy()
    with_void[0, 0] = 255
    write_mask(tmp_path / "void.png", with_void, PALETTE)
    assert np.array_equal(read_objects(tmp_path / "void.png").numbers, NUMBERS)
    only = np.where(NUMBERS, 255, 0).astype(np.uint8)
    write_mask(tmp_path / "only.png", only, PALETTE)
    assert np.array_equal(read_objects(tmp_path / "only.png").numbers, NUMBERS > 0)
    write_mask(tmp_path / "binary.png", with_void, PALETTE)
    assert np.array_equal(read_objects(tmp_path / "binary.png", binary=True).numbers, with_void > 0)


def test_a_short_palette_is_filled(tmp_path):
    image = Image.fromarray(NUMBERS)
    image.putpalette([0, 0, 0, 9, 8, 7, 1, 2, 3, 6, 5, 4])
    image.save(tmp_path / "a.png")
    found = read_objects(tmp_path / "a.png")
    assert np.array_equal(found.numbers, NUMBERS)
    assert found.palette[:12] == [0, 0, 0, 9, 8, 7, 1, 2, 3, 6, 5, 4]
    assert len(found.palette) == 768


def test_grey_masks(tmp_path):
    assert np.array_equal(read_objects(save(tmp_path / "a.png", NUMBERS)).numbers, NUMBERS)
    bright = NUMBERS * 85
    # Next to other values 255 is an object here.
    assert np.array_equal(read_objects(save(tmp_path / "b.png", bright)).numbers, bright)
    white = np.where(NUMBERS == 3, 255, 0).astype(np.uint8)
    for mode in ("L", "1"):
        assert np.array_equal(read_objects(save(tmp_path / "c.png", white, mode)).numbers, NUMBERS == 3)
    wide = save(tmp_path / "d.png", NUMBERS.astype(np.uint16))
    assert np.array_equal(read_objects(wide).numbers, NUMBERS)
    with pytest.raises(ValueError, match=r"d\.png holds values of 0 to 771; expected numbers of objects, 0 to 255"):
        read_objects(save(wide, NUMBERS.astype(np.uint16) * 257))
    assert np.array_equal(read_objects(wide, binary=True).numbers, NUMBERS == 3)


def test_soft_edges_and_jpeg_are_refused_or_binary(tmp_path):
    ramp = np.tile(np.arange(256, dtype=np.uint8), (4, 1))
    save(tmp_path / "soft.png", ramp)
    with pytest.raises(ValueError, match=r"256 different greys.*--binary"):
        read_objects(tmp_path / "soft.png")
    assert np.array_equal(read_objects(tmp_path / "soft.png", binary=True).numbers, ramp > 127)
    square = np.zeros((32, 32), dtype=np.uint8)
    square[8:24, 8:24] = 255
    save(tmp_path / "a.jpg", square, quality=60)
    with pytest.raises(ValueError, match="JPEG"):
        read_objects(tmp_path / "a.jpg")
    assert np.array_equal(read_objects(tmp_path / "a.jpg", binary=True).numbers, square > 0)


def test_coloured_masks(tmp_path):
    red, green = (200, 0, 0), (0, 90, 250)
    colours = np.array([(0, 0, 0), green, red], dtype=np.uint8)
    wanted = np.array([[0, 1, 2, 2, 0]], dtype=np.uint8)
    found = read_objects(save(tmp_path / "a.png", colours[wanted]))
    assert np.array_equal(found.numbers, wanted)
    assert found.palette[:9] == [0, 0, 0, *green, *red]
    opacity = np.array([[255, 255, 100, 200, 0]], dtype=np.uint8)
    clear = np.dstack([colours[[[1, 1, 2, 2, 1]]], opacity])
    assert np.array_equal(read_objects(save(tmp_path / "b.png", clear)).numbers, [[1, 1, 0, 2, 0]])
    assert np.array_equal(read_objects(tmp_path / "b.png", binary=True).numbers, [[1, 1, 0, 1, 0]])
    many = np.dstack([np.arange(300) % 256, np.arange(300) // 256, np.full(300, 9)]).astype(np.uint8)
    with pytest.raises(ValueError, match="300 colours"):
        read_objects(save(tmp_path / "c.png", many))
    most = read_objects(save(tmp_path / "d.png", many[:, :255]))
    assert np.array_equal(np.unique(most.numbers), np.arange(1, 256))


def test_masks_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "a.png", NUMBERS, exif=exif)
    assert np.array_equal(read_objects(tmp_path / "a.png").numbers, np.rot90(NUMBERS, -1))


def test_masks_that_cannot_be_used(tmp_path):
    for name, array in (("grey.png", np.zeros((3, 4), dtype=np.uint8)), ("black.png", np.zeros((3, 4, 3), np.uint8))):
        save(tmp_path / name, array)
        with pytest.raises(ValueError, match=f"{name} marks no object"):
            read_objects(tmp_path / name)
        with pytest.raises(ValueError, match="marks no object"):
            read_objects(tmp_path / name, binary=True)
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match=r"text\.png cannot be read as a mask"):
        read_objects(tmp_path / "text.png")
    with pytest.raises(FileNotFoundError, match=r"no mask at .*gone\.png"):
        read_objects(tmp_path / "gone.png")
    with pytest.raises(ValueError, match="folder; expected a mask"):
        read_objects(tmp_path)
    save(tmp_path / "large.png", np.ones((40, 40), dtype=np.uint8))
    with pixel_limit(399), pytest.raises(ValueError, match="40 x 40 pixels, but a file may hold 1596"):
        read_objects(tmp_path / "large.png")


@pytest.mark.parametrize(
    ("name", "text", "names", "points"),
    [
        ("a.csv", "1,2\n3.5,-4e0\n", ["0", "1"], [(1, 2), (3.5, -4)]),
        ("a.csv", "\ufeffy, id ,x\n2,nose,1\n\n4,,3\n", ["nose", "1"], [(1, 2), (3, 4)]),
        ("a.json", '[[1, 2], {"x": 3, "y": 4, "id": 7}]', ["0", "7"], [(1, 2), (3, 4)]),
        ("a.txt", "1,2", ["0"], [(1, 2)]),
    ],
)
def test_points_files(tmp_path, name, text, names, points):
    (tmp_path / name).write_text(text, "utf-8")
    assert read_points(tmp_path / name) == (names, points)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "", "no list of points"),
        ("a.csv", "x,y\n", "no list of points"),
        ("a.csv", "1,2\n3\n", "point 1: expected x and y"),
        ("a.csv", "1,2,3\n", "point 0"),
        ("a.csv", "x,y\n1,b\n", "point 0"),
        ("a.csv", "x,y\n1\n", "point 0"),
        ("a.csv", "id,x,y\na,1,2\na,3,4\n", "more than one point 'a'"),
        ("a.json", "[[1, 2", "cannot be read as points"),
        ("a.json", '{"x": 1}', "no list of points"),
        ("a.json", "[]", "no list of points"),
        ("a.json", "[[true, 2]]", "point 0"),
        ("a.json", "[[1, null]]", "point 0"),
        ("a.json", '[{"x": 1}]', "point 0"),
        ("a.json", "[5]", "point 0"),
        ("a.json", "[" * 100_000, "cannot be read as points"),
        ("a.csv", b"\xff\xfe1,2", "cannot be read as points"),
    ],
)
def test_malformed_points(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message) as caught:
        read_points(tmp_path / name)
    assert len(str(caught.value)) < 600


def test_lines_of_points_are_csv():
    tracks = PointTracks(
        np.array([[1.234, 5.678], [0, 9]], dtype=np.float32), np.array([0.5, 0]), np.array([True, False])
    )
    text = lines_of(12, 'a "b", c', ["nose", "1,2"], tracks)
    first, second = csv.DictReader([",".join(COLUMNS), *text.splitlines()])
    assert list(first.values()) == ["12", 'a "b", c', "nose", "1.23", "5.68", "0.5000", "1"]
    assert (second["id"], second["visible"]) == ("1,2", "0")


def colour(number):
    return (10 * number, 255 - 10 * number, 40)


def write_frames(folder, names):
    folder.mkdir(exist_ok=True)
    for number, name in enumerate(names):
        Image.new("RGB", (8, 6), colour(number)).save(folder / name)


def test_frames_of_a_folder(tmp_path):
    folder = tmp_path / "with space"
    write_frames(folder, ["1.png", "2.png", "10.png", "11 b.png", "11 b.bmp", "mask.png"])
    write_frames(folder / "below", ["3.png"])
    (folder / ".hidden.png").write_text("")
    (folder / "notes.txt").write_text("")
    (folder / "12.jpg").write_text("no image")
    video = open_video(folder, [folder / ".." / "with space" / "mask.png"])
    assert video.count == 6
    found = list(video.frames())
    assert [one.name for one in found] == ["1", "2", "10", "11 b.bmp", "11 b.png", "12"]
    assert [one.image.getpixel((0, 0)) for one in found[:3]] == [colour(0), colour(1), colour(2)]
    assert isinstance(found[5].image, FrameError)
    assert "12.jpg cannot be read" in str(found[5].image)
    assert [one.name for one in video.frames(4)] == ["11 b.png", "12"]


def test_folders_and_files_that_are_no_video(tmp_path):
    with pytest.raises(ValueError, match="no frames in"):
        open_video(tmp_path)
    with pytest.raises(FileNotFoundError, match="folder of frames or video"):
        open_video(tmp_path / "gone")
    for name, message in (("a.png", "as an image"), ("a.mp4", "as a video|PyAV")):
        (tmp_path / name).write_text("neither")
        with pytest.raises(ValueError, match=message):
            open_video(tmp_path / name)


def test_without_pyav(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "a.mp4").write_bytes(b"\0" * 100)
    with pytest.raises(ValueError, match=r'pip install "lift_fast\[video\]".*ffmpeg -i'):
        open_video(tmp_path / "a.mp4")
    write_frames(tmp_path, ["1.png"])
    with pytest.raises(ValueError, match=r'pip install "lift_fast\[video\]"; or give a \.webp or \.gif'):
        write_movie(tmp_path / "film.mp4", [tmp_path / "1.png"], 24)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_frames_of_an_animation(tmp_path, suffix):
    images = [Image.new("RGB", (8, 6), colour(number)) for number in range(5)]
    images[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=images[1:])
    video = open_video(tmp_path / f"a.{suffix}")
    assert video.count == 5
    for start in (0, 3):
        found = list(read_ahead(video.frames(start)))
        assert [one.name for one in found] == [f"{number:06d}" for number in range(start, 5)]
        for number, one in enumerate(found, start):
            assert np.abs(np.array(one.image.getpixel((4, 3))) - colour(number)).max() < 20


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    pytest.importorskip("av")
    folder = tmp_path_factory.mktemp("film")
    images = camera(9, (62, 95))[0]
    for number, image in enumerate(images):
        image.save(folder / f"{number}.png")
    write_movie(folder / "film.mp4", [folder / f"{number}.png" for number in range(9)], 12.5)
    return folder / "film.mp4", images


def test_video_file(film):
    path, images = film
    video = open_video(path)
    assert (video.count, video.rate) == (9, 12.5)
    found = list(video.frames())
    assert len(found) == 9
    assert [one.name for one in video.frames(6)] == ["000006", "000007", "000008"]
    for one, image in zip(found, images, strict=True):
        # H.264 halves the sides of colour: the odd column is cut.
        assert one.image.size == (94, 62)
        assert np.abs(np.asarray(one.image, dtype=float) - np.asarray(image)[:, :94]).mean() < 6


def test_damaged_video(film, tmp_path):
    path, _ = film
    content = bytearray(path.read_bytes())
    (tmp_path / "cut.mp4").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"cut\.mp4 cannot be read as a video"):
        list(open_video(tmp_path / "cut.mp4").frames())
    start = content.index(b"mdat") + 4
    length = int.from_bytes(content[start - 8 : start - 4], "big") - 8
    rng = np.random.default_rng(0)
    named = 0
    for _ in range(20):
        damaged = content.copy()
        place, size = start + int(rng.integers(length - 300)), int(rng.integers(20, 300))
        damaged[place : place + size] = rng.bytes(size)
        (tmp_path / "bad.mp4").write_bytes(damaged)
        found = list(open_video(tmp_path / "bad.mp4").frames())
        problems = [str(one.image) for one in found if isinstance(one.image, FrameError)]
        assert all("bad.mp4, frame" in one or "of its 9 frames cannot be read" in one for one in problems)
        assert len(found) == 9 or not problems or "of its 9 frames" in problems[-1]
        named += bool(problems)
    assert named > 3
    with pixel_limit(1000), pytest.raises(ValueError, match="94 x 62 pixels, but a file may hold 4000"):
        open_video(path)


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_film_of_a_web_page(tmp_path, suffix):
    write_frames(tmp_path, [f"{number}.png" for number in range(4)])
    Image.new("RGB", (1300, 90)).save(tmp_path / "wide.png")
    write_movie(tmp_path / f"film{suffix}", [tmp_path / f"{number}.png" for number in range(4)], 10)
    with Image.open(tmp_path / f"film{suffix}") as image:
        assert (image.n_frames, image.size) == (4, (8, 6))
        image.seek(3)
        image.load()
        assert image.info["duration"] == 100
        assert np.abs(np.array(image.convert("RGB").getpixel((4, 3))) - colour(3)).max() < 20
    write_movie(tmp_path / f"wide{suffix}", [tmp_path / "wide.png"], 10)
    with Image.open(tmp_path / f"wide{suffix}") as image:
        assert image.size == (640, 44)
    with pytest.raises(ValueError, match=r"too many for .*; give a film that ends in \.mp4"):
        write_movie(tmp_path / f"long{suffix}", [tmp_path / "wide.png"] * 300_000, 10)
    with pytest.raises(ValueError, match="at least one image"):
        write_movie(tmp_path / f"none{suffix}", [], 10)
    assert not (tmp_path / f"long{suffix}").exists()


def test_overlay_shows_objects_and_points():
    image = Image.new("RGB", (120, 90), (60, 60, 60))
    mask = np.zeros((90, 120), dtype=np.uint8)
    mask[20:50, 30:70] = 2
    xy = np.array([[100, 20], [100, 70]], dtype=np.float32)
    before = PointTracks(xy - (20, 0), np.ones(2), np.array([True, False]))
    points = PointTracks(xy, np.ones(2), np.array([True, False]))
    sheet = np.asarray(draw_overlay(TrackedFrame(3, image, mask, points), None, [before]))
    # The usual second colour is green.
    assert sheet[35, 50, 1] > sheet[35, 50, 0] == sheet[35, 50, 2] < 60
    assert sheet[20, 50, 1] > sheet[35, 50, 1] + 30
    assert sheet[80, 10].tolist() == [60, 60, 60]
    # A visible point is filled and has a trail.
    assert sheet[20, 100].tolist() != [60, 60, 60]
    assert sheet[20, 90].tolist() != [60, 60, 60]
    assert sheet[70, 100].tolist() == [60, 60, 60]
    assert sheet[70, 90].tolist() == [60, 60, 60]
    assert (sheet[60:80, 90:110] != 60).any()
    palette = usual_palette()
    palette[6:9] = 0, 0, 255
    blue = np.asarray(draw_overlay(TrackedFrame(3, image, mask, None), palette))
    assert blue[35, 50, 2] > blue[35, 50, 1]
    assert np.asarray(image).max() == 60
