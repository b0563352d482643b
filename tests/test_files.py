"""Atomic writing: the old file or the whole new one, nothing in between. Folders, and the order of files."""

import errno
import os
import stat
from pathlib import Path

import pytest

from lift_fast._files import atomic_path, make_folder, natural_key
from lift_fast.images import list_images


def test_success_replaces_the_file(tmp_path):
    target = tmp_path / "result.png"
    target.write_bytes(b"old")
    with atomic_path(target) as temporary:
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".png"
        temporary.write_bytes(b"new")
        assert target.read_bytes() == b"old"
    assert target.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["result.png"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failure_keeps_the_old_file(tmp_path, error):
    target = tmp_path / "result.npz"
    target.write_bytes(b"old")

    def fail_half_way():
        with atomic_path(target) as temporary:
            temporary.write_bytes(b"half")
            raise error

    with pytest.raises(error):
        fail_half_way()
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["result.npz"]


def test_permissions_are_the_usual_ones(tmp_path):
    with atomic_path(tmp_path / "a") as temporary:
        temporary.write_bytes(b"")
    (tmp_path / "b").write_bytes(b"")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE((tmp_path / "b").stat().st_mode)


def test_missing_folder_is_named(tmp_path):
    with (
        pytest.raises(FileNotFoundError, match="no_such_folder does not exist"),
        atomic_path(tmp_path / "no_such_folder" / "a"),
    ):
        pass


def test_a_folder_is_made_with_those_above_it(tmp_path):
    assert make_folder(str(tmp_path / "a" / "b")) == tmp_path / "a" / "b"
    assert os.listdir(make_folder(tmp_path / "a" / "b")) == []


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file is a file; expected a folder"):
        make_folder(tmp_path / "file")
    with pytest.raises(ValueError, match=r"cannot write to the folder .*below: Not a directory; give another one"):
        make_folder(tmp_path / "file" / "below")

    def refuse(**_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    # Whoever runs the tests may be allowed to write anywhere.
    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(ValueError, match="Read-only file system; give another one"):
        make_folder(tmp_path)


def test_files_are_counted_as_people_count():
    # More digits than int() takes are digits too.
    long = "x" + "9" * 5000
    expected = [
        "1.jpg",
        "02.jpg",
        "2.jpg",
        "10.jpg",
        "12.jpg",
        "a9/9.png",
        "a9/10.png",
        "a10/2.png",
        "x1",
        long,
        "x.png",
    ]
    ordered = sorted(map(Path, expected[6:] + expected[:6]), key=natural_key)
    assert [path.as_posix() for path in ordered] == expected
    padded = [f"{t:05d}.jpg" for t in range(120)]
    assert sorted(padded[70:] + padded[:70], key=natural_key) == padded


def test_folders_of_pictures_are_in_that_order(tmp_path):
    for number in (1, 2, 10, 11):
        (tmp_path / f"frame{number}.png").touch()
    assert [path.name for path in list_images(tmp_path)] == [f"frame{n}.png" for n in (1, 2, 10, 11)]
