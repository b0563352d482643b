"""Names and messages as a terminal, a table or a picture may show them: whatever a file is called, on one line."""

from __future__ import annotations


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
