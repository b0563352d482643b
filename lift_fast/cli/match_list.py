"""``lift-fast match --pairs``: many pairs with one set of networks, each with files of its own, resumable."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lift_fast._files import make_folder
from lift_fast._text import one_line, quoted

from . import match_pair
from .errors import UsageError, as_usage_error
from .kept import check_kept, settings_of
from .match_export import FLOW, check_exports, image_name, none_exported, totals, write_exports
from .options import build_extractor, remarks
from .pair_list import name_results, read_pairs


class _Job(NamedTuple):
    """A pair, and the files for its results; the second and the third if they are wanted."""

    line: int
    names: tuple[str, str]
    images: tuple[Path, Path]
    numbers: Path
    sheet: Path | None
    flow: Path | None


def run_list(arguments: argparse.Namespace) -> int:
    """Match the pairs of the list; return the exit status."""
    from tqdm import tqdm

    exports = [path for path in arguments.export if path != Path(FLOW)]
    out = Path("matches") if arguments.out is None else arguments.out
    if out.suffix.lower() in match_pair.SHEETS and not out.is_dir():
        raise UsageError(
            f"--out {quoted(out)}: with --pairs this is the folder for all results; --sheets sets the format"
        )
    with as_usage_error():
        jobs, failed = _jobs(arguments, out)
        make_folder(out)
    check_exports(
        exports,
        [job.names for job in jobs],
        (arguments.pairs, arguments.weights, arguments.lift, *{path for job in jobs for path in job.images}),
    )
    settings = settings_of(arguments, match_pair.SETTINGS)
    waiting = list(jobs)
    if not arguments.overwrite:
        waiting = [job for job in jobs if not _is_kept(job, settings)]
    quiet = arguments.quiet or arguments.json
    kept = len(jobs) - len(waiting)
    if kept and not quiet:
        print(f"{kept} of {len(jobs)} results exist already; --overwrite recomputes them", file=sys.stderr)
    figures: list[dict[str, Any]] = []
    lost: set[_Job] = set()
    start = time.perf_counter()
    seconds = {"imports": start - arguments.started}
    if waiting:
        from lift_fast.map_cache import MapCache

        extractor, cache = build_extractor(arguments), MapCache()
        seconds["model"] = time.perf_counter() - start
        for remark in [] if quiet else remarks(arguments):
            print(remark, file=sys.stderr)
        # None shows it on a terminal only.
        hidden = True if arguments.quiet else None
        for job in tqdm(waiting, unit="pair", disable=hidden, file=sys.stderr):
            try:
                found = _match(arguments, extractor, job, cache)
            except (ValueError, OSError) as error:
                failed.append(f"line {job.line}: {error}")
                lost.add(job)
                continue
            for name, value in found["seconds"].items():
                seconds[name] = seconds.get(name, 0.0) + value
            found["seconds"] = {name: round(value, 4) for name, value in found["seconds"].items()}
            figures.append(dict(zip("ab", job.names, strict=True)) | found)
    written, exported = _export(arguments, exports, [job for job in jobs if job not in lost], {*waiting} - lost)
    for pair in [] if quiet else figures:
        if pair["warning"]:
            print(f"warning: {one_line(pair['a'])} and {one_line(pair['b'])}: {pair['warning']}", file=sys.stderr)
    if (line := none_exported(arguments, exported)) and not quiet:
        print(line, file=sys.stderr)
    for message in failed:
        print(f"skipped: {one_line(message)}", file=sys.stderr)
    total = round(time.perf_counter() - start, 3)
    if arguments.json:
        document = {
            "out": str(out),
            "exports": written,
            "exported": totals(exported),
            "pairs": figures,
            "written": len(figures),
            "kept": kept,
            "failed": failed,
            "seconds": total,
        }
        print(json.dumps(document))
    elif not arguments.quiet:
        if arguments.timing:
            seconds["total"] = time.perf_counter() - arguments.started
            print("\n".join(f"{name:10} {value:8.3f} s" for name, value in seconds.items()))
        count = f"{len(figures)} pair{'s' * (len(figures) != 1)}"
        print(
            f"matched {count} in {total} s, results in {', '.join(map(quoted, (out, *(exports if written else []))))}"
            + (f"; {len(failed)} of {len(figures) + len(failed)} were skipped" if failed else ""),
            file=sys.stderr,
        )
    return 1 if failed else 0


def _jobs(arguments: argparse.Namespace, out: Path) -> tuple[list[_Job], list[str]]:
    """The pairs of the list, and a message for each line that holds none.

    Raises:
        UsageError: if no image exists, or a result would replace an image or a network.
    """
    pairs, failed = read_pairs(arguments.pairs)
    root = arguments.pairs.parent if arguments.root is None else arguments.root
    if not any(os.path.exists(root / name) for pair in pairs for name in (pair.a, pair.b)):
        raise UsageError(
            f"no image of {quoted(arguments.pairs)} exists, the first would be {quoted(root / pairs[0].a)}; give "
            "--root, the folder from which its names start"
        )
    ending = None if arguments.sheets == "none" else f".{arguments.sheets or 'png'}"
    jobs = []
    for pair, stem in zip(pairs, name_results(pairs), strict=True):
        images = root / pair.a, root / pair.b
        job = _Job(
            line=pair.line,
            names=(image_name(images[0], root), image_name(images[1], root)),
            images=images,
            numbers=out / f"{stem}.npz",
            sheet=None if ending is None else out / f"{stem}{ending}",
            flow=out / f"{stem}{FLOW}" if Path(FLOW) in arguments.export else None,
        )
        jobs.append(job)
    inputs = {_file(path) for job in jobs for path in job.images}
    inputs |= {_file(path) for path in (arguments.pairs, arguments.weights, arguments.lift) if path is not None}
    for job in jobs:
        for path in (job.numbers, job.sheet, job.flow):
            found = None if path is None else _file(path)
            if found is not None and found in inputs:
                raise UsageError(f"--out: {quoted(path)} is an input, which would be overwritten; give another folder")
    return jobs, failed


def _file(path: str | Path) -> tuple[int, int] | None:
    """What is the same for all names of a file; None if there is none."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino


