"""Running the warp protocol over a folder: progress, resuming, the summary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from lift_fast.backbones import FrozenViT
from lift_fast.evaluation.methods import Method
from lift_fast.evaluation.resume import Journal, new_result
from lift_fast.evaluation.rules import check_sizes

from .protocol import WarpProtocol, evaluate_batch, image_name, normaliser, read_views
from .summary import summarise


def evaluate(
    methods: Sequence[Method],
    backbone: FrozenViT,
    paths: Sequence[Path],
    root: Path,
    *,
    sizes: Sequence[int] = (112, 224, 448),
    seeds: int = 1,
    protocol: WarpProtocol | None = None,
    reference: str | None = None,
    batch_size: int = 8,
    out: Path | None = None,
    record: dict[str, Any] | None = None,
    progress: Callable[[int], object] = lambda count: None,
) -> dict[str, Any]:
    """Evaluate methods on photographs.

    Args:
        methods, backbone, protocol, record, progress: as :func:`lift_fast.evaluation.spair.evaluate`.
        paths: photographs; their names are relative to the folder ``root``.
        sizes: pixels S of the square views.
        seeds: number of warps of each photograph; 0 to ``seeds - 1``.
        reference: method with which the others are compared photograph by photograph; None for no comparison.
        batch_size: pairs of views at one time.
        out: file for the result, also written every few seconds. If it exists and was made with the same ``record`` and
            options, it is resumed.

    Returns:
        The result as JSON holds it: ``"protocol", "complete", "options", "record", "scores"`` (seed, size, method,
        photograph -> shares at each alpha, mean and median error), ``"skipped"`` and ``"summary"``.

    Raises:
        ValueError: for sizes, seeds or a reference that do not fit, or an ``out`` of other options.
        FileNotFoundError: if the folder of ``out`` does not exist.
    """
    protocol = protocol or WarpProtocol()
    names = [method.name for method in methods]
    if reference is not None and reference not in names:
        raise ValueError(f"the reference {reference!r} is not one of the methods {', '.join(names)}")
    check_sizes(sizes, seeds, backbone.patch_size)
    named = [(path, image_name(path, root)) for path in paths]
    options = {
        "methods": names,
        "sizes": list(sizes),
        "seeds": seeds,
        "points": protocol.points,
        "alphas": list(protocol.alphas),
        "photometric": protocol.photometric,
        "reference": reference,
        "photographs": [name for _, name in named],
    }
    journal = Journal(out, new_result("warp", options, record, skipped={}))
    if journal.before is not None:
        journal.content.update({name: journal.before[name] for name in ("scores", "skipped")})
    skipped = journal.content["skipped"]
    normalise = normaliser(backbone.mean, backbone.std, backbone.device, backbone.dtype)
    for seed in range(seeds):
        for size in sizes:
            found = {name: journal.part(seed, size, name) for name in names}
            todo = [
                path
                for path, name in named
                if name not in skipped and not all(name in scores for scores in found.values())
            ]
            progress(len(paths) - len(todo))
            views = read_views(todo, root, size, seed, protocol)
            while group := list(islice(views, batch_size)):
                skipped.update({name: view for name, view in group if isinstance(view, str)})
                valid = {name: view for name, view in group if not isinstance(view, str)}
                if valid:
                    with torch.inference_mode():
                        scores = evaluate_batch(methods, list(valid.values()), size, normalise, protocol)
                    for method, values in scores.items():
                        rows = [[*one.pck, one.error, one.median] for one in values]
                        found[method].update(zip(valid, rows, strict=True))
                    journal.save()
                progress(len(group))
    return journal.finish(complete=True, summary=summarise(journal.content))
