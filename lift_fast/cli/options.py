"""Options shared by several commands, and the objects built from them."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from lift_fast import _env, demonstration
from lift_fast._text import quoted
from lift_fast.training.settings import FACETS

from .errors import UsageError, as_usage_error

if TYPE_CHECKING:
    from lift_fast.extractor import ViTLiFTExtractor

_DTYPES = ("auto", "float32", "bfloat16", "float16")
_ENGINES = ("auto", "torch", "openvino", "compile")


def positive(text: str) -> int:
    """argparse type: an integer >= 1."""
    return _at_least(1, text)


def whole(text: str) -> int:
    """argparse type: an integer >= 0."""
    return _at_least(0, text)


def seed(text: str) -> int:
    """argparse type: a seed for PyTorch's generators."""
    try:
        value = int(text)
    except ValueError:
        value = 1 << 64
    if not -(1 << 63) <= value < 1 << 64:
        raise argparse.ArgumentTypeError(f"expected a whole number of at most 64 bits, got {text!r}")
    return value


def threads(text: str) -> int:
    """argparse type: a number of CPU threads, from 1 to 256, or four for each core if that is more."""
    value, most = positive(text), max(256, 4 * (os.cpu_count() or 1))
    if value > most:
        raise argparse.ArgumentTypeError(f"expected at most {most} threads on this machine, got {text!r}")
    return value


def _at_least(least: int, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text!r}")
    return value


def load_size(text: str) -> int | tuple[int, int]:
    """argparse type: ``448`` (the shorter side) or ``480x640`` (height x width)."""
    height, cross, width = text.lower().partition("x")
    return (positive(height), positive(width)) if cross else positive(text)


def add_model_options(
    parser: argparse.ArgumentParser,
    sizes: bool = True,
    facet: str | None = "key",
    facet_help: str = "(%(default)s)",
    size_note: str = "",
    longest_side: bool = False,
    dtype: str = "float32",
) -> None:
    """Options for backbone, LiFT and device; with ``sizes`` also ``--size`` and ``--iterations``.

    ``facet`` is the default; None adds ``final`` to the choices and leaves the default to the command. ``size_note``
    extends the help of ``--size``; ``longest_side`` adds ``--max-side``. ``dtype`` is the default of ``--dtype``.
    """
    group = parser.add_argument_group("features")
    group.add_argument(
        "--model",
        default=demonstration.BACKBONE,
        help="backbone: an official name such as dino_vits16, or any timm ViT (%(default)s, shipped with the package)",
    )
    group.add_argument("--weights", metavar="FILE", help="local checkpoint of the backbone")
    group.add_argument("--random-weights", action="store_true", help="random backbone weights, for tests")
    lift = group.add_mutually_exclusive_group()
    lift.add_argument(
        "--lift",
        metavar="FILE",
        help="LiFT checkpoint trained for this backbone (the demonstration's for the keys of the last block of the "
        "demonstration backbone, else none)",
    )
    lift.add_argument("--random-lift", action="store_true", help="a LiFT with random weights, for tests")
    lift.add_argument("--no-lift", action="store_true", help="the backbone alone")
    if sizes:
        group.add_argument(
            "--iterations", type=positive, default=1, metavar="N", help="apply LiFT N times (%(default)s)"
        )
    choices = FACETS if facet else (*FACETS, "final")
    group.add_argument("--facet", default=facet, choices=choices, help=facet_help)
    group.add_argument("--layer", type=int, help="block of the backbone, may be negative (the last)")
    group.add_argument("--stride", type=positive, help="pixels between patches (the patch size)")
    if sizes:
        group.add_argument(
            "--size",
            type=load_size,
            default=448,
            metavar="S",
            help=f"load images with this shorter side, or as HxW{size_note} (%(default)s)",
        )
    if longest_side:
        add_longest_side(group)
    add_pixel_limit(group)
    group.add_argument("--device", help="cpu, cuda, cuda:1, ... (CUDA if there is one)")
    group.add_argument(
        "--dtype",
        default=dtype,
        choices=_DTYPES,
        help="compute in; auto is bfloat16 where the processor multiplies it, else float32 (%(default)s)",
    )
    group.add_argument(
        "--engine",
        default="auto",
        choices=_ENGINES,
        help="what computes the backbone (%(default)s: the fastest here, without long compilation)",
    )
    group.add_argument("--threads", type=threads, metavar="N", help="CPU threads (all)")
    group.add_argument("--seed", type=seed, default=0, help="of random weights (%(default)s)")


def add_longest_side(group: argparse._ActionsContainer) -> None:
    """The option for :func:`lift_fast.images.bounded_size`."""
    group.add_argument(
        "--max-side",
        type=positive,
        metavar="N",
        help="load an image whose longer side would exceed N pixels at N, and its shorter side in proportion (4 times "
        "--size, at least 1792; none for HxW)",
    )


