"""Unsupervised object discovery: one box for each picture by TokenCut, judged by CorLoc."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from lift_fast.backbones import FrozenViT
from lift_fast.evaluation.methods import Batch, Features
from lift_fast.evaluation.results import Column, Table, as_json, save_json
from lift_fast.evaluation.tokencut import EPS, NotFiniteError, TokenCut, tokencut
from lift_fast.images import check_size, to_tensor
from lift_fast.pictures import confidence_colours, place_cells

from .dataset import Box, BoxDataSet, Sample

RULES = ("published", "exact")
_PANEL, _GAP, _TEXT = 480, 12, 18
_PREDICTED, _TRUE, _INK = (220, 40, 40), (40, 200, 80), (25, 25, 25)


@dataclass(frozen=True)
class Discovery:
    """What :func:`discover` finds."""

    cut: TokenCut
    box: Box
    """(x0, y0, x1, y1) in the picture's pixels."""
    covered: tuple[float, float, float, float]
    """(top, left, height, width) over which the grid lies, padding included, as shares of the picture's sides."""


@dataclass(frozen=True)
class Prediction:
    """The box of one picture, and how it fares."""

    name: str
    box: Box
    """(x0, y0, x1, y1) in pixels of the file."""
    iou: float
    """The largest with a ground-truth box."""
    found: bool
    """IoU >= 0.5 with any ground-truth box."""
    degenerate: bool
    """The graph did not determine the cut (:class:`lift_fast.evaluation.tokencut.TokenCut`)."""


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes in continuous pixels; 0 for empty boxes."""
    inter, union = _areas(a, b)
    return inter / union if union > 0 else 0.0


def overlaps(a: Box, b: Box) -> bool:
    """Whether the intersection over union is at least 0.5, exactly so for whole pixels."""
    inter, union = _areas(a, b)
    return union > 0 and 2 * inter >= union


def _published_overlap(found: Box, truth: Box) -> bool:
    """:func:`overlaps` as the LiFT paper's evaluation computes it, for ``truth`` in whole pixels.

    Areas are float32 there, what is common to both float64, and a term against division by zero keeps equality out.
    """
    eps = 1e-7
    inter, _ = _areas(found, truth)
    area = np.float32((found[2] - found[0]) * (found[3] - found[1] + eps))
    other = np.float32(truth[2] - truth[0]) * (np.float32(truth[3] - truth[1]) + np.float32(eps))
    return bool(inter / (float(area + other) - inter + eps) >= 0.5)


def _areas(a: Box, b: Box) -> tuple[float, float]:
    wide, tall = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inter = max(wide, 0.0) * max(tall, 0.0)
    return inter, (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter


def read_as_stored(path: str | os.PathLike[str]) -> Image.Image:
    """A picture as 8-bit RGB in the pixels that annotations speak of: not turned by its EXIF orientation.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, if it does not decode.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no picture at {path}")
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error


@dataclass(frozen=True)
class Prepared:
    """A picture as features take it."""

    batch: Batch
    size: tuple[int, int]
    """(height, width) of what is no padding."""
    stretch: bool = False
    """The grid lies over all of it, whatever its cells cover."""


def prepare(
    image: Image.Image, backbone: FrozenViT, resolution: int | None = None, rule: str = "published"
) -> Prepared:
    """A picture, normalised and then padded with zeros at the right and at the bottom to whole patches.

    Args:
        image: RGB.
        backbone: says what a patch is, how pictures are normalised, and where it runs.
        resolution: None keeps the picture's own size (TokenCut's published evaluation); S resizes it to S x S.
        rule: of such resizing. ``published``, as in the LiFT paper's evaluation: bilinear and not padded, the grid
            stretched over the square. ``exact``: Lanczos and padded.

    Raises:
        ValueError: for an unknown rule.
    """
    if rule not in RULES:
        raise ValueError(f"rule must be {' or '.join(RULES)}, got {rule!r}")
    stretch = resolution is not None and rule == "published"
    if resolution is not None:
        check_size((resolution, resolution))
        how = Image.Resampling.BILINEAR if stretch else Image.Resampling.LANCZOS
        image = image.resize((resolution, resolution), how)
    tensor = to_tensor(image, backbone.mean, backbone.std)
    tall, wide = tensor.shape[2:]
    if not stretch:
        tensor = F.pad(tensor, (0, -wide % backbone.patch_size, 0, -tall % backbone.patch_size))
    weight = backbone.model.patch_embed.proj.weight
    return Prepared(Batch(tensor.to(weight.device, weight.dtype)), (tall, wide), stretch)


def discover(
    image: Image.Image, prepared: Prepared, features: Callable[[Batch], Features], *, tau: float, eps: float = EPS
) -> Discovery:
    """TokenCut's box in a picture, in the picture's pixels; padding is clipped off, a resized picture scaled back.

    Args:
        image: the picture.
        prepared: of :func:`prepare`.
        features: what to cut: a :class:`lift_fast.evaluation.methods.Method` or the like.
        tau, eps: as :func:`lift_fast.evaluation.tokencut.tokencut`.

    Raises:
        NotFiniteError: for features that are not finite.
        ValueError: for features of another form.
    """
    maps, covered = features(prepared.batch)
    if prepared.stretch:
        covered = (0, 0, *prepared.size)
    if maps.ndim != 4 or maps.shape[0] != 1:
        raise ValueError(f"features must give a map [1, C, h, w] for a picture, got {list(maps.shape)}")
    cut = tokencut(maps[0].flatten(1).T, (maps.shape[2], maps.shape[3]), tau=tau, eps=eps)
    (width, height), (tall, wide) = image.size, prepared.size
    x0, y0, x1, y1 = cut.box((tall, wide), covered)
    box = (x0 * width / wide, y0 * height / tall, x1 * width / wide, y1 * height / tall)
    return Discovery(cut, box, (covered[0] / tall, covered[1] / wide, covered[2] / tall, covered[3] / wide))


