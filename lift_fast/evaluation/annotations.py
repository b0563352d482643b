"""What readers of annotations share: names from lists, and values in messages, whatever a file holds."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lift_fast._text import one_line

# Of every usual file system.
_LONGEST_NAME = 255
_SHOWN, _REASON = 80, 300
_LONGEST_LIST = 1 << 26


def brief(value: Any) -> str:
    """``repr`` of a value for a message, printable and cut to 80 characters."""
    # Of a text of megabytes only the beginning is looked at; numbers have no more than some hundred digits.
    text = one_line(repr(value[: 2 * _SHOWN] if isinstance(value, (str, bytes, list)) else value))
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def shortened(reason: object) -> str:
    """Somebody else's message, printable and cut to 300 characters."""
    text = one_line(str(reason)[: 2 * _REASON])
    return text if len(text) <= _REASON else f"{text[:_REASON]}..."


def list_lines(path: Path) -> list[str]:
    """Lines of a list of names, without spaces around them and without empty ones.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is no text, or has more than 64 MiB.
    """
    size = path.stat().st_size
    if size > _LONGEST_LIST:
        raise ValueError(f"it has {size} bytes; a list of names has no more than {_LONGEST_LIST}")
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip()]


def check_names(path: Path, names: Iterable[str], expected: str, forbidden: str = "/\\") -> None:
    """Refuse names that lead elsewhere, do not print, or are no file's.

    Raises:
        ValueError: naming the list and the first such name.
    """
    for name in names:
        if not is_name(name, forbidden):
            raise ValueError(f"{path}: expected {expected} in each line, got {brief(name)}")


def is_name(name: object, forbidden: str = "/\\") -> bool:
    """Whether it is the name of a file that prints and stays in its folder."""
    if not isinstance(name, str) or name in ("", ".", "..") or any(mark in name for mark in forbidden):
        return False
    return name.isprintable() and len(name.encode(errors="surrogatepass")) <= _LONGEST_NAME
