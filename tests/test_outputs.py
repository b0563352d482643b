"""Full disks, read-only folders and outputs that are no files: one line, before the work where it can be told."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import lift_fast
from lift_fast._files import atomic_path, remove_unfinished, require_writable
from lift_fast.cli import main

NETWORK = ["--model", "vit_tiny_patch16_224", "--random-weights", "--quiet", "--size", "32"]
pytestmark = pytest.mark.usefixtures("one_thread")
COMMANDS = {
    "match": (["match", "a.png", "a.png", "--out", "{}.png"], ".png"),
    "match numbers": (["match", "a.png", "a.png", "--out", "{}.png"], ".npz"),
    "show": (["show", "a.png", "--method", "backbone", "--out", "{}.png"], ".png"),
    "show page": (["show", "a.png", "--method", "backbone", "--html", "{}.html"], ".html"),
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)).save("a.png")
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def run(case: str, stem: str) -> int:
    return main([word.format(stem) for word in COMMANDS[case][0]] + NETWORK)


@pytest.fixture
def no_work(monkeypatch):
    """It must be told before the networks run, and before they are built."""

    def worked(*_, **__):
        raise AssertionError("worked first")

    monkeypatch.setattr(lift_fast.ViTLiFTExtractor, "__init__", worked)
    monkeypatch.setattr("lift_fast.cli.show.build", worked)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("case", COMMANDS)
@pytest.mark.parametrize("kind", ["folder", "pipe", "missing", "beside a file", "full", "read-only"])
def test_what_cannot_be_written_is_told_before_the_work(case, kind, here, capsys, monkeypatch):
    suffix, stem = COMMANDS[case][1], "out/x"
    said = {"folder": "that is a folder", "pipe": "that is a named pipe"}
    if kind == "folder":
        (here / f"x{suffix}").mkdir()
    elif kind == "pipe":
        os.mkfifo(here / f"x{suffix}")
    elif kind == "missing":
        stem, said[kind] = "no\nwhere/x", r"the folder 'no\nwhere' does not exist; create it first"
    elif kind == "beside a file":
        stem, said[kind] = "a.png/x", "the folder a.png does not exist"
    else:
        number = errno.ENOSPC if kind == "full" else errno.EROFS
        said[kind] = f"cannot write there: {os.strerror(number)}; give another place"

        class Full:
            def __enter__(self):
                if kind == "read-only":
                    raise OSError(number, os.strerror(number))
                return self

            def write(self, content):
                raise OSError(number, os.strerror(number))

            def __exit__(self, *_):
                pass

        monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: Full())
    assert run(case, stem) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said[kind] in error
    assert error.startswith(f"lift-fast {case.split()[0]}: --{'html' if suffix == '.html' else 'out'} ")


@pytest.mark.parametrize("case", COMMANDS)
@pytest.mark.parametrize("where", ["content", "name"])
def test_a_disk_that_fills_in_the_end(case, where, here, capsys, monkeypatch):
    """The old files stay, and nothing half-written."""
    suffixes = (".png", ".npz", ".html")
    for suffix in suffixes:
        (here / f"x{suffix}").write_text("old")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if where == "name":
        monkeypatch.setattr(tempfile, "mkstemp", full)
    elif case == "match numbers":
        monkeypatch.setattr(np, "savez_compressed", full)
    elif case == "show page":
        monkeypatch.setattr(Path, "write_text", full)
    else:
        monkeypatch.setattr(Image.Image, "save", full)
    assert run(case, "out/x") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"cannot write out/x{'.png' if COMMANDS[case][1] == '.npz' else COMMANDS[case][1]}" in error
    assert os.strerror(errno.ENOSPC) in error
    monkeypatch.undo()
    assert sorted(os.listdir(here)) == sorted(f"x{suffix}" for suffix in suffixes)
    assert all((here / f"x{suffix}").read_text() == "old" for suffix in suffixes)


def test_extract_keeps_a_folder_out_of_its_way(here, capsys):
    """It once counted as the image's descriptors, there already."""
    (here / "a.npz").mkdir()
    assert main(["extract", "a.png", "--out", "out", *NETWORK]) == 2
    assert "cannot write out/a.npz: Is a directory" in capsys.readouterr().err


def test_a_link_to_nothing_may_be_written(here):
    (here / "x.png").symlink_to("nothing")
    require_writable(here / "x.png")
    require_writable(here / "new.png")


def test_unfinished_files_can_be_removed(here):
    def write():
        with atomic_path(here / "x.png") as temporary:
            assert temporary.exists()
            remove_unfinished()
            assert not temporary.exists()

    with pytest.raises(FileNotFoundError):
        write()
    with atomic_path(here / "y.png") as temporary:
        temporary.write_text("whole")
    remove_unfinished()
    assert os.listdir(here) == ["y.png"]
