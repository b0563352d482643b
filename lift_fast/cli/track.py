"""``lift-fast track``: objects and points of a first frame through a video."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lift_fast._text import one_line, quoted, shown

from .errors import UsageError, as_usage_error, check_output, writing
from .kept import FEATURES, settings_of
from .options import (
    add_model_options,
    add_output_options,
    build_extractor,
    positive,
    remarks,
    whole,
)

if TYPE_CHECKING:
    from lift_fast.tracking import ObjectMask, Video

    from .track_results import Results

_DESCRIPTION = """Follow the objects of a mask (--mask), points (--points), or both from the first frame through a
video. FRAMES is a folder with an image for each frame, taken in natural order, an animated GIF, WebP, PNG or TIFF, or a
video file (with PyAV: pip install "lift_fast[video]"). OUT/masks gets an indexed PNG for each frame, whose values
number the objects, OUT/points.csv each point in each frame, OUT/overlay both drawn over the frames. An interrupted run
resumes where it stopped, with the results of one that was not interrupted. A frame that cannot be read or has another
size is named and left out (exit status 1)."""
_EXAMPLE = (
    "examples: lift-fast track frames/ --mask first.png --out tracked; "
    "lift-fast track clip.mp4 --points 320,180 400,200 --out tracked --movie tracked/overlay.mp4; "
    "lift-fast track frames/ --mask first.png --model dino_vits16 --lift lift_dino_vits16.pth"
)
# What results depend on, next to the frames, the mask and the points.
_SETTINGS = (*FEATURES, "queue", "radius", "topk", "temperature", "binary", "overlay")
_MOVIES = (".mp4", ".webp", ".gif")


def _radius(text: str) -> int | None:
    """argparse type: cells, or ``none``."""
    return None if text.lower() == "none" else whole(text)


def _rate(text: str) -> float:
    """argparse type: frames per second."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    # A frame of a GIF lasts at most 655 seconds.
    if not 0.01 <= value <= 1000:
        raise argparse.ArgumentTypeError(f"expected frames per second, 0.01 to 1000, got {text!r}")
    return value


