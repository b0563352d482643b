"""SPair-71k in its original layout: pairs of images with key points, checked when they are read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lift_fast._text import said, shown
from lift_fast.evaluation.annotations import is_name, read_names
from lift_fast.evaluation.results import read_json

Array = npt.NDArray[np.float64]

LAYOUTS = ("large", "small")
# Pixels by which a pair's key points may differ from those of its images' own annotations without a remark.
_TOLERANCE = 1.0


class SPairError(ValueError):
    """A data set or annotation that cannot be used; the message names the path."""


@dataclass(frozen=True)
class Pair:
    """One annotated pair of images of a category."""

    name: str
    """Of its annotation, ``number-source-target:category``."""
    category: str
    annotation: Path
    source: Path
    target: Path
    source_points: Array
    """[N, 2] (x, y) in pixels of the source image."""
    target_points: Array
    """[N, 2] the same parts in the target image."""
    box: tuple[float, float, float, float]
    """Of the object in the target image: left, top, right, bottom."""
    source_size: tuple[int, int] | None
    """(width, height) that the annotation gives for the source image."""
    target_size: tuple[int, int] | None
    difficulty: dict[str, int]
    """``viewpoint_variation``, ``scale_variation``, ``truncation`` and ``occlusion``, where annotated."""
    part_names: tuple[str, ...] = ()
    """Names of the N key points in the images' own annotations; empty where the pair does not give them."""


@dataclass(frozen=True)
class Filters:
    """Which pairs to take by their annotated difficulty; None takes all.

    Attributes:
        viewpoint_variation: 0 easy, 1 medium, 2 hard.
        scale_variation: 0 easy, 1 medium, 2 hard.
        truncation: 0 none, 1 source, 2 target, 3 both.
        occlusion: as ``truncation``.
    """

    viewpoint_variation: tuple[int, ...] | None = None
    scale_variation: tuple[int, ...] | None = None
    truncation: tuple[int, ...] | None = None
    occlusion: tuple[int, ...] | None = None

    def takes(self, pair: Pair) -> bool:
        """Whether the pair passes; raises ``SPairError`` if its annotation does not have a field to choose by."""
        for name, wanted in vars(self).items():
            if wanted is None:
                continue
            if name not in pair.difficulty:
                raise SPairError(f"{pair.annotation}: no {name} to choose by")
            if pair.difficulty[name] not in wanted:
                return False
        return True


@dataclass
class Selection:
    """The pairs of an evaluation and what was left out."""

    categories: tuple[str, ...] = ()
    """The requested ones."""
    pairs: dict[str, list[Pair]] = field(default_factory=dict)
    """By category, in the order of their names; empty categories are missing."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Annotation (its path below the root) or category -> the reason."""
    remarks: dict[str, str] = field(default_factory=dict)
    """Annotations that are used but disagree with those of their images."""


