"""Resuming an interrupted run: its findings lie on disk with the settings that they were made with.

A :class:`Journal` is one file, rewritten after a part or every few seconds; :class:`Lines` is a file that grows by a
line for each finding. Both find their file again by its path, and refuse one of other settings, which they name.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Generic, TypeVar

from .results import as_json, load_json, save_json

REMEDY = "give another file, or delete it to start over"
T = TypeVar("T")


def settings_of(options: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """Everything that results depend on, as JSON holds it. They do not depend on the date."""
    return as_json({**options, **{name: value for name, value in record.items() if name != "date"}})


def differing(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Names of the settings that differ. One that is missing in ``before`` counts as None."""
    return [name for name in now if before.get(name) != now[name]] + [name for name in before if name not in now]


def made_otherwise(where: object, names: Iterable[str], remedy: str = REMEDY) -> str:
    """Message that ``where`` was made with settings of which ``names`` differ."""
    return f"{where} was made with other settings ({', '.join(names)}); {remedy}"


def check_same(path: Path | str, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse the content of ``path`` if its ``"options"`` or ``"record"`` (but for the date) differ from a new run's.

    Raises:
        ValueError: naming what differs, or which of the objects of ``now`` are missing in ``before``.
    """
    lacking = [name for name in now if isinstance(now[name], dict) and not isinstance(before.get(name), dict)]
    if lacking:
        raise ValueError(f"{path} cannot be resumed: it holds no valid {', '.join(lacking)}; {REMEDY}")
    names = differing(*(settings_of(content["options"], content["record"]) for content in (before, now)))
    if names:
        raise ValueError(made_otherwise(path, names))


def new_result(protocol: str, options: dict[str, Any], record: dict[str, Any] | None, **more: Any) -> dict[str, Any]:
    """The content of a result's file at the start of a run."""
    begun = {"protocol": protocol, "complete": False, "options": options, "record": record or {}, "scores": {}}
    return {**begun, **more}


def load_same(path: Path | None, head: dict[str, Any], read: Callable[[Path], dict[str, Any]] | None = None) -> Any:
    """The content of a file that an earlier run wrote with the same settings; None without such a file.

    ``head`` holds ``"protocol"``, ``"options"``, ``"record"`` and other objects that the file must hold. Without
    ``read`` the file is a result.

    Raises:
        FileNotFoundError: if the folder of ``path`` does not exist: before any work, not when its result is written.
        ValueError: as :func:`check_same`, or if the file cannot be read.
    """
    if path is None:
        return None
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: the folder {path.parent} does not exist")
    if not path.exists():
        return None
    before = load_json(path, head["protocol"]) if read is None else read(path)
    check_same(path, before, head)
    return before


class Journal:
    """The findings of a run so far, in memory and, unless ``path`` is None, on disk; raises as :func:`load_same`.

    Args:
        content: of a new run; what is written to the file.
        seconds: between two writes; :meth:`finish` writes at once.
        read, write: for the file; by default a result as JSON.

    Attributes:
        before: what the file held; None for a new run.
    """

    def __init__(
        self,
        path: Path | None,
        content: dict[str, Any],
        seconds: float = 20.0,
        read: Callable[[Path], dict[str, Any]] | None = None,
        write: Callable[[Path, dict[str, Any]], None] = save_json,
    ) -> None:
        self.path, self.content, self.seconds, self.write = path, content, seconds, write
        self.saved = time.monotonic()
        self.before: dict[str, Any] | None = load_same(path, content, read)

    def save(self) -> None:
        """Write the file, unless that was done less than ``seconds`` ago."""
        if self.path is not None and time.monotonic() - self.saved >= self.seconds:
            self.write(self.path, self.content)
            self.saved = time.monotonic()

    def finish(self, **more: Any) -> dict[str, Any]:
        """The content with ``more``, written."""
        self.content.update(more)
        if self.path is not None:
            self.write(self.path, self.content)
        return self.content

    def part(self, *keys: object) -> dict[str, Any]:
        """The object below ``content["scores"]`` at ``keys``, made if missing."""
        found: dict[str, Any] = self.content["scores"]
        for key in keys:
            found = found.setdefault(str(key), {})
        return found


class Lines(Generic[T]):
    """Findings by name, in a file that grows by a line for each; the first line holds the settings.

    A last line that an interruption cut off is dropped. Without a ``path`` everything stays in memory.

    Args:
        settings: as JSON holds them.
        decode, encode: between a finding and its line's object, which has a ``"name"``.

    Raises:
        ValueError: if the file was made with other settings, or a line is malformed; names the line.
    """

    def __init__(
        self,
        path: Path | None,
        settings: dict[str, Any],
        decode: Callable[[dict[str, Any]], T],
        encode: Callable[[T], dict[str, Any]],
    ) -> None:
        self.path, self.encode = path, encode
        self.done: dict[str, T] = {}
        if path is None:
            return
        if not path.exists():
            path.write_text(json.dumps({"settings": settings}, sort_keys=True) + "\n", "utf-8")
            return
        content = path.read_text("utf-8")
        head, *lines = content.splitlines() or [""]
        try:
            names = differing(json.loads(head)["settings"], settings)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} holds no settings in its first line; {REMEDY}") from error
        if names:
            raise ValueError(made_otherwise(path, names))
        whole = lines if content.endswith("\n") else lines[:-1]
        for number, line in enumerate(whole, 2):
            try:
                entry = json.loads(line)
                self.done[entry["name"]] = decode(entry)
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{path}, line {number} is malformed: {error}; delete it to start over") from error
        if not content.endswith("\n"):
            path.write_text("\n".join([head, *whole]) + "\n", "utf-8")

    def add(self, name: str, finding: T) -> None:
        """Append a line."""
        self.done[name] = finding
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.encode(finding)) + "\n")
