"""Names, values and messages as a terminal, a table or an image may show them: on one line, however long they are."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

_VALUE, _NAME, _NAMES, _MESSAGE = 100, 120, 5, 300


def quoted(name: object) -> str:
    """A name for a message: as it is, or in quotes and escaped where it holds what would not print.

    Line breaks, terminal escapes, marks that reverse the writing direction, bytes that are no UTF-8 (which Python keeps
    as surrogates).
    """
    text = str(name)
    return text if text.isprintable() else repr(text)


def one_line(message: object) -> str:
    """A message with everything in it that would not print escaped, line breaks too."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(message))


def shown(value: object) -> str:
    """``value`` as messages print it: its ``repr`` up to 100 characters, of a tensor the shape and dtype."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {value.dtype}"
    # Of a text of megabytes only the beginning is looked at; numbers have no more than some thousand digits.
    text = repr(value[: 2 * _VALUE] if isinstance(value, (str, bytes, list)) else value)
    return _cut(text if text.isprintable() else _joined(text), _VALUE)


def said(error: object) -> str:
    """What an error says, up to 300 characters; its type where it says nothing, as some of Pillow's."""
    return _cut(_joined(str(error)), _MESSAGE) or type(error).__name__


def named(name: object) -> str:
    """The name of an entry of a file, always in quotes, up to 120 characters."""
    return repr(name) if isinstance(name, str) and len(name) <= _NAME else f"'{_short(name)}'"


def listed(names: Iterable[object]) -> str:
    """The first five names of entries of a file, and how many more there are."""
    found = list(names)
    more = f", ... {len(found) - _NAMES} more" if len(found) > _NAMES else ""
    return ", ".join(map(_short, found[:_NAMES])) + more


def _short(name: object) -> str:
    # Of other keys of a file not even the repr is to be trusted.
    if not isinstance(name, str):
        return f"({type(name).__name__})"
    return quoted(name if len(name) <= _NAME else f"{name[:_NAME]}... ({len(name)} characters)")


def _joined(text: str) -> str:
    return one_line(" ".join(text.split()))


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}..."
