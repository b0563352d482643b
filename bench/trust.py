"""What confidence, verification and warning of ``match_images`` are worth, on photographs under known homographies.

python -m bench.trust PHOTOS --held-out --skip 33 --count 50

Each photograph is matched with views of itself under known homographies (lift_fast.evaluation.warp) with changed
colours, and with a view of another photograph. ``--held-out`` takes the photographs that the demonstration pair was not
trained on, from the folder that it was trained on. Prints the tables of docs/matching.md; ``--json`` keeps the figures.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from lift_fast import ImageMatches, ViTLiFTExtractor, match_images
from lift_fast.demonstration import BACKBONE, LIFT
from lift_fast.evaluation.warp.protocol import change_colours, name_seed, project, random_homography, render
from lift_fast.geometry import KINDS, guessed_camera, verify_pairs
from lift_fast.images import list_images, read_image
from lift_fast.training import split
from lift_fast.trust import least_agreement, least_inliers

Array = npt.NDArray[np.float64]
SIZE, STEP, RIGHT = 448, 4, 3.0
# Strengths of the homographies: that of the warp protocol, and stronger.
STRENGTHS = (1.0, 1.5)
_RANDOM = 2000
# Cells around the best one that do not count as its rivals.
_PEAK = 2


def view(path: Path, strength: float) -> tuple[Image.Image, Array]:
    """A view of a photograph, and the homography from pixels of its first view to pixels of this one."""
    back = random_homography(name_seed(path.name, 0, 0), strength)
    image = change_colours(render(read_image(path), back, SIZE), name_seed(path.name, 0, 1))
    pixels = np.array([[SIZE, 0, -0.5], [0, SIZE, -0.5], [0, 0, 1.0]])
    return image, pixels @ np.linalg.inv(back) @ np.linalg.inv(pixels)


def corner_error(found: Array | None, truth: Array) -> float:
    """Mean distance of the four corners in pixels; infinite without a homography."""
    if found is None:
        return float("inf")
    corners = np.array([[0, 0], [SIZE - 1, 0], [SIZE - 1, SIZE - 1], [0, SIZE - 1.0]])
    distances = np.linalg.norm(project(found, corners) - project(truth, corners), axis=1)
    return float(np.nan_to_num(distances, nan=np.inf).mean())


def scores(found: ImageMatches, maps: list[torch.Tensor]) -> dict[str, Array]:
    """Candidates for the confidence of the valid matches."""
    valid = found.valid
    similarity, way_back = found.similarity.clamp(0, 1), torch.exp2(-found.distance)
    # Sharpness: how far the best cell stands above the best one outside its neighbourhood.
    a, b = (F.normalize(m[0].float(), dim=0) for m in maps)
    table = a.flatten(1).T @ b.flatten(1)
    best, index = table.max(1)
    rows, columns = torch.arange(b.shape[1]), torch.arange(b.shape[2])
    y, x = (index // b.shape[2])[:, None], (index % b.shape[2])[:, None]
    near = ((rows - y).abs() <= _PEAK)[:, :, None] & ((columns - x).abs() <= _PEAK)[:, None]
    rival = table.view(-1, *b.shape[1:]).masked_fill(near, -1).flatten(1).amax(1)
    sharpness = F.interpolate((best - rival).view(1, 1, *a.shape[1:]), size=(SIZE, SIZE), mode="bilinear")[0, 0]
    at = found.xy_a.round().long()
    sharpness = sharpness[at[..., 1], at[..., 0]].clamp_min(0)
    # Neighbours: the share of those within three cells whose displacement is similar, up to a slope.
    moved = F.pad((found.xy_b - found.xy_a).permute(2, 0, 1) / 8, (6, 6, 6, 6), value=1e4)
    height, width = valid.shape
    neighbours = torch.zeros(height, width)
    for dy in range(-6, 7, 2):
        for dx in range(-6, 7, 2):
            other = moved[:, 6 + dy : 6 + dy + height, 6 + dx : 6 + dx + width]
            away = (other - moved[:, 6:-6, 6:-6]).norm(dim=0) / (0.5 + 0.15 * (dx * dx + dy * dy) ** 0.5 / 2)
            neighbours += torch.exp(-away.square() / 2) / 49
    found_scores = {
        "similarity": similarity,
        "way back": way_back,
        "similarity and way back (release 0.1.0)": similarity * way_back,
        "sharpness of the peak": sharpness,
        "sharpness and way back": sharpness * way_back,
        "neighbours' displacements": neighbours,
        "neighbours and way back": neighbours * way_back,
        "local affine maps (`confidence`)": found.confidence,
        "local affine maps and way back": found.confidence * way_back,
        "local affine maps and sharpness": found.confidence * sharpness,
    }
    return {name: value[valid].double().numpy() for name, value in found_scores.items()}


def ranking(score: Array, right: npt.NDArray[np.bool_]) -> tuple[float, float]:
    """Area under the precision curve (over the share of matches that is kept), and precision of the best tenth."""
    ordered = right[np.argsort(-score, kind="stable")]
    precision = ordered.cumsum() / np.arange(1, len(ordered) + 1)
    return float(precision.mean()), float(ordered[: max(1, len(ordered) // 10)].mean())


def judged(matches: ImageMatches) -> dict[str, Any]:
    """What the warnings know about a pair. With this step a verification draws all valid matches."""
    trust, record = matches.trust, matches.verification
    figures: dict[str, Any] = {"valid": trust.valid_share, "agreement": trust.agreement}
    a, b = (xy[matches.valid] for xy in (matches.xy_a, matches.xy_b))
    for kind in KINDS:
        if kind == "homography":
            found = record
        else:
            camera = guessed_camera((SIZE, SIZE))
            found = verify_pairs(a, b, kind, threshold=record.threshold, camera=camera)
        figures[f"inliers of {kind}"] = found.inliers
        figures[f"inlier share of {kind}"] = found.share
    return figures


def measure(paths: list[Path]) -> dict[str, Any]:
    """All figures, as lists over pairs."""
    extractor = ViTLiFTExtractor(BACKBONE, LIFT, device="cpu", silent=True)

    def match(first: Image.Image, second: Image.Image, normalize: str = "pixel") -> ImageMatches:
        return match_images(
            first, second, extractor=extractor, size=SIZE, step=STEP, normalize=normalize, verify="homography"
        )

    errors: dict[str, list[float]] = defaultdict(list)
    rankings: dict[str, list[tuple[float, float]]] = defaultdict(list)
    shares, related, unrelated = [], [], []
    tenths = np.zeros((10, 3))
    for index, path in enumerate(tqdm(paths)):
        first = render(read_image(path), np.eye(3), SIZE)
        for strength in STRENGTHS:
            second, truth = view(path, strength)
            for normalize in ("grid", "pixel"):
                matches = match(first, second, normalize)
                threshold = matches.verification.threshold
                a, b = (xy[matches.valid].double().numpy() for xy in (matches.xy_a, matches.xy_b))
                some = np.random.default_rng(0).permutation(len(a))[:_RANDOM]
                for name, found in {
                    "all valid matches": verify_pairs(a, b, threshold=threshold).matrix,
                    f"{_RANDOM} random ones": verify_pairs(a[some], b[some], threshold=threshold).matrix,
                    "`verify`": matches.transform,
                }.items():
                    errors[f"{normalize}, {name}"].append(corner_error(found, truth))
            right = np.linalg.norm(project(truth, a) - b, axis=1) < RIGHT
            shares.append(float(right.mean()))
            batches = [extractor.preprocess(image, (SIZE, SIZE))[0] for image in (first, second)]
            with torch.no_grad():
                maps = [extractor.matching_map(batch) for batch in batches]
            for name, score in scores(matches, maps).items():
                rankings[name].append(ranking(score, right))
            confidence = matches.confidence[matches.valid].double().numpy()
            bins = np.minimum((confidence * 10).astype(int), 9)
            for column, weights in enumerate((np.ones(len(bins)), confidence, right)):
                tenths[:, column] += np.bincount(bins, weights, 10)
            related.append(judged(matches))
        for step in (1, 7):
            second, _ = view(paths[(index + step) % len(paths)], 1.0)
            unrelated.append(judged(match(first, second)))
    return {
        "photographs": [path.name for path in paths],
        "errors": errors,
        "right": shares,
        "ranking": rankings,
        "calibration": tenths.tolist(),
        "related": related,
        "unrelated": unrelated,
        "grids": (matches.grid_a, matches.grid_b),
    }


def tables(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = ["| homography from | median corner error, px | weaker warps | stronger warps | within 10 px |"]
    lines.append("| --- | ---: | ---: | ---: | ---: |")
    for name, errors in result["errors"].items():
        medians = [statistics.median(part) for part in (errors, errors[0::2], errors[1::2])]
        share = statistics.mean(error < 10 for error in errors)
        lines.append(f"| {name} | {' | '.join(f'{value:.2f}' for value in medians)} | {share:.0%} |")
    base = statistics.mean(result["right"])
    lines += ["", f"| order by | area under the precision curve | best tenth within {RIGHT:g} px | against all |"]
    lines.append("| --- | ---: | ---: | ---: |")
    lines.append(f"| chance | {base:.3f} | {base:.1%} | 1.0 |")
    for name, found in result["ranking"].items():
        area, best = (statistics.mean(column) for column in zip(*found, strict=True))
        lines.append(f"| {name} | {area:.3f} | {best:.1%} | {best / base:.1f} |")
    lines += ["", f"| confidence | matches | mean confidence | within {RIGHT:g} px |", "| --- | ---: | ---: | ---: |"]
    for k, (count, total, right) in enumerate(result["calibration"]):
        if count:
            lines.append(
                f"| {k / 10:.1f} to {(k + 1) / 10:.1f} | {count:.0f} | {total / count:.2f} | {right / count:.2f} |"
            )
    heads = (
        "related: lowest twentieth, median",
        "unrelated: median, highest twentieth",
        "bound",
        "false alarms",
        "misses",
    )
    lines += ["", f"| figure | {' | '.join(heads)} |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: |")
    grids = result["grids"]
    bounds = {f"inliers of {kind}": float(least_inliers(kind, grids)) for kind in KINDS}
    bounds["agreement"] = least_agreement(grids)
    for name in result["related"][0]:
        ours, others = (np.array([pair[name] for pair in result[side]]) for side in ("related", "unrelated"))
        quantiles = [*np.quantile(ours, (0.05, 0.5)), *np.quantile(others, (0.5, 0.95))]
        row = f"| {name} | {quantiles[0]:.3g}, {quantiles[1]:.3g} | {quantiles[2]:.3g}, {quantiles[3]:.3g} | "
        bound = bounds.get(name)
        if bound is None:
            row += "| | |"
        else:
            alarms, misses = int((ours < bound).sum()), int((others >= bound).sum())
            row += f"{bound:.3g} | {alarms} of {len(ours)} | {misses} of {len(others)} |"
        lines.append(row)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", type=Path, metavar="PHOTOS", help="a folder of photographs")
    parser.add_argument("--held-out", action="store_true", help="only every tenth, which training leaves out")
    parser.add_argument("--skip", type=int, default=0, metavar="N", help="leave out the first N, after shuffling")
    parser.add_argument("--count", type=int, default=50, metavar="N", help="at most N photographs (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to a file")
    arguments = parser.parse_args()
    paths = list_images(arguments.photographs)
    if arguments.held_out:
        paths = split(paths, root=arguments.photographs)[1]
    chosen = np.random.default_rng(0).permutation(len(paths))[arguments.skip :][: arguments.count]
    if len(chosen) < 8:
        parser.error(f"at least 8 photographs are needed, {arguments.photographs} leaves {len(chosen)}")
    result = measure([paths[index] for index in chosen])
    if arguments.json:
        arguments.json.write_text(json.dumps(result))
    print(tables(result))


if __name__ == "__main__":
    main()
