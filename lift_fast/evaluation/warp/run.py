"""Running the warp protocol over a folder: progress, resumption, the summary and its tables."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from lift_fast.backbones import FrozenViT
from lift_fast.evaluation import results
from lift_fast.evaluation.methods import Method

from .protocol import Score, WarpProtocol, evaluate_batch, normaliser, picture_name, read_views
from .summary import summarise

PROTOCOL = "warp"
_SAVE_SECONDS = 20.0


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
        methods: of :func:`lift_fast.evaluation.methods.build_methods`, on ``backbone``.
        backbone: says how pictures are normalised and where it runs.
        paths: photographs; ``root`` is the folder that their names are relative to.
        sizes: pixels S of the square views.
        seeds: warps of each photograph; 0 to ``seeds - 1``.
        protocol: options; None takes the defaults.
        reference: method that the others are compared with photograph by photograph; None for no comparison.
        batch_size: pairs of views at one time.
        out: file for the result, written every few seconds too; one that is there and was made with the same
            ``record`` and options is gone on with.
        record: what the result depends on (model, weights, provenance), stored with it; entries ``"date"`` aside it
            must be the same when going on.
        progress: called with the number of pairs that have been done.

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
        raise ValueError(f"the reference {reference!r} is none of the methods {', '.join(names)}")
    if seeds < 1 or not sizes or min(sizes) < backbone.patch_size or len(set(sizes)) < len(sizes):
        raise ValueError(
            f"expected at least one seed and different sizes of at least a patch ({backbone.patch_size} pixels), got "
            f"{seeds} seeds and sizes {', '.join(map(str, sizes))}"
        )
    options = {
        "methods": names,
        "sizes": list(sizes),
        "seeds": seeds,
        "points": protocol.points,
        "alphas": list(protocol.alphas),
        "photometric": protocol.photometric,
        "reference": reference,
        "photographs": [picture_name(path, root) for path in paths],
    }
    run = _Run(out, options, record or {})
    normalise = normaliser(backbone.mean, backbone.std, backbone.device, backbone.dtype)
    for seed in range(seeds):
        for size in sizes:
            todo = [path for path in paths if not run.has(seed, size, picture_name(path, root))]
            progress(len(paths) - len(todo))
            for group in _groups(read_views(todo, root, size, seed, protocol), batch_size):
                sound = [(name, view) for name, view in group if not isinstance(view, str)]
                for name, view in group:
                    if isinstance(view, str):
                        run.skip(name, view)
                if sound:
                    with torch.inference_mode():
                        scores = evaluate_batch(methods, [view for _, view in sound], size, normalise, protocol)
                    run.add(seed, size, [name for name, _ in sound], scores)
                progress(len(group))
    return run.finish()


class _Run:
    """What has been measured so far, in memory and on disk."""

    def __init__(self, out: Path | None, options: dict[str, Any], record: dict[str, Any]) -> None:
        self.out, self.saved = out, time.monotonic()
        self.content: dict[str, Any] = {
            "protocol": PROTOCOL,
            "complete": False,
            "options": options,
            "record": record,
            "scores": {},
            "skipped": {},
        }
        if out is not None and out.exists():
            before = results.load_json(out, PROTOCOL)
            results.check_same(out, before, self.content)
            self.content["scores"], self.content["skipped"] = before["scores"], before["skipped"]

    def has(self, seed: int, size: int, name: str) -> bool:
        return name in self.content["skipped"] or all(
            name in self._scores(seed, size, method) for method in self.content["options"]["methods"]
        )

    def skip(self, name: str, reason: str) -> None:
        self.content["skipped"][name] = reason

    def add(self, seed: int, size: int, names: Sequence[str], scores: dict[str, list[Score]]) -> None:
        for method, values in scores.items():
            into = self._scores(seed, size, method)
            into.update({n: [*v.pck, v.error, v.median] for n, v in zip(names, values, strict=True)})
        if self.out is not None and time.monotonic() - self.saved > _SAVE_SECONDS:
            results.save_json(self.out, self.content)
            self.saved = time.monotonic()

    def finish(self) -> dict[str, Any]:
        self.content["complete"] = True
        self.content["summary"] = summarise(self.content)
        if self.out is not None:
            results.save_json(self.out, self.content)
        return self.content

    def _scores(self, seed: int, size: int, method: str) -> dict[str, list[float]]:
        found: dict[str, list[float]] = (
            self.content["scores"].setdefault(str(seed), {}).setdefault(str(size), {}).setdefault(method, {})
        )
        return found


def _groups(items: Iterable[Any], size: int) -> Iterable[list[Any]]:
    group: list[Any] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
