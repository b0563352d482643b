"""``lift-fast match``: dense matches between two photographs, as a picture and as numbers."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UsageError, as_usage_error
from .options import add_model_options, add_output_options, build_extractor, describe, positive

if TYPE_CHECKING:
    import torch

_DESCRIPTION = """Match every n-th pixel of picture A to the most similar pixel of picture B, draw the matches, and
write them to an .npz file beside the picture: points [P, 2] and matches [P, 2] as (x, y) pixels of the loaded
pictures, points_original and matches_original likewise in the files' own pixels, similarity [P], valid [P] and the
sizes (height, width) of the loaded pictures and the files."""
_EXAMPLE = "example: lift-fast match left.jpg right.jpg --out matches.png --lift lift_dino_vits16.pth --mutual"


def add_parser(commands: Any) -> None:
    """Add the command to argparse's ``commands``."""
    parser = commands.add_parser("match", help="match two photographs", description=_DESCRIPTION, epilog=_EXAMPLE)
    parser.add_argument("a", type=Path, metavar="A", help="first picture")
    parser.add_argument("b", type=Path, metavar="B", help="second picture, searched for the pixels of A")
    parser.add_argument("--out", type=Path, default=Path("matches.png"), metavar="PNG", help="(%(default)s)")
    parser.add_argument("--step", type=positive, default=4, metavar="N", help="match every N-th pixel (%(default)s)")
    parser.add_argument("--mutual", action="store_true", help="keep matches that lead back to their pixel")
    parser.add_argument("--normalize", default="grid", choices=("grid", "pixel"), help="see dense_match (%(default)s)")
    parser.add_argument("--lines", type=positive, default=40, metavar="N", help="match lines to draw (%(default)s)")
    add_model_options(parser)
    add_output_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Match, draw, write. Returns the exit status."""
    if arguments.out.suffix.lower() != ".png":
        raise UsageError(f"--out must end in .png, got {arguments.out}; the numbers go beside it as .npz")
    if not arguments.out.parent.is_dir():
        raise UsageError(f"--out {arguments.out}: the folder {arguments.out.parent} does not exist; make it first")
    for path in (arguments.a, arguments.b):
        if not path.is_file():
            raise UsageError(f"no picture at {path}")

    import numpy as np
    import torch

    from lift_fast import dense_match
    from lift_fast._files import atomic_path
    from lift_fast.pictures import MatchView, draw_matches

    say = (lambda *_: None) if arguments.quiet or arguments.json else lambda text: print(text, file=sys.stderr)
    clock = _Clock()
    extractor = build_extractor(arguments)
    clock.lap("model")
    if extractor.lift is None:
        say("no LiFT checkpoint was given: matching the backbone's features alone; --lift FILE adds LiFT")
    with as_usage_error():
        batches, pictures = zip(
            *(extractor.preprocess(path, arguments.size) for path in (arguments.a, arguments.b)), strict=True
        )
        clock.lap("read")
        with torch.inference_mode():
            maps = [_descriptors(extractor, batch, arguments.iterations) for batch in batches]
        clock.lap("features", maps[0].device)
        (height_a, width_a), (height_b, width_b) = (batch.shape[2:] for batch in batches)
        ys, xs = (_centres(n, arguments.step) for n in (height_a, width_a))
        points = torch.stack(torch.meshgrid(xs, ys, indexing="xy"), dim=-1).view(1, -1, 2).to(maps[0].device)
        result = dense_match(
            maps[0],
            maps[1],
            (height_a, width_a),
            (height_b, width_b),
            points=points,
            normalize=arguments.normalize,
            mutual=arguments.mutual,
        )
        clock.lap("match", maps[0].device)

    points_xy, matches = points[0].cpu().numpy(), result.xy[0].cpu().numpy()
    similarity, valid = result.similarity[0].cpu().numpy(), result.valid[0].cpu().numpy()
    caption = (
        f"{describe(arguments)}   A {width_a} x {height_a}, B {width_b} x {height_b} pixels, grid "
        f"{maps[0].shape[2]} x {maps[0].shape[3]}   {int(valid.sum())} of {valid.size} matches"
        f"{' mutual' if arguments.mutual else ''}   {clock.laps['features'] + clock.laps['match']:.2f} s"
    )
    view = MatchView(
        picture_a=np.asarray(pictures[0]),
        picture_b=np.asarray(pictures[1]),
        points=points_xy,
        matches=matches,
        similarity=similarity,
        valid=valid,
        grid=(len(ys), len(xs)),
        caption=caption,
        warning="random weights: these matches mean nothing"
        if arguments.random_weights or arguments.random_lift
        else "",
    )
    sheet = draw_matches(view, lines=arguments.lines)
    with atomic_path(arguments.out) as temporary:
        sheet.save(temporary, format="PNG")
    numbers = arguments.out.with_suffix(".npz")
    originals = [_original_size(path) for path in (arguments.a, arguments.b)]
    loaded = [(height_a, width_a), (height_b, width_b)]
    with atomic_path(numbers) as temporary, temporary.open("wb") as file:
        np.savez_compressed(
            file,
            points=points_xy,
            matches=matches,
            points_original=_rescale(points_xy, loaded[0], originals[0]),
            matches_original=_rescale(matches, loaded[1], originals[1]),
            similarity=similarity,
            valid=valid,
            size_a=np.array(loaded[0]),
            size_b=np.array(loaded[1]),
            original_size_a=np.array(originals[0]),
            original_size_b=np.array(originals[1]),
        )
    clock.lap("draw")
    if arguments.json:
        figures = {
            "out": str(arguments.out),
            "npz": str(numbers),
            "model": arguments.model,
            "lift": arguments.lift,
            "random_weights": bool(arguments.random_weights or arguments.random_lift),
            "size_a": list(loaded[0]),
            "size_b": list(loaded[1]),
            "grid": list(maps[0].shape[2:]),
            "points": int(valid.size),
            "valid": int(valid.sum()),
            "mean_similarity": float(similarity[valid].mean()) if valid.any() else None,
            "seconds": {name: round(value, 4) for name, value in clock.laps.items()},
        }
        print(json.dumps(figures))
    else:
        say(caption)
        say("   ".join(f"{name} {value:.2f} s" for name, value in clock.laps.items()))
        say(f"wrote {arguments.out} and {numbers}")
    return 0


class _Clock:
    """Seconds of each stage."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._start = time.perf_counter()

    def lap(self, name: str, device: torch.device | None = None) -> None:
        if device is not None and device.type == "cuda":
            import torch

            torch.cuda.synchronize(device)
        now = time.perf_counter()
        self.laps[name] = now - self._start
        self._start = now


