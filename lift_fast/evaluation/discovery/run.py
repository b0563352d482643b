"""Unsupervised object discovery: one box for each image by TokenCut, measured by CorLoc."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from lift_fast.backbones import FrozenViT
from lift_fast.evaluation.methods import Batch, Features
from lift_fast.evaluation.results import save_json
from lift_fast.evaluation.resume import Lines, settings_of
from lift_fast.evaluation.tokencut import EPS, NotFiniteError
from lift_fast.images import read_image

from .dataset import BoxDataSet, Sample
from .protocol import Discovery, Prediction, discover, prepare, score_box
from .summary import corloc


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
        backbone, resolution, rule: as for :func:`prepare`.
        data: images with boxes.
        tau, eps: of TokenCut.
        out: file for the result. Next to it stands a journal of each method, ``OUT.METHOD.jsonl``, with a line for each
            image, from which an interrupted run with the same settings is resumed.
        record, progress: as :func:`lift_fast.evaluation.spair.evaluate`.
        show: called with each method's name and result, unless the journal holds it already.

    Returns:
        The result as JSON holds it: ``"protocol"``, ``"options"``, ``"record"``, ``"summary"`` (method -> the figures
        of :func:`corloc`), ``"skipped"`` (image -> why: no annotation, no objects, not decoded, features that are
        not finite; they are left out of all figures) and ``"predictions"``.

    Raises:
        ValueError: if no image is left, or the journals were written with other settings.
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
    settings = settings_of({name: value for name, value in options.items() if name != "methods"}, record or {})
    journals = {
        name: Lines(out and out.with_suffix(f".{name}.jsonl"), {**settings, "method": name}, _prediction, asdict)
        for name, _ in methods
    }
    predictions: dict[str, list[Prediction]] = {name: [] for name, _ in methods}

    def look(sample: Sample) -> None:
        known = {name: lines.done[sample.name] for name, lines in journals.items() if sample.name in lines.done}
        found: dict[str, Discovery] = {}
        if len(known) < len(methods):
            try:
                image = read_image(sample.path, upright=False)
            except (OSError, ValueError) as error:
                skipped[sample.name] = str(error)
                return
            prepared = prepare(image, backbone, resolution, rule)
            for name, method in methods:
                try:
                    if name not in known:
                        found[name] = discover(image, prepared, method, tau=tau, eps=eps)
                except NotFiniteError as error:
                    # Left out for all methods: otherwise their figures would be of different images.
                    skipped.setdefault(sample.name, f"{name}: {error}")
            if sample.name in skipped:
                return
            square = (image.size, resolution) if resolution is not None and rule == "published" else None
            for name, discovery in found.items():
                known[name] = score_box(sample, discovery.box, discovery.cut.degenerate, square)
                journals[name].add(sample.name, known[name])
                show(name, sample, image, discovery, known[name])
        for name, prediction in known.items():
            predictions[name].append(prediction)

    for sample in data.samples:
        look(sample)
        progress(1)
    if not any(predictions.values()):
        reason = next(iter(skipped.items()), ("", "the list is empty"))
        raise ValueError(f"no image of {data.name} can be used; the first: {reason[0]}: {reason[1]}")
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


def _prediction(entry: dict[str, Any]) -> Prediction:
    x0, y0, x1, y1 = entry.pop("box")
    return Prediction(box=(x0, y0, x1, y1), **entry)
