"""Matches in the files of other tools: COLMAP's text, hloc's HDF5, and Middlebury's ``.flo`` for the dense field.

COLMAP and hloc know key points by their number, so that the matches of several pairs meet in one image. Positions of
one image that fall into one cell become one key point, as in hloc's ``match_dense``.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ._files import atomic_path
from ._text import quoted, shown
from .checks import check_whole

if TYPE_CHECKING:
    import h5py

Arrays = Mapping[str, npt.NDArray[Any]]
# Matches written, by the names of the pair.
_Counts = dict[tuple[str, str], int]

SUFFIXES = (".txt", ".h5", ".hdf5", ".flo")
ARRAYS = (
    *("xy_a", "xy_b", "confidence", "valid", "inliers", "covered_a"),
    *("size_a", "size_b", "loaded_size_a", "loaded_size_b"),
)
"""What is read of a pair; ``inliers`` may be missing."""
_SIFT_CHANNELS = 128
_SPACES = {*" \t\n\v\f\r"}
# Middlebury's mark, and its value for unknown flow: whatever exceeds 1e9.
_FLOW_MARK, _UNKNOWN = b"PIEH", 1e10
_STRIP_PIXELS = 1 << 20
# Each temporary file is held open, and a process may open some thousand.
_FILES_AT_ONCE = 128
# Confidence weighs positions; one of 0 still is somewhere.
_LEAST_WEIGHT = 1e-6


@dataclass(frozen=True)
class MatchedPair:
    """The matches of two images for :func:`export_matches`."""

    names: tuple[str, str]
    """Of the images, relative to the folder of all, with forward slashes."""
    load: Callable[[], Arrays]
    """The arrays of :meth:`lift_fast.image_matching.ImageMatches.numpy`; called twice."""
    orientations: tuple[int, int] = (1, 1)
    """EXIF orientation (1 to 8) of the files. COLMAP and hloc disregard it: their positions are in pixels as stored."""


class _Chosen(NamedTuple):
    """The matches of a pair, at most one for each cell of either image."""

    cells: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
    xy: tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]
    scores: npt.NDArray[np.float64]


class _KeyPoints:
    """Key points of an image: cells in rising order, and sums of weighted positions and of weights, ``[N, 3]``."""

    def __init__(self) -> None:
        self.cells = np.zeros(0, np.int64)
        self.sums = np.zeros((0, 3))

    def add(self, cells: npt.NDArray[np.int64], xy: npt.NDArray[np.float64], scores: npt.NDArray[np.float64]) -> None:
        weights = np.maximum(scores, _LEAST_WEIGHT)[:, None]
        self.cells, where = np.unique(np.concatenate([self.cells, cells]), return_inverse=True)
        sums = np.zeros((len(self.cells), 3))
        np.add.at(sums, where, np.concatenate([self.sums, np.concatenate([xy * weights, weights], axis=1)]))
        self.sums = sums

    def positions(self) -> npt.NDArray[np.float32]:
        """``[N, 2]`` (x, y), integers at pixel centres."""
        return (self.sums[:, :2] / self.sums[:, 2:]).astype(np.float32)


def check_export(path: str | os.PathLike[str], names: Sequence[tuple[str, str]]) -> list[Path]:
    """Check before the work that :func:`export_matches` can write these pairs; return its files and folders.

    Raises:
        ImportError: if the format needs h5py, which is missing.
        TypeError: for names that are not strings.
        ValueError: for an ending that is none of :data:`SUFFIXES`, or names or a number of pairs that the format cannot
            hold.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"matches are exported to {', '.join(SUFFIXES)} (by the ending), got {quoted(path)}")
    if not names:
        raise ValueError("pairs must hold at least one pair, got none")
    for pair in names:
        if not isinstance(pair, tuple) or [type(name) for name in pair] != [str, str]:
            raise TypeError(f"names must be two strings, got {shown(pair)}")
        if any("\0" in name for name in pair):
            raise ValueError(f"names cannot hold a zero byte, got {shown(pair)}; give those of files")
    if suffix == ".flo":
        if len(names) != 1:
            raise ValueError(f"a .flo file holds one pair, got {len(names)}; write a file for each")
        return [path]
    if suffix == ".txt":
        for name in sorted({name for pair in names for name in pair}):
            _check_colmap_name(name)
        if all(a == b for a, b in names):
            only = quoted(names[0][0])
            raise ValueError(f"COLMAP matches no image with itself, and {only} has no other; export to .h5")
        return [path, path.with_name(f"{path.stem}_keypoints")]
    groups: dict[str, tuple[str, str]] = {}
    for pair in names:
        first = groups.setdefault(_hloc_pair(pair), pair)
        if first != pair:
            one, other = (" ".join(map(quoted, each)) for each in (first, pair))
            group = quoted(_hloc_pair(pair))
            raise ValueError(f"hloc has one name, {group}, for {one} and for {other}; rename an image")
    _h5py()
    return [path, path.with_name(f"{path.stem}_keypoints{path.suffix}")]


