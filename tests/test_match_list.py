"""``lift-fast match --pairs``: lists as people write them, results that do not collide, resuming, and what fails."""

from __future__ import annotations

import json
import os
from collections import Counter

import numpy as np
import pytest
from PIL import Image

import lift_fast
from lift_fast.cli import main
from lift_fast.cli.match_list import Pair, name_results, read_pairs

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
    built = Counter()
    init = lift_fast.ViTLiFTExtractor.__init__
    monkeypatch.setattr(
        lift_fast.ViTLiFTExtractor,
        "__init__",
        lambda self, *a, **k: (built.update(n=1), init(self, *a, **k))[1],
    )
    lines = ["# hello", "", "a.png b.png", "  deep/a.png   größe.png ", "an image.png\tb.png", "a.png\ta.png"]
    # A mark of Windows' editors, its line ends, no last line end, and a pair twice.
    (folder / "pairs.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*lines, "a.png b.png"]).encode())
    assert run("--pairs", folder / "pairs.txt", "--out", "out", "--json") == 0
    said = capsys.readouterr()
    figures = json.loads(said.out)
    assert said.err == ""
    assert built["n"] == 1
    assert (figures["written"], figures["kept"], figures["failed"]) == (4, 0, [])
    pairs = {(found["a"], found["b"]): found for found in figures["pairs"]}
    expected = {("a.png", "b.png"), ("deep/a.png", "größe.png"), ("an image.png", "b.png"), ("a.png", "a.png")}
    assert set(pairs) == expected
    stems = {"a--b", "deep-a--größe", "an image--b", "a--a"}
    assert set(os.listdir("out")) == {stem + suffix for stem in stems for suffix in (".png", ".npz")}
    # The same numbers as of the pair alone.
    assert run(folder / "a.png", folder / "b.png", "--out", "one.png", "--quiet") == 0
    with np.load("one.npz") as one, np.load(pairs["a.png", "b.png"]["npz"]) as other:
        assert set(other) == {*one, "settings", "source", "source_bytes"}
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
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
        4: "expected two images, separated by white space, or by a tab if a name contains spaces; got 1",
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
    images = folder / "a.png", folder / "b.png"
    for arguments, reason in (
        ((), "give two images, A and B; or --pairs LIST"),
        (images[:1], "give two images, A and B, got one; or --pairs LIST"),
        ((*images, "--pairs", folder / "pairs.txt"), "give two images or --pairs LIST, not both"),
        ((*images, "--root", folder), "--root belongs to --pairs LIST"),
        ((*images, "--overwrite"), "--overwrite belongs to --pairs LIST"),
        ((*images, "--sheets", "none"), "--sheets belongs to --pairs LIST"),
        (("--pairs", folder / "pairs.txt", "--root", "no"), "--root no is not a folder"),
        (("--pairs", folder / "pairs.txt", "--out", images[0]), "is a file; expected a folder"),
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


def test_bytes_outside_utf8_are_names(tmp_path):
    (tmp_path / "pairs.txt").write_bytes(b"\xff\xfe.png b.png\n")
    pairs, failed = read_pairs(tmp_path / "pairs.txt")
    assert os.fsencode(pairs[0].a) == b"\xff\xfe.png"
    assert failed == []
