"""Names from the lists of data sets, checked because a file may hold anything."""

from __future__ import annotations

from pathlib import Path

from lift_fast._text import shown

# The limit of every usual file system.
_LONGEST_NAME = 255
_LONGEST_LIST = 1 << 26


def read_names(path: Path, kind: str, expected: str, forbidden: str = "/\\", first_word: bool = False) -> list[str]:
    """Names from a list, one per line, without surrounding spaces, empty lines and duplicates.

    Args:
        path: the list.
        kind: of its entries, in the singular.
        expected: content of each line, for the message.
        forbidden: characters that a name must not have.
        first_word: take only the first word of each line.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the list, if it is not text, lists nothing, has more than 64 MiB, or holds a name that leads
            elsewhere, does not print or cannot be that of a file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no list of {kind}s at {path}")
    try:
        size = path.stat().st_size
        if size > _LONGEST_LIST:
            raise ValueError(f"it has {size} bytes; a list of names has no more than {_LONGEST_LIST}")
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    stripped = (line.strip() for line in lines)
    names = list(dict.fromkeys(line.split()[0] if first_word else line for line in stripped if line))
    if not names:
        raise ValueError(f"{path} lists no {kind}")
    for name in names:
        if not is_name(name, forbidden):
            raise ValueError(f"{path}: expected {expected} in each line, got {shown(name)}")
    return names


def is_name(name: object, forbidden: str = "/\\") -> bool:
    """Whether ``name`` is a printable file name that does not leave its folder."""
    if not isinstance(name, str) or name in ("", ".", "..") or any(mark in name for mark in forbidden):
        return False
    return name.isprintable() and len(name.encode(errors="surrogatepass")) <= _LONGEST_NAME
