"""Files are written atomically: a reader sees the old file or the whole new one, never a part. Folders for them, and
the order of files that are a sequence."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it replaces ``path``, on any error it is removed.

    The temporary file keeps the suffix of ``path``, since image and array writers choose their format by it.

    Raises:
        FileNotFoundError: if the folder of ``path`` does not exist.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {target}: the folder {target.parent} does not exist")
    handle, name = tempfile.mkstemp(prefix=f".{target.stem}.", suffix=f".tmp{target.suffix}", dir=target.parent)
    os.close(handle)
    temporary = Path(name)
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

    To be called before long work whose results go there.

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
        raise ValueError(f"{folder} is a file; expected a folder for the results, give another one") from error
    except OSError as error:
        raise ValueError(f"cannot write to the folder {folder}: {error.strerror}; give another one") from error
    return folder
