"""Running SPair-71k: category by category, with the features of an image computed once for all of its pairs."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lift_fast.backbones import FrozenViT
from lift_fast.evaluation.methods import Features, Method
from lift_fast.evaluation.resume import Journal, new_result
from lift_fast.evaluation.rules import DRAWS, check_rule, check_sizes
from lift_fast.images import read_image

from .dataset import Filters, Pair, Selection, SPair
from .features import CACHE_BYTES, ImageFeatures, size_of
from .protocol import Protocol, fit, is_right, match_points
from .summary import summarise

# Of the maps that one call matches.
_STACKED_BYTES = 32 << 20


def draw_pairs(pairs: Sequence[Pair], category: str, count: int | None, seed: int) -> list[Pair]:
    """``count`` of a category's pairs, drawn without replacement by seed and category alone, in the order of their
    names; all of them if there are no more. A larger draw of the same seed holds every smaller one."""
    if count is None or count >= len(pairs):
        return list(pairs)
    order = np.random.default_rng([seed, zlib.crc32(category.encode())]).permutation(len(pairs))
    return [pairs[index] for index in sorted(order[:count])]


def published_draw(selection: Selection, count: int, seed: int) -> dict[str, list[Pair]]:
    """``count`` pairs of each category as the LiFT paper's evaluation draws them: with replacement, by NumPy's global
    generator, seeded once, category after category.

    Its order of categories is that of a folder's listing, which depends on the file system; here it is the selection's.
    """
    random = np.random.RandomState(seed)
    return {
        category: [pairs[index] for index in random.choice(len(pairs), count)]
        for category, pairs in selection.pairs.items()
    }


def draws(selection: Selection, count: int | None, seeds: int, draw: str = "distinct") -> list[dict[str, list[Pair]]]:
    """For each seed the pairs of each category: :func:`draw_pairs`, or :func:`published_draw` for ``"published"``."""
    if draw == "published" and count is not None:
        return [published_draw(selection, count, seed) for seed in range(seeds)]
    return [
        {category: draw_pairs(pairs, category, count, seed) for category, pairs in selection.pairs.items()}
        for seed in range(seeds)
    ]


def drawn(selection: Selection, count: int | None, seeds: int, draw: str = "distinct") -> dict[str, list[Pair]]:
    """The pairs of each category that at least one seed draws, each once."""
    found = draws(selection, count, seeds, draw)
    return {
        category: list({pair.name: pair for by_category in found for pair in by_category[category]}.values())
        for category in selection.pairs
    }


def evaluate(
    methods: Sequence[Method],
    backbone: FrozenViT,
    dataset: SPair,
    selection: Selection,
    *,
    sizes: Sequence[int] = (56, 112, 224, 448),
    seeds: int = 1,
    pairs_per_category: int | None = None,
    draw: str = "distinct",
    filters: Filters | None = None,
    protocol: Protocol | None = None,
    batch_size: int = 8,
    cache_bytes: int = CACHE_BYTES,
    out: Path | None = None,
    record: dict[str, Any] | None = None,
    progress: Callable[[int], object] = lambda count: None,
) -> dict[str, Any]:
    """Evaluate methods on pairs.

    Args:
        methods: of :func:`lift_fast.evaluation.methods.build_methods`, on ``backbone``.
        backbone: gives the normalisation of images and the device.
        dataset: names what the results are of.
        selection: of :meth:`SPair.select`, made with ``filters``.
        sizes: pixels S of the squares.
        seeds: number of draws of ``pairs_per_category``; 0 to ``seeds - 1``.
        pairs_per_category: number of pairs to draw; None for all.
        draw: ``distinct``, no pair twice, or ``published`` (:func:`published_draw`), where a pair counts as often as it
            is drawn.
        filters: recorded with the results.
        protocol: options; None takes the defaults.
        batch_size: images that go through the backbone at one time.
        cache_bytes: of descriptors to keep; a category whose images need more is done in parts.
        out: file for the result, also written after each category. If it exists and was made with the same ``record``
            and options, it is resumed.
        record: what the result depends on (model, weights, provenance), stored with it; all entries but ``"date"`` must
            be the same to resume.
        progress: called with the number of pairs that are done.

    Returns:
        The result as JSON holds it: ``"protocol", "complete", "options", "record"``; ``"scores"``: size, method,
        category, pair -> number of key points, then how many are right at each alpha by ``<``, then by ``<=``;
        ``"draws"``: for each seed category -> pairs, None where all are taken; ``"skipped"``: file or category -> the
        reason; ``"left_out"``: pair -> file; ``"remarks"``; and ``"summary"``, see :func:`summarise`.

    Raises:
        ValueError: for sizes or seeds that do not fit, or an ``out`` of other options.
        FileNotFoundError: if the folder of ``out`` does not exist.
    """
    protocol = protocol or Protocol()
    check_sizes(sizes, seeds, backbone.patch_size)
    if seeds > 1 and pairs_per_category is None:
        raise ValueError(f"{seeds} seeds need pairs_per_category: without it all pairs are taken and none is drawn")
    check_rule("draw", draw, DRAWS)
    options = {
        "methods": [method.name for method in methods],
        "split": dataset.split,
        "layout": dataset.layout,
        "categories": list(selection.categories),
        "sizes": list(sizes),
        "seeds": seeds,
        "pairs_per_category": pairs_per_category,
        "draw": draw,
        **{name: None if wanted is None else sorted(wanted) for name, wanted in vars(filters or Filters()).items()},
        "alphas": list(protocol.alphas),
        "placement": protocol.placement,
    }
    lists = {"skipped": dict(selection.skipped), "left_out": {}, "remarks": dict(selection.remarks)}
    journal = Journal(out, new_result("spair", options, record, draws=None, **lists), seconds=0)
    left_out = _LeftOut(dataset, journal.content)
    _resume(journal, selection, left_out)
    if pairs_per_category is not None:
        journal.content["draws"] = [
            {category: [pair.name for pair in pairs] for category, pairs in by_category.items()}
            for by_category in draws(selection, pairs_per_category, seeds, draw)
        ]
    # A pair's score is the same in every draw.
    wanted = drawn(selection, pairs_per_category, seeds, draw)
    for size in sizes:
        by_method = {method.name: journal.part(size, method.name) for method in methods}
        for category, pairs in wanted.items():
            names = {pair.name for pair in pairs} - left_out.pairs.keys()
            if all(category in found and names <= found[category].keys() for found in by_method.values()):
                progress(len(pairs))
                continue
            images = ImageFeatures(methods, backbone, size, batch_size, cache_bytes)
            with torch.inference_mode():
                scores = _score(images, pairs, protocol, left_out, progress)
            for method, found in by_method.items():
                found[category] = scores[method]
            journal.save()
    summary = summarise(journal.content)
    for category in selection.categories:
        if not summary["pairs"].get(category):
            left_out.reasons.setdefault(category, "empty category: no usable pair left")
    return journal.finish(complete=True, summary={**summary, "skipped": len(left_out.reasons)})


class _LeftOut:
    """Pairs that cannot be used, and why their files cannot."""

    def __init__(self, dataset: SPair, content: dict[str, Any]) -> None:
        self.dataset = dataset
        self.pairs: dict[str, str] = content["left_out"]
        self.reasons: dict[str, str] = content["skipped"]

    def check(self, pair: Pair, look: Callable[[Path], tuple[int, int] | str]) -> bool:
        """Whether a pair can be used; ``look`` gives (width, height) of an image, or why it cannot be used."""
        for path, noted in ((pair.source, pair.source_size), (pair.target, pair.target_size)):
            size = look(path)
            if isinstance(size, str):
                where, reason = path, size
            elif noted is None or noted == size:
                continue
            else:
                there = f"{size[0]} x {size[1]} pixels, {noted[0]} x {noted[1]} in the annotation"
                where, reason = pair.annotation, f"{pair.annotation}: {path.name} is {there}"
            name = self.dataset.below(where)
            self.reasons.setdefault(name, reason)
            self.pairs[pair.name] = name
            return False
        return True


def _resume(journal: Journal, selection: Selection, left_out: _LeftOut) -> None:
    """Take over earlier scores, and check again what was left out."""
    if journal.before is None:
        return
    # Annotations and images may have changed since.
    pairs = {pair.name: pair for pairs in selection.pairs.values() for pair in pairs}
    for size, by_method in journal.before["scores"].items():
        for method, by_category in by_method.items():
            for category, scores in by_category.items():
                known = {name: row for name, row in scores.items() if name in pairs}
                journal.part(size, method)[category] = known
    for name, pair in pairs.items():
        if name in journal.before["left_out"]:
            left_out.check(pair, _size)


def _size(path: Path) -> tuple[int, int] | str:
    try:
        return read_image(path).size
    except (OSError, ValueError) as error:
        return str(error)


def _score(
    images: ImageFeatures,
    pairs: Sequence[Pair],
    protocol: Protocol,
    left_out: _LeftOut,
    progress: Callable[[int], object],
) -> dict[str, dict[str, list[int]]]:
    """Counts by method and pair."""
    scores: dict[str, dict[str, list[int]]] = {method.name: {} for method in images.methods}
    for part in _parts(images, pairs):
        valid = [pair for pair in part if left_out.check(pair, images.look)]
        progress(len(part) - len(valid))
        for method in images.methods:
            for group in _groups(valid, images, method.name):
                scores[method.name].update(_score_group(group, images, method.name, protocol))
                if method is images.methods[-1]:
                    progress(len(group))
    return {method: dict(sorted(by_pair.items())) for method, by_pair in scores.items()}


def _parts(images: ImageFeatures, pairs: Sequence[Pair]) -> Iterator[list[Pair]]:
    """The pairs in parts whose images' descriptors fit the budget."""
    paths = sorted({path for pair in pairs for path in (pair.source, pair.target)})
    for start in range(0, len(paths), images.batch_size):
        images.load(paths[start : start + images.batch_size])
        if images.features:
            break
    capacity = images.capacity()
    # Two blocks of images are in memory at one time, so that each block meets every other one.
    length = max(1, len(paths) if capacity >= len(paths) else capacity // 2)
    block = {path: index // length for index, path in enumerate(paths)}
    parts: dict[tuple[int, int], list[Pair]] = {}
    for pair in pairs:
        low, high = sorted((block[pair.source], block[pair.target]))
        parts.setdefault((low, high), []).append(pair)
    for _, part in sorted(parts.items()):
        needed = sorted({path for pair in part for path in (pair.source, pair.target)})
        images.keep(needed)
        images.load(needed)
        yield part


def _groups(pairs: Sequence[Pair], images: ImageFeatures, method: str) -> Iterator[list[Pair]]:
    """Pairs whose maps have the same shape, with similar numbers of points, as many as fit one call."""
    by_shape: dict[Any, list[Pair]] = {}
    for pair in sorted(pairs, key=lambda pair: (len(pair.source_points), pair.name)):
        source, target = (images.features[path][method] for path in (pair.source, pair.target))
        key = (source.map.shape, target.map.shape, source.covered, target.covered)
        by_shape.setdefault(key, []).append(pair)
    for group in by_shape.values():
        each = 2 * size_of(images.features[group[0].source][method])
        count = max(1, _STACKED_BYTES // each)
        for start in range(0, len(group), count):
            yield group[start : start + count]


def _score_group(pairs: Sequence[Pair], images: ImageFeatures, method: str, protocol: Protocol) -> dict[str, list[int]]:
    """Counts by pair: key points, right ones at each alpha by ``<``, right ones by ``<=``."""
    sides = []
    for paths in ([pair.source for pair in pairs], [pair.target for pair in pairs]):
        features = [images.features[path][method] for path in paths]
        sides.append(Features(torch.stack([one.map for one in features]), features[0].covered))
    frames = [[fit(images.sizes[path], images.side) for path in (pair.source, pair.target)] for pair in pairs]
    points = [source.place(pair.source_points) for pair, (source, _) in zip(pairs, frames, strict=True)]
    matches = match_points(sides[0], sides[1], points, images.side, protocol.placement)
    counts = {}
    for pair, (_, target), found in zip(pairs, frames, matches, strict=True):
        below, at_most = is_right(found, target.place(pair.target_points), pair.box, target.scale, protocol.alphas)
        counts[pair.name] = [len(found), *map(int, below.sum(0)), *map(int, at_most.sum(0))]
    return counts
