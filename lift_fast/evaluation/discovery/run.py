"""Unsupervised object discovery: one box for each picture by TokenCut, judged by CorLoc."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from lift_fast.backbones import FrozenViT
from lift_fast.evaluation.methods import Batch, Features
from lift_fast.evaluation.results import as_json, save_json
from lift_fast.evaluation.tokencut import EPS, NotFiniteError
from lift_fast.images import read_image

from .dataset import BoxDataSet, Sample
from .protocol import Discovery, Prediction, discover, judge, prepare
from .summary import corloc


class Journal:
    """Predictions in a file that grows by one line for each picture, so that an interrupted run goes on.

    The first line holds the settings; a file of other settings is refused. A last line that an interruption cut off is
    dropped.
    """

    def __init__(self, path: str | os.PathLike[str], settings: dict[str, Any]) -> None:
        """
        Raises:
            ValueError: if the file was written with other settings, or is no journal.
        """
        self.path = Path(path)
        self.done: dict[str, Prediction] = {}
        header = json.dumps({"settings": settings}, sort_keys=True)
        if self.path.exists():
            self._read(header)
        else:
            self.path.write_text(header + "\n", "utf-8")

    def _read(self, header: str) -> None:
        content = self.path.read_text("utf-8")
        lines = content.splitlines()
        if not lines or lines[0] != header:
            raise ValueError(
                f"{self.path} was written with other settings{_differing(lines[:1], header)}; give another --out, or "
                "delete it to begin anew"
            )
        whole = lines[1:] if content.endswith("\n") else lines[1:-1]
        for number, line in enumerate(whole, 2):
            try:
                entry = json.loads(line)
                x0, y0, x1, y1 = entry.pop("box")
                self.done[entry["name"]] = Prediction(box=(x0, y0, x1, y1), **entry)
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f"{self.path}, line {number} is no prediction: {error}; delete the file to begin anew"
                ) from error
        if not content.endswith("\n"):
            self.path.write_text("\n".join([header, *whole]) + "\n", "utf-8")

    def add(self, prediction: Prediction) -> None:
        """Append a line."""
        self.done[prediction.name] = prediction
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(prediction)) + "\n")


def _differing(there: list[str], header: str) -> str:
    """The names of the settings that are not the same, for a message; nothing if the line holds none."""
    try:
        (old, new) = (json.loads(line)["settings"] for line in (*there, header))
        names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    except (ValueError, TypeError, KeyError, AttributeError):
        return ", or is no journal of this command"
    return f" ({', '.join(names)})"


def evaluate(
    methods: Sequence[tuple[str, Callable[[Batch], Features]]],
    backbone: FrozenViT,
    data: BoxDataSet,
    *,
    tau: float,
    eps: float = EPS,
    resolution: int | None = None,
    rule: str = "published",
    out: Path | None = None,
    record: dict[str, Any] | None = None,
    show: Callable[[str, Sample, Image.Image, Discovery, Prediction], object] = lambda *_: None,
    progress: Callable[[int], object] = lambda _: None,
) -> dict[str, Any]:
    """CorLoc of methods on a data set.

    Args:
        methods: names and :class:`lift_fast.evaluation.methods.Method` or the like, of one backbone.
        backbone: as :func:`prepare`.
        data: pictures with boxes.
        tau, eps: of TokenCut.
        resolution, rule: as :func:`prepare` and :func:`judge`.
        out: file for the result. Beside it stands a journal of each method, ``OUT.METHOD.jsonl``, with a line for each
            picture, from which an interrupted run with the same settings goes on.
        record: what the result depends on beside these options; entries but ``"date"`` must be the same to go on.
        show: called with each method's name and result, unless it came from the journal.
        progress: called with 1 after each picture.

    Returns:
        The result as JSON holds it: ``"protocol"``, ``"options"``, ``"record"``, ``"summary"`` (method -> the figures
        of :func:`corloc`), ``"skipped"`` (picture -> why: no annotation, no objects, not decoded, features that are
        not finite; they are left out of all figures) and ``"predictions"``.

    Raises:
        ValueError: if no picture is left, or the journals were written with other settings.
        FileNotFoundError: if the folder of ``out`` does not exist.
    """
    options = {
        "dataset": data.name,
        "methods": [name for name, _ in methods],
        "tau": tau,
        "eps": eps,
        "resolution": resolution,
        "rule": rule,
    }
    skipped = dict(data.skipped)
    settings = {**options, **{k: v for k, v in (record or {}).items() if k != "date"}}
    del settings["methods"]
    journals = {
        name: None if out is None else Journal(out.with_suffix(f".{name}.jsonl"), as_json({**settings, "method": name}))
        for name, _ in methods
    }
    predictions: dict[str, list[Prediction]] = {name: [] for name, _ in methods}
    for sample in data.samples:
        before = {name: _done(journals[name]).get(sample.name) for name, _ in methods}
        missing = [(name, run) for name, run in methods if before[name] is None]
        try:
            image = read_image(sample.path, upright=False) if missing else None
        except (OSError, ValueError) as error:
            skipped[sample.name] = str(error)
            progress(1)
            continue
        found: dict[str, Discovery] = {}
        if image is not None:
            prepared = prepare(image, backbone, resolution, rule)
            for name, run in missing:
                try:
                    found[name] = discover(image, prepared, run, tau=tau, eps=eps)
                except NotFiniteError as error:
                    # Left out for all methods, or their figures would be of different pictures.
                    skipped.setdefault(sample.name, f"{name}: {error}")
        if sample.name in skipped:
            progress(1)
            continue
        for name, known in before.items():
            if known is not None:
                predictions[name].append(known)
        if image is None:
            progress(1)
            continue
        square = (image.size, resolution) if resolution is not None and rule == "published" else None
        for name, discovery in found.items():
            prediction = judge(sample, discovery.box, discovery.cut.degenerate, square)
            predictions[name].append(prediction)
            journal = journals[name]
            if journal is not None:
                journal.add(prediction)
            show(name, sample, image, discovery, prediction)
        progress(1)
    if not any(predictions.values()):
        reason = next(iter(skipped.items()), ("", "the list is empty"))
        raise ValueError(f"no picture of {data.name} can be used; the first: {reason[0]}: {reason[1]}")
    content = {
        "protocol": "discovery",
        "options": options,
        "record": record or {},
        "summary": {name: corloc(found) for name, found in predictions.items()},
        "skipped": skipped,
        "predictions": {name: [asdict(p) for p in found] for name, found in predictions.items()},
    }
    if out is not None:
        save_json(out, content)
    return content


def _done(journal: Journal | None) -> dict[str, Prediction]:
    return {} if journal is None else journal.done
