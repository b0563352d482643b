"""Data sets of images with ground-truth boxes, in their original layouts on disk: Pascal VOC and COCO.

Boxes are (x0, y0, x1, y1) in continuous pixels: the whole image is (0, 0, width, height).
"""

from __future__ import annotations

import math
import os
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lift_fast._text import shown
from lift_fast.evaluation.annotations import is_name, read_names
from lift_fast.evaluation.results import read_json

Box = tuple[float, float, float, float]

COCO_LIST = "coco_20k_filenames.txt"
"""The published list of COCO20k, from the repositories of LOST and TokenCut."""
PUBLISHED_NAMES = {"VOC2007 trainval": "voc07", "VOC2012 trainval": "voc12", f"COCO {COCO_LIST[:-4]}": "coco20k"}
"""What published numbers call a data set, by :attr:`BoxDataSet.name`; subsets and other lists have no such name."""
# Real annotation files have some kilobytes.
_LARGEST_XML = 1 << 24
# Pixels: no image is larger, and sums and products of such coordinates are exact enough.
_FARTHEST = 1e9


@dataclass(frozen=True)
class Sample:
    """An image and its objects."""

    name: str
    path: Path
    boxes: tuple[Box, ...]


@dataclass
class BoxDataSet:
    """The images of a data set, in the order of its list.

    Attributes:
        samples: those with at least one box.
        skipped: (name, reason) of the others: an annotation that is missing or malformed, or no objects.
    """

    name: str
    samples: list[Sample] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)


def read_voc(root: str | os.PathLike[str], year: int, *, split: str = "trainval", no_hard: bool = False) -> BoxDataSet:
    """Pascal VOC detection: ``ImageSets/Main/SPLIT.txt``, ``Annotations/NAME.xml``, ``JPEGImages/NAME.jpg``.

    Every object counts, difficult and truncated ones too, as in the published evaluations of LOST and TokenCut. VOC
    counts pixels from 1 and its boxes include their last pixel, so 1 is subtracted from xmin and ymin alone. Fractions
    in coordinates (some files of VOC2012 have them) are cut off.

    Args:
        root: the folder of that year, ``VOCdevkit``, or the folder that holds ``VOCdevkit``.
        year: 2007 or 2012 (any ``VOC<year>``).
        split: name of the list.
        no_hard: leave out difficult and truncated objects, and images that have no others (the ``VOC_all`` setting).

    Raises:
        FileNotFoundError: if the layout or the list is missing; names the expected path.
        ValueError: if the list is empty or cannot be read.
    """
    root = Path(root)
    tried = [root, root / f"VOC{year}", root / "VOCdevkit" / f"VOC{year}"]
    base = next((folder for folder in tried if (folder / "ImageSets" / "Main").is_dir()), None)
    if base is None or (base == root and (root / f"VOC{year}").is_dir()):
        raise FileNotFoundError(
            f"no ImageSets/Main in {' or '.join(map(str, tried))}; --root is the folder that holds VOCdevkit/VOC{year}"
        )
    names = _names(base / "ImageSets" / "Main" / f"{split}.txt")
    data = BoxDataSet(f"VOC{year} {split}" + (" without difficult and truncated objects" if no_hard else ""))
    for name in names:
        try:
            boxes = _voc_boxes(base / "Annotations" / f"{name}.xml", no_hard)
        except (OSError, ValueError) as error:
            data.skipped.append((name, str(error)))
            continue
        if boxes:
            data.samples.append(Sample(name, base / "JPEGImages" / f"{name}.jpg", tuple(boxes)))
        else:
            data.skipped.append((name, "no objects"))
    return data


def read_coco(
    root: str | os.PathLike[str],
    *,
    annotations: str | os.PathLike[str] | None = None,
    names: str | os.PathLike[str] | None = None,
) -> BoxDataSet:
    """A list of COCO images: COCO20k, a published random subset of train2014.

    Boxes of crowds do not count. The corners (x, y, x + w, y + h) are rounded to whole pixels, halves to even, as in
    the published evaluation.

    Args:
        root: holds ``annotations/instances_train2014.json`` and the images in ``train2014/`` or
            ``images/train2014/``.
        annotations: another annotation file.
        names: text file with the file name of an image in each line; the number after its last ``_`` is the image's
            id. None takes ``coco_20k_filenames.txt`` in ``root`` or in its ``annotations``.

    Raises:
        FileNotFoundError: if a file or folder is missing; names the expected path.
        ValueError: for a file that is not a valid list or not such JSON.
    """
    root = Path(root)
    source = Path(annotations) if annotations is not None else root / "annotations" / "instances_train2014.json"
    listed = [Path(names)] if names is not None else [root / COCO_LIST, root / "annotations" / COCO_LIST]
    list_file = next((path for path in listed if path.is_file()), None)
    if list_file is None:
        raise FileNotFoundError(
            f"no list of images at {' or '.join(map(str, listed))}; take {COCO_LIST} from the repository of LOST or "
            "TokenCut, or give your own with --list"
        )
    folders = [root / "train2014", root / "images" / "train2014"]
    folder = next((path for path in folders if path.is_dir()), None)
    if folder is None:
        raise FileNotFoundError(f"no folder of images at {' or '.join(map(str, folders))}")
    wanted = {name: _coco_id(name, list_file) for name in _names(list_file)}
    files, boxes, problems = _coco_boxes(source, set(wanted.values()))
    data = BoxDataSet(f"COCO {list_file.stem}")
    for name, number in wanted.items():
        if number not in files:
            data.skipped.append((name, f"no image with id {number} in {source}"))
        elif number in problems:
            data.skipped.append((name, problems[number]))
        elif not boxes.get(number):
            data.skipped.append((name, "no objects"))
        else:
            data.samples.append(Sample(name, folder / files[number], tuple(boxes[number])))
    return data


