"""What readers of annotations share: names from lists, whatever a file holds."""

from __future__ import annotations

from pathlib import Path

from lift_fast._text import shown

# Of every usual file system.
_LONGEST_NAME = 255
_LONGEST_LIST = 1 << 26


def read_names(path: Path, kind: str, expected: str, forbidden: str = "/\\", first_word: bool = False) -> list[str]:
    """Names from a list, one a line, without spaces around them, empty lines and doubles.

    Args:
        path: the list.
        kind: what it lists, in the singular.
        expected: what each line should hold, for the message.
        forbidden: characters that no name has.
        first_word: of each line alone.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no text, lists nothing, has more than 64 MiB, or holds a name that leads elsewhere, does
            not print or is no file's; names the list.
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
    """Whether it is the name of a file that prints and stays in its folder."""
    if not isinstance(name, str) or name in ("", ".", "..") or any(mark in name for mark in forbidden):
        return False
    return name.isprintable() and len(name.encode(errors="surrogatepass")) <= _LONGEST_NAME
