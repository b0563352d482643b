"""A prediction run over a data set: each sequence becomes a folder of masks; an interrupted run can be resumed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lift_fast._files import atomic_path
from lift_fast.evaluation.results import as_json
from lift_fast.evaluation.resume import differing, made_otherwise
from lift_fast.tracking.labels import Mask
from lift_fast.tracking.masks import write_mask

from .dataset import Davis, DavisError, Video, first_annotation
from .protocol import FeatureMaps, Network, PropagationOptions, predict

# Records how the masks next to it were made.
RECORD = "predictions.json"


@dataclass
class Predictions:
    """The outcome of a run, by sequence and method; ``problems`` holds why sequences were left out."""

    computed: list[tuple[str, str]] = field(default_factory=list)
    kept: list[tuple[str, str]] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)
    frames: int = 0


@dataclass(frozen=True)
class Job:
    """One method, its features and the folder for its masks, which is made if missing.

    ``record`` is what the masks depend on, as JSON can hold it. It is written next to them and compared when a run is
    resumed.
    """

    name: str
    features: FeatureMaps
    folder: Path
    record: dict[str, Any]


def predict_dataset(
    dataset: Davis,
    jobs: Sequence[Job],
    network: Network,
    options: PropagationOptions,
    *,
    names: Sequence[str] | None = None,
    overwrite: bool = False,
    progress: Callable[[int], Any] = lambda frames: None,
) -> Predictions:
    """Masks of each sequence by each method, ``folder/<sequence>/<frame>.png``, indexed, with the data set's palette.

    A sequence's folder appears once all of its masks are there, and is kept then: an interrupted run resumes with the
    next sequence. A sequence that cannot be used is named and left out.

    Args:
        dataset: with at least the first annotation of each sequence.
        jobs: methods; they share the images and common parts of the features.
        network: normalisation and device; its methods are not used.
        names: of sequences; None for all of the data set's list.
        overwrite: compute again the masks that exist.
        progress: called with the number of frames that are done or left out.

    Raises:
        DavisError: if a folder holds masks of another record and ``overwrite`` is not set, or masks without a record.
    """
    for job in jobs:
        job.folder.mkdir(parents=True, exist_ok=True)
        _agree(dataset, job, overwrite)
    done = Predictions()
    for name in dataset.names if names is None else names:
        left = 0
        try:
            video = dataset.sequence(name)
            left = len(video.frames)
            missing = [job for job in jobs if overwrite or not _complete(job.folder / name, video.frames)]
            done.kept.extend((name, job.name) for job in jobs if job not in missing)
            if missing:
                mask = first_annotation(video)
                methods = replace(network, methods=[job.features for job in missing])
                masks = predict(video.frames, mask, methods, options)
                for _ in _write(masks, video, missing, dataset.palette):
                    progress(1)
                    left -= 1
                done.computed.extend((name, job.name) for job in missing)
                done.frames += len(video.frames)
        except DavisError as error:
            done.problems[name] = str(error)
        progress(left)
    return done


def _write(masks: Iterator[list[Mask]], video: Video, jobs: Sequence[Job], palette: list[int]) -> Iterator[None]:
    """Write the masks of one video; its folders appear at the end. Yields after each frame."""
    folders = [job.folder / f".{video.name}.partial" for job in jobs]
    try:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        for frame, found in zip(video.frames, masks, strict=True):
            for folder, mask in zip(folders, found, strict=True):
                write_mask(folder / f"{frame.stem}.png", mask, palette)
            yield
        for folder, job in zip(folders, jobs, strict=True):
            target = job.folder / video.name
            if target.exists():
                shutil.rmtree(target)
            folder.rename(target)
    finally:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


def _complete(folder: Path, frames: Sequence[Path]) -> bool:
    return all((folder / f"{frame.stem}.png").is_file() for frame in frames)


def _agree(dataset: Davis, job: Job, overwrite: bool) -> None:
    """Refuse to mix our masks with masks of other settings or of another program."""
    folder, path = job.folder, job.folder / RECORD
    record = as_json(job.record)
    there = [name for name in dataset.names if (folder / name).exists()]
    if there and not path.exists():
        raise DavisError(
            f"{folder} holds {there[0]}, but no {RECORD}: this command did not write it and leaves it alone; choose "
            "another folder (--masks DIR)"
        )
    old = None
    if path.exists():
        try:
            old = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DavisError(
                f"{path} cannot be read: {error}; remove the folder or choose another (--masks DIR)"
            ) from error
    if there and old != record:
        if not overwrite:
            names = differing(old, record) if isinstance(old, dict) else [*record]
            remedy = "choose another folder (--masks DIR), or compute them again (--overwrite)"
            raise DavisError(made_otherwise(f"the content of {folder}", names, remedy))
        for name in there:
            shutil.rmtree(folder / name)
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
