"""Atomic writing: the old file or the whole new one, nothing in between. Folders, no files, the order of files."""

import errno
import os
import socket
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from lift_fast import locks
from lift_fast._files import atomic_path, make_folder, natural_key, require_regular_file
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


WRITER = """
    import sys, time
    from lift_fast._files import atomic_path
    with atomic_path(sys.argv[1]) as temporary:
        temporary.write_bytes(b"half")
        print(temporary.name, flush=True)
        time.sleep(600)
"""


def test_temporary_files_of_killed_writers_are_collected_and_no_others(tmp_path):
    # Names that only look like ours, and one that does but is no file.
    users = [".result.tmp.png", ".x.0123abcd.lift_fast-tmpx", "x.0123abcd.lift_fast-tmp.png", ".a.lift_fast-tmp.png"]
    for name in users:
        (tmp_path / name).write_bytes(b"a user's")
    os.mkfifo(tmp_path / ".fifo.0123abcd.lift_fast-tmp")
    (tmp_path / ".link.0123abcd.lift_fast-tmp").symlink_to(tmp_path / users[0])
    (tmp_path / ".folder.0123abcd.lift_fast-tmp").mkdir()
    kept = sorted(os.listdir(tmp_path))
    writer = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WRITER), str(tmp_path / "result.png")], stdout=subprocess.PIPE, text=True
    )
    try:
        name = writer.stdout.readline().strip()
        assert name.startswith(".result.")
        assert name.endswith(".png")
        # What it writes beside.
        (tmp_path / f"{name}.data").touch()
        with atomic_path(tmp_path / "mine.npz") as mine:
            mine.write_bytes(b"half")
            make_folder(tmp_path)
            # While their writers live they stay.
            assert sorted(os.listdir(tmp_path)) == sorted([*kept, name, f"{name}.data", mine.name])
    finally:
        writer.kill()
        writer.wait()
        writer.stdout.close()
    (tmp_path / "mine.npz").unlink()
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, name, f"{name}.data"])
    make_folder(tmp_path)
    assert sorted(os.listdir(tmp_path)) == kept


def test_a_child_does_not_keep_the_file_of_its_parent(tmp_path):
    with atomic_path(tmp_path / "a"):
        held = list(locks._claims)
        child = os.fork()
        if child == 0:
            # Without Python's own way out, which would end the test session here too.
            os._exit(0 if all(claim.handle < 0 for claim in held) else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert any(claim.handle >= 0 for claim in held)


def test_where_files_cannot_be_locked_nothing_is_collected(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    (tmp_path / ".a.0123abcd.lift_fast-tmp.png").write_bytes(b"perhaps a slow writer's")
    with monkeypatch.context() as patch:
        patch.setattr("fcntl.flock", unsupported)
        make_folder(tmp_path)
        with atomic_path(tmp_path / "b") as temporary:
            temporary.write_bytes(b"b")
        assert sorted(os.listdir(tmp_path)) == [".a.0123abcd.lift_fast-tmp.png", "b"]
    make_folder(tmp_path)
    assert os.listdir(tmp_path) == ["b"]


def test_long_names_have_room_for_the_temporary_ones(tmp_path):
    name = "x" * 250 + ".png"
    with atomic_path(tmp_path / name) as temporary:
        temporary.write_bytes(b"")
    assert os.listdir(tmp_path) == [name]


def test_only_regular_files_are_regular(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for name in ("file", "link"):
        require_regular_file(str(tmp_path / name), "image")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        for path, error, words in (
            (tmp_path, ValueError, "is a folder; expected an image"),
            (tmp_path / "pipe", ValueError, "is a named pipe; expected an image"),
            ("/dev/null", ValueError, "/dev/null is a device; expected an image"),
            (tmp_path / "socket", ValueError, "is a socket; expected an image"),
            (tmp_path / "dangling", FileNotFoundError, "no image at .*dangling"),
            (tmp_path / "file" / "below", FileNotFoundError, "no image at"),
            (tmp_path / "circle", ValueError, "no image at .*circle: Too many levels"),
            (tmp_path / ("x" * 300), ValueError, "File name too long"),
            ("a\0b", ValueError, "null"),
        ):
            with pytest.raises(error, match=words):
                require_regular_file(path, "image")


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


def test_folders_of_images_are_in_that_order(tmp_path):
    for number in (1, 2, 10, 11):
        (tmp_path / f"frame{number}.png").touch()
    assert [path.name for path in list_images(tmp_path)] == [f"frame{n}.png" for n in (1, 2, 10, 11)]
