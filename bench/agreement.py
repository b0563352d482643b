"""Whether bfloat16 finds the matches that float32 finds, on photographs under known homographies.

python -m bench.agreement PHOTOS --held-out

Each photograph is matched with the view of the warp protocol (lift_fast.evaluation.warp), once with the networks in
float32 and once in bfloat16; the matcher computes in float32. For comparison, float32 in the native core is held up to
float32 in PyTorch's own layers: matches differ by rounding there, too. ``--held-out`` takes the photographs that the
demonstration pair was not trained on, from the folder that it was trained on. Prints the tables of docs/matching.md;
intervals are a bootstrap over photographs.
"""

from __future__ import annotations

import argparse
import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from lift_fast import ViTLiFTExtractor, dense_match, match_images
from lift_fast.demonstration import BACKBONE, LIFT
from lift_fast.evaluation.results import bootstrap
from lift_fast.evaluation.warp.protocol import ALPHAS, MARGIN, project, render
from lift_fast.images import list_images, read_image
from lift_fast.training import split

from .trust import SIZE, STEP, corner_error, view

Array = npt.NDArray[np.float64]
NORMALIZE = ("pixel", "grid")
# Ways to compute the maps that are compared, the first with each other one.
BASE, HALF, PLAIN = "float32", "bfloat16", "float32, PyTorch's layers"
NEAR = (0.5, 1.0, 2.0)


@contextmanager
def without_native_core() -> Iterator[None]:
    before = os.environ.get("LIFT_FAST_DISABLE_NATIVE")
    os.environ["LIFT_FAST_DISABLE_NATIVE"] = "1"
    try:
        yield
    finally:
        del os.environ["LIFT_FAST_DISABLE_NATIVE"]
        if before is not None:
            os.environ["LIFT_FAST_DISABLE_NATIVE"] = before


def extractors(device: str | None, **options: Any) -> dict[str, ViTLiFTExtractor]:
    return {
        name: ViTLiFTExtractor(device=device, silent=True, dtype=dtype, **options)
        for name, dtype in ((BASE, torch.float32), (HALF, torch.bfloat16), (PLAIN, torch.float32))
    }


@torch.no_grad()
def maps_of(name: str, extractor: ViTLiFTExtractor, images: list[Image.Image]) -> Tensor:
    """``[2, c, h, w]`` in the extractor's dtype."""
    batch = torch.cat([extractor.preprocess(image, (SIZE, SIZE))[0] for image in images])
    if name != PLAIN:
        return extractor.matching_map(batch)
    with without_native_core():
        return extractor.matching_map(batch)


def map_errors(found: Tensor, exact: Tensor) -> dict[str, float]:
    """How far maps are from float32's: relative, and the largest error of a cosine of cells of the two images."""
    cosines = []
    for maps in (found, exact):
        a, b = torch.nn.functional.normalize(maps.float(), dim=1).flatten(2)
        cosines.append(a.T @ b)
    return {
        "relative error of the maps": float((found.float() - exact).norm() / exact.norm()),
        "largest error of a cosine": float((cosines[0] - cosines[1]).abs().max()),
    }


def compare(maps: dict[str, Tensor], truth: Array, normalize: str) -> dict[str, dict[str, float]]:
    """Figures of one pair for each way to compute its maps."""
    y, x = torch.meshgrid(*[torch.arange(1, SIZE, STEP)] * 2, indexing="ij")
    points = torch.stack([x, y], -1).flatten(0, 1).to(maps[BASE].device)
    there = project(truth, points.cpu().double().numpy())
    # In this form points beyond the horizon are left out.
    inside = ((there >= MARGIN * SIZE) & (there <= (1 - MARGIN) * SIZE)).all(1)
    results = {
        name: dense_match(
            found[:1], found[1:], (SIZE, SIZE), (SIZE, SIZE), points=points[None], normalize=normalize, mutual=1.0
        )
        for name, found in maps.items()
    }
    base = results[BASE]
    figures: dict[str, dict[str, float]] = {}
    for name, result in results.items():
        error = np.linalg.norm(result.xy[0].cpu().numpy()[inside] - there[inside], axis=1)
        figures[name] = {f"PCK@{alpha:g}": 100 * float((error < alpha * SIZE).mean()) for alpha in ALPHAS}
        figures[name]["valid"] = 100 * float(result.valid.float().mean())
        if name == BASE:
            continue
        cells = SIZE / maps[name].shape[-1]
        apart = (result.xy - base.xy)[0].float().norm(dim=-1) / cells
        for kind, chosen in (("", torch.ones_like(base.valid[0])), (" of the valid", base.valid[0])):
            some = apart[chosen]
            if len(some):
                figures[name][f"equal{kind}"] = 100 * float((some == 0).float().mean())
                figures[name].update({f"within {n:g}{kind}": 100 * float((some <= n).float().mean()) for n in NEAR})
        figures[name]["same verdict"] = 100 * float((result.valid == base.valid).float().mean())
    return figures