def add_pixel_limit(group: argparse._ArgumentGroup) -> None:
    """The option for :func:`lift_fast.images.set_max_pixels`."""
    group.add_argument(
        "--max-pixels",
        type=positive,
        metavar="N",
        help="refuse images loaded at more pixels, files of more than four times as many, and maps of more than one "
        "cell for each 64 (33554432, which is 8192 x 4096)",
    )


def run_within_limits(arguments: argparse.Namespace) -> int:
    """Run the command of ``arguments`` under their limits; return the exit status."""
    from lift_fast.images import pixel_limit

    try:
        _env.check()
    except ValueError as error:
        raise UsageError(str(error)) from error
    if getattr(arguments, "dtype", None) == "auto":
        arguments.dtype = _chosen_dtype(arguments.device)
    with pixel_limit(getattr(arguments, "max_pixels", None)):
        status: int = arguments.run(arguments)
    return status


def _chosen_dtype(device: str | None) -> str:
    """What ``--dtype auto`` means: results and what is kept of them name a dtype, wherever they were made."""
    from lift_fast import devices
    from lift_fast.precision import resolve_dtype

    with as_usage_error():
        return str(resolve_dtype("auto", devices.resolve(device))).removeprefix("torch.")


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Options for output on the terminal."""
    parser.add_argument("--json", action="store_true", help="print the figures as JSON on standard output")
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no messages")


def build_extractor(arguments: argparse.Namespace) -> ViTLiFTExtractor:
    """Build the extractor of the options, and set ``arguments.lift`` to the LiFT in use.

    Raises:
        UsageError: if it cannot be built.
    """
    import torch

    from lift_fast.extractor import ViTLiFTExtractor

    if takes_demonstration_lift(arguments):
        arguments.lift = demonstration.LIFT
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    if arguments.lift is None and not arguments.random_lift and arguments.iterations != 1:
        raise UsageError("--iterations repeats LiFT, which is missing; give --lift FILE (or --random-lift)")
    with as_usage_error():
        extractor = ViTLiFTExtractor(
            arguments.model,
            arguments.lift,
            channel=None,
            patch=None,
            stride=arguments.stride,
            layer=arguments.layer,
            facet=arguments.facet,
            device=arguments.device,
            silent=True,
            random_lift=arguments.random_lift,
            weights=arguments.weights,
            random_weights=arguments.random_weights,
            seed=arguments.seed,
            dtype=getattr(torch, arguments.dtype),
            engine=arguments.engine,
        )
    announce_compilation(arguments)
    return extractor


def announce_compilation(arguments: argparse.Namespace) -> None:
    """Say that the first image will keep its reader waiting, where it does."""
    if arguments.engine == "compile" and not arguments.quiet:
        print("--engine compile: PyTorch compiles before the first image, for up to a minute", file=sys.stderr)


def takes_demonstration_lift(arguments: argparse.Namespace) -> bool:
    """Whether the demonstration LiFT follows its backbone: the default on the features that it was trained on."""
    own_weights = arguments.model == demonstration.BACKBONE and not (arguments.weights or arguments.random_weights)
    own_features = arguments.facet == "key" and arguments.layer is None
    return own_weights and own_features and not (arguments.lift or arguments.random_lift or arguments.no_lift)


def remarks(arguments: argparse.Namespace) -> list[str]:
    """Notes on the networks for readers of the results."""
    found = []
    if arguments.model == demonstration.BACKBONE and not (arguments.weights or arguments.random_weights):
        found.append(
            "demonstration pair, trained on 754 photographs: for real work use a pretrained backbone "
            "(--model dino_vits16) and the LiFT trained for it (--lift FILE)"
        )
    if arguments.lift is None and not (arguments.random_lift or arguments.no_lift):
        found.append("no LiFT checkpoint was given: the backbone's features alone; --lift FILE adds LiFT")
    if arguments.lift == demonstration.LIFT and not (arguments.facet == "key" and arguments.layer in (None, -1, 5)):
        found.append(f"{demonstration.LIFT} was trained on the keys of the last block, not on these features")
    if arguments.random_weights or arguments.random_lift:
        found.append("random weights: these features mean nothing")
    return found


def describe(arguments: argparse.Namespace) -> str:
    """One line on the source of the features."""
    backbone = f"{arguments.model} {arguments.facet}s" if arguments.facet != "token" else f"{arguments.model} tokens"
    if arguments.random_weights:
        backbone += " (random weights)"
    elif arguments.weights:
        backbone += f" ({quoted(os.path.basename(arguments.weights))})"
    if arguments.random_lift:
        lift = "LiFT (random weights)"
    elif arguments.lift:
        lift = f"LiFT ({quoted(os.path.basename(arguments.lift))})"
    else:
        return f"{backbone}, no LiFT"
    return f"{backbone} + {lift}" + (f" x {arguments.iterations}" if arguments.iterations > 1 else "")
