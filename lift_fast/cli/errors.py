"""Errors that are the input's fault: shown as one line, without a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UsageError(Exception):
    """What came cannot be used; the message says what was expected and what to do."""


@contextmanager
def as_usage_error() -> Iterator[None]:
    """Turn the errors by which the package refuses input into :class:`UsageError`; bugs keep their traceback."""
    from lift_fast.backbones import WeightsNotFoundError

    try:
        yield
    except (ValueError, FileNotFoundError, PermissionError, IsADirectoryError, WeightsNotFoundError) as error:
        raise UsageError(str(error)) from error
