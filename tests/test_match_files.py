"""Matches in the files of other tools, read back by those tools and by readers of our own."""

from __future__ import annotations

import dataclasses
import errno
import io
import os
import re
import struct
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from lift_fast import match_images
from lift_fast.cli import main
from lift_fast.image_matching import ImageMatches
from lift_fast.match_files import MatchedPair, check_export, export_matches

h5py = pytest.importorskip("h5py")
SIZES = [((37, 53), (32, 48)), ((480, 641), (112, 144)), ((31, 200), (16, 112))]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def dense(rng, size_a, size_b, step=3, valid=0.7, spread=1.0):
    """Arrays of a pair with matches anywhere in B's loaded pixels; sizes are (original, loaded)."""
    loaded_a, loaded_b = size_a[1], size_b[1]
    ys, xs = (np.arange((n - 1) % step // 2, n, step) for n in loaded_a)
    at = np.stack(np.meshgrid(xs, ys), axis=-1)
    shape = at.shape[:2]
    to = np.stack([rng.integers(0, max(1, int(n * spread)), shape) for n in loaded_b[::-1]], axis=-1)
    found = rng.random(shape) < valid
    scale_a, scale_b = (np.array(o[::-1]) / np.array(n[::-1]) for o, n in (size_a, size_b))
    xy_b = np.where(found[..., None], (to + 0.5) * scale_b - 0.5, -1)
    confidence = np.where(found, rng.permutation(found.size).reshape(shape) / found.size, 0)
    return {
        "xy_a": ((at + 0.5) * scale_a - 0.5).astype(np.float32),
        "xy_b": xy_b.astype(np.float32),
        "confidence": confidence.astype(np.float32),
        "valid": found,
        **{f"size_{side}": np.array(size[0]) for side, size in (("a", size_a), ("b", size_b))},
        **{f"loaded_size_{side}": np.array(size[1]) for side, size in (("a", size_a), ("b", size_b))},
        "covered_a": np.array((0, 0, *loaded_a)),
    }


def pair(names, arrays, **options):
    return MatchedPair(names, lambda: arrays, **options)


def merged(pairs, cell):
    """Key points and matches by dictionaries: {name: {cell: position}}, {pair: {(cell of A, cell of B): score}}."""
    seen = defaultdict(lambda: defaultdict(list))
    matches = {}
    for (name_a, name_b), arrays in pairs:
        keep = arrays["valid"] & arrays.get("inliers", True)
        rows = sorted(
            zip(arrays["confidence"][keep], arrays["xy_a"][keep], arrays["xy_b"][keep], strict=True),
            key=lambda row: -row[0],
        )
        ids = []
        for _, *xys in rows:
            both = []
            for side, xy in zip("ab", xys, strict=True):
                at = (xy + 0.5) / arrays[f"size_{side}"][::-1] * arrays[f"loaded_size_{side}"][::-1] - 0.5
                both.append(tuple(round(float(v)) // cell for v in at[::-1]))
            ids.append(tuple(both))
        best_a, best_b = {}, {}
        for index, (a, b) in enumerate(ids):
            best_a.setdefault(a, index)
            best_b.setdefault(b, index)
        chosen = sorted(set(best_a.values()) & set(best_b.values()))
        matches[name_a, name_b] = {ids[index]: rows[index][0] for index in chosen}
        for index in chosen:
            for name, at, xy in zip((name_a, name_b), ids[index], rows[index][1:], strict=True):
                seen[name][at].append((float(rows[index][0]), xy.astype(np.float64)))
    points = {
        name: {
            at: sum(max(w, 1e-6) * xy for w, xy in found) / sum(max(w, 1e-6) for w, _ in found)
            for at, found in sorted(cells.items())
        }
        for name, cells in seen.items()
    }
    return points, matches


def as_matches(points, found):
    """The expected matches of a pair of ``merged`` as numbers."""
    return {
        names: sorted(
            ((list(points[names[0]]).index(a), list(points[names[1]]).index(b)), score)
            for (a, b), score in cells.items()
        )
        for names, cells in found.items()
    }


def three_pairs(rng):
    """a is A twice, b is A and B, c is B twice."""
    a, b, c = SIZES
    one, two, three = (dense(rng, *sizes, spread=0.6) for sizes in ((a, b), (b, c), (a, c)))
    return [(("x/ä.jpg", "b.png"), one), (("b.png", "c.png"), two), (("x/ä.jpg", "c.png"), three)]


def read_colmap_list(path):
    """The pairs of a match list as COLMAP reads one: names, then numbers until an empty line."""
    found, lines = {}, iter(Path(path).read_bytes().decode().split("\n"))
    for line in lines:
        if not line.strip():
            continue
        names = tuple(line.split())
        numbers = []
        for row in lines:
            if not row.strip():
                break
            numbers.append(tuple(map(int, row.split())))
        found[names] = numbers
    return found


def read_colmap_features(path):
    """``[N, 2]`` of a features file as COLMAP reads one."""
    header, *rows = Path(path).read_text().splitlines()
    count, channels = map(int, header.split())
    values = np.array([row.split() for row in rows], dtype=np.float64).reshape(count, 4 + 128)
    assert channels == 128
    assert (values[:, 2:4] == [1, 0]).all()
    assert (values[:, 4:] == 0).all()
    return values[:, :2]


@pytest.mark.parametrize("cell", [1, 3, 7])
def test_colmap_text(cell):
    pairs = three_pairs(np.random.default_rng())
    export_matches("m.txt", [pair(*each) for each in pairs], cell)
    points, matches = merged(pairs, cell)
    expected = as_matches(points, matches)
    found = read_colmap_list("m.txt")
    assert found.keys() == expected.keys()
    for names, rows in expected.items():
        assert found[names] == [numbers for numbers, _ in rows]
        assert rows
    assert sorted(p.as_posix() for p in Path("m_keypoints").rglob("*.txt")) == [
        f"m_keypoints/{name}.txt" for name in sorted(points)
    ]
    for name, cells in points.items():
        got = read_colmap_features(f"m_keypoints/{name}.txt")
        np.testing.assert_allclose(got, np.array(list(cells.values())) + 0.5, atol=1e-4)
        # A match that is only in one pair, in a cell of its own, keeps its place.
        if cell == 1:
            np.testing.assert_array_equal(got.astype(np.float32), np.float32(list(cells.values())) + np.float32(0.5))
    # The images of several pairs share key points.
    used = [{a for a, _ in found["x/ä.jpg", other]} for other in ("b.png", "c.png")]
    assert used[0] & used[1]


@pytest.mark.parametrize("cell", [1, 4])
@pytest.mark.parametrize("suffix", [".h5", ".hdf5"])
def test_hloc(cell, suffix):
    pairs = three_pairs(np.random.default_rng())
    export_matches(f"m{suffix}", [pair(*each) for each in pairs], cell)
    points, matches = merged(pairs, cell)
    with h5py.File(f"m_keypoints{suffix}") as features, h5py.File(f"m{suffix}") as file:
        for name, cells in points.items():
            got = features[name]["keypoints"].__array__()
            assert got.dtype == np.float32
            np.testing.assert_allclose(got, list(cells.values()), atol=1e-4)
        assert set(file) == {"x-ä.jpg", "b.png"}
        assert set(file["x-ä.jpg"]) == {"b.png", "c.png"}
        for names, rows in as_matches(points, matches).items():
            group = file["/".join(name.replace("/", "-") for name in names)]
            to, scores = group["matches0"].__array__(), group["matching_scores0"].__array__()
            assert (to.dtype, scores.dtype) == (np.int32, np.float16)
            assert len(to) == len(scores) == len(points[names[0]])
            at = np.flatnonzero(to != -1)
            assert list(zip(at, to[at], strict=True)) == [numbers for numbers, _ in rows]
            np.testing.assert_array_equal(scores[at], np.float16([score for _, score in rows]))
            assert (scores[to == -1] == 0).all()


@pytest.mark.parametrize("suffix", [".txt", ".h5"])
def test_pycolmap_finds_the_geometry(suffix):
    """Key points and matches in COLMAP's database: it verifies the true matches. The .h5 way is that of the docs."""
    pycolmap = pytest.importorskip("pycolmap")
    rng = np.random.default_rng()
    size, focal = (240, 320), 300.0
    arrays = dense(rng, (size, size), (size, size), step=8, valid=1.0)
    # A scene of two depths, seen by a camera that moves sideways; a third of the matches are wrong.
    y, x = (arrays["xy_a"][..., i].astype(np.float64) for i in (1, 0))
    depth = np.where(x < 160, 4.0, 7.0) + 0.01 * y
    anywhere = arrays["xy_b"].copy()
    arrays["xy_b"][..., 0], arrays["xy_b"][..., 1] = np.rint(x - focal * 0.9 / depth), y
    wrong = rng.random(x.shape) < 0.33
    arrays["xy_b"][wrong] = anywhere[wrong]
    arrays["valid"] = (arrays["xy_b"] >= 0).all(-1)
    arrays["confidence"] = np.where(wrong, 0.1, 0.9).astype(np.float32)
    Path("photos/deep").mkdir(parents=True)
    names = ("left.png", "deep/ä.png") if suffix == ".txt" else ("left one.png", "deep/ä.png")
    for name in names:
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(f"photos/{name}")
    if suffix == ".h5":
        page = (Path(__file__).parents[1] / "docs/matching.md").read_text("utf-8")
        (block,) = re.findall(r"^```python\n(import h5py, .*?)^```$", page, re.M | re.S)
        Path("matches").mkdir()
        export_matches("matches/matches.h5", [pair(names, arrays)])
        first, second = names
        Path("pairs.txt").write_text(f'# a list\n\n"./{first}" {second}\n{second}\t{first}\n{second} other.png\n')
        for _ in range(2):
            exec(compile(block, "docs/matching.md", "exec"), {})
    else:
        export_matches("matches.txt", [pair(names, arrays)])
        Path("pairs.txt").write_text(" ".join(names) + "\n")
        pycolmap.Database.open("scene.db").close()
        pycolmap.import_images("scene.db", "photos")
        with pycolmap.Database.open("scene.db") as database:
            ids = [database.read_image_with_name(name).image_id for name in names]
            for number, name in zip(ids, names, strict=True):
                points = read_colmap_features(f"matches_keypoints/{name}.txt")
                database.write_keypoints(number, points.astype(np.float32))
            database.write_matches(*ids, np.array(read_colmap_list("matches.txt")[names], np.uint32))
        pycolmap.verify_matches("scene.db", "pairs.txt")
    with pycolmap.Database.open("scene.db") as database:
        ids = [database.read_image_with_name(name).image_id for name in names]
        points = [database.read_keypoints(number)[:, :2] - 0.5 for number in ids]
        inliers = database.read_two_view_geometry(*ids).inlier_matches.astype(np.int64)
        read = database.read_matches(*ids)
    expected, _ = merged([(names, arrays)], 1)
    for name, got in zip(names, points, strict=True):
        np.testing.assert_allclose(got, list(expected[name].values()), atol=1e-4)

    def true(matches):
        moved = points[0][matches[:, 0]] - points[1][matches[:, 1]]
        x, y = points[0][matches[:, 0]].T
        return (np.abs(moved[:, 0] - focal * 0.9 / (np.where(x < 160, 4, 7) + 0.01 * y)) < 1) & (moved[:, 1] == 0)

    assert true(read).sum() > 300
    assert true(inliers).sum() > 0.9 * true(read).sum()
    assert (~true(inliers)).sum() < 0.5 * (~true(read)).sum()


def test_inliers_are_what_is_written_of_verified_matches():
    arrays = dense(np.random.default_rng(), SIZES[0], SIZES[1])
    arrays["inliers"] = arrays["valid"] & (np.random.default_rng(3).random(arrays["valid"].shape) < 0.5)
    export_matches("m.txt", [pair(("a", "b"), arrays)])
    points, matches = merged([(("a", "b"), arrays)], 1)
    assert read_colmap_list("m.txt")["a", "b"] == [numbers for numbers, _ in as_matches(points, matches)["a", "b"]]
    export_matches("m.flo", [pair(("a", "b"), arrays)])
    del arrays["inliers"]
    export_matches("all.flo", [pair(("a", "b"), arrays)])
    assert (read_flow("m.flo") > 1e9).sum() > (read_flow("all.flo") > 1e9).sum()


def test_no_match_at_all():
    arrays = dense(np.random.default_rng(), SIZES[0], SIZES[1], valid=0)
    other = dense(np.random.default_rng(), SIZES[0], SIZES[1])
    for name in ("m.txt", "m.h5"):
        export_matches(f"only_{name}", [pair(("a", "b"), arrays)])
        export_matches(name, [pair(("a", "b"), arrays), pair(("a", "c"), other)])
    with h5py.File("only_m.h5") as file:
        assert file["a/b"]["matches0"].shape == (0,)
    export_matches("m.flo", [pair(("a", "b"), arrays)])
    found = read_colmap_list("m.txt")
    assert found["a", "b"] == []
    assert found["a", "c"]
    assert read_colmap_features("m_keypoints/b.txt").shape == (0, 2)
    with h5py.File("m_keypoints.h5") as features, h5py.File("m.h5") as file:
        assert features["b"]["keypoints"].shape == (0, 2)
        assert (file["a/b"]["matches0"].__array__() == -1).all()
    assert (read_flow("m.flo") > 1e9).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_positions_are_in_pixels_as_stored(orientation):
    """COLMAP and hloc read files without their EXIF orientation."""
    stored = np.zeros((5, 9), np.uint8)
    # Off the middle, where turning changes nothing.
    at = (np.random.default_rng().integers(0, 4), np.random.default_rng().integers(0, 2))
    stored[at[1], at[0]] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save("a.png", exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open("a.png")))
    (y,), (x,) = np.nonzero(upright)
    arrays = {
        "xy_a": np.array([[x, y]], np.float32),
        "xy_b": np.array([[1, 2]], np.float32),
        "confidence": np.ones(1, np.float32),
        "valid": np.ones(1, bool),
        **{f"{kind}_{side}": np.array(upright.shape) for side in "ab" for kind in ("size", "loaded_size")},
    }
    export_matches("m.h5", [pair(("a", "b"), arrays, orientations=(orientation, 1))])
    with h5py.File("m_keypoints.h5") as features:
        assert features["a"]["keypoints"][0].tolist() == list(at)
        assert features["b"]["keypoints"][0].tolist() == [1, 2]


def read_flow(path):
    """A Middlebury file by its description: mark 202021.25, width, height, u and v by rows, little endian."""
    content = Path(path).read_bytes()
    mark, width, height = struct.unpack("<fii", content[:12])
    assert mark == 202021.25
    assert len(content) == 12 + 8 * width * height
    return np.frombuffer(content, "<f4", offset=12).reshape(height, width, 2)


@pytest.mark.parametrize("step", [1, 3, 50])
@pytest.mark.parametrize("size", [*SIZES, ((16, 16), (64, 48)), ((1, 1), (16, 16))])
def test_flow(size, step):
    rng = np.random.default_rng()
    arrays = dense(rng, size, SIZES[0], step)
    top, left = (rng.integers(0, n // 4) for n in size[1])
    if step == 1:
        # Descriptors of overlapping patches cover no border.
        tall, wide = size[1][0] - 2 * top, size[1][1] - 2 * left
        arrays["covered_a"] = np.array((top, left, tall, wide))
        for name in ("xy_a", "xy_b", "valid", "confidence"):
            arrays[name] = arrays[name][top : top + tall, left : left + wide]
    export_matches("m.flo", [pair(("a", "b"), arrays)])
    flow = read_flow("m.flo")
    assert flow.shape == (*size[0], 2)
    cv2 = pytest.importorskip("cv2")
    np.testing.assert_array_equal(cv2.readOpticalFlow("m.flo"), flow)
    scale = np.array(size[1]) / size[0]
    flat = arrays["xy_a"].reshape(-1, 2).astype(np.float64)
    for y, x in rng.integers(0, size[0], (200, 2)):
        covered_y, covered_x = (np.array((y, x)) + 0.5) * scale - arrays["covered_a"][:2]
        inside = 0 <= covered_y < arrays["covered_a"][2] and 0 <= covered_x < arrays["covered_a"][3]
        distance = np.square(flat - (x, y)).sum(1)
        # Between two matched pixels either will do.
        nearest = np.flatnonzero(distance < distance.min() + 1e-3)
        moves = arrays["xy_b"].reshape(-1, 2)[nearest] - arrays["xy_a"].reshape(-1, 2)[nearest]
        possible = [
            move if inside and ok else (1e10, 1e10)
            for move, ok in zip(moves, arrays["valid"].reshape(-1)[nearest], strict=True)
        ]
        assert any(np.allclose(flow[y, x], move, atol=1e-3, rtol=1e-6) for move in possible)


def test_an_unchanged_image_flows_nowhere():
    size = SIZES[1]
    arrays = dense(np.random.default_rng(), size, size, step=4, valid=1.0)
    arrays["xy_b"] = arrays["xy_a"] + np.float32([3, -2])
    export_matches("m.flo", [pair(("a", "b"), arrays)])
    np.testing.assert_allclose(read_flow("m.flo"), np.broadcast_to([3, -2], (*size[0], 2)), atol=1e-4)


def test_flow_in_strips(monkeypatch):
    arrays = dense(np.random.default_rng(), SIZES[1], SIZES[0])
    with monkeypatch.context() as patch:
        patch.setattr("lift_fast.match_files._STRIP_PIXELS", 5000)
        export_matches("strips.flo", [pair(("a", "b"), arrays)])
    export_matches("whole.flo", [pair(("a", "b"), arrays)])
    assert Path("strips.flo").read_bytes() == Path("whole.flo").read_bytes()


def test_names():
    rng = np.random.default_rng()
    arrays = dense(rng, SIZES[0], SIZES[0])
    names = "my photos/an image.jpg", "größe/日本.png"
    export_matches("m.h5", [pair(names, arrays)])
    with h5py.File("m_keypoints.h5") as features, h5py.File("m.h5") as file:
        assert len(features[names[0]]["keypoints"]) > 0
        assert list(file["my photos-an image.jpg/größe-日本.png"]) == ["matches0", "matching_scores0"]
    for bad, message in (
        ("an image.jpg", "cannot hold an image.jpg, a name with white space; rename the image, or export to .h5"),
        ("a\nb", r"cannot hold 'a\\nb'"),
        ("../a.jpg", r"relative to one folder, which cannot be said of \.\./a\.jpg"),
        ("/a.jpg", "relative to one folder"),
        ("a//b.jpg", "relative to one folder"),
        ("", "relative to one folder"),
    ):
        with pytest.raises(ValueError, match=message):
            export_matches("m.txt", [pair(("b", bad), arrays)])
    with pytest.raises(ValueError, match="hloc has one name, x-a/b, for x/a b and for x-a b; rename an image"):
        export_matches("n.h5", [pair(("x/a", "b"), arrays), pair(("x-a", "b"), arrays)])
    for bad in (("a", "a/keypoints"), ("a/keypoints", "a"), ("", "a")):
        with pytest.raises(ValueError, match=r"HDF5 cannot hold .*; rename the image"):
            export_matches("n.h5", [pair(bad, arrays)])
    # An image with itself is no pair for COLMAP, whose database has one entry for two images.
    export_matches("m.txt", [pair(("a", "a"), arrays), pair(("a", "b"), arrays)])
    assert list(read_colmap_list("m.txt")) == [("a", "b")]
    export_matches("self.h5", [pair(("a", "a"), arrays)])
    with h5py.File("self.h5") as file:
        assert (file["a/a"]["matches0"].__array__() >= 0).any()
    assert sorted(os.listdir()) == ["m.h5", "m.txt", "m_keypoints", "m_keypoints.h5", "self.h5", "self_keypoints.h5"]


def test_bad_arguments(monkeypatch):
    arrays = dense(np.random.default_rng(), SIZES[0], SIZES[0])
    one = [pair(("a", "b"), arrays)]
    for path, pairs, cell, message in (
        ("m.csv", one, 1, r"exported to \.txt, \.h5, \.hdf5, \.flo \(by the ending\), got m\.csv"),
        ("m", one, 1, "got m"),
        ("m.h5", [], 1, "at least one pair"),
        ("m.h5", one, 0, "cell must be an integer"),
        ("m.h5", [pair(("a\0c", "b"), arrays)], 1, "cannot hold a zero byte"),
        ("m.txt", [pair(("a", "a"), arrays)], 1, "matches no image with itself, and a has no other"),
        ("m.h5", [pair(("a", "b"), arrays, orientations=(1, 9))], 1, "orientation must be at most 8, got 9"),
        ("m.flo", one * 2, 1, "holds one pair, got 2"),
        ("m.flo", [pair(("a", "b"), {**arrays, "valid": arrays["valid"][0]})], 1, "needs dense matches"),
    ):
        with pytest.raises(ValueError, match=message):
            export_matches(path, pairs, cell)
    for names in ("ab", ("a",), ("a", 1), ("a", "b", "c"), None):
        with pytest.raises(TypeError, match="names must be two strings"):
            export_matches("m.h5", [pair(names, arrays)])
    other = dense(np.random.default_rng(), SIZES[0], SIZES[1])
    with pytest.raises(ValueError, match=r"b is \[480, 641\] pixels, .* in one pair, and \[37, 53\] at"):
        export_matches("m.h5", [pair(("a", "b"), arrays), pair(("a", "b"), other)])
    with pytest.raises(FileNotFoundError, match="the folder no does not exist"):
        export_matches("no/m.h5", [pair(("a", "b"), arrays)])
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r'pip install "lift_fast\[export\]"'):
        check_export("m.h5", [("a", "b")])
    assert check_export("x/m.TXT", [("a", "b")]) == [Path("x/m.TXT"), Path("x/m_keypoints")]
    assert os.listdir() == []


@pytest.mark.parametrize("name", ["m.txt", "m.h5", "m.flo"])
def test_old_files_stay_until_new_ones_are_whole(name, monkeypatch):
    rng = np.random.default_rng()
    export_matches(name, [pair(("a", "b"), dense(rng, SIZES[0], SIZES[0]))])
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    calls, arrays = [], dense(rng, SIZES[0], SIZES[0])

    def load():
        calls.append(1)
        # Of two pairs the second fails when the first is written.
        if len(calls) > 3 or name == "m.flo":
            raise OSError(errno.EIO, "gone")
        return arrays

    made = [MatchedPair(("a", "b"), load)] if name == "m.flo" else [MatchedPair(("a", c), load) for c in "bc"]
    with pytest.raises(OSError, match="gone"):
        export_matches(name, made)
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before


def test_more_images_than_files_may_be_open(monkeypatch):
    monkeypatch.setattr("lift_fast.match_files._FILES_AT_ONCE", 2)
    arrays = dense(np.random.default_rng(), SIZES[0], SIZES[0])
    export_matches("m.txt", [pair(("a", f"b{i}"), arrays) for i in range(6)])
    assert len(os.listdir("m_keypoints")) == 7
    assert not [name for name in os.listdir("m_keypoints") if not name.endswith(".txt") or name.startswith(".")]


def test_image_matches_export():
    arrays = dense(np.random.default_rng(), SIZES[0], SIZES[1])
    tensors = {name: torch.from_numpy(arrays[name]) for name in ("xy_a", "xy_b", "confidence", "valid")}
    images = [Image.new("RGB", (loaded[1], loaded[0])) for _, loaded in SIZES[:2]]
    matches = ImageMatches(
        **tensors,
        similarity=tensors["confidence"],
        distance=tensors["confidence"],
        size_a=SIZES[0][0],
        size_b=SIZES[1][0],
        picture_a=images[0],
        picture_b=images[1],
        covered_a=(0, 0, *SIZES[0][1]),
        covered_b=(0, 0, *SIZES[1][1]),
        grid_a=(1, 1),
        grid_b=(1, 1),
        random_weights=False,
    )
    for suffix in (".txt", ".h5", ".flo"):
        count = matches.export(f"one{suffix}", names=("x.jpg", "y.jpg"), cell=2)
        assert [count] == export_matches(f"two{suffix}", [pair(("x.jpg", "y.jpg"), arrays)], 2)
        if suffix == ".flo":
            assert count == arrays["valid"].sum()
        else:
            assert count == len(merged([(("x", "y"), arrays)], 2)[1]["x", "y"])
    for name in (".txt", "_keypoints/x.jpg.txt", ".flo"):
        assert Path(f"one{name}").read_bytes() == Path(f"two{name}").read_bytes()
    with h5py.File("one.h5") as one, h5py.File("two.h5") as two:
        np.testing.assert_array_equal(one["x.jpg/y.jpg/matches0"], two["x.jpg/y.jpg/matches0"])
    matches.export(Path("plain.flo"))
    for suffix in (".txt", ".H5"):
        with pytest.raises(ValueError, match=r"A was not given as a path; give names=\("):
            matches.export(f"m{suffix}")
    with pytest.raises(ValueError, match="by the ending"):
        matches.export("m.csv")
    found = dataclasses.replace(matches, files=("photos/x.jpg", "photos/deep/y.jpg"), orientations=(6, 1))
    found.export("found.txt")
    assert list(read_colmap_list("found.txt")) == [("x.jpg", "deep/y.jpg")]
    export_matches("six.txt", [pair(("x.jpg", "deep/y.jpg"), arrays, orientations=(6, 1))])
    assert Path("found_keypoints/x.jpg.txt").read_bytes() == Path("six_keypoints/x.jpg.txt").read_bytes()
    found.export("upright.txt", orientations=(1, 1))
    assert Path("found_keypoints/x.jpg.txt").read_bytes() != Path("upright_keypoints/x.jpg.txt").read_bytes()


@pytest.mark.usefixtures("one_thread")
def test_positions_agree_with_the_command_for_every_form_of_image():
    rng = np.random.default_rng()
    exif = Image.Exif()
    exif[0x0112] = 6
    Path("photos/deep").mkdir(parents=True)
    names = "a.png", "deep/a.png"
    for name in names:
        values = rng.integers(0, 255, (40, 56, 3), dtype=np.uint8)
        Image.fromarray(values).save(f"photos/{name}", exif=exif)
    paths = [f"photos/{name}" for name in names]
    assert main(["match", *paths, "--export", "m.txt", "--size", "32", "--step", "1", "--quiet"]) == 0
    for convert in (
        str,
        Path,
        lambda path: Path(path).read_bytes(),
        lambda path: io.BytesIO(Path(path).read_bytes()),
        Image.open,
    ):
        found = match_images(*map(convert, paths), size=32)
        assert found.orientations == (6, 6)
        by_path = convert in (str, Path)
        found.export("p.txt", names=None if by_path else names)
        assert Path("p.txt").read_bytes() == Path("m.txt").read_bytes()
        for name in names:
            ours, theirs = (Path(f"{stem}_keypoints/{name}.txt").read_bytes() for stem in "pm")
            assert ours == theirs
        if not by_path:
            with pytest.raises(ValueError, match="was not given as a path"):
                found.export("p.txt")
    upright = [ImageOps.exif_transpose(Image.open(path)) for path in paths]
    assert match_images(upright[0], np.asarray(upright[1]), size=32).orientations == (1, 1)
