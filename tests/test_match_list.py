"""``lift-fast match --pairs``: lists as people write them, results that do not collide, resuming, and what fails."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import lift_fast
from lift_fast.cli import main
from lift_fast.cli.pair_list import Pair, name_results, read_pairs

h5py = pytest.importorskip("h5py")
NETWORK = ["--model", "vit_tiny_patch16_224", "--random-weights", "--size", "32", "--step", "8", "--lines", "3"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Five images, of which one has a space in its name and one lies deeper."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos" / "deep").mkdir(parents=True)
    rng = np.random.default_rng()
    for name in ("a.png", "b.png", "an image.png", "größe.png", "deep/a.png"):
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(tmp_path / "photos" / name)
    return tmp_path / "photos"


def run(*arguments):
    return main(["match", *map(str, arguments), *NETWORK])


def test_a_list_is_matched_with_one_set_of_networks(folder, capsys, monkeypatch):
    built, seen = Counter(), []
    init = lift_fast.ViTLiFTExtractor.__init__
    monkeypatch.setattr(
        lift_fast.ViTLiFTExtractor,
        "__init__",
        lambda self, *a, **k: (built.update(n=1), init(self, *a, **k))[1],
    )
    tokens = lift_fast.ViTLiFTExtractor._backbone_tokens
    monkeypatch.setattr(
        lift_fast.ViTLiFTExtractor,
        "_backbone_tokens",
        lambda self, batch, n: (seen.append(len(batch)), tokens(self, batch, n))[1],
    )
    lines = ["# hello", "", "a.png b.png", "  deep/a.png   größe.png ", "an image.png\tb.png", "a.png\ta.png"]
    # A mark of Windows' editors, its line ends, no last line end, and a pair twice.
    (folder / "pairs.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*lines, "a.png b.png"]).encode())
    assert run("--pairs", folder / "pairs.txt", "--out", "out", "--json") == 0
    said = capsys.readouterr()
    figures = json.loads(said.out)
    assert said.err == ""
    assert built["n"] == 1
    # Each image once, although one stands in three places.
    assert seen == [1] * 5
    assert (figures["written"], figures["kept"], figures["failed"]) == (4, 0, [])
    pairs = {(found["a"], found["b"]): found for found in figures["pairs"]}
    expected = {("a.png", "b.png"), ("deep/a.png", "größe.png"), ("an image.png", "b.png"), ("a.png", "a.png")}
    assert set(pairs) == expected
    stems = {"a--b", "deep-a--größe", "an image--b", "a--a"}
    assert set(os.listdir("out")) == {stem + suffix for stem in stems for suffix in (".png", ".npz")}
    # The same numbers as of the pair alone.
    assert run(folder / "a.png", folder / "b.png", "--out", "one.png", "--quiet") == 0
    with np.load("one.npz") as one, np.load(pairs["a.png", "b.png"]["npz"]) as other:
        assert set(other) == {*one, "settings", "source", "source_bytes", "orientation"}
        # Two images together may round otherwise than one by one: ties aside, the same.
        assert all(one[name].shape == other[name].shape for name in one)
        assert (one["xy_b"] == other["xy_b"]).all(-1).mean() > 0.9
        np.testing.assert_allclose(one["similarity"], other["similarity"], atol=1e-4)
        assert other["source"].tolist() == ["a.png", "b.png"]


def test_a_run_resumes(folder, capsys, monkeypatch):
    (folder / "pairs.txt").write_text("a.png b.png\nb.png a.png\n")
    command = "--pairs", folder / "pairs.txt", "--out", "out", "--sheets", "webp"
    assert run(*command, "--quiet") == 0
    before = {name: os.stat(f"out/{name}").st_mtime_ns for name in os.listdir("out")}
    assert set(before) == {"a--b.npz", "a--b.webp", "b--a.npz", "b--a.webp"}
    (folder / "pairs.txt").write_text("a.png b.png\nb.png a.png\ndeep/a.png a.png\n")
    os.unlink("out/b--a.webp")
    capsys.readouterr()
    assert run(*command) == 0
    assert "1 of 3 results exist already" in capsys.readouterr().err
    after = {name: os.stat(f"out/{name}").st_mtime_ns for name in os.listdir("out")}
    assert set(after) == {*before, "deep-a--a.npz", "deep-a--a.webp"}
    assert {name for name in before if after[name] == before[name]} == {"a--b.npz", "a--b.webp"}
    # Nothing is left to do: no networks are built.
    with monkeypatch.context() as patch:
        patch.setattr(lift_fast.ViTLiFTExtractor, "__init__", lambda *_, **__: pytest.fail("built"))
        assert run(*command, "--json") == 0
    assert json.loads(capsys.readouterr().out)["kept"] == 3
    # Other settings or another image: refused before anything is written.
    assert run(*command, "--no-mutual") == 2
    assert "made with other settings (mutual)" in capsys.readouterr().err
    Image.new("RGB", (64, 32)).save(folder / "b.png")
    assert run(*command) == 2
    assert "contains the matches of another b.png" in capsys.readouterr().err
    assert after == {name: os.stat(f"out/{name}").st_mtime_ns for name in os.listdir("out")}
    assert run(*command, "--no-mutual", "--overwrite", "--quiet") == 0


def test_what_cannot_be_read_is_named_and_the_rest_goes_on(folder, capsys):
    (folder / "notes.png").write_text("no image")
    (folder / "half.png").write_bytes((folder / "a.png").read_bytes()[:500])
    os.mkfifo(folder / "pipe.png")
    Image.new("RGB", (5000, 3)).save(folder / "strip.png")
    lines = [
        "a.png nowhere.png",
        "notes.png a.png",
        "a.png half.png",
        "alone.png",
        "an image.png b.png",
        "pipe.png a.png",
        "x\0y a.png",
        "a.png b.png",
        f"{'x' * 9000} a.png",
    ]
    (folder / "pairs.txt").write_text("\n".join(lines))
    assert run("--pairs", folder / "pairs.txt", "--out", "out", "--sheets", "none", "--json") == 1
    said = capsys.readouterr()
    figures = json.loads(said.out)
    assert (figures["written"], len(figures["failed"])) == (1, 8)
    assert os.listdir("out") == ["a--b.npz"]
    for line, reason in {
        1: "no image at ",
        2: "notes.png cannot be read as an image",
        3: "half.png cannot be read as an image",
        4: "names with spaces need a tab between them or double quotes; got 1",
        5: "got 3",
        6: "is a named pipe",
        7: "got a zero byte",
        9: "more than 8192 characters",
    }.items():
        (message,) = (text for text in said.err.splitlines() if text.startswith(f"skipped: line {line}: "))
        assert reason in message
    assert len(said.err.splitlines()) == 8
    assert "\0" not in said.err


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no pairs in pairs.txt: it has no line with two images"),
        (b"# a b\n\n", "it has no line with two images"),
        (b"one\n", "no pairs in pairs.txt: line 1: expected two images"),
        (b"\x89PNG" + bytes(100_000), "line 1: expected two images"),
        (None, "no list of pairs at pairs.txt"),
    ],
)
def test_lists_without_pairs(content, reason, folder, capsys):
    if content is not None:
        (folder.parent / "pairs.txt").write_bytes(content)
    assert run("--pairs", "pairs.txt") == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1
    assert not (folder.parent / "matches").exists()


def test_options_that_do_not_belong_together(folder, capsys):
    (folder / "pairs.txt").write_text("a.png b.png\n")
    images, folder = (folder / "a.png", folder / "b.png"), Path("photos")
    for arguments, reason in (
        ((), "give two images, A and B; or --pairs LIST"),
        (images[:1], "give two images, A and B, got one; or --pairs LIST"),
        ((*images, "--pairs", folder / "pairs.txt"), "give two images or --pairs LIST, not both"),
        ((*images, "--overwrite"), "--overwrite belongs to --pairs LIST"),
        ((*images, "--sheets", "none"), "--sheets belongs to --pairs LIST"),
        (("--pairs", folder / "pairs.txt", "--root", "no"), "--root no is not a folder"),
        (("--pairs", folder / "pairs.txt", "--root", "."), "pairs.txt exists, the first would be a.png"),
        (("--pairs", folder / "pairs.txt", "--out", folder / "pairs.txt"), "is a file; expected a folder"),
        (("--pairs", folder / "pairs.txt", "--out", "m.png"), "this is the folder for all results; --sheets sets"),
    ):
        assert run(*arguments) == 2
        error = capsys.readouterr().err
        assert reason in error
        assert error.count("\n") == 1


def test_results_replace_no_image_of_the_list(folder, capsys):
    Image.open(folder / "a.png").save(folder / "a--b.png")
    (folder / "pairs.txt").write_text("a.png b.png\na--b.png b.png\n")
    before = (folder / "a--b.png").read_bytes()
    assert run("--pairs", folder / "pairs.txt", "--out", folder) == 2
    assert "is an input" in capsys.readouterr().err
    assert (folder / "a--b.png").read_bytes() == before


def test_exports_hold_the_whole_list(folder, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(folder / "a.png").transpose(Image.Transpose.ROTATE_90).save(folder / "turned.png", exif=exif)
    (folder / "pairs.txt").write_text("a.png b.png\n./deep/a.png a.png\na.png gone.png\nturned.png b.png\n")
    command = "--pairs", folder / "pairs.txt", "--out", "out", "--sheets", "none"
    exports = "--export", "out/m.txt", "--export", "out/m.h5", "--export", ".flo", "--export-cell", 2
    assert run(*command, "--quiet") == 1
    capsys.readouterr()
    # All are kept: the files are made of them, without networks.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lift_fast.ViTLiFTExtractor, "__init__", lambda *_, **__: None)
        patch.setattr("lift_fast.cli.match_pair.match", lambda *_: (_ for _ in ()).throw(ValueError("unreadable")))
        assert run(*command, *exports, "--json") == 1
    figures = json.loads(capsys.readouterr().out)
    flows = ["out/a--b.flo", "out/deep-a--a.flo", "out/turned--b.flo"]
    assert figures["exports"] == ["out/m.txt", "out/m.h5", *flows]
    assert figures["kept"] == 3
    text = Path("out/m.txt").read_text()
    assert text.startswith("a.png b.png\n")
    assert "\n\ndeep/a.png a.png\n" in text
    assert sorted(os.listdir("out/m_keypoints")) == ["a.png.txt", "b.png.txt", "deep", "turned.png.txt"]
    with h5py.File("out/m.h5") as file, h5py.File("out/m_keypoints.h5") as features:
        assert sorted(f"{one}/{other}" for one in file for other in file[one]) == [
            "a.png/b.png",
            "deep-a.png/a.png",
            "turned.png/b.png",
        ]
        for name, (width, height) in (("a.png", (50, 40)), ("turned.png", (40, 50))):
            found = features[name]["keypoints"].__array__()
            assert len(found) > 0
            assert (found >= -0.5).all()
            assert (found < (width, height)).all()
        # The same pixels, of which one file holds the turned ones: (x, y) is (y, 49 - x) there.
        where = features["a.png"]["keypoints"].__array__()
        turned = features["turned.png"]["keypoints"].__array__()
        assert {(y, 49 - x) for x, y in where.tolist()} & {tuple(at) for at in turned.tolist()}
    with np.load("out/a--b.npz") as data, open("out/a--b.flo", "rb") as file:
        assert np.frombuffer(file.read(), "<i4", 2, 4).tolist() == data["size_a"][::-1].tolist()
    # A new result has a new flow.
    before = os.stat("out/a--b.flo").st_mtime_ns
    assert run(*command, *exports, "--quiet") == 1
    assert os.stat("out/a--b.flo").st_mtime_ns == before
    assert run(*command, *exports, "--quiet", "--overwrite") == 1
    assert os.stat("out/a--b.flo").st_mtime_ns > before


def test_a_damaged_result_is_named(folder, capsys):
    (folder / "pairs.txt").write_text("a.png b.png\n")
    command = "--pairs", folder / "pairs.txt", "--out", "out", "--sheets", "none"
    assert run(*command, "--quiet") == 0
    content = bytearray(Path("out/a--b.npz").read_bytes())
    content[200] ^= 255
    Path("out/a--b.npz").write_bytes(content)
    capsys.readouterr()
    assert run(*command, "--export", "m.h5", "--quiet") == 2
    error = capsys.readouterr().err
    assert "out/a--b.npz cannot be read: " in error
    assert "--overwrite makes it anew" in error
    assert error.count("\n") == 1
    assert not Path("m.h5").exists()
    assert run(*command, "--export", "m.h5", "--quiet", "--overwrite") == 0


def test_nothing_is_exported_of_no_match(folder, capsys):
    (folder / "pairs.txt").write_text("a.png gone.png\n")
    Path("m.txt").write_text("old")
    assert run("--pairs", folder / "pairs.txt", "--export", "m.txt", "--export", ".flo") == 1
    said = capsys.readouterr().err
    assert "matched 0 pairs in" in said
    assert said.endswith(" s, results in matches; 1 of 1 were skipped\n")
    assert Path("m.txt").read_text() == "old"
    assert os.listdir("matches") == []


def test_exports_that_cannot_be_are_told_before_the_work(folder, capsys, monkeypatch):
    monkeypatch.setattr(lift_fast.ViTLiFTExtractor, "__init__", lambda *_, **__: pytest.fail("worked first"))
    (folder / "pairs.txt").write_text("a.png b.png\nan image.png\ta.png\n")
    (folder / "m_keypoints").write_text("")
    (folder / "up.txt").write_text("../photos/a.png b.png\n../b.png b.png\n")
    one, many = (folder / "a.png", folder / "b.png"), ("--pairs", folder / "pairs.txt")
    for arguments, export, reason in (
        (many, "m.txt", "COLMAP's match lists cannot hold an image.png"),
        (many, "m.flo", "--export m.flo would hold one pair of 2; give .flo alone"),
        (many, "m.csv", "exported to .txt, .h5, .hdf5, .flo (by the ending), got m.csv"),
        (many, "no/m.h5", "the folder no does not exist"),
        (("--pairs", folder / "up.txt"), "m.txt", "which cannot be said of ../b.png; give the folder that holds all"),
        (one, folder / "m.txt", "m_keypoints is a file; expected a folder"),
        (one, "photos/../m.csv", "got photos/../m.csv"),
    ):
        assert run(*arguments, "--export", export) == 2
        error = capsys.readouterr().err
        assert reason in error
        assert error.count("\n") == 1
    for arguments in (one, many):
        assert run(*arguments, "--export", "m.h5", "--root", "nowhere") == 2
        assert "--root nowhere is not a folder" in capsys.readouterr().err
        assert run(*arguments, "--export", "m.h5", "--export-cell", 2**20 + 1) == 2
        assert "--export-cell must be at most 1048576 pixels, got 1048577" in capsys.readouterr().err
    for exports in (("m.h5", "m_keypoints.h5"), ("m_keypoints.h5", "m.h5"), ("./m.h5", "m_keypoints.h5")):
        assert run(*one, *(word for name in exports for word in ("--export", name))) == 2
        assert "would both write" in capsys.readouterr().err
    Image.open(folder / "a.png").save(folder / "a.h5", format="PNG")
    assert run(folder / "a.h5", folder / "b.png", "--export", folder / "a.h5") == 2
    assert "is an input" in capsys.readouterr().err
    (folder / "up.txt").write_text("a.png b.png\n")
    assert run("--pairs", folder / "up.txt", "--export", folder / "up.txt") == 2
    assert "is an input" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "h5py", None)
    assert run(*many, "--export", "m.h5") == 2
    assert 'pip install "lift_fast[export]"' in capsys.readouterr().err


def test_exports_of_one_pair(folder, capsys):
    images = folder / "a.png", folder / "deep" / "a.png"
    exports = "--export", "m.h5", "--export", "m.txt", "--export", ".flo"
    assert run(*images, *exports, "--out", "sheet.jpg", "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["exports"] == ["m.h5", "m.txt", "sheet.flo"]
    with h5py.File("m.h5") as file, np.load("sheet.npz") as data:
        # Names start where both images are.
        to = file["a.png/deep-a.png"]["matches0"].__array__()
        assert 0 < (to >= 0).sum() <= data["valid"].sum()
    assert Path("m_keypoints/deep/a.png.txt").is_file()
    assert run(*images, *exports, "--root", folder.parent, "--quiet") == 0
    assert Path("m.txt").read_text().startswith("photos/a.png photos/deep/a.png\n")
    assert Path("matches.flo").is_file()
    assert run(*images, *exports) == 0
    assert "wrote matches.png, matches.npz, m.h5, m.txt, matches.flo" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("ending", "format"), [(".png", "PNG"), (".JPG", "JPEG"), (".jpeg", "JPEG"), (".webp", "WEBP"), (".pdf", None)]
)
def test_sheets_by_ending(ending, format, folder):
    assert run(folder / "a.png", folder / "b.png", "--out", f"sheet{ending}", "--quiet") == 0
    if format is None:
        assert Path("sheet.pdf").read_bytes().startswith(b"%PDF-")
    else:
        with Image.open(f"sheet{ending}") as sheet:
            assert (sheet.format, sheet.mode) == (format, "RGB")
            # The bar that says random weights, as red as it was drawn.
            assert np.abs(np.subtract(sheet.getpixel((700, 4)), (176, 32, 32))).max() <= 8
    assert Path("sheet.npz").is_file()


def test_names_never_collide():
    names = ["a.jpg", "a.png", "A.jpg", "b", "a--b", "b--a", "x/y.jpg", "x-y.jpg", "/x/y.jpg", "../x/y.jpg", "c" * 300]
    names += ["-o", ".hidden", "..", "a\nb", "é" * 200 + "1", "é" * 200 + "2", "what?.png", "tab\x1b[0m", "\udcff.png"]
    pairs = [Pair(1, a, b) for a in names for b in names]
    stems = name_results(pairs)
    assert len({stem.casefold() for stem in stems}) == len(pairs)
    assert all(len(os.fsencode(stem)) <= 200 and os.sep not in stem and stem.isprintable() for stem in stems)
    assert not any(stem.startswith(("-", ".")) for stem in stems)
    # Names do not depend on the order.
    assert dict(zip(pairs[::-1], name_results(pairs[::-1]), strict=True)) == dict(zip(pairs, stems, strict=True))
    assert name_results([Pair(1, "one/left.jpg", "two/right.png")]) == ["one-left--two-right"]


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("a.png b.png", ("a.png", "b.png")),
        ('"an image.png" b.png', ("an image.png", "b.png")),
        ('  b.png   "an image.png"  ', ("b.png", "an image.png")),
        ("an image.png\tb c.png", ("an image.png", "b c.png")),
        # Quotes within a name are of the name.
        ('it"s.png 5".png', ('it"s.png', '5".png')),
        ('"a".png b.png', ('"a".png', "b.png")),
        ('it\'s.png\t"b"', ("it's.png", '"b"')),
    ],
)
def test_names_in_lists(line, names, tmp_path):
    (tmp_path / "pairs.txt").write_text(line)
    assert read_pairs(tmp_path / "pairs.txt") == ([Pair(1, *names)], [])


def test_bytes_outside_utf8_are_names(tmp_path):
    (tmp_path / "pairs.txt").write_bytes(b"\xff\xfe.png b.png\n")
    pairs, failed = read_pairs(tmp_path / "pairs.txt")
    assert os.fsencode(pairs[0].a) == b"\xff\xfe.png"
    assert failed == []


def test_any_bytes_are_a_list_or_told_to_be_none(tmp_path):
    rng = np.random.default_rng()
    parts = [b"a.png", b"b", b"/", b" ", b"\t", b"\n", b"\r\n", b"\r", b"#", b"\0", b"\xff", b"\xef\xbb\xbf"]
    parts.append("\u2028é".encode())
    for _ in range(300):
        content = b"".join(parts[i] for i in rng.integers(0, len(parts), rng.integers(0, 40)))
        (tmp_path / "pairs.txt").write_bytes(content)
        try:
            pairs, failed = read_pairs(tmp_path / "pairs.txt")
        except ValueError:
            continue
        assert len({(pair.a, pair.b) for pair in pairs}) == len(pairs) > 0
        names = [name for pair in pairs for name in (pair.a, pair.b)]
        assert all(name and "\0" not in name and "\n" not in name for name in names)
        assert all(message.startswith("line ") and "\n" not in message for message in failed)
        stems = name_results(pairs)
        assert len({stem.casefold() for stem in stems}) == len(pairs)