def names_of(path: str | os.PathLike[str], files: tuple[str | None, str | None]) -> tuple[str, str]:
    """Names in the export ``path`` of two images: relative to the folder that holds both.

    Raises:
        ValueError: if the format needs names and an image has no file.
    """
    a, b = files
    if a is None or b is None:
        if Path(path).suffix.lower() in SUFFIXES[:-1]:
            raise ValueError(
                f"{quoted(path)} names the images, and {'A' if a is None else 'B'} was not given as a path; give "
                'names=("a.jpg", "b.jpg"), relative to the folder of all images'
            )
        return "a", "b"
    root = os.path.commonpath([Path(file).absolute().parent for file in (a, b)])
    return Path(os.path.relpath(a, root)).as_posix(), Path(os.path.relpath(b, root)).as_posix()


def export_matches(path: str | os.PathLike[str], pairs: Sequence[MatchedPair], cell: int = 1) -> list[int]:
    """Write matches in the format of the path's ending; old files stay as they are until the new ones are whole.

    The valid matches are written; of verified ones (``inliers``), the inliers.

    * ``.txt``: ``path`` is a match list for COLMAP's ``matches_importer --match_type raw``, and the folder
      ``<stem>_keypoints`` holds a file for each image, for ``feature_importer --import_path``. Positions are COLMAP's:
      the centre of the first pixel is (0.5, 0.5). Descriptors are 0.
    * ``.h5``, ``.hdf5``: ``path`` holds hloc's matches (``name_a/name_b``, with - for slashes: ``matches0`` int32,
      ``matching_scores0`` float16), and ``<stem>_keypoints.h5`` its features (by name: ``keypoints [N, 2]`` float32,
      integers at pixel centres).
    * ``.flo``: one pair; displacements from A to B, float32 in pixels of the original images, for each pixel of the
      original, upright A: that of the nearest matched pixel, and 1e10 (unknown) where this one is not valid or the
      descriptors cover no pixel.

    Args:
        path: see above.
        pairs: at least one.
        cell: for key points: positions of one image within a cell of ``cell`` x ``cell`` loaded pixels become one, at
            their mean weighted by confidence. Of the matches between two images one is kept for each cell of either,
            the most confident. 1 moves nothing.

    Returns:
        For each pair the number of matches written.

    Raises:
        FileNotFoundError: if the path's folder is missing.
        ImportError: if h5py is missing, which HDF5 needs.
        OSError: if the files cannot be written.
        TypeError: for names that are not strings.
        ValueError: for another ending, names that a format cannot hold, more than one pair for ``.flo``, matches of
            given points for ``.flo``, and a ``cell`` or an orientation out of range.
    """
    files = check_export(path, [pair.names for pair in pairs])
    cell = check_whole("cell", cell, 1, 1 << 20)
    suffix = files[0].suffix.lower()
    if suffix == ".flo":
        return [_write_flow(files[0], pairs[0].load())]
    write = _write_colmap if suffix == ".txt" else _write_hloc
    counts = write(files[0], files[1], pairs, cell)
    return [counts.get(pair.names, 0) for pair in pairs]


