"""Linear CKA between features of the same picture at different input sizes: how little features change with scale."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lift_fast.evaluation.methods import Batch, Features
from lift_fast.evaluation.results import Estimate, bootstrap
from lift_fast.images import read_image, resize, to_tensor

from .journal import CKARun
from .metric import StreamingCKA, centres, linear_cka, sample

SIZES = (56, 112, 224, 448)


def scale_invariance(
    methods: Sequence[tuple[str, Callable[[Batch], Features]]],
    paths: Sequence[Path],
    *,
    sizes: Sequence[int] = SIZES,
    reference: int = 448,
    grid: int = 28,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    root: Path | None = None,
    out: Path | None = None,
    record: dict[str, Any] | None = None,
    progress: Callable[[int], object] = lambda _: None,
) -> dict[str, Any]:
    """CKA of each method's features at each size with its own features at the reference size.

    A picture is resized to S x S (Lanczos). Both maps are read, bilinearly, at the centres of one grid x grid lattice
    over the picture: so the number of positions does not depend on the size or the method. CKA is taken over the
    positions of one picture and averaged over pictures, with a bootstrap interval; beside it stands CKA over the
    positions of all pictures together.

    Args:
        methods: names and :class:`lift_fast.evaluation.methods.Method` or the like.
        paths: pictures.
        sizes: S of the curve, in pixels.
        reference: S to compare with.
        grid: side of the lattice, at least 2.
        mean, std: of the normalisation.
        device, dtype: of what the methods take.
        seed: of the interval's resampling.
        root: folder below which results name pictures; None names them as ``paths`` do.
        out: file for the result; one that is there and was made with the same ``record`` and options is the result.
            An interrupted run goes on from ``OUT.partial.pt`` beside it.
        record: what the result depends on beside the options, stored with it.
        progress: called with the number of pictures that have been done.

    Returns:
        ``curves``: method -> size -> ``cka`` (mean over pictures, low, high) and ``pooled``; ``pictures`` (how many);
        ``scores``: method -> size -> picture -> CKA; ``skipped``: name -> reason of pictures that do not decode;
        ``options`` and ``record``.

    Raises:
        ValueError: if no picture could be used, for a grid of fewer than 2 x 2 positions, a size given twice, or an
            ``out`` of other options.
        FileNotFoundError: if the folder of ``out`` does not exist.
    """
    if grid < 2:
        raise ValueError(f"grid must be at least 2, for CKA needs several positions, got {grid}")
    if len(set(sizes)) < len(sizes):
        raise ValueError(f"each size once, got {', '.join(map(str, sizes))}")
    positions = centres(grid, grid)
    pooled = {(name, size): StreamingCKA() for name, _ in methods for size in sizes}
    options = {
        "methods": [name for name, _ in methods],
        "sizes": list(sizes),
        "reference": reference,
        "grid": grid,
        "photographs": [_name(path, root) for path in paths],
    }
    run = CKARun(out, options, record or {}, pooled)
    if run.finished is not None:
        progress(len(paths))
        return run.finished
    for path in paths:
        name = _name(path, root)
        if name in run.rows or name in run.skipped:
            progress(1)
            continue
        try:
            image = read_image(path, upright=False)
        except (OSError, ValueError) as error:
            run.add(name, str(error))
            progress(1)
            continue
        batches = {
            size: Batch(_square(image, size, mean, std).to(device=device, dtype=dtype)) for size in {*sizes, reference}
        }
        pairs = []
        for _, method in methods:
            target = sample(method(batches[reference]), positions, (reference, reference))
            pairs += [(sample(method(batches[size]), positions, (size, size)), target) for size in sizes]
        row = [linear_cka(*pair) for pair in pairs]
        # After everything that may fail: a picture's part is in all sums or in none.
        for total, pair in zip(pooled.values(), pairs, strict=True):
            total.update(*pair)
        run.add(name, row)
        progress(1)
    scores = list(run.rows.values())
    if not scores:
        raise ValueError(
            f"none of {len(paths)} pictures could be read: {next(iter(run.skipped.values()), 'none given')}"
        )
    estimates = _means(scores, seed)
    curves: dict[str, dict[str, Any]] = {name: {} for name, _ in methods}
    for (name, size), estimate in zip(pooled, estimates, strict=True):
        curves[name][str(size)] = {"cka": estimate.as_list(), "pooled": pooled[name, size].value()}
    content = {
        "estimator": "linear, biased",
        "reference": reference,
        "sizes": list(sizes),
        "grid": grid,
        "pictures": len(scores),
        "curves": curves,
    }
    return run.finish(content)


def _name(path: Path, root: Path | None) -> str:
    """What results know a picture by."""
    return str(path) if root is None or path == root else path.relative_to(root).as_posix()


def _square(image: Image.Image, size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    return to_tensor(resize(image, (size, size)), mean, std)


def _means(scores: list[list[float]], seed: int) -> list[Estimate]:
    """Mean of each column over the pictures where it is defined: the features of a plain picture can be constant."""
    columns = list(zip(*scores, strict=True))
    defined = [[value for value in column if math.isfinite(value)] for column in columns]
    if all(len(column) == len(scores) for column in defined):
        return bootstrap(scores, seed)
    nothing = Estimate(math.nan, math.nan, math.nan)
    return [bootstrap([[v] for v in column], seed)[0] if column else nothing for column in defined]
