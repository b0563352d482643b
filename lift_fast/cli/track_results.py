"""The folder of a tracking run: its results, its record, and the state from which an interrupted run resumes."""

from __future__ import annotations

import io
import json
import re
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lift_fast._files import atomic_path, make_folder
from lift_fast._text import listed, quoted
from lift_fast.evaluation.resume import differing, made_otherwise
from lift_fast.tensor_files import plain_tensor, read_tensor_file
from lift_fast.tracking import PointTracks, TrackedFrame, Tracker, draw_overlay, write_mask
from lift_fast.tracking.masks import usual_palette
from lift_fast.tracking.point_files import COLUMNS, lines_of

from .errors import writing

RECORD, STATE, POINTS = "track.json", "track_state.pth", "points.csv"
_COMMAND = "lift-fast track"
_WAY_OUT = "give another --out, or --overwrite"
_NOTE = "the frames written so far are kept"
# Between two states; a resumed run repeats at most this much.
_SECONDS = 10.0
# Frames along which the overlays draw the ways of points.
_TRAIL = 24
_QUALITY = 92


class Results:
    """Writes the results of one run, each file as a whole or not at all.

    Attributes:
        complete: an earlier run with the same settings has finished.
        next: number of the next frame.
    """

    def __init__(
        self, out: Path, settings: dict[str, Any], overlay: str, identifiers: list[str], frames: list[str] | None
    ) -> None:
        self.out, self.settings, self.overlay, self.identifiers = out, settings, overlay, identifiers
        # Their names; None if they are numbered.
        self.frames = frames
        self._before: dict[str, Any] | None = None
        self.palette = usual_palette()
        self.complete, self.next, self.written = False, 0, 0
        self._counts: dict[str, Any] = {"frames": 0, "failed": [], "objects": {}, "points": {}, "names": []}
        self._trail: deque[PointTracks] = deque(maxlen=_TRAIL)
        self._saved = time.monotonic()
        self._state: dict[str, Any] | None = None

    def mask_path(self, name: str) -> Path:
        return self.out / "masks" / f"{name}.png"

    def overlay_path(self, name: str) -> Path:
        return self.out / "overlay" / f"{name}.{self.overlay}"

    def overlays(self) -> list[Path]:
        """Files of the overlays, in the order of the frames."""
        return [self.overlay_path(name) for name in self._counts["names"]]

    def open(self, overwrite: bool) -> None:
        """Look at what the folder holds.

        Raises:
            ValueError: if that is the result of other settings and ``overwrite`` is not set, or of another program.
        """
        path = self.out / RECORD
        before = self._before = self._record(path)
        if before is None and any(self._ours()):
            raise ValueError(
                f"{quoted(self.out)} holds {quoted(next(self._ours()).name)}, but no {RECORD} of "
                f"{_COMMAND}; give another --out"
            )
        if before is not None and not overwrite:
            if names := differing(before["settings"], self.settings):
                raise ValueError(made_otherwise(quoted(self.out), names, _WAY_OUT))
            self.complete = bool(before.get("complete")) and self._all_there(before)
            if not self.complete:
                self._state = self._read_state()
        if self.complete:
            self._counts = before["counts"]  # type: ignore[index]  # checked by _all_there

    def begin(self, tracker: Tracker) -> None:
        """Make the folders, and bring ``tracker`` to where an earlier run stopped; else that run's files go."""
        self.tracker = tracker
        if self._state is None:
            for old in list(self._earlier()):
                old.unlink()
            self._write_record(complete=False)
        for name in ("masks",) * bool(tracker.objects) + ("overlay",) * (self.overlay != "none"):
            make_folder(self.out / name)
        rows = self.out / POINTS
        if self._state is None:
            if self.identifiers:
                with writing(rows):
                    rows.write_text(",".join(COLUMNS) + "\n", "utf-8")
            return
        try:
            tracker.restore(self._state["tracker"])
            trail = self._state["trail"]
            self._trail.extend(PointTracks(*(one.numpy() for one in each)) for each in trail)
            self.next, self._counts = int(self._state["next"]), json.loads(self._state["counts"])
            if self.identifiers:
                with rows.open("r+b") as file:
                    if file.seek(0, 2) < self._state["bytes"]:
                        raise ValueError(f"{POINTS} has become shorter")
                    # The rows of frames that are tracked again.
                    file.truncate(self._state["bytes"])
        except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
            raise ValueError(f"{quoted(self.out / STATE)} cannot be resumed: {error}; {_WAY_OUT}") from error

    def add(self, name: str, frame: TrackedFrame) -> None:
        """Write the results of the next frame."""
        number = self.next
        if frame.mask is not None:
            with writing(self.mask_path(name), _NOTE):
                write_mask(self.mask_path(name), frame.mask, self.palette)
            for value in np.unique(frame.mask).tolist():
                if value:
                    self._see("objects", str(value))
        if frame.points is not None:
            with writing(self.out / POINTS, _NOTE), (self.out / POINTS).open("a", encoding="utf-8", newline="") as file:
                file.write(lines_of(number, name, self.identifiers, frame.points))
            for identifier, visible in zip(self.identifiers, frame.points.visible, strict=True):
                if visible:
                    self._see("points", identifier)
        if self.overlay != "none":
            sheet = draw_overlay(frame, self.palette, list(self._trail))
            path = self.overlay_path(name)
            with writing(path, _NOTE), atomic_path(path) as temporary:
                sheet.save(temporary, format="JPEG" if self.overlay == "jpg" else "PNG", quality=_QUALITY)
        if frame.points is not None:
            self._trail.append(frame.points)
        self._counts["names"].append(name)
        self._counts["frames"] += 1
        self.next += 1
        self.written += 1

    def leave_out(self, problem: str) -> None:
        """The next frame cannot be used."""
        self._counts["failed"].append(problem)
        self.next += 1

    def save_now_and_then(self) -> None:
        """Write the state, unless that was done a moment ago."""
        if time.monotonic() - self._saved < _SECONDS:
            return
        rows = self.out / POINTS
        trail = [[torch.from_numpy(one) for one in (t.xy, t.confidence, t.visible)] for t in self._trail]
        state = {
            "settings": json.dumps(self.settings),
            "next": self.next,
            "counts": json.dumps(self._counts),
            "bytes": rows.stat().st_size if self.identifiers else 0,
            "tracker": self.tracker.state(),
            "trail": trail,
        }
        content = io.BytesIO()
        torch.save(state, content)
        path = self.out / STATE
        with writing(path, _NOTE), atomic_path(path) as temporary:
            temporary.write_bytes(content.getbuffer())
        self._saved = time.monotonic()

    def finish(self) -> None:
        """Record that all frames are done."""
        self._write_record(complete=True)
        (self.out / STATE).unlink(missing_ok=True)

    def figures(self) -> dict[str, Any]:
        """What ``--json`` prints: ``objects`` and ``points`` say in how many frames each was seen and where last."""
        counts = self._counts
        return {
            "out": str(self.out),
            "frames": counts["frames"],
            "written": self.written,
            "kept": counts["frames"] - self.written,
            "failed": counts["failed"],
            "objects": counts["objects"],
            "points": counts["points"],
        }

    def summary(self) -> Iterator[str]:
        """A line on each kind of thing that was followed."""
        for kind, noun in (("objects", "object"), ("points", "point")):
            found = self._counts[kind]
            last = self._counts["frames"] + len(self._counts["failed"]) - 1
            gone = [name for name, one in found.items() if one["last"] < last]
            if found:
                whole = f"{len(found)} {noun}{'s' * (len(found) > 1)}"
                yield whole + (f"; not in the last frame: {listed(gone)}" if gone else ", all in the last frame")

    def _see(self, kind: str, name: str) -> None:
        entry = self._counts[kind].setdefault(name, {"frames": 0, "last": 0})
        entry["frames"] += 1
        entry["last"] = self.next

    def _ours(self) -> Iterator[Path]:
        """Files as a run writes them, but for the record."""
        for pattern in ("masks/*.png", "overlay/*.jpg", "overlay/*.png", POINTS, STATE):
            yield from (path for path in self.out.glob(pattern) if not path.name.startswith("."))

    def _earlier(self) -> Iterator[Path]:
        """Those of the earlier run: others of such names in its folders may be somebody's own."""
        if self._before is None:
            return
        planned = self._before.get("frames", [])
        names = {*(planned or ()), *self._before["counts"]["names"]}
        for path in self._ours():
            numbered = planned is None and re.fullmatch("[0-9]{6,}", path.stem)
            if path.parent == self.out or path.stem in names or numbered:
                yield path

    def _all_there(self, record: dict[str, Any]) -> bool:
        try:
            names = record["counts"]["names"]
            paths = [self.mask_path(name) for name in names] if self.settings["mask"] else []
            paths += [self.overlay_path(name) for name in names] if self.overlay != "none" else []
            paths += [self.out / POINTS] if self.identifiers else []
        except (KeyError, TypeError):
            return False
        return all(path.is_file() for path in paths)

    def _record(self, path: Path) -> dict[str, Any] | None:
        """The record of an earlier run, if this command wrote it."""
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text("utf-8"))
            counts = content["counts"]["names"]
            if content["command"] == _COMMAND and isinstance(content["settings"], dict) and isinstance(counts, list):
                return dict(content)
        except (OSError, ValueError, KeyError, TypeError):
            pass
        raise ValueError(f"{quoted(path)} was not written by {_COMMAND}; give another --out")

    def _write_record(self, complete: bool) -> None:
        content = {"command": _COMMAND, "complete": complete, "settings": self.settings, "counts": self._counts}
        content["frames"] = self.frames
        path = self.out / RECORD
        with writing(path, _NOTE), atomic_path(path) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", "utf-8")

    def _read_state(self) -> dict[str, Any] | None:
        path = self.out / STATE
        if not path.exists():
            return None
        try:
            state = read_tensor_file(path)
            if json.loads(state["settings"]) != self.settings:
                raise ValueError("it belongs to other settings")
            for name, tensor in state["tracker"].items():
                plain_tensor(tensor, path, name)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{quoted(path)} cannot be resumed: {error}; {_WAY_OUT}") from error
        return state
