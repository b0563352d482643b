"""What an evaluation by CKA has measured so far, in memory and on disk, so that an interrupted run goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lift_fast._files import atomic_path
from lift_fast.evaluation import results

if TYPE_CHECKING:
    from .metric import StreamingCKA

PROTOCOL = "cka"
_SAVE_SECONDS = 30.0
Curve = tuple[str, int]
"""Method and size."""


class CKARun:
    """CKA by picture, and the sums behind CKA over all pictures together.

    The sums are matrices of C x C, too large for JSON: until the run is complete everything stands in
    ``OUT.partial.pt`` beside ``out``, written as a whole now and then, and removed in the end.

    Attributes:
        rows: name of a picture -> CKA of each curve, in the order of ``pooled``.
        skipped: name of a picture -> what is wrong with it.
        finished: the result that ``out`` holds already; None while something is left to do.
    """

    def __init__(
        self,
        out: Path | None,
        options: dict[str, Any],
        record: dict[str, Any],
        pooled: Mapping[Curve, StreamingCKA],
    ) -> None:
        """
        Args:
            out: file for the result; None keeps everything in memory.
            options, record: what the result depends on; they must be the same to go on, the record's ``"date"`` aside.
            pooled: empty; filled with what has been measured before.

        Raises:
            ValueError: for files of other options, or that cannot be read.
            FileNotFoundError: if the folder of ``out`` does not exist.
        """
        self.out, self.pooled, self.saved = out, pooled, time.monotonic()
        self.head = {"protocol": PROTOCOL, "options": options, "record": record}
        self.rows: dict[str, list[float]] = {}
        self.skipped: dict[str, str] = {}
        self.finished: dict[str, Any] | None = None
        if out is None:
            return
        if not out.parent.is_dir():
            raise FileNotFoundError(f"cannot write {out}: the folder {out.parent} does not exist")
        self.partial = out.with_suffix(".partial.pt")
        if out.exists():
            before = results.load_json(out, PROTOCOL)
            results.check_same(out, before, self.head)
            self.finished = before
        elif self.partial.exists():
            self._read()

    def add(self, name: str, row: Sequence[float] | str) -> None:
        """A picture's CKA of each curve, or what is wrong with it."""
        if isinstance(row, str):
            self.skipped[name] = row
        else:
            self.rows[name] = list(row)
        if self.out is not None and time.monotonic() - self.saved > _SAVE_SECONDS:
            self._write()
            self.saved = time.monotonic()

    def finish(self, content: dict[str, Any]) -> dict[str, Any]:
        """The result, with its scores, written."""
        scores: dict[str, dict[str, dict[str, float]]] = {}
        for index, (method, size) in enumerate(self.pooled):
            scores.setdefault(method, {})[str(size)] = {name: row[index] for name, row in self.rows.items()}
        content = {**self.head, **content, "skipped": self.skipped, "scores": scores}
        if self.out is not None:
            results.save_json(self.out, content)
            self.partial.unlink(missing_ok=True)
        return content

    def _write(self) -> None:
        state = {
            # Text, for the reader of tensors takes plain values alone.
            "text": json.dumps(results.as_json({**self.head, "skipped": self.skipped})),
            "rows": self.rows,
            "sums": [one.state() for one in self.pooled.values()],
        }
        with atomic_path(self.partial) as temporary:
            torch.save(state, temporary)

    def _read(self) -> None:
        try:
            state = torch.load(self.partial, map_location="cpu", weights_only=True)
            before = json.loads(state["text"])
            rows, sums = dict(state["rows"]), list(state["sums"])
        except Exception as error:
            raise ValueError(
                f"{self.partial} cannot be gone on with ({type(error).__name__}); delete it to begin anew"
            ) from error
        results.check_same(self.partial, before, self.head)
        for one, saved in zip(self.pooled.values(), sums, strict=True):
            one.restore(saved)
        self.rows, self.skipped = rows, before["skipped"]