def _is_kept(job: _Job, settings: Mapping[str, Any]) -> bool:
    if not job.numbers.is_file():
        return False
    check_kept(job.numbers, settings, job.images, "match --pairs", "matches")
    return job.sheet is None or job.sheet.is_file()


def _match(arguments: argparse.Namespace, extractor: Any, job: _Job, cache: Any) -> dict[str, Any]:
    """Match and write a pair; return its figures."""
    matches = match_pair.match(arguments, extractor, *job.images, cache)
    origins = match_pair.origin(arguments, extractor, matches, job.images)
    return match_pair.write(arguments, matches, job.sheet, job.numbers, origins)


def _export(
    arguments: argparse.Namespace, exports: list[Path], jobs: list[_Job], new: set[_Job]
) -> tuple[list[str], dict[str, list[int]]]:
    """Write the files for other tools from the numbers of all pairs; return them, and each pair's matches in them."""
    if not (arguments.export and jobs):
        return [], {}
    import numpy as np

    from lift_fast.match_files import ARRAYS, MatchedPair

    def read(path: Path, names: Sequence[str] = ARRAYS) -> dict[str, Any]:
        try:
            with np.load(path) as data:
                return {name: data[name] for name in names if name != "inliers" or name in data}
        except Exception as error:
            raise UsageError(f"{quoted(path)} cannot be read: {one_line(error)}; --overwrite makes it anew") from error

    matched: dict[tuple[str, str], MatchedPair] = {}
    counts: dict[str, list[int]] = {}
    for job in jobs:
        first, second = read(job.numbers, ["orientation"])["orientation"].tolist()
        matched[job.names] = MatchedPair(job.names, partial(read, job.numbers), (first, second))
        if job.flow is not None and (job in new or not job.flow.is_file()):
            counts |= write_exports([job.flow], [matched[job.names]], 1)
    counts |= write_exports(exports, list(matched.values()), arguments.export_cell or arguments.step)
    flows = [job.flow for job in jobs if job.flow is not None]
    return [*map(str, exports), *map(str, flows)], counts
