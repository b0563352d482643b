"""Locks on files that end with the process that holds them, however it ends."""

from __future__ import annotations

import errno
import os
import platform
import stat
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:
    # Windows: as on a file system without locks.
    fcntl = None  # type: ignore[assignment]

_LOCK_FILE = ".lift_fast-lock"
_TRIES = 100


class Claim:
    """A file that this process holds open, and locks if the file system can: ``locked`` says so."""

    def __init__(self, handle: int, locked: bool) -> None:
        self.handle, self.locked = handle, locked
        _claims.add(self)

    def release(self) -> None:
        """Give the file up; a second call does nothing."""
        handle, self.handle = self.handle, -1
        if handle >= 0:
            os.close(handle)


# Whoever forks hands its locks on: a reading process that outlives its parent would keep them.
_claims: weakref.WeakSet[Claim] = weakref.WeakSet()


def _release_all() -> None:
    for held in list(_claims):
        held.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_all)


def claim(path: Path, *, create: bool = False) -> Claim | None:
    """Open the regular file ``path`` and lock it; None if another process holds it, or if it is not there any more.

    Args:
        path: the file; a link or anything but a regular file counts as not there.
        create: make it if it is missing.

    Raises:
        OSError: if it cannot be opened.
    """
    flags = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | (os.O_CREAT if create else 0)
    try:
        handle = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENXIO, errno.EISDIR):
            return None
        raise
    locked = False
    try:
        locked = _lock(handle)
        opened, there = os.fstat(handle), os.lstat(path)
        if not stat.S_ISREG(opened.st_mode) or not os.path.samestat(opened, there):
            raise FileNotFoundError(path)
    except (BlockingIOError, FileNotFoundError):
        os.close(handle)
        return None
    return Claim(handle, locked)


def _lock(handle: int) -> bool:
    """Whether the open file is now locked; False where the file system cannot.

    Raises:
        BlockingIOError: if another process holds it.
    """
    if fcntl is None:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        # Emulations on other file systems say in their own way that somebody holds it, and that they cannot.
        if error.errno == errno.EACCES:
            raise BlockingIOError(error.errno, os.strerror(error.errno)) from error
        return False
    return True


@contextmanager
def reserved(folder: Path, purpose: str) -> Iterator[None]:
    """Keep ``folder`` for one process at a time, as long as the context lasts.

    The lock ends with the process, also when it is killed. On a file system without locks the process id in the file
    decides: the file counts while its process runs; that of another machine counts until somebody deletes it.

    Args:
        folder: must exist and be writable.
        purpose: what the process does there, for the message.

    Raises:
        ValueError: if another process does the same there; gives its id.
    """
    path = folder / _LOCK_FILE
    held, owner = _reserve(path, folder)
    if owner is not None:
        hint = "" if held is None else f". Locks do not work there: if no such process runs any more, delete {path}"
        if held is not None:
            held.release()
        raise ValueError(f"another {purpose} ({owner}) writes to {folder}; end it, or give another folder{hint}")
    assert held is not None
    with suppress(OSError):
        # For the message alone where locks work; a full disk is for those to report who need room.
        os.ftruncate(held.handle, 0)
        os.pwrite(held.handle, f"process {os.getpid()} on {platform.node()}".encode(), 0)
    mine = os.getpid()
    try:
        yield
    finally:
        if os.getpid() == mine:
            with suppress(OSError):
                path.unlink()
            held.release()


def _reserve(path: Path, folder: Path) -> tuple[Claim | None, str | None]:
    """This process's claim of the lock file, and who has it instead; both where locks do not work."""
    for _ in range(_TRIES):
        try:
            held = claim(path, create=True)
            owner = _owner(path)
        except OSError as error:
            raise ValueError(f"cannot lock the folder {folder} with {path.name}: {error.strerror}") from error
        if held is not None:
            return held, owner if not held.locked and owner is not None and _may_run(owner) else None
        # Otherwise the other process has ended between the two questions, and taken its file along.
        if owner is not None:
            return None, owner
    raise ValueError(f"cannot lock the folder {folder}: {path} is no file that can be locked; delete it")


def _owner(path: Path) -> str | None:
    """What the holder wrote of itself, ``"process 7 on host"``; None if it is gone."""
    try:
        # A pipe of that name would wait for somebody who writes.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError:
        return None
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            return None
        text = os.read(handle, 200).decode(errors="replace")
    finally:
        os.close(handle)
    return "".join(filter(str.isprintable, text)) or "its process is not known"


def _may_run(owner: str) -> bool:
    number, _, host = owner.removeprefix("process ").partition(" on ")
    # Its process was killed before it could write; or the number is given out again, in containers always the same.
    if not number.isdecimal() or int(number) == os.getpid():
        return False
    if host != platform.node():
        return True
    try:
        os.kill(int(number), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