def measure(paths: list[Path], networks: dict[str, ViTLiFTExtractor]) -> dict[str, Any]:
    """Figures by normalisation and way, as lists over pairs."""
    figures: dict[str, Any] = {rule: defaultdict(lambda: defaultdict(list)) for rule in NORMALIZE}
    errors: dict[str, Any] = defaultdict(lambda: defaultdict(list))
    for path in tqdm(paths):
        images = [render(read_image(path), np.eye(3), SIZE)]
        second, truth = view(path, 1.0)
        images.append(second)
        maps = {name: maps_of(name, extractor, images) for name, extractor in networks.items()}
        for name in networks:
            for what, value in map_errors(maps[name], maps[BASE]).items():
                errors[name][what].append(value)
        for rule in NORMALIZE:
            for name, found in compare(maps, truth, rule).items():
                for what, value in found.items():
                    figures[rule][name][what].append(value)
    return {"figures": figures, "errors": errors}


def verified(paths: list[Path], networks: dict[str, ViTLiFTExtractor]) -> str:
    """Homographies that ``match_images`` finds and verifies, as Markdown: their corner errors, and warnings."""
    errors: dict[str, list[float]] = defaultdict(list)
    warned: dict[str, int] = defaultdict(int)
    for path in tqdm(paths):
        first = render(read_image(path), np.eye(3), SIZE)
        second, truth = view(path, 1.0)
        for name in (BASE, HALF):
            matches = match_images(first, second, extractor=networks[name], size=SIZE, step=STEP, verify="homography")
            errors[name].append(corner_error(matches.transform, truth))
            warned[name] += bool(matches.warning)
    lines = ["", f"| homographies, {len(paths)} pairs | median corner error, px | within 10 px | warned of |"]
    lines.append("| --- | ---: | ---: | ---: |")
    for name, found in errors.items():
        near = sum(error < 10 for error in found)
        lines.append(f"| {name} | {np.median(found):.2f} | {near} | {warned[name]} |")
    return "\n".join(lines)


def tables(what: str, result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = []
    for rule, ways in result["figures"].items():
        count = len(ways[BASE]["valid"])
        lines += ["", f'**{what}, `"{rule}"`, {count} pairs**', ""]
        names = [f"PCK@{alpha:g}" for alpha in ALPHAS] + ["valid"]
        lines.append(f"| networks | {' | '.join(names)} |")
        lines.append("| --- |" + " ---: |" * len(names))
        base = np.array([ways[BASE][name] for name in names]).T
        for way, found in ways.items():
            values = np.array([found[name] for name in names]).T
            lines.append(f"| {way} | {' | '.join(f'{value:.2f}' for value in values.mean(0))} |")
            if way != BASE:
                cells = [f"{e.value:+.2f} ({e.low:+.2f} to {e.high:+.2f})" for e in bootstrap(values - base)]
                lines.append(f"| less float32 | {' | '.join(cells)} |")
        names = ["equal", *(f"within {n:g}" for n in NEAR)]
        heads = [*names, *(f"{name} of the valid" for name in names), "same verdict"]
        lines += ["", f"| against float32, % | {' | '.join(heads)} |", "| --- |" + " ---: |" * len(heads)]
        for way, found in ways.items():
            if way != BASE:
                lines.append(f"| {way} | {' | '.join(f'{np.mean(found[name]):.1f}' for name in heads)} |")
    lines += ["", "| against float32 | median relative error of the maps | largest error of a cosine |"]
    lines.append("| --- | ---: | ---: |")
    for way, found in result["errors"].items():
        if way != BASE:
            relative, largest = found.values()
            lines.append(f"| {way} | {np.median(relative):.1e} | {max(largest):.1e} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", type=Path, metavar="PHOTOS", help="a folder of photographs")
    parser.add_argument("--held-out", action="store_true", help="only every tenth, which training leaves out")
    parser.add_argument("--count", type=int, default=100, metavar="N", help="at most N photographs (%(default)s)")
    parser.add_argument(
        "--random", type=int, default=8, metavar="N", help="and N with a random ViT-S/16, its arithmetic (%(default)s)"
    )
    parser.add_argument("--device", help="cpu, cuda, ... (CUDA if there is one)")
    arguments = parser.parse_args()
    paths = list_images(arguments.photographs)
    if arguments.held_out:
        paths = split(paths, root=arguments.photographs)[1]
    chosen = [paths[index] for index in np.random.default_rng(0).permutation(len(paths))[: arguments.count]]
    networks = extractors(arguments.device, model_type=BACKBONE, lift_path=LIFT)
    print(verified(chosen, networks))
    print(tables("demonstration pair", measure(chosen, networks)))
    if arguments.random:
        options = {"model_type": "dino_vits16", "random_weights": True, "random_lift": True}
        networks = extractors(arguments.device, **options)
        print(tables("ViT-S/16 of random weights", measure(chosen[: arguments.random], networks)))


if __name__ == "__main__":
    main()
