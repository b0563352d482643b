"""``lift-fast export``: write the networks as an ONNX file for ONNX Runtime, OpenVINO and other engines."""

from __future__ import annotations

import argparse
import json
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lift_fast._text import quoted

from .errors import UsageError, as_usage_error, check_output, writing
from .options import add_model_options, add_output_options, build_extractor, describe, positive, remarks, whole

if TYPE_CHECKING:
    from lift_fast.export.graph import Network

_DESCRIPTION = """Write the networks as an ONNX file in float32. Input "imgs" [batch, 3, height, width]: RGB between 0
and 1, less the mean, divided by the standard deviation; both are in the file's metadata (lift_fast.mean,
lift_fast.std). Outputs: "descriptors" [batch, cells, channels], or "matching_map" [batch, channels, rows, columns], the
same inner products in half the channels (in all of them without LiFT). --no-lift writes the backbone alone. Batch,
height and width are free unless --static fixes them. Exit status: 0 if the file was written, 1 if --check finds a
relative error above 1e-4, 2 for invalid input."""
_EXAMPLE = "example: lift-fast export --what matching-map --check --out maps.onnx"
_WHAT = ("descriptors", "matching-map", "lift")
_MOST_ERROR = 1e-4


def add_parser(commands: Any) -> None:
    """Add the command to argparse's ``commands``."""
    parser = commands.add_parser("export", help="write an ONNX file", description=_DESCRIPTION, epilog=_EXAMPLE)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the file, .onnx")
    parser.add_argument(
        "--what",
        default="descriptors",
        choices=_WHAT,
        help="images to descriptors (with --no-lift the backbone's tokens), images to a matching map, or LiFT alone, "
        "which also takes the backbone's tokens (%(default)s)",
    )
    parser.add_argument("--normalize", action="store_true", help="divide each descriptor of a matching map by its norm")
    parser.add_argument("--static", type=_size, metavar="HxW", help="for images of this size only")
    parser.add_argument("--batch", type=positive, metavar="N", help="with --static, images at once (1)")
    parser.add_argument("--iterations", type=whole, default=1, metavar="N", help="apply LiFT N times (%(default)s)")
    parser.add_argument("--opset", type=positive, default=18, metavar="N", help="of ONNX, 18 to 23 (%(default)s)")
    parser.add_argument(
        "--check", action="store_true", help="run the file in ONNX Runtime, and print how far it is from the networks"
    )
    add_model_options(parser, sizes=False)
    add_output_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the file and check it; return the exit status."""
    if arguments.out.suffix.lower() != ".onnx":
        raise UsageError(f"--out must end in .onnx, got {quoted(arguments.out)}")
    check_output("out", arguments.out, (arguments.weights, arguments.lift))
    if arguments.normalize and arguments.what != "matching-map":
        raise UsageError("--normalize belongs to --what matching-map")
    if arguments.batch and not arguments.static:
        raise UsageError("--batch belongs to --static HxW")
    if arguments.dtype not in ("float32", "auto"):
        raise UsageError(f"--dtype {arguments.dtype}: the file computes in float32; leave it out")
    if arguments.check and find_spec("onnxruntime") is None:
        raise UsageError("--check needs ONNX Runtime: pip install onnxruntime")
    # Where the file's results are compared with.
    arguments.dtype, arguments.device = "float32", arguments.device or "cpu"

    say = (lambda *_: None) if arguments.quiet or arguments.json else lambda text: print(text, file=sys.stderr)
    extractor = build_extractor(arguments)
    for remark in remarks(arguments):
        say(remark)
    network: Network = extractor
    if arguments.what == "lift":
        if extractor.lift is None:
            raise UsageError("--what lift needs a LiFT; give --lift FILE (or --random-lift)")
        if arguments.iterations != 1:
            raise UsageError("--iterations belongs to images; LiFT alone is run again by its caller")
        network = extractor.lift  # type: ignore[assignment]

    from lift_fast.export import export_onnx

    output = "matching_map" if arguments.what == "matching-map" else "descriptors"
    start = time.perf_counter()
    try:
        with as_usage_error(), writing(arguments.out):
            export_onnx(
                network,
                arguments.out,
                not arguments.static,
                output=output,
                size=arguments.static,
                batch=arguments.batch or 1,
                iterations=arguments.iterations,
                normalize=arguments.normalize,
                opset=arguments.opset,
            )
    except ImportError as error:
        raise UsageError(str(error)) from error
    seconds = time.perf_counter() - start
    size = arguments.out.stat().st_size
    what = "LiFT alone" if network is not extractor else output.replace("_", " ")
    say(f"wrote {quoted(arguments.out)} ({size / 1e6:.1f} MB): {what}, {describe(arguments)}")
    checks = _check(arguments, network, extractor.patch) if arguments.check else []
    worst = max((each["relative_error"] for each in checks), default=0.0)
    if checks:
        sizes = ", ".join(f"{each['images']} x {each['height']} x {each['width']}" for each in checks)
        say(f"ONNX Runtime: largest relative error {worst:.1e} (batches of {sizes})")
        if worst > _MOST_ERROR:
            say(f"warning: above {_MOST_ERROR:.0e}; do not use this file")
    if arguments.json:
        figures = {"out": str(arguments.out), "what": arguments.what, "bytes": size, "seconds": round(seconds, 3)}
        print(json.dumps({**figures, "checks": checks}))
    return int(not worst <= _MOST_ERROR)


def _check(arguments: argparse.Namespace, network: Network, patch: int) -> list[dict[str, Any]]:
    from lift_fast.export import compare_onnx

    if arguments.static:
        shapes = [(arguments.batch or 1, *arguments.static)]
    else:
        # One square, several of no whole patches.
        shapes = [(1, 14 * patch, 14 * patch), (3, 5 * patch + patch // 2, 9 * patch + 1)]
    with as_usage_error():
        found = compare_onnx(arguments.out, network, shapes)
    return [
        {"engine": each.engine, **dict(zip(("images", "height", "width"), each.shape, strict=True))}
        | {"relative_error": each.relative_error}
        for each in found
    ]


def _size(text: str) -> tuple[int, int]:
    """argparse type: ``HxW``."""
    height, cross, width = text.lower().partition("x")
    if not cross:
        raise argparse.ArgumentTypeError(f"expected HxW in pixels, such as 448x448, got {text!r}")
    return positive(height), positive(width)
