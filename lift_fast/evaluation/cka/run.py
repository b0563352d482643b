"""Linear CKA between features of the same image at different input sizes: how little features change with scale."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lift_fast._files import atomic_path
from lift_fast.evaluation.methods import Batch, Features
from lift_fast.evaluation.results import Estimate, as_json, bootstrap, save_json
from lift_fast.evaluation.resume import Journal, load_same
from lift_fast.images import read_image, resize, to_tensor

from .metric import StreamingCKA, centres, linear_cka, sample

SIZES = (56, 112, 224, 448)
_SAVE_SECONDS = 30.0


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

    An image is resized to S x S (Lanczos). Both maps are read, bilinearly, at the centres of one grid x grid lattice
    over the image, so the number of positions does not depend on the size or the method. CKA is taken over the
    positions of one image and averaged over images, with a bootstrap interval. In addition, CKA is taken over the
    positions of all images together.

    Args:
        methods: names and :class:`lift_fast.evaluation.methods.Method` or the like.
        paths: images.
        sizes: S of the curve, in pixels.
        reference: S to compare with.
        grid: side of the lattice, at least 2.
        mean, std: of the normalisation.
        device, dtype: of the methods' input.
        seed: of the interval's resampling.
        root: folder to which the names of images in results are relative; None names them as ``paths`` do.
        out, record, progress: as :func:`lift_fast.evaluation.spair.evaluate`; an interrupted run is resumed from
            ``OUT.partial.pt`` next to ``out``.

    Returns:
        ``curves``: method -> size -> ``cka`` (mean over images, low, high) and ``pooled``; ``pictures`` (how many);
        ``scores``: method -> size -> image -> CKA; ``skipped``: name -> reason of images that do not decode;
        ``options`` and ``record``.

    Raises:
        ValueError: if no image could be used, for a grid of fewer than 2 x 2 positions, a size given twice, or an
            ``out`` of other options.
        FileNotFoundError: if the folder of ``out`` does not exist.
    """
    if grid < 2:
        raise ValueError(f"grid must be at least 2, because CKA needs several positions, got {grid}")
    if len(set(sizes)) < len(sizes):
        raise ValueError(f"each size must be given once, got {', '.join(map(str, sizes))}")

    def normalise(image: Image.Image) -> Tensor:
        return to_tensor(image, mean, std).to(device=device, dtype=dtype)

    positions = centres(grid, grid)
    pooled = {(name, size): StreamingCKA() for name, _ in methods for size in sizes}
    options = {
        "methods": [name for name, _ in methods],
        "sizes": list(sizes),
        "reference": reference,
        "grid": grid,
        "photographs": [_name(path, root) for path in paths],
    }
    head = {"protocol": "cka", "options": options, "record": record or {}}
    finished: dict[str, Any] | None = load_same(out, head)
    if finished is not None:
        progress(len(paths))
        return finished
    # The sums are C x C matrices, too large for JSON.
    partial = out and out.with_suffix(".partial.pt")
    begun = {**head, "skipped": {}, "rows": {}, "sums": []}
    journal = Journal(partial, begun, _SAVE_SECONDS, _read_partial, _write_partial)
    if journal.before is not None:
        journal.content.update({name: journal.before[name] for name in ("skipped", "rows")})
        for one, state in zip(pooled.values(), journal.before["sums"], strict=True):
            one.restore(state)
    journal.content["sums"] = list(pooled.values())
    rows: dict[str, list[float]] = journal.content["rows"]
    skipped: dict[str, str] = journal.content["skipped"]
    for path in paths:
        name = _name(path, root)
        if name not in rows and name not in skipped:
            try:
                image = read_image(path, upright=False)
            except (OSError, ValueError) as error:
                skipped[name] = str(error)
            else:
                rows[name] = _measure(methods, image, pooled, positions, reference, normalise)
            journal.save()
        progress(1)
    if not rows:
        raise ValueError(f"cannot read any of {len(paths)} images: {next(iter(skipped.values()), 'none given')}")
    estimates = _means(list(rows.values()), seed)
    curves: dict[str, dict[str, Any]] = {name: {} for name, _ in methods}
    scores: dict[str, dict[str, dict[str, float]]] = {name: {} for name, _ in methods}
    for index, ((method, size), estimate) in enumerate(zip(pooled, estimates, strict=True)):
        curves[method][str(size)] = {"cka": estimate.as_list(), "pooled": pooled[method, size].value()}
        scores[method][str(size)] = {name: row[index] for name, row in rows.items()}
    content = {
        **head,
        "estimator": "linear, biased",
        "reference": reference,
        "sizes": list(sizes),
        "grid": grid,
        "pictures": len(rows),
        "curves": curves,
        "skipped": skipped,
        "scores": scores,
    }
    if out is not None and partial is not None:
        save_json(out, content)
        partial.unlink(missing_ok=True)
    return content


def _measure(
    methods: Sequence[tuple[str, Callable[[Batch], Features]]],
    image: Image.Image,
    pooled: dict[tuple[str, int], StreamingCKA],
    positions: Tensor,
    reference: int,
    normalise: Callable[[Image.Image], Tensor],
) -> list[float]:
    """CKA of one image in the order of ``pooled``, method after method; adds the image to these sums."""
    sizes = list(dict.fromkeys(size for _, size in pooled))
    batches = {size: Batch(normalise(resize(image, (size, size)))) for size in {*sizes, reference}}
    pairs = []
    for _, method in methods:
        target = sample(method(batches[reference]), positions, (reference, reference))
        pairs += [(sample(method(batches[size]), positions, (size, size)), target) for size in sizes]
    row = [linear_cka(*pair) for pair in pairs]
    # After everything that may fail: an image is part of all sums or of none.
    for total, pair in zip(pooled.values(), pairs, strict=True):
        total.update(*pair)
    return row


def _read_partial(path: Path) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {**json.loads(state["text"]), "rows": dict(state["rows"]), "sums": list(state["sums"])}
    except Exception as error:
        raise ValueError(f"{path} cannot be resumed ({type(error).__name__}); delete it to start over") from error


def _write_partial(path: Path, content: dict[str, Any]) -> None:
    # As text: the reader of tensors takes plain values alone.
    text = json.dumps(as_json({name: content[name] for name in ("protocol", "options", "record", "skipped")}))
    state = {"text": text, "rows": content["rows"], "sums": [one.state() for one in content["sums"]]}
    with atomic_path(path) as temporary:
        torch.save(state, temporary)


def _name(path: Path, root: Path | None) -> str:
    """Name of an image in results."""
    return str(path) if root is None or path == root else path.relative_to(root).as_posix()


def _means(scores: list[list[float]], seed: int) -> list[Estimate]:
    """Mean of each column over the images where it is defined: features of an image of one colour can be constant."""
    columns = list(zip(*scores, strict=True))
    defined = [[value for value in column if math.isfinite(value)] for column in columns]
    if all(len(column) == len(scores) for column in defined):
        return bootstrap(scores, seed)
    nothing = Estimate(math.nan, math.nan, math.nan)
    return [bootstrap([[v] for v in column], seed)[0] if column else nothing for column in defined]