def _choose(pair: MatchedPair, arrays: Arrays, cell: int) -> _Chosen:
    keep = arrays["valid"] & arrays["inliers"] if "inliers" in arrays else arrays["valid"]
    scores = arrays["confidence"][keep].astype(np.float64)
    cells, positions = [], []
    for side, orientation in zip("ab", pair.orientations, strict=True):
        xy = arrays[f"xy_{side}"][keep].astype(np.float64)
        size, loaded = arrays[f"size_{side}"][::-1], arrays[f"loaded_size_{side}"][::-1]
        at = np.rint((xy + 0.5) * (loaded / size) - 0.5).astype(np.int64) // cell
        check_whole("orientation", orientation, 1, 8)
        cells.append(at[:, 1] * int(loaded[0]) + at[:, 0])
        positions.append(_as_stored(xy, size, orientation))
    order = np.argsort(-scores, kind="stable")
    best = np.zeros(len(order), bool)
    firsts = [order[np.unique(each[order], return_index=True)[1]] for each in cells]
    best[np.intersect1d(firsts[0], firsts[1])] = True
    return _Chosen((cells[0][best], cells[1][best]), (positions[0][best], positions[1][best]), scores[best])


def _as_stored(xy: npt.NDArray[np.float64], size: npt.NDArray[Any], orientation: int) -> npt.NDArray[np.float64]:
    """Positions in the upright image of ``size`` (width, height), in the pixels of the file."""
    x, y = xy[:, 0], xy[:, 1]
    right, down = size[0] - 1 - x, size[1] - 1 - y
    turned = [(x, y), (right, y), (right, down), (x, down), (y, x), (y, right), (down, right), (down, x)]
    return np.stack(turned[orientation - 1], axis=1)


def _key_points(pairs: Sequence[MatchedPair], cell: int) -> dict[str, _KeyPoints]:
    found: dict[str, _KeyPoints] = {}
    sizes: dict[str, list[list[int]]] = {}
    for pair in pairs:
        arrays = pair.load()
        chosen = _choose(pair, arrays, cell)
        for name, side, cells, xy in zip(pair.names, "ab", chosen.cells, chosen.xy, strict=True):
            size = [arrays[f"{kind}_{side}"].tolist() for kind in ("size", "loaded_size")]
            if sizes.setdefault(name, size) != size:
                raise ValueError(
                    f"{quoted(name)} is {size[0]} pixels, loaded at {size[1]}, in one pair, and {sizes[name][0]} at "
                    f"{sizes[name][1]} in another; give each image its own name, and match all pairs at one size"
                )
            found.setdefault(name, _KeyPoints()).add(cells, xy, chosen.scores)
    return found


def _numbered(
    pairs: Sequence[MatchedPair], points: Mapping[str, _KeyPoints], cell: int
) -> Iterator[tuple[tuple[str, str], npt.NDArray[np.int64], npt.NDArray[np.float64]]]:
    """Names, numbers of key points ``[M, 2]`` in rising order of A's, and scores ``[M]`` of each pair."""
    for pair in pairs:
        chosen = _choose(pair, pair.load(), cell)
        numbers = np.stack(
            [np.searchsorted(points[name].cells, cells) for name, cells in zip(pair.names, chosen.cells, strict=True)],
            axis=1,
        )
        order = np.argsort(numbers[:, 0])
        yield pair.names, numbers[order], chosen.scores[order]


def _check_colmap_name(name: str) -> None:
    if _SPACES & {*name}:
        raise ValueError(
            f"COLMAP's match lists cannot hold {quoted(name)}, a name with white space; rename the image, or export to "
            ".h5"
        )
    parts = name.split("/")
    if not all(parts) or {".", ".."} & {*parts} or Path(name).is_absolute():
        raise ValueError(
            f"COLMAP names images relative to one folder, which cannot be said of {quoted(name)}; give the folder that "
            "holds all images (--root)"
        )


def _write_colmap(path: Path, folder: Path, pairs: Sequence[MatchedPair], cell: int) -> _Counts:
    counts: _Counts = {}
    pairs = [pair for pair in pairs if pair.names[0] != pair.names[1]]
    points = _key_points(pairs, cell)
    with ExitStack() as stack:
        listed = stack.enter_context(atomic_path(path))
        with listed.open("wb") as file:
            for names, numbers, _ in _numbered(pairs, points, cell):
                file.write(b" ".join(map(os.fsencode, names)) + b"\n")
                np.savetxt(file, numbers, fmt="%d")
                counts[names] = len(numbers)
                file.write(b"\n")
        for batch in _batches(sorted(points)):
            with ExitStack() as written:
                for name in batch:
                    target = folder / f"{name}.txt"
                    target.parent.mkdir(parents=True, exist_ok=True)
                    positions = points[name].positions() + np.float32(0.5)
                    rest = " 1 0" + " 0" * _SIFT_CHANNELS + "\n"
                    with written.enter_context(atomic_path(target)).open("w", encoding="ascii", newline="\n") as file:
                        file.write(f"{len(positions)} {_SIFT_CHANNELS}\n")
                        # Nine digits are every float32.
                        file.writelines(f"{x:.9g} {y:.9g}{rest}" for x, y in positions.tolist())
    return counts


