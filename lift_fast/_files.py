"""Atomic writing of files (a reader sees the old file or the whole new one), output folders, and natural order."""

from __future__ import annotations

import os
import re
import stat
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ._text import quoted, with_article
from .locks import Claim, claim

_unfinished: set[str] = set()
# Held while a temporary file is created and noted. Reentrant, because a signal's handler may run within.
_creating = threading.RLock()
_MARK = ".lift_fast-tmp"
_LEFTOVER = re.compile(r"\..*\.[a-z0-9_]{8}" + re.escape(_MARK) + r"(\.[^.]*(\.data)?)?", re.DOTALL)
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def require_regular_file(path: str | os.PathLike[str], what: str) -> None:
    """Refuse anything but a regular file without opening it: opening a pipe may block, and a device has no end.

    Args:
        path: the file, or a link to it.
        what: the expected content for the message, such as "image".

    Raises:
        FileNotFoundError: if ``path`` does not exist.
        ValueError: naming the path, if it is a folder, pipe, socket or device, or not a valid file name.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        # pathlib makes one slash of two.
        remote = re.match(r"https?:/", str(path), re.IGNORECASE)
        advice = "; nothing is downloaded: fetch it first, or in Python pass its bytes" if remote else ""
        raise FileNotFoundError(f"no {what} at {quoted(path)}{advice}") from None
    except PermissionError as error:
        raise ValueError(f"{quoted(path)} cannot be accessed: {error.strerror}") from error
    except (OSError, ValueError) as error:
        # Too long, a loop of links, a zero byte, or bytes that the file system rejects.
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"no {what} at {quoted(path)}: {reason}") from error
    if not stat.S_ISREG(mode):
        raise ValueError(f"{quoted(path)} is {_kind(mode)}; expected {with_article(what)}")


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path next to ``path``; on success it replaces ``path``, on any error it is removed.

    The temporary file keeps the suffix of ``path``, because image and array writers choose their format by it.
    :func:`make_folder` and :func:`collect_leftovers` remove the temporary files of killed processes, and what these
    wrote next to them under the same name and ``.data``.

    Raises:
        FileNotFoundError: if the folder of ``path`` does not exist.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {quoted(target)}: the folder {quoted(target.parent)} does not exist")
    with _creating:
        temporary, held = _temporary(target)
        _unfinished.add(str(temporary))
    try:
        yield temporary
        # mkstemp creates files that only their owner can read; give the result the usual permissions.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, target)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise
    finally:
        held.release()
        _unfinished.discard(str(temporary))


def begin_no_more(seconds: float = 0.5) -> None:
    """Before the process exits: other threads that enter :func:`atomic_path` wait for that from now on.

    ``seconds``: to wait for one that creates a file, on a slow file system.
    """
    _creating.acquire(timeout=seconds)


def remove_unfinished() -> None:
    """Remove the temporary files of every active :func:`atomic_path`, before the process exits."""
    for name in list(_unfinished):
        with suppress(OSError):
            os.unlink(name)


def natural_key(path: str | os.PathLike[str]) -> tuple[tuple[tuple[str, int, str], ...], ...]:
    """Sort key for natural order: 2.jpg before 10.jpg, folder by folder.

    Runs of digits compare as numbers, everything else as text. Text order decides between names that compare equal.
    """
    return tuple(_natural(part) for part in Path(path).parts)


def _natural(name: str) -> tuple[tuple[str, int, str], ...]:
    texts = re.split(r"([0-9]+)", name)
    numbers = [text.lstrip("0") for text in texts[1::2]]
    # Compare digits by count, then as text: int() rejects thousands of digits.
    pairs = [("", len(number), number) for number in numbers]
    key = [(texts[0], 0, "")]
    for pair, text in zip(pairs, texts[2::2], strict=True):
        key += [pair, (text, 0, "")]
    return (*key, (name, 0, ""))


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Create the folder ``path`` and its parents if missing, and check that files can be written there.

    Call it before long work that writes there. It removes temporary files of killed processes.

    Raises:
        ValueError: with the reason, if the folder cannot be created or written to.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Permissions are not enough: a file system may be read-only or full.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except FileExistsError as error:
        raise ValueError(f"{quoted(folder)} is a file; expected a folder for the results, give another one") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot write to the folder {quoted(folder)}: {reason}; give another one") from error
    collect_leftovers(folder)
    return folder


def require_writable(path: str | os.PathLike[str]) -> None:
    """Check that a file can be written, before long work whose result it holds.

    Raises:
        ValueError: if its folder is missing, full or not writable, or if it is a folder, pipe or device, or no name of
            a file.
    """
    target = Path(path)
    folder = target.parent
    if "\0" in str(target):
        raise ValueError("a file name holds no zero byte; give another one")
    try:
        if not os.path.isdir(folder):
            raise ValueError(f"the folder {quoted(folder)} does not exist; create it first")
        if os.path.exists(target):
            mode = os.stat(target).st_mode
            if not stat.S_ISREG(mode):
                raise ValueError(f"that is {_kind(mode)}; give a file")
        # A full disk may still have room for an empty file.
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
            file.flush()
    except OSError as error:
        raise ValueError(f"cannot write there: {error.strerror or error}; give another place") from error


def _kind(mode: int) -> str:
    return next((name for test, name in _KINDS if test(mode)), "not a regular file")


def _temporary(target: Path) -> tuple[Path, Claim]:
    while True:
        # Shorten a long name, so that the rest fits.
        prefix, suffix = f".{target.stem[:40]}.", f"{_MARK}{target.suffix}"
        handle, name = tempfile.mkstemp(prefix=prefix, suffix=suffix, dir=target.parent)
        os.close(handle)
        try:
            held = claim(Path(name))
        except BaseException:
            os.unlink(name)
            raise
        # Meanwhile another process may have removed it as a leftover.
        if held is not None:
            return Path(name), held


def collect_leftovers(folder: Path) -> None:
    """Remove temporary files of :func:`atomic_path` whose writers have ended: no process holds their lock."""
    with suppress(OSError), os.scandir(folder) as entries:
        for name in sorted(entry.name for entry in entries if _LEFTOVER.fullmatch(entry.name)):
            # Files of other users cannot be opened and stay.
            with suppress(OSError):
                if name.endswith(".data") and os.path.lexists(folder / name.removesuffix(".data")):
                    # Its writer holds the other file, which would have been removed just now.
                    continue
                held = claim(folder / name)
                if held is None:
                    continue
                try:
                    # Without locks a dead writer cannot be distinguished from a slow one.
                    if held.locked:
                        (folder / name).unlink()
                finally:
                    held.release()
