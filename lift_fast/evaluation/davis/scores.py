"""Scores of predicted masks as the semi-supervised evaluation of DAVIS 2017 defines them."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lift_fast._files import atomic_path

from .dataset import Davis, DavisError, Video, first_annotation, read_annotation, read_mask
from .metrics import boundary_f, jaccard, statistics

# Names and order of the published results.
MEASURES = ("J&F-Mean", "J-Mean", "J-Recall", "J-Decay", "F-Mean", "F-Recall", "F-Decay")


@dataclass(frozen=True)
class SequenceScores:
    """Values of one sequence: ``j`` and ``f`` ``[objects, frames]``, without the first and the last frame."""

    name: str
    frames: tuple[str, ...]
    j: npt.NDArray[np.float64]
    f: npt.NDArray[np.float64]

    def objects(self) -> list[dict[str, float]]:
        """The :data:`MEASURES` of each object."""
        found = []
        for j, f in zip(self.j, self.f, strict=True):
            region, contour = statistics(j), statistics(f)
            values = ((region.mean + contour.mean) / 2, *region, *contour)
            found.append(dict(zip(MEASURES, values, strict=True)))
        return found


def mean_measures(objects: list[dict[str, float]]) -> dict[str, float]:
    """Mean of each measure over objects; raises ``ValueError`` for no objects."""
    if not objects:
        raise ValueError("no object has been scored")
    return {name: float(np.mean([scores[name] for scores in objects])) for name in MEASURES}


def score_sequence(video: Video, predictions: Path, *, threads: int = 1) -> SequenceScores:
    """J and F of each object in each frame but the first and the last.

    The objects are 1 to the largest number in the first annotation, as published: a number that does not occur there
    counts as an object that is never seen, a larger number in a later annotation as background.

    ``predictions`` is a folder of masks ``<frame>.png`` of object numbers; ``threads`` frames are scored at one time.

    Raises:
        DavisError: naming the file, if it is missing or cannot be read, has another size, or holds an object that is
            not in the first annotation.
    """
    if len(video.frames) < 3:
        raise DavisError(
            f"{video.name} has {len(video.frames)} frames; expected 3 or more: the first and the last do not count"
        )
    count = int(first_annotation(video).max())
    frames = video.frames[1:-1]

    def score(frame: Path) -> list[tuple[float, float]]:
        annotation = read_annotation(video.annotation(frame), video.binary_masks)
        path = predictions / f"{frame.stem}.png"
        found = read_mask(path, video.binary_masks)
        if found.shape != annotation.shape:
            raise DavisError(
                f"{path} has {found.shape[1]} x {found.shape[0]} pixels, the annotation "
                f"{annotation.shape[1]} x {annotation.shape[0]}"
            )
        if found.max(initial=0) > count:
            raise DavisError(f"{path} holds object {found.max()}, but {video.name} has objects 1 to {count}")
        pairs = ((annotation == number, found == number) for number in range(1, count + 1))
        return [(jaccard(truth, guess), boundary_f(truth, guess)) for truth, guess in pairs]

    with ThreadPoolExecutor(max_workers=max(1, threads)) as pool:
        values = np.array(list(pool.map(score, frames)))
    return SequenceScores(
        video.name, tuple(frame.stem for frame in frames), values[:, :, 0].T.copy(), values[:, :, 1].T.copy()
    )


def score_folder(
    dataset: Davis,
    folder: Path,
    names: Iterable[str] | None = None,
    *,
    threads: int = 1,
    progress: Callable[[int], Any] = lambda sequences: None,
) -> tuple[list[SequenceScores], dict[str, str]]:
    """Scores of all sequences, and by name why a sequence could not be scored.

    ``dataset`` has annotations of all frames, ``folder`` a folder of masks for each sequence; ``names`` defaults to all
    sequences. ``progress`` is called with 1 after each.
    """
    scores: list[SequenceScores] = []
    problems: dict[str, str] = {}
    for name in dataset.names if names is None else names:
        try:
            scores.append(score_sequence(dataset.sequence(name), folder / name, threads=threads))
        except DavisError as error:
            problems[name] = str(error)
        progress(1)
    return scores, problems


def write_csv(scores: list[SequenceScores], folder: str | os.PathLike[str], subset: str) -> list[Path]:
    """The two files of the published evaluation: ``global_results-<subset>.csv`` with the means over all objects, and
    ``per-sequence_results-<subset>.csv`` with J and F of each object, ``<sequence>_<object>``; three decimals."""
    objects = [(f"{one.name}_{i}", o) for one in scores for i, o in enumerate(one.objects(), start=1)]
    means = mean_measures([o for _, o in objects])
    columns = ("J-Mean", "F-Mean")
    tables = {
        f"global_results-{subset}.csv": [MEASURES, [f"{means[name]:.3f}" for name in MEASURES]],
        f"per-sequence_results-{subset}.csv": [
            ("Sequence", *columns),
            *([name, *(f"{o[column]:.3f}" for column in columns)] for name, o in objects),
        ],
    }
    written = []
    for name, rows in tables.items():
        path = Path(folder) / name
        with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
        written.append(path)
    return written