class SPair:
    """Reader of ``PairAnnotation/<split>/*.json``, ``ImageAnnotation/<category>/*.json``,
    ``JPEGImages/<category>/*.jpg`` and ``Layout/<layout>/<split>.txt``.

    Args:
        root: folder of the data set.
        split: ``test``, ``val`` or ``trn``.
        layout: list of pairs, ``large`` or ``small``; None takes ``large`` or, without such a list, every file of
            ``PairAnnotation/<split>``.

    Raises:
        SPairError: if a folder or list is missing, or there is no pair.
    """

    def __init__(self, root: str | os.PathLike[str], split: str = "test", layout: str | None = None) -> None:
        self.root, self.split = Path(root), split
        self.annotations = self.root / "PairAnnotation" / split
        self.images_folder = self.root / "JPEGImages"
        for folder in (self.annotations, self.images_folder):
            if not folder.is_dir():
                raise SPairError(
                    f"no folder {folder}; expected the layout of SPair-71k: PairAnnotation/{split}, ImageAnnotation, "
                    "JPEGImages and Layout below the root"
                )
        chosen = layout or LAYOUTS[0]
        path = self.root / "Layout" / chosen / f"{split}.txt"
        if layout is None and not path.is_file():
            self.layout, names = None, sorted(file.stem for file in self.annotations.glob("*.json"))
        else:
            try:
                self.layout, names = chosen, read_names(path, "pair", "the name of an annotation")
            except (OSError, ValueError) as error:
                raise SPairError(str(error)) from error
        if not names:
            raise SPairError(f"{self.annotations} holds no pair")
        self.categories = tuple(sorted({*_folders(self.images_folder), *_folders(self.root / "ImageAnnotation")}))
        if not self.categories:
            raise SPairError(f"{self.images_folder} holds no folder; expected one for each category")
        self.names: dict[str, list[str]] = {category: [] for category in self.categories}
        self.strays: list[str] = []
        """Names of pairs whose category has no folder."""
        for name in names:
            category = self._category(name)
            (self.strays if category is None else self.names[category]).append(name)

    def read(self, name: str, category: str) -> Pair:
        """The pair of that name; raises ``SPairError`` with the file if it is missing or malformed."""
        path = self._path(name)
        content = _read_json(path)
        try:
            return self._pair(name, category, path, content)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise SPairError(f"{path}: malformed annotation: {said(reason)}") from error

    def select(
        self,
        categories: Sequence[str] | None = None,
        filters: Filters | None = None,
        progress: Callable[[int], Any] = lambda count: None,
    ) -> Selection:
        """Read the pairs of some categories, or of all; raises ``SPairError`` for an unknown category.

        ``progress`` is called with the number of annotations that have been read.
        """
        unknown = [name for name in categories or () if name not in self.categories]
        if unknown:
            raise SPairError(
                f"{self.root} has no category {', '.join(unknown)}; there are {', '.join(self.categories)}"
            )
        found = Selection(tuple(dict.fromkeys(self.categories if categories is None else categories)))
        for name in self.strays if categories is None else ():
            found.skipped[self.below(self._path(name))] = "of a category that has no folder in JPEGImages"
        for category in found.categories:
            pairs = self._read_category(category, filters or Filters(), found, progress)
            if pairs:
                found.pairs[category] = pairs
                found.remarks.update(self._compare(category, pairs))
            else:
                left = "no pair left" if self.names[category] else f"no pair in {self.split}"
                found.skipped[category] = f"empty category: {left}"
        return found

    def below(self, path: Path) -> str:
        """A file's path below the root, its name in results."""
        return path.relative_to(self.root).as_posix()

    def _read_category(
        self, category: str, filters: Filters, found: Selection, progress: Callable[[int], Any]
    ) -> list[Pair]:
        pairs = []
        for name in sorted(set(self.names[category])):
            try:
                pair = self.read(name, category)
                if filters.takes(pair):
                    pairs.append(pair)
            except SPairError as error:
                found.skipped[self.below(self._path(name))] = str(error)
            progress(1)
        return pairs

    def _category(self, name: str) -> str | None:
        stem, colon, category = name.rpartition(":")
        if colon and stem:
            return category if category in self.categories else None
        # For file systems without colons in names.
        fitting = [category for category in self.categories if name.endswith(f"_{category}")]
        return max(fitting, key=len, default=None)

    def _path(self, name: str) -> Path:
        path = self.annotations / f"{name}.json"
        other = self.annotations / f"{name.replace(':', '_')}.json"
        return other if other.is_file() and not path.is_file() else path

    def _pair(self, name: str, category: str, path: Path, content: dict[str, Any]) -> Pair:
        if content.get("category", category) != category:
            raise ValueError(f"category is {shown(content['category'])}, but {category!r} in the file's name")
        if content.get("mirror", 0) != 0:
            raise ValueError("the pair is mirrored; the protocol has no such pairs")
        source, target = (_points(content, key) for key in ("src_kps", "trg_kps"))
        if len(source) != len(target):
            raise ValueError(f"{len(source)} source and {len(target)} target key points; expected as many")
        box = np.asarray(content["trg_bndbox"], dtype=np.float64)
        if box.shape != (4,) or not np.isfinite(box).all() or max(box[2] - box[0], box[3] - box[1]) <= 0:
            raise ValueError(f"trg_bndbox is {shown(content['trg_bndbox'])}; expected left, top, right, bottom")
        parts = tuple(str(part) for part in content.get("kps_ids") or ())
        left, top, right, bottom = (float(value) for value in box)
        return Pair(
            name,
            category,
            path,
            self.images_folder / category / _file_name(content, "src_imname"),
            self.images_folder / category / _file_name(content, "trg_imname"),
            source,
            target,
            (left, top, right, bottom),
            _image_size(content, "src_imsize"),
            _image_size(content, "trg_imsize"),
            {grade: int(content[grade]) for grade in vars(Filters()) if grade in content},
            parts if len(parts) == len(source) else (),
        )

    def _compare(self, category: str, pairs: Iterable[Pair]) -> dict[str, str]:
        """Remarks on pairs whose key points are not those of their images' annotations."""
        folder = self.root / "ImageAnnotation" / category
        known: dict[Path, dict[str, Any] | None] = {}
        remarks = {}
        for pair in pairs:
            for image, points in ((pair.source, pair.source_points), (pair.target, pair.target_points)):
                path = folder / f"{image.stem}.json"
                if path not in known:
                    try:
                        own = _read_json(path).get("kps")
                        known[path] = own if isinstance(own, dict) else None
                        if known[path] is None:
                            remarks[self.below(path)] = f"{path} has no kps; the pairs' own key points are used"
                    except SPairError as error:
                        known[path] = None
                        remarks[self.below(path)] = f"{error}; the pairs' own key points are used"
                of_image = known[path]
                if of_image is not None and not _agree(of_image, pair.part_names, points):
                    remarks[self.below(pair.annotation)] = f"{pair.annotation}: key points differ from those of {path}"
        return remarks


def _agree(own: dict[str, Any], names: Sequence[str], points: Array) -> bool:
    for name, point in zip(names, points, strict=False):
        try:
            there = np.asarray(own.get(name), dtype=np.float64)
        except (TypeError, ValueError, OverflowError):
            return False
        if there.shape != (2,) or not (np.abs(there - point) <= _TOLERANCE).all():
            return False
    return True


def _folders(path: Path) -> list[str]:
    return [folder.name for folder in path.glob("[!.]*") if folder.is_dir()]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path, "annotation")
    except (OSError, ValueError) as error:
        raise SPairError(str(error)) from error
    if not isinstance(content, dict):
        raise SPairError(f"{path} holds a {type(content).__name__}; expected an object with the fields of SPair-71k")
    return content


def _points(content: dict[str, Any], key: str) -> Array:
    points = np.asarray(content[key], dtype=np.float64)
    if points.ndim != 2 or points.shape[1] != 2 or not len(points) or not np.isfinite(points).all():
        raise ValueError(f"{key} must be a list of one or more [x, y]")
    return points


def _file_name(content: dict[str, Any], key: str) -> str:
    name: Any = content[key]
    if not is_name(name):
        raise ValueError(f"{key} is {shown(name)}; expected the name of a file")
    return name


def _image_size(content: dict[str, Any], key: str) -> tuple[int, int] | None:
    if content.get(key) is None:
        return None
    width, height = (int(value) for value in content[key][:2])
    if width < 1 or height < 1:
        raise ValueError(f"{key} is {shown(content[key])}; expected width, height, channels")
    return width, height
