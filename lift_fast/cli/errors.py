"""Errors of the input: reported on one line, without a traceback."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lift_fast._files import require_writable
from lift_fast._text import quoted


class UsageError(Exception):
    """Invalid input; the message gives the value, the expected one and what to do."""


@contextmanager
def as_usage_error() -> Iterator[None]:
    """Turn the package's errors for invalid input into :class:`UsageError`; bugs keep their traceback."""
    from lift_fast.backbones import WeightsNotFoundError

    try:
        yield
    except (ValueError, FileNotFoundError, PermissionError, IsADirectoryError, WeightsNotFoundError) as error:
        raise UsageError(str(error)) from error


@contextmanager
def writing(path: Path, note: str = "") -> Iterator[None]:
    """Turn an OSError while writing ``path`` into :class:`UsageError`; ``note`` ends the message."""
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"cannot write {quoted(path)}: {error.strerror or error}; fix the problem and run the same command again"
            + (f", {note}" if note else "")
        ) from error


def check_output(option: str, path: Path, inputs: Iterable[str | Path | None] = ()) -> None:
    """Check before the work that an output file can be written and is not one of ``inputs``."""
    refuse_input(option, path, inputs)
    try:
        require_writable(path)
    except ValueError as error:
        raise UsageError(f"--{option} {quoted(path)}: {error}") from error


def refuse_input(option: str, path: Path, inputs: Iterable[str | Path | None]) -> None:
    """Check that an output does not replace an input, under any name."""
    for given in inputs:
        if given is None:
            continue
        try:
            same = os.path.samefile(path, given)
        except (OSError, ValueError):
            # One of them does not exist.
            continue
        if same:
            raise UsageError(f"--{option}: {quoted(path)} is an input, which would be overwritten; give another name")