def _descriptors(extractor: Any, batch: torch.Tensor, iterations: int) -> torch.Tensor:
    """``[1, C, h, w]`` on the grid that LiFT leaves."""
    tokens = extractor.extract_descriptors_iterative_lift(batch, iterations)
    height, width = extractor.backbone.grid(batch.shape[2], batch.shape[3])
    if extractor.lift is not None:
        height, width = height << iterations, width << iterations
    return tokens.transpose(1, 2).unflatten(2, (height, width))


def _centres(pixels: int, step: int) -> torch.Tensor:
    """Every ``step``-th pixel, the sample centred in the picture."""
    import torch

    return torch.arange((pixels - 1) % step // 2, pixels, step)


def _original_size(path: Path) -> tuple[int, int]:
    """(height, width) of the file as it is shown, that is with its EXIF orientation applied."""
    from lift_fast.images import read_image

    width, height = read_image(path).size
    return height, width


def _rescale(xy: Any, loaded: tuple[int, int], original: tuple[int, int]) -> Any:
    """Pixel centres of the loaded picture as positions in the file's pixels; (-1, -1) stays what it is."""
    import numpy as np

    scale = np.array([original[1] / loaded[1], original[0] / loaded[0]])
    scaled = ((xy + 0.5) * scale - 0.5).astype(np.float32)
    scaled[(xy < 0).any(axis=1)] = -1
    return scaled