def judge(sample: Sample, box: Box, degenerate: bool, square: tuple[tuple[int, int], int] | None = None) -> Prediction:
    """The prediction for a picture against its ground truth.

    Args:
        sample: the picture.
        box: in the picture's pixels.
        degenerate: of the cut.
        square: the picture's (width, height) and S, to judge in the pixels of the picture at S x S as the LiFT paper's
            evaluation does: true boxes are scaled and cut to whole pixels (towards zero), and an IoU of just 0.5 is
            none, for a term against division by zero makes it smaller.
    """
    truths, seen = sample.boxes, box
    judged: Callable[[Box, Box], bool] = overlaps
    if square is not None:
        (width, height), side = square
        x, y = side / width, side / height
        seen = (box[0] * x, box[1] * y, box[2] * x, box[3] * y)
        truths = tuple((_whole(a * x), _whole(b * y), _whole(c * x), _whole(d * y)) for a, b, c, d in truths)
        judged = _published_overlap
    return Prediction(
        sample.name,
        box,
        max(iou(seen, truth) for truth in truths),
        any(judged(seen, truth) for truth in truths),
        degenerate,
    )


def _whole(value: float) -> float:
    return float(int(value))


def corloc(predictions: Iterable[Prediction]) -> dict[str, Any]:
    """Figures over pictures: ``corloc`` (percent of pictures whose box is correct), ``pictures``, ``found``,
    ``mean_iou`` (0 to 1) and ``degenerate`` (how many)."""
    all_of_them = list(predictions)
    count, found = len(all_of_them), sum(p.found for p in all_of_them)
    return {
        "corloc": 100 * found / count if count else None,
        "pictures": count,
        "found": found,
        "mean_iou": sum(p.iou for p in all_of_them) / count if count else None,
        "degenerate": sum(p.degenerate for p in all_of_them),
    }


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
            image = read_as_stored(sample.path) if missing else None
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


def table(content: dict[str, Any]) -> Table:
    """CorLoc by method."""
    columns = [Column("CorLoc, %", digits=2), Column("mean IoU", digits=3), Column("not determined", "", 0)]
    rows = [(name, [f["corloc"], f["mean_iou"], f["degenerate"]]) for name, f in content["summary"].items()]
    options = content["options"]
    counted = max(figures["pictures"] for figures in content["summary"].values())
    where = "own size" if options["resolution"] is None else f"{options['resolution']} pixels"
    if options["resolution"] is not None and options.get("rule") == "exact":
        where += ", exact rule"
    title = f"{options['dataset']}, {counted} pictures at {where}, {len(content['skipped'])} left out"
    return Table(f"{title}, tau {options['tau']:g}", columns, rows)


def draw_discovery(sample: Sample, image: Image.Image, discovery: Discovery, prediction: Prediction) -> Image.Image:
    """One sheet: the picture with the predicted (red) and the true boxes (green), the eigenvector, the foreground."""
    font = ImageFont.load_default(size=_TEXT)
    scale = min(_PANEL / image.width, _PANEL / image.height)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    cut = discovery.cut
    vector = cut.eigenvector
    spread = float(vector.max() - vector.min())
    stretched = (vector - vector.min()) / (spread if spread > 0 else 1.0)
    rows = cut.foreground.astype(np.uint8) * 90 + cut.component.astype(np.uint8) * 165
    panels = [
        ("picture", image.resize(size, Image.Resampling.LANCZOS)),
        (
            f"eigenvector, {cut.eigenvector.shape[1]} x {cut.eigenvector.shape[0]}",
            place_cells(confidence_colours(stretched), size, discovery.covered),
        ),
        ("foreground, its component", place_cells(np.repeat(rows[..., None], 3, 2), size, discovery.covered)),
    ]
    top = 2 * _GAP + 2 * _TEXT + _GAP
    sheet = Image.new("RGB", (_GAP + 3 * (size[0] + _GAP), top + size[1] + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    verdict = "found" if prediction.found else "missed"
    note = ", cut not determined" if prediction.degenerate else ""
    draw.text((_GAP, _GAP), f"{sample.name}: IoU {prediction.iou:.3f}, {verdict}{note}", font=font, fill=_INK)
    for number, (title, panel) in enumerate(panels):
        left = _GAP + number * (size[0] + _GAP)
        draw.text((left, _GAP + _TEXT + _GAP), title, font=font, fill=_INK)
        sheet.paste(panel, (left, top))
        if number == 0:
            for box, colour in [*((b, _TRUE) for b in sample.boxes), (prediction.box, _PREDICTED)]:
                x0, y0, x1, y1 = (v * scale for v in box)
                far = (left + max(x0, x1 - 1), top + max(y0, y1 - 1))
                draw.rectangle((left + x0, top + y0, *far), outline=colour, width=3)
    return sheet
