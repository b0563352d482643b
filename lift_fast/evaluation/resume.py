"""How a run that was interrupted is resumed: what it has found lies on disk, with the settings that it was made with.

A :class:`Journal` is one file, rewritten after a part or now and then; :class:`Lines` is a file that grows by a line
for each finding. Both are found again by their path and refused where their settings are others, which are named.
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
    """All that results depend on, as JSON holds it; a date says nothing of them."""
    found: dict[str, Any] = as_json({**options, **{name: value for name, value in record.items() if name != "date"}})
    return found


def differing(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Names of the settings that are not the same. One that was not known before counts as None."""
    return [name for name in now if before.get(name) != now[name]] + [name for name in before if name not in now]


def made_otherwise(where: object, names: Iterable[str], remedy: str = REMEDY) -> str:
    """Message about what ``where`` holds, made with settings of which ``names`` differ."""
    return f"{where} was made with other settings ({', '.join(names)}); {remedy}"


def check_same(path: Path | str, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse results that were made with other options, or depend on something else but the date.

    Args:
        path: of the file, for the message.
        before: its content.
        now: the content that a new run begins with; both have ``"options"`` and ``"record"``.

    Raises:
        ValueError: naming what differs, or what ``before`` lacks of the objects that ``now`` holds.
    """
    lacking = [name for name in now if isinstance(now[name], dict) and not isinstance(before.get(name), dict)]
    if lacking:
        raise ValueError(
            f"{path} cannot be resumed: it holds no {', '.join(lacking)} in the form of such results; {REMEDY}"
        )
    names = differing(*(settings_of(content["options"], content["record"]) for content in (before, now)))
    if names:
        raise ValueError(made_otherwise(path, names))


def new_result(protocol: str, options: dict[str, Any], record: dict[str, Any] | None, **more: Any) -> dict[str, Any]:
    """What the file of a result holds before anything is known."""
    begun = {"protocol": protocol, "complete": False, "options": options, "record": record or {}, "scores": {}}
    return {**begun, **more}


def load_same(path: Path | None, head: dict[str, Any], read: Callable[[Path], dict[str, Any]] | None = None) -> Any:
    """The content of a file that an earlier run with the same settings wrote; None where there is none.

    Args:
        path: the file, or None.
        head: ``"protocol"``, ``"options"``, ``"record"`` and other objects that the file must hold.
        read: reads it; None reads a result.

    Raises:
        FileNotFoundError: if the folder of ``path`` does not exist, before any work whose result is to go there.
        ValueError: as :func:`check_same`, or if it cannot be read.
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
    """What a run has found so far, in memory and on disk.

    Args:
        path: file; None keeps everything in memory.
        content: what a new run begins with, see :func:`load_same`.
        seconds: between two times of writing; :meth:`finish` writes at once.
        read, write: the file; None takes a result as JSON.

    Attributes:
        content: what stands in the file when it is written.
        before: what the file held; None for a run that begins.

    Raises:
        FileNotFoundError, ValueError: as :func:`load_same`.
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
        """Write the file, unless that was done a moment ago."""
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

    A last line that an interruption cut off is dropped.

    Args:
        path: file; None keeps everything in memory.
        settings: as JSON holds them.
        decode: makes a finding of a line's object, which has a ``"name"``.
        encode: the other way round.

    Raises:
        ValueError: if the file was made with other settings, or holds something else; says in which line.
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
                raise ValueError(
                    f"{path}, line {number} is malformed: {error}; delete the file to start over"
                ) from error
        if not content.endswith("\n"):
            path.write_text("\n".join([head, *whole]) + "\n", "utf-8")

    def add(self, name: str, finding: T) -> None:
        """Append a line."""
        self.done[name] = finding
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.encode(finding)) + "\n")
