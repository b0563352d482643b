"""Linear CKA between features of the same picture at different input sizes: how little features change with scale."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lift_fast.evaluation.charts import Series, line_chart
from lift_fast.evaluation.discovery import read_as_stored
from lift_fast.evaluation.methods import Batch, Features
from lift_fast.evaluation.results import Column, Estimate, Table, bootstrap
from lift_fast.images import resize, to_tensor

from .journal import CKARun

SIZES = (56, 112, 224, 448)


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear centred kernel alignment of two sets of features of the same positions.

    ``|Y^T X|^2 / (|X^T X| |Y^T Y|)`` in Frobenius norms, columns centred (Kornblith et al., "Similarity of Neural
    Network Representations Revisited", ICML 2019): the plain, biased estimator. It does not change if either side is
    turned or scaled. Computed in float64 from C x C or N x N products, whichever is smaller.

    Args:
        x: ``[N, C1]``.
        y: ``[N, C2]``.

    Returns:
        0 to 1; NaN if one side is constant.

    Raises:
        ValueError: for other shapes, or values that are not finite.
    """
    _check_pair(x, y)
    # Scale does not count; fourth powers of it would leave even float64.
    x, y = (each.double() / (float(each.abs().max()) or 1.0) for each in (x, y))
    x, y = x - x.mean(0), y - y.mean(0)
    if len(x) <= max(x.shape[1], y.shape[1]):
        gram_x, gram_y = x @ x.T, y @ y.T
        cross = float((gram_x * gram_y).sum())
        own = float(gram_x.norm()) * float(gram_y.norm())
    else:
        cross = float((y.T @ x).square().sum())
        own = float((x.T @ x).norm()) * float((y.T @ y).norm())
    return _ratio(cross, own)


class StreamingCKA:
    """:func:`linear_cka` over positions that come in parts: of many pictures, in memory of C x C."""

    def __init__(self) -> None:
        self.count = 0
        self._origin: tuple[Tensor, ...] = ()
        self._sums: list[Tensor] = []
        self._products: list[Tensor] = []

    def update(self, x: Tensor, y: Tensor) -> None:
        """Add positions, ``[N, C1]`` and ``[N, C2]``.

        Raises:
            ValueError: as :func:`linear_cka`, and for other channels than before.
        """
        _check_pair(x, y)
        x, y = x.double(), y.double()
        if not self._sums:
            # Far from zero, sums of squares lose what centring needs; any point among the data will do as the origin.
            self._origin = x.mean(0), y.mean(0)
            shapes = ((x.shape[1],) * 2, (y.shape[1],) * 2, (y.shape[1], x.shape[1]))
            self._products = [torch.zeros(shape, dtype=torch.float64, device=x.device) for shape in shapes]
            self._sums = [torch.zeros_like(origin) for origin in self._origin]
        if (x.shape[1], y.shape[1]) != (len(self._sums[0]), len(self._sums[1])):
            raise ValueError(
                f"expected {len(self._sums[0])} and {len(self._sums[1])} channels as before, got {x.shape[1]} and "
                f"{y.shape[1]}"
            )
        x, y = (each - origin.to(each.device) for each, origin in zip((x, y), self._origin, strict=True))
        self.count += len(x)
        for total, part in zip(self._sums, (x, y), strict=True):
            total += part.sum(0).to(total.device)
        for total, (a, b) in zip(self._products, ((x, x), (y, y), (y, x)), strict=True):
            total += (a.T @ b).to(total.device)

    def state(self) -> dict[str, Any]:
        """What :meth:`restore` needs; plain values and tensors on the CPU."""
        if not self.count:
            return {"count": 0}
        parts = {"origin": self._origin, "sums": self._sums, "products": self._products}
        return {"count": self.count, **{name: [t.cpu().clone() for t in part] for name, part in parts.items()}}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from the :meth:`state` of another."""
        self.count = state["count"]
        if self.count:
            self._origin = tuple(state["origin"])
            self._sums, self._products = list(state["sums"]), list(state["products"])

    def value(self) -> float:
        """Linear CKA of all positions so far; NaN without any."""
        if self.count == 0:
            return math.nan
        sum_x, sum_y = self._sums
        centred = [
            product - torch.outer(a, b) / self.count
            for product, (a, b) in zip(self._products, ((sum_x, sum_x), (sum_y, sum_y), (sum_y, sum_x)), strict=True)
        ]
        own_x, own_y, cross = (float(part.norm()) for part in centred)
        return _ratio(cross**2, own_x * own_y)


def _ratio(cross: float, own: float) -> float:
    return cross / own if own > 0 else math.nan


def _check_pair(x: Tensor, y: Tensor) -> None:
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or 0 in x.shape or 0 in y.shape:
        raise ValueError(
            f"expected [N, C1] and [N, C2] of the same N positions, got {list(x.shape)} and {list(y.shape)}"
        )
    if not (bool(torch.isfinite(x).all()) and bool(torch.isfinite(y).all())):
        raise ValueError("features hold NaN or infinity")


def sample(features: Features, positions: Tensor, picture: tuple[int, int]) -> Tensor:
    """Features at positions of the picture, bilinear between cells' centres, held constant beyond the outermost.

    Args:
        features: a map ``[1, C, h, w]`` and the pixels that it covers.
        positions: ``[h', w', 2]`` (x, y) as shares of the picture's width and height, 0 to 1.
        picture: (height, width) of the picture that the map was made from.

    Returns:
        ``[h' * w', C]`` float64.
    """
    maps, (top, left, height, width) = features
    x = (positions[..., 0] * picture[1] - left) / width
    y = (positions[..., 1] * picture[0] - top) / height
    at = torch.stack([2 * x - 1, 2 * y - 1], dim=-1).to(maps.device, torch.float64)
    found = F.grid_sample(maps.double(), at[None], mode="bilinear", padding_mode="border", align_corners=False)
    return found[0].flatten(1).T


def centres(rows: int, columns: int) -> Tensor:
    """[rows, columns, 2] centres (x, y) of a grid of cells over a picture, as shares of its sides."""
    y, x = ((torch.arange(n, dtype=torch.float64, device="cpu") + 0.5) / n for n in (rows, columns))
    return torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1)


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
            image = read_as_stored(path)
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


def draw_curves(content: dict[str, Any]) -> Image.Image:
    """The curves of :func:`scale_invariance` as a chart.

    Raises:
        ValueError: if no value is defined.
    """
    series = []
    for name, curve in content["curves"].items():
        known = [(int(size), entry["cka"]) for size, entry in curve.items() if _known(entry["cka"][0])]
        series.append(
            Series(
                name,
                [(size, cka[0]) for size, cka in known],
                [(cka[1], cka[2]) if _known(cka[1]) else (math.nan, math.nan) for _, cka in known],
            )
        )
    size, count = content["reference"], content["pictures"]
    return line_chart(
        series, title=f"Linear CKA with the features at {size} x {size}, {count} pictures", x="input size", y="CKA"
    )


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def table(content: dict[str, Any]) -> Table:
    """CKA by method and size."""
    rows = []
    for name, curve in content["curves"].items():
        cells = [Estimate(*(math.nan if v is None else v for v in curve[str(s)]["cka"])) for s in content["sizes"]]
        rows.append((name, cells))
    title = f"Linear CKA with the features at {content['reference']} pixels, {content['pictures']} pictures"
    return Table(title, [Column(f"{size}", digits=3) for size in content["sizes"]], rows)
