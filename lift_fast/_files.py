"""Files are written atomically: a reader sees the old file or the whole new one, never a part. Folders for them, and
the order of files that are a sequence."""

from __future__ import annotations

import os
import re
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ._text import quoted
from .locks import Claim, claim

_unfinished: set[str] = set()
_MARK = ".lift_fast-tmp"
_LEFTOVER = re.compile(r"\..*\.[a-z0-9_]{8}" + re.escape(_MARK) + r"(\.[^.]*)?", re.DOTALL)
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def require_regular_file(path: str | os.PathLike[str], what: str) -> None:
    """Refuse what is no regular file, without opening it: opening a pipe may wait for ever, a device never ends.

    Args:
        path: the file, or a link to it.
        what: it should be, for the message, such as "image".

    Raises:
        FileNotFoundError: if there is nothing.
        ValueError: if it is a folder, pipe, socket or device, or the name cannot be that of a file; names it and its
            kind.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"no {what} at {quoted(path)}") from None
    except PermissionError as error:
        raise ValueError(f"{quoted(path)} cannot be looked at: {error.strerror}") from error
    except (OSError, ValueError) as error:
        # Too long, a loop of links, a zero byte, bytes that the file system does not take.
        raise ValueError(f"{quoted(path)} names no {what}: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(mode):
        raise ValueError(f"{quoted(path)} is {_kind(mode)}; expected a {what}")


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it replaces ``path``, on any error it is removed.

    The temporary file keeps the suffix of ``path``, since image and array writers choose their format by it. What a
    killed process leaves is collected by :func:`make_folder`.

    Raises:
        FileNotFoundError: if the folder of ``path`` does not exist.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {quoted(target)}: the folder {quoted(target.parent)} does not exist")
    temporary, held = _temporary(target)
    _unfinished.add(str(temporary))
    try:
        yield temporary
        # mkstemp creates files readable by their owner alone; give the result the usual permissions.
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


def remove_unfinished() -> None:
    """Remove the temporary files of every :func:`atomic_path` that has not ended, for a process that ends now."""
    for name in list(_unfinished):
        with suppress(OSError):
            os.unlink(name)


def natural_key(path: str | os.PathLike[str]) -> tuple[tuple[tuple[str, int, str], ...], ...]:
    """Key by which files come in the order that people count them in: 2.jpg before 10.jpg, folder by folder.

    Runs of digits compare as numbers, everything else as text; names that are equal so are in the order of their text.
    """
    return tuple(_natural(part) for part in Path(path).parts)


def _natural(name: str) -> tuple[tuple[str, int, str], ...]:
    texts = re.split(r"([0-9]+)", name)
    numbers = [text.lstrip("0") for text in texts[1::2]]
    # Digits by their count and then as text: int() refuses thousands of them.
    pairs = [("", len(number), number) for number in numbers]
    key = [(texts[0], 0, "")]
    for pair, text in zip(pairs, texts[2::2], strict=True):
        key += [pair, (text, 0, "")]
    return (*key, (name, 0, ""))


def make_folder(path: str | os.PathLike[str]) -> Path:
    """The folder ``path``, made if missing, with the folders above it; files can be written there.

    To be called before long work whose results go there. Temporary files that killed processes have left there are
    removed.

    Raises:
        ValueError: if it cannot be made, or nothing can be written to it; says why.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Permissions alone do not tell: file systems are mounted read-only, or have no room for one more file.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except FileExistsError as error:
        raise ValueError(f"{quoted(folder)} is a file; expected a folder for the results, give another one") from error
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot write to the folder {quoted(folder)}: {said}; give another one") from error
    _collect_leftovers(folder)
    return folder


def require_writable(path: str | os.PathLike[str]) -> None:
    """Refuse a file that could not be written in the end, before long work whose result goes there.

    Raises:
        ValueError: if its folder is missing, full or cannot be written to, or if a folder, pipe or device lies in its
            place; says what to do.
    """
    target = Path(path)
    folder = target.parent
    try:
        if not os.path.isdir(folder):
            raise ValueError(f"the folder {quoted(folder)} does not exist; make it first")
        if os.path.exists(target):
            mode = os.stat(target).st_mode
            if not stat.S_ISREG(mode):
                raise ValueError(f"that is {_kind(mode)}; give a file")
        # A full disk may still have room for a file that holds nothing.
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
            file.flush()
    except OSError as error:
        raise ValueError(f"cannot write there: {error.strerror or error}; give another place") from error


def _kind(mode: int) -> str:
    return next((name for test, name in _KINDS if test(mode)), "no regular file")


def _temporary(target: Path) -> tuple[Path, Claim]:
    while True:
        # Of a long name a part, so that there is room for the rest.
        prefix, suffix = f".{target.stem[:40]}.", f"{_MARK}{target.suffix}"
        handle, name = tempfile.mkstemp(prefix=prefix, suffix=suffix, dir=target.parent)
        os.close(handle)
        try:
            held = claim(Path(name))
        except BaseException:
            os.unlink(name)
            raise
        # Another process may have taken it for a leftover in between.
        if held is not None:
            return Path(name), held


def _collect_leftovers(folder: Path) -> None:
    """Remove temporary files of :func:`atomic_path` whose writers are gone: nobody holds their lock."""
    with suppress(OSError), os.scandir(folder) as entries:
        for name in [entry.name for entry in entries if _LEFTOVER.fullmatch(entry.name)]:
            # Another user's cannot be opened, and stays.
            with suppress(OSError):
                held = claim(folder / name)
                if held is None:
                    continue
                try:
                    # Where files cannot be locked nobody can tell a dead writer from a slow one.
                    if held.locked:
                        (folder / name).unlink()
                finally:
                    held.release()