def _batches(names: Sequence[str]) -> Iterator[list[str]]:
    return ([name for _, name in batch] for _, batch in groupby(enumerate(names), lambda at: at[0] // _FILES_AT_ONCE))


def _write_hloc(path: Path, features: Path, pairs: Sequence[MatchedPair], cell: int) -> _Counts:
    h5py = _h5py()
    counts: _Counts = {}
    points = _key_points(pairs, cell)
    # The temporary files are locked already, and HDF5 would not open them.
    with atomic_path(features) as first, atomic_path(path) as second:
        with h5py.File(first, "w", locking=False) as file:
            for name, found in points.items():
                _put(file, name, {"keypoints": found.positions()})
        with h5py.File(second, "w", locking=False) as file:
            for names, numbers, scores in _numbered(pairs, points, cell):
                matches = np.full(len(points[names[0]].cells), -1, np.int32)
                confidence = np.zeros(len(matches), np.float16)
                matches[numbers[:, 0]], confidence[numbers[:, 0]] = numbers[:, 1], scores
                arrays = {"matches0": matches, "matching_scores0": confidence}
                _put(file, _hloc_pair(names), arrays, compression="gzip", compression_opts=1)
                counts[names] = len(numbers)
    return counts


def _hloc_pair(names: tuple[str, str]) -> str:
    return "/".join(name.replace("/", "-") for name in names)


def _put(file: h5py.File, name: str, arrays: Mapping[str, Any], **options: Any) -> None:
    try:
        group = file.require_group(name)
        for key, array in arrays.items():
            group.create_dataset(key, data=array, **options)
    except (ValueError, TypeError) as error:
        raise ValueError(f"HDF5 cannot hold {quoted(name)} here: {error}; rename the image") from error


def _h5py() -> Any:
    try:
        import h5py
    except ImportError as error:
        raise ImportError(
            f'HDF5 files need h5py, which cannot be imported ({error}): pip install "lift_fast[export]"'
        ) from error
    return h5py


def _write_flow(path: Path, arrays: Arrays) -> int:
    valid = arrays["valid"] & arrays["inliers"] if "inliers" in arrays else arrays["valid"]
    if valid.ndim != 2:
        raise ValueError("a .flo file needs dense matches; leave points=None in match_images, with step=N for fewer")
    height, width = arrays["size_a"].tolist()
    xy_a = arrays["xy_a"].astype(np.float64)
    flow = np.where(valid[..., None], arrays["xy_b"] - xy_a, _UNKNOWN).astype("<f4")
    scale = arrays["size_a"] / arrays["loaded_size_a"]
    top, left, tall, wide = arrays["covered_a"]
    rows, columns = _nearest(xy_a[:, 0, 1], height), _nearest(xy_a[0, :, 0], width)
    inside_y, inside_x = (
        _covered(count, start * by, end * by)
        for count, start, end, by in ((height, top, top + tall, scale[0]), (width, left, left + wide, scale[1]))
    )
    strip = max(1, _STRIP_PIXELS // width)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(_FLOW_MARK + struct.pack("<ii", width, height))
        for start in range(0, height, strip):
            part = slice(start, start + strip)
            pixels = flow[rows[part]][:, columns]
            pixels[~(inside_y[part, None] & inside_x)] = _UNKNOWN
            file.write(pixels.tobytes())
    return int(valid.sum())


def _nearest(centres: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.int64]:
    """For each of ``count`` pixels the nearest of ``centres``, which rise."""
    return np.searchsorted((centres[1:] + centres[:-1]) / 2, np.arange(count))


def _covered(count: int, start: float, end: float) -> npt.NDArray[np.bool_]:
    """Which of ``count`` pixels have their centre in ``start`` to ``end``, measured from the first pixel's edge."""
    centres = np.arange(count) + 0.5
    return (centres >= start) & (centres < end)
