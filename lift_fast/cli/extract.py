"""``lift-fast extract``: dense descriptors of images, one .npz file each."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lift_fast._files import atomic_path, make_folder
from lift_fast._text import one_line, quoted

from .errors import UsageError, as_usage_error, refuse_input, writing
from .kept import FEATURES, check_kept, marks, settings_of
from .options import add_model_options, add_output_options, build_extractor, positive, remarks
from .written import BackgroundWriter

if TYPE_CHECKING:
    from lift_fast.distributed import World
    from lift_fast.extractor import ViTLiFTExtractor
    from lift_fast.image_stream import ImageDescriptors

_DESCRIPTION = """Write the descriptors of each image to an .npz file: descriptors [h, w, C], image_size (height, width
of the loaded image), file_size (of the file), settings (JSON), source and source_bytes (name and length of the image's
file). The folder structure of INPUT is kept. A result is named after its image, with .npz in place of the suffix, or
after it if another image has the same name. Existing files are kept unless --overwrite is given, so an interrupted run
resumes where it stopped; if one has another model, LiFT, size or image, nothing is written (exit status 2). An
unreadable image is reported and skipped (exit status 1). Under torchrun each process takes its share of the images:
torchrun --nproc-per-node 8 -m lift_fast extract ..."""
_EXAMPLE = "example: lift-fast extract photos/ --out features/ --model dino_vits16 --lift lift_dino_vits16.pth"

# Settings that change descriptors: stored with them, and compared before a run resumes.
_SETTINGS = (*FEATURES, "dtype_out")


def add_parser(commands: Any) -> None:
    """Add the command to argparse's ``commands``."""
    parser = commands.add_parser(
        "extract", help="descriptors of images or folders", description=_DESCRIPTION, epilog=_EXAMPLE
    )
    parser.add_argument("input", type=Path, nargs="+", metavar="INPUT", help="images or folders")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for the results, created if missing"
    )
    parser.add_argument(
        "--batch-size",
        type=positive,
        metavar="N",
        help="most images of one size at once (on the CPU as many as fill 448 x 448 pixels, on a GPU 16 at most)",
    )
    parser.add_argument(
        "--dtype-out", default="float32", choices=("float32", "float16"), help="stored as (%(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="recompute existing results")
    add_model_options(parser, longest_side=True)
    add_output_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Extract all images; return the exit status."""
    import torch

    from lift_fast.distributed import join_world

    # The processes only exchange figures at the end. One may finish hours before another with more missing results, and
    # torchrun detects a process that dies.
    with join_world("cpu", timedelta(days=365)) as world:
        if world.size > 1 and torch.cuda.is_available():
            torch.cuda.set_device(world.local_rank % torch.cuda.device_count())
        return _run(arguments, world)


def _run(arguments: argparse.Namespace, world: World) -> int:
    from tqdm import tqdm

    quiet = arguments.quiet or not world.leads
    with as_usage_error():
        jobs = _jobs(arguments.input, arguments.out)
        make_folder(arguments.out)
    for target in jobs.values():
        _check_name(target, arguments.out)
    settings = settings_of(arguments, _SETTINGS)
    if not arguments.overwrite:
        # Every process checks all results, so that none has written when another one refuses.
        for source, target in jobs.items():
            if target.is_file():
                check_kept(target, settings, [source], "extract", "descriptors")
    # Divided before looking for existing results, because other processes write meanwhile.
    jobs = dict(list(jobs.items())[world.rank :: world.size])
    waiting = {source: target for source, target in jobs.items() if arguments.overwrite or not target.is_file()}
    skipped = len(jobs) - len(waiting)
    if skipped and not quiet and world.size == 1:
        print(f"{skipped} of {len(jobs)} results exist already; --overwrite recomputes them", file=sys.stderr)
    failed: list[str] = []
    start = time.perf_counter()
    if waiting:
        extractor = build_extractor(arguments)
        for remark in [] if quiet else remarks(arguments):
            print(remark, file=sys.stderr)
        # None shows it on a terminal only.
        hidden = True if quiet else None
        with tqdm(total=len(waiting), unit="image", disable=hidden, file=sys.stderr) as bar:
            _extract(extractor, waiting, arguments, settings, failed, bar)
    shares = world.gather((len(waiting) - len(failed), skipped, failed))
    if not world.leads:
        return 0
    failed = [message for share in shares for message in share[2]]
    for message in failed:
        print(f"skipped: {one_line(message)}", file=sys.stderr)
    figures = {
        "out": str(arguments.out),
        "written": sum(share[0] for share in shares),
        "kept": sum(share[1] for share in shares),
        "failed": failed,
        "seconds": round(time.perf_counter() - start, 3),
    }
    if arguments.json:
        print(json.dumps(figures))
    elif not arguments.quiet:
        print(
            f"wrote {figures['written']} files to {quoted(arguments.out)} in {figures['seconds']} s"
            + (f", {len(failed)} of {figures['written'] + len(failed)} images were skipped" if failed else ""),
            file=sys.stderr,
        )
    return 1 if failed else 0


def _jobs(inputs: list[Path], out: Path) -> dict[Path, Path]:
    """Each image with its own result file."""
    from lift_fast.images import list_images

    jobs: dict[Path, Path] = {}
    taken: dict[Path, Path] = {}
    for entry in inputs:
        for source in list_images(entry):
            inside = source.relative_to(entry) if entry.is_dir() else Path(source.name)
            target = out / inside.with_suffix(".npz")
            if target in taken and taken[target] != source:
                # a.jpg and a.png, or one name in two inputs: add the suffix, then the input's name.
                inside = inside.with_name(inside.name + ".npz")
                target = out / inside
            if target in taken and taken[target] != source:
                target = out / (entry.name if entry.is_dir() else entry.parent.name) / inside
            if target in taken and taken[target] != source:
                raise UsageError(
                    f"{quoted(source)} and {quoted(taken[target])} would both be written to {quoted(target)}; extract "
                    "them separately"
                )
            taken[target] = source
            jobs[source] = target
    # Only a file given by name may be an image with this suffix.
    for entry in inputs:
        if entry.suffix.lower() == ".npz":
            for target in taken:
                refuse_input("out", target, [entry])
    return jobs


def _check_name(target: Path, out: Path) -> None:
    """Check that the system has no objection to a result's name, such as its length."""
    try:
        target.is_file()
        # Its own folder may be missing, which would be reported first.
        (out / target.name).is_file()
    except OSError as error:
        raise UsageError(
            f"cannot write {quoted(target)}: {error.strerror}; rename the image or give another --out"
        ) from error


def _extract(
    extractor: ViTLiFTExtractor,
    waiting: dict[Path, Path],
    arguments: argparse.Namespace,
    settings: dict[str, Any],
    failed: list[str],
    bar: Any,
) -> None:
    """Write the results of ``waiting``; messages on unusable images go to ``failed``."""
    import torch

    from lift_fast.image_stream import extract_images

    def skip(image: object, message: str) -> None:
        failed.append(message)
        bar.update()

    lengths: dict[Path, int] = {}

    def sources() -> Iterator[Path]:
        """The images, each measured before it is read."""
        for source in waiting:
            with suppress(OSError):
                lengths[source] = source.stat().st_size
            yield source

    def descriptors() -> Generator[ImageDescriptors, None, None]:
        # Not around the loop below, whose errors are of another kind.
        with as_usage_error():
            yield from extract_images(
                sources(),
                extractor=extractor,
                size=arguments.size,
                max_side=arguments.max_side,
                lift_iter=arguments.iterations,
                batch_size=arguments.batch_size,
                dtype=getattr(torch, arguments.dtype_out),
                on_error=skip,
            )

    jobs = list(waiting.items())
    with as_usage_error():
        for folder in dict.fromkeys(target.parent for target in waiting.values()):
            make_folder(folder)
    with closing(descriptors()) as results, BackgroundWriter(bar.update) as writer:
        for found in results:
            source, target = jobs[found.position]
            length = lengths.pop(source, None)
            if length is None or _differs(source, length):
                # Which of both was read is not known.
                skip(source, f"{quoted(source)} changed while it was read; run the same command again")
                continue
            writer.put(found.descriptors.nbytes, partial(_write, found, source, length, target, settings))


def _differs(source: Path, length: int) -> bool:
    """Whether the file has another length now; one that is gone was read before."""
    try:
        return source.stat().st_size != length
    except OSError:
        return False


def _write(found: ImageDescriptors, source: Path, length: int, target: Path, settings: dict[str, Any]) -> None:
    import numpy as np

    with (
        writing(target, "the files written so far are kept"),
        atomic_path(target) as temporary,
        temporary.open("wb") as file,
    ):
        np.savez(
            file,
            descriptors=found.descriptors.numpy(),
            image_size=np.array(found.image_size),
            file_size=np.array(found.file_size),
            **marks(settings, [source], [length]),
        )
