"""Atomic writing: the old file or the whole new one, nothing in between."""

import os
import stat

import pytest

from lift_fast._files import atomic_path


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