def _names(path: Path) -> list[str]:
    """Names of a list file, the first word of each line."""
    names = read_names(path, "image", "the name of an image", forbidden="\\", first_word=True)
    outside = [name for name in names if ".." in Path(name).parts or Path(name).is_absolute()]
    if outside:
        raise ValueError(f"{path}: {outside[0]!r} leads out of the data set")
    return names


def _voc_boxes(path: Path, no_hard: bool) -> list[Box]:
    if not path.is_file():
        raise FileNotFoundError(f"no annotation at {path}")
    annotation = _parse_xml(path)
    boxes = []
    for number, thing in enumerate(annotation.findall("object")):
        if no_hard and any(thing.findtext(flag, "0").strip() == "1" for flag in ("difficult", "truncated")):
            continue
        corners = [_number(thing.findtext(f"bndbox/{side}"), path, number) for side in ("xmin", "ymin", "xmax", "ymax")]
        x0, y0, x1, y1 = (float(int(value)) for value in corners)
        box = (x0 - 1, y0 - 1, x1, y1)
        if not (box[2] > box[0] and box[3] > box[1]):
            raise ValueError(f"{path}, object {number}: the box {box} is empty")
        boxes.append(box)
    return boxes


def _parse_xml(path: Path) -> ET.Element:
    """The root of an annotation. A document type is refused: entities can grow without bound."""
    if path.stat().st_size > _LARGEST_XML:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; an annotation has no more than {_LARGEST_XML}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
        if "<!DOCTYPE" in text or "<!ENTITY" in text:
            raise ValueError("a document type is not accepted")
        # Parsed as text: the encoding that it declares does not matter.
        return ET.fromstring(re.sub(r"^\s*<\?xml[^>]*\?>", "", text))
    except (ET.ParseError, ValueError) as error:
        raise ValueError(f"{path} is not a valid annotation: {error}") from error


def _number(text: str | None, path: Path, number: int) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not abs(value) <= _FARTHEST:
        raise ValueError(f"{path}, object {number}: expected a number in its bndbox, got {shown(text)}")
    return value


def _coco_id(name: str, source: Path) -> int:
    digits = Path(name).name.split("_")[-1].split(".")[0]
    if not digits.isascii() or not digits.isdigit():
        raise ValueError(f"{source}: {shown(name)} has no image id; expected e.g. COCO_train2014_000000000009.jpg")
    return int(digits)


def _coco_boxes(source: Path, wanted: set[int]) -> tuple[dict[int, str], dict[int, list[Box]], dict[int, str]]:
    """File names, boxes and problems of the wanted images."""
    content = read_json(source, "annotation file")
    files: dict[int, str] = {}
    boxes: dict[int, list[Box]] = {}
    problems: dict[int, str] = {}
    for image in _entries(content, "images", source):
        number, file_name = image.get("id"), image.get("file_name")
        if not isinstance(number, int) or number not in wanted or not isinstance(file_name, str):
            continue
        files[number] = Path(file_name).name
        if not is_name(files[number]):
            problems[number] = f"{source}, image {number}: file_name is {shown(file_name)}"
    for thing in _entries(content, "annotations", source):
        number = thing.get("image_id")
        if not isinstance(number, int) or number not in wanted or thing.get("iscrowd") == 1:
            continue
        where = f"{source}, annotation {shown(thing.get('id'))}"
        try:
            boxes.setdefault(number, []).append(_coco_box(thing.get("bbox"), where))
        except ValueError as error:
            problems[number] = str(error)
    return files, boxes, problems


def _entries(content: Any, key: str, source: Path) -> Iterable[dict[str, Any]]:
    entries = content.get(key) if isinstance(content, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{source} has no list {key!r} of objects; expected COCO's instances format")
    return entries


def _coco_box(bbox: Any, where: str) -> Box:
    numbers: list[Any] = bbox if isinstance(bbox, list) and len(bbox) == 4 else [None]
    # Compared before any arithmetic: integers of JSON have no bound. NaN fails too.
    if not all(isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) <= _FARTHEST for v in numbers):
        raise ValueError(f"{where}: bbox must be four numbers, got {shown(bbox)}")
    x, y, width, height = numbers
    x0, y0, x1, y1 = (float(round(v)) for v in (x, y, x + width, y + height))
    if width <= 0 or height <= 0:
        raise ValueError(f"{where}: the bbox {shown(bbox)} is empty")
    # A box thinner than a pixel is empty after rounding and is never found; the published code keeps it too.
    return x0, y0, x1, y1
