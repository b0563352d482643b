"""Errors that are the input's fault: shown as one line, without a traceback."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lift_fast._files import require_writable
from lift_fast._text import quoted


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


@contextmanager
def writing(path: Path, note: str = "") -> Iterator[None]:
    """What is inside writes ``path``: no room or no permission is the input's fault; ``note`` ends the message."""
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"cannot write {quoted(path)}: {error.strerror or error}; put that right and run the same command again"
            + (f", {note}" if note else "")
        ) from error


def check_output(option: str, path: Path, inputs: Iterable[str | Path | None] = ()) -> None:
    """Refuse a file that could not be written, or is one of ``inputs``, before the work whose result it is to hold."""
    refuse_input(option, path, inputs)
    try:
        require_writable(path)
    except ValueError as error:
        raise UsageError(f"--{option} {quoted(path)}: {error}") from error


def refuse_input(option: str, path: Path, inputs: Iterable[str | Path | None]) -> None:
    """Refuse an output that would take the place of a file that is read, by whatever name."""
    for given in inputs:
        if given is None:
            continue
        try:
            same = os.path.samefile(path, given)
        except (OSError, ValueError):
            # One of them is not there.
            continue
        if same:
            raise UsageError(f"--{option}: {quoted(path)} is an input, which would be overwritten; give another name")
