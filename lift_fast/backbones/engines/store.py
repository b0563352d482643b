"""Compiled backbones on disk: bounded in bytes, checked before they are read, and never in the way of computing."""

from __future__ import annotations

import hashlib
import os
import time
from contextlib import suppress
from pathlib import Path

from ... import _env
from ..._files import atomic_path, make_folder
from ...locks import claim

_MARK = b"lift_fast engine 1\n"
_DIGEST = hashlib.sha256().digest_size
_SUFFIX = ".engine"


def folder() -> Path | None:
    """Where they are kept; None if the cache is off or there is no home folder."""
    try:
        return _env.cache_folder() / "engines" if _env.engine_cache_bytes() else None
    except RuntimeError:
        return None


def read(key: str) -> bytes | None:
    """What :func:`write` put there, or None. A damaged file is removed."""
    path = _path(key)
    if path is None:
        return None
    try:
        # A link or a pipe of that name is none of ours.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        with open(handle, "rb") as file:
            if os.fstat(handle).st_size > _env.engine_cache_bytes():
                return None
            head, content = file.read(len(_MARK) + _DIGEST), file.read()
        # The time of the last use decides what is removed first.
        os.utime(path)
    except OSError:
        return None
    if head != _MARK + hashlib.sha256(content).digest():
        discard(key)
        return None
    return content


def write(key: str, content: bytes) -> None:
    """Keep ``content``, and remove the longest unused beyond the bound. Does nothing where that fails."""
    path = _path(key)
    if path is None or len(_MARK) + _DIGEST + len(content) > _env.engine_cache_bytes():
        return
    # ValueError: the folder cannot be made or written to.
    with suppress(OSError, ValueError):
        make_folder(path.parent)
        with atomic_path(path) as temporary:
            temporary.write_bytes(_MARK + hashlib.sha256(content).digest() + content)
        _shrink(path.parent)


def discard(key: str) -> None:
    """Remove an entry that turned out to be of no use."""
    path = _path(key)
    if path is not None:
        with suppress(OSError):
            path.unlink()


def _path(key: str) -> Path | None:
    place = folder()
    return None if place is None else place / f"{key}{_SUFFIX}"


def _shrink(place: Path) -> None:
    # Two processes at once would remove more than they must.
    for _ in range(20):
        held = claim(place / ".lock", create=True)
        if held is not None:
            break
        time.sleep(0.05)
    else:
        return
    try:
        with os.scandir(place) as entries:
            found = [(entry.stat(follow_symlinks=False), entry.path) for entry in entries if _is_ours(entry)]
        found.sort(key=lambda item: item[0].st_mtime_ns, reverse=True)
        total = 0
        for status, path in found:
            total += status.st_size
            if total > _env.engine_cache_bytes():
                with suppress(OSError):
                    os.unlink(path)
    finally:
        held.release()


def _is_ours(entry: os.DirEntry[str]) -> bool:
    return entry.name.endswith(_SUFFIX) and entry.is_file(follow_symlinks=False)
