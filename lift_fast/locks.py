"""Locks on files that are released when their process ends, even if it is killed."""

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
    # Windows is treated like a file system without locks.
    fcntl = None  # type: ignore[assignment]

_LOCK_FILE = ".lift_fast-lock"
_TRIES = 100


class Claim:
    """A file that this process holds open; ``locked`` is False if the file system has no locks."""

    def __init__(self, handle: int, locked: bool) -> None:
        self.handle, self.locked = handle, locked
        _claims.add(self)

    def release(self) -> None:
        """Close the file; a second call does nothing."""
        handle, self.handle = self.handle, -1
        if handle >= 0:
            os.close(handle)


# A forked process inherits locks: a data loading worker that outlives its parent would keep them.
_claims: weakref.WeakSet[Claim] = weakref.WeakSet()


def _release_all() -> None:
    for held in list(_claims):
        held.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_all)


def claim(path: Path, *, create: bool = False) -> Claim | None:
    """Open the regular file ``path`` and lock it; None if another process holds it or it does not exist.

    Links and other kinds of files count as missing. With ``create`` a missing file is created.

    Raises:
        OSError: if the file cannot be opened.
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
    """Lock the open file; False if the file system has no locks, BlockingIOError if another process holds it."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        # Emulated locks report a held file, and missing support, with errors of their own.
        if error.errno == errno.EACCES:
            raise BlockingIOError(error.errno, os.strerror(error.errno)) from error
        return False
    return True


@contextmanager
def reserved(folder: Path, purpose: str) -> Iterator[None]:
    """Reserve ``folder`` for this process inside the context.

    The lock is released when the process ends, even if it is killed. On a file system without locks the process id in
    the file decides: the file is valid while its process runs; one of another machine is valid until it is deleted.

    Args:
        folder: must exist and be writable.
        purpose: what the process does there, for the message.

    Raises:
        ValueError: if another process has reserved the folder; gives its id.
    """
    path = folder / _LOCK_FILE
    held, owner = _reserve(path, folder)
    if owner is not None:
        hint = "" if held is None else f". Locks do not work there: if that process no longer runs, delete {path}"
        if held is not None:
            held.release()
        raise ValueError(f"another {purpose} ({owner}) writes to {folder}; end it, or give another folder{hint}")
    assert held is not None
    with suppress(OSError):
        # With locks this is only for the message; on a full disk later writes report the error.
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
    """This process's claim of the lock file, or the process that holds it; both if locks do not work."""
    for _ in range(_TRIES):
        try:
            held = claim(path, create=True)
            owner = _owner(path)
        except OSError as error:
            raise ValueError(f"cannot lock the folder {folder} with {path.name}: {error.strerror}") from error
        if held is not None:
            return held, owner if not held.locked and owner is not None and _may_run(owner) else None
        # Otherwise the other process ended between the two calls and removed its file.
        if owner is not None:
            return None, owner
    raise ValueError(f"cannot lock the folder {folder}: {path} cannot be locked; delete it")


def _owner(path: Path) -> str | None:
    """The holder's entry, ``"process 7 on host"``; None without a file."""
    try:
        # Nonblocking, in case it is a pipe.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError:
        return None
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            return None
        text = os.read(handle, 200).decode(errors="replace")
    finally:
        os.close(handle)
    return "".join(filter(str.isprintable, text)) or "unknown process"


def _may_run(owner: str) -> bool:
    number, _, host = owner.removeprefix("process ").partition(" on ")
    # Killed before it could write its id, or the id is reused: containers often repeat the same one.
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