def add_parser(commands: Any) -> None:
    """Add the command to argparse's ``commands``."""
    parser = commands.add_parser(
        "track", help="follow objects and points through a video", description=_DESCRIPTION, epilog=_EXAMPLE
    )
    parser.add_argument("frames", type=Path, metavar="FRAMES", help="folder of frames, animated image or video file")
    parser.add_argument(
        "--mask",
        type=Path,
        metavar="FIRST",
        help="objects of the first frame, in its size: an indexed or grey PNG whose values number them (0 is "
        "background, 255 void in an indexed one), or an image with each object in its own colour on black",
    )
    parser.add_argument(
        "--binary",
        action="store_true",
        help="one object: whatever is brighter than half of the mask's brightest pixel (for soft edges and JPEG)",
    )
    parser.add_argument(
        "--points",
        nargs="+",
        metavar="X,Y",
        help="points of the first frame in its pixels, or one CSV or JSON file of them",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("tracked"), metavar="DIR", help="folder for the results (%(default)s)"
    )
    parser.add_argument(
        "--overlay", default="jpg", choices=("jpg", "png", "none"), help="format of the overlays (%(default)s)"
    )
    parser.add_argument(
        "--movie", type=Path, metavar="FILE", help="join the overlays to a film: .mp4 (with PyAV), .webp or .gif"
    )
    parser.add_argument("--fps", type=_rate, metavar="N", help="frames per second of the film (the video's, else 24)")
    parser.add_argument("--overwrite", action="store_true", help="start over, in place of existing results")
    numbers = parser.add_argument_group("propagation")
    numbers.add_argument("--queue", type=whole, default=7, metavar="N", help="last frames as context (%(default)s)")
    numbers.add_argument(
        "--radius", type=_radius, default=12, metavar="N", help="of the neighbourhood in cells, or none (%(default)s)"
    )
    numbers.add_argument("--topk", type=positive, default=5, metavar="K", help="cells to average (%(default)s)")
    numbers.add_argument("--temperature", type=float, default=0.1, metavar="T", help="of their weights (%(default)s)")
    add_model_options(parser, size_note=", rounded to whole patches", longest_side=True)
    add_output_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Track; return the exit status."""
    if arguments.mask is None and not arguments.points:
        raise UsageError("nothing to follow; give --mask FIRST.png, --points X,Y ..., or both")
    if arguments.binary and arguments.mask is None:
        raise UsageError("--binary is about the mask; give --mask")
    if arguments.movie is not None:
        if arguments.movie.suffix.lower() not in _MOVIES:
            raise UsageError(f"--movie must end in {', '.join(_MOVIES)}, got {quoted(arguments.movie)}")
        if arguments.overlay == "none":
            raise UsageError("--movie joins the overlays; leave out --overlay none")
    from lift_fast._files import make_folder
    from lift_fast.locks import reserved
    from lift_fast.tracking import open_video, read_objects

    with ExitStack() as stack:
        with as_usage_error():
            mask = None if arguments.mask is None else read_objects(arguments.mask, arguments.binary)
            names, points = _points(arguments.points)
            video = open_video(arguments.frames, [path for path in (arguments.mask,) if path is not None])
            files = [Path(arguments.points[0])] if arguments.points and len(arguments.points) == 1 else []
            files += [path for path in (arguments.frames, arguments.mask) if path is not None]
            _keep_apart(arguments.out, files)
            make_folder(arguments.out)
            stack.enter_context(reserved(arguments.out, "tracking"))
        if arguments.movie is not None:
            if video.files and arguments.movie.resolve().parent == arguments.frames.resolve():
                raise UsageError(
                    f"--movie {quoted(arguments.movie)} would lie among the frames, and may be taken for one; give "
                    "another folder"
                )
            inputs = (arguments.mask, arguments.weights, arguments.lift, arguments.frames)
            check_output("movie", arguments.movie, inputs)
        return _run(arguments, video, mask, names, points)


def _run(
    arguments: argparse.Namespace,
    video: Video,
    mask: ObjectMask | None,
    names: list[str],
    points: list[tuple[float, float]],
) -> int:
    from tqdm import tqdm

    from lift_fast.tracking import FrameError, Tracker
    from lift_fast.tracking.frames import read_ahead

    from .track_results import Results

    say = (lambda *_: None) if arguments.quiet or arguments.json else lambda text: print(text, file=sys.stderr)
    start = time.perf_counter()
    frames = video.frames()
    first = next(frames, None)
    frames.close()
    if first is None:
        raise UsageError(f"{quoted(arguments.frames)} holds no frame")
    if isinstance(first.image, FrameError):
        raise UsageError(f"{first.image}; it is the first frame, from which the others follow")
    results = Results(
        arguments.out, _settings(arguments, video, mask, names, points), arguments.overlay, names, video.names
    )
    if mask is not None:
        results.palette = mask.palette
    with as_usage_error():
        results.open(arguments.overwrite)
    if results.complete:
        say(f"{quoted(arguments.out)} is complete already; --overwrite tracks again")
    else:
        extractor = build_extractor(arguments)
        for remark in remarks(arguments):
            say(remark)
        with as_usage_error():
            tracker = Tracker(
                first.image,
                None if mask is None else mask.numbers,
                points or None,
                extractor=extractor,
                size=arguments.size,
                max_side=arguments.max_side,
                lift_iter=arguments.iterations,
                queue=arguments.queue,
                radius=arguments.radius,
                topk=arguments.topk,
                temperature=arguments.temperature,
            )
            results.begin(tracker)
        if tracker.lost:
            say(f"too small for the descriptor map, and left out: objects {tracker.lost}; a larger --size follows them")
        if results.next:
            say(f"resuming at frame {results.next}; the frames before are kept")
        else:
            results.add(first.name, tracker.first)
        # None shows it on a terminal only.
        hidden = True if arguments.quiet else None
        bar = tqdm(total=video.count, initial=results.next, unit="frame", disable=hidden, file=sys.stderr)
        with bar:
            for frame in read_ahead(video.frames(results.next)):
                try:
                    if isinstance(frame.image, FrameError):
                        raise frame.image
                    found = tracker.step(frame.image)
                except FrameError as error:
                    results.leave_out(str(error) if isinstance(frame.image, FrameError) else f"{frame.name}: {error}")
                else:
                    results.add(frame.name, found)
                bar.update()
                results.save_now_and_then()
        results.finish()
    figures = results.figures()
    for message in figures["failed"]:
        print(f"left out: {one_line(message)}", file=sys.stderr)
    if arguments.movie is not None:
        _write_movie(arguments, results, video.rate)
        figures["movie"] = str(arguments.movie)
    figures["seconds"] = round(time.perf_counter() - start, 3)
    if arguments.json:
        print(json.dumps(figures))
    else:
        for text in results.summary():
            say(text)
        say(f"wrote {figures['written']} frames to {quoted(arguments.out)} in {figures['seconds']} s")
    return 1 if figures["failed"] else 0


def _keep_apart(out: Path, inputs: Iterable[Path]) -> None:
    """Refuse inputs that lie where the results go, which are replaced as a whole."""
    places = {(out / name).resolve() for name in ("masks", "overlay", "points.csv")}
    for path in inputs:
        if places & {path.resolve(), path.resolve().parent}:
            raise UsageError(f"{quoted(path)} lies where results of --out {quoted(out)} go; give another --out")


def _write_movie(arguments: argparse.Namespace, results: Results, rate: float | None) -> None:
    from lift_fast.tracking.movie import write_movie

    with as_usage_error(), writing(arguments.movie):
        write_movie(arguments.movie, results.overlays(), arguments.fps or max(rate or 24.0, 0.01))


def _points(given: list[str] | None) -> tuple[list[str], list[tuple[float, float]]]:
    """Identifiers and places of ``--points``."""
    from lift_fast.tracking.point_files import read_points

    if not given:
        return [], []
    if len(given) == 1 and "," not in given[0]:
        return read_points(given[0])
    points = []
    for text in given:
        try:
            x, y = map(float, text.split(","))
        except ValueError:
            if len(given) == 1:
                # A file whose name contains a comma.
                return read_points(text)
            raise UsageError(f"--points takes X,Y ... or one CSV or JSON file, got {shown(text)}") from None
        points.append((x, y))
    return [str(number) for number in range(len(points))], points


def _settings(
    arguments: argparse.Namespace,
    video: Video,
    mask: ObjectMask | None,
    names: list[str],
    points: list[tuple[float, float]],
) -> dict[str, Any]:
    """What the results depend on, as JSON values."""
    chosen = settings_of(arguments, _SETTINGS)
    if not (arguments.random_weights or arguments.random_lift):
        chosen["seed"] = None
    for name in ("weights", "lift"):
        if chosen[name] is not None and Path(chosen[name]).is_file():
            chosen[name] = [Path(chosen[name]).name, Path(chosen[name]).stat().st_size]
    sources = video.files or (video.path,)
    chosen["frames"] = _digest(f"{path.name} {_bytes(path)}" for path in sources)
    chosen["mask"] = None if mask is None else _digest([mask.numbers.shape, mask.numbers.tobytes(), mask.palette])
    chosen["points"] = _digest([names, points]) if points else None
    return chosen


def _bytes(path: Path) -> int:
    # Reading a file that has gone reports it.
    return path.stat().st_size if path.exists() else -1


def _digest(parts: Iterable[object]) -> str:
    return hashlib.sha256("\n".join(map(repr, parts)).encode("utf-8", "backslashreplace")).hexdigest()[:16]
