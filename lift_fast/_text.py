"""Names, values and messages in printable form, on one line of bounded length."""

from __future__ import annotations

import sys
from collections.abc import Iterable

_VALUE, _NAME, _NAMES, _MESSAGE = 100, 120, 5, 300


def quoted(name: object) -> str:
    """A name for a message; quoted and escaped if it contains unprintable characters.

    These are line breaks, terminal escapes, marks that reverse the writing direction, and bytes outside UTF-8 (which
    Python keeps as surrogates).
    """
    text = str(name)
    return text if text.isprintable() else repr(text)


def one_line(message: object) -> str:
    """A message with unprintable characters and line breaks escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(message))


def shown(value: object) -> str:
    """``value`` for a message: its ``repr`` up to 100 characters, or shape and dtype of a tensor."""
    # The command line and the start of an import get here before PyTorch has loaded.
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return f"a tensor {list(value.shape)} of {value.dtype}"
    # Cut long texts before repr; numbers have no more than some thousand digits.
    text = repr(value[: 2 * _VALUE] if isinstance(value, (str, bytes, list)) else value)
    return _cut(text if text.isprintable() else _joined(text), _VALUE)


def said(error: object) -> str:
    """The message of an error, up to 300 characters; its type if it has none, as some of Pillow's."""
    return _cut(_joined(str(error)), _MESSAGE) or type(error).__name__


def named(name: object) -> str:
    """The name of a file's entry, always in quotes, up to 120 characters."""
    return repr(name) if isinstance(name, str) and len(name) <= _NAME else f"'{_short(name)}'"


def listed(names: Iterable[object]) -> str:
    """The first five names of a file's entries, and how many more there are."""
    found = list(names)
    more = f", ... {len(found) - _NAMES} more" if len(found) > _NAMES else ""
    return ", ".join(map(_short, found[:_NAMES])) + more


def with_article(noun: str) -> str:
    """``noun`` after "a" or "an"."""
    return f"an {noun}" if noun[0] in "aeiouAEIOU" else f"a {noun}"


def _short(name: object) -> str:
    # Other keys of a file may have an unsafe repr.
    if not isinstance(name, str):
        return f"({type(name).__name__})"
    return quoted(name if len(name) <= _NAME else f"{name[:_NAME]}... ({len(name)} characters)")


def _joined(text: str) -> str:
    return one_line(" ".join(text.split()))


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}..."
