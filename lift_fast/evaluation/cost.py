"""Parameters and floating point operations of methods, and what accuracy they buy."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lift_fast.backbones import FrozenViT
from lift_fast.backbones.vit import shared_copy
from lift_fast.lift import LiFT

from .charts import Series, line_chart
from .results import Estimate
from .runs import Run
from .tables import Column, Table

# Of layers with an affine part, as the published count has it.
_NORM_OPERATIONS = 4


@dataclass(frozen=True)
class Cost:
    """What one method costs for one image of S x S pixels."""

    method: str
    size: int
    grid: tuple[int, int]
    """Cells (h, w) of its map."""
    parameters: int
    """Of the whole backbone (the published tables count all of it) and of what comes after it."""
    gflops: float
    """2 x multiply-adds of matrix products, attention and convolutions that the plain graph runs, in 10^9; of the
    backbone only what the facet needs."""
    published_gflops: float
    """As the LiFT paper counts, see :func:`published_count`."""
    milliseconds: float | None = None


def method_cost(
    name: str,
    backbone: FrozenViT,
    size: int,
    network: nn.Module | None = None,
    milliseconds: float | None = None,
) -> Cost:
    """Cost of a method for one image.

    Nothing is computed: shapes alone run through the networks, so sizes and weights do not matter.

    Args:
        name: ``backbone``, ``bilinear``, ``double-size``, ``stride-S``, ``lift``, ``lift-N``, ``random-lift``, or with
            ``network`` any label.
        backbone: the frozen backbone.
        size: side of the image in pixels.
        network: what comes after the backbone: a ``LiFT`` or any module with ``forward(imgs, x)``. None takes a LiFT of
            the published form for the methods that have one.
        milliseconds: goes into the result.

    Raises:
        ValueError: for an unknown method, or a size smaller than a patch.
    """
    match = re.fullmatch(r"(backbone|bilinear|double-size|random-lift|lift|stride)(?:-([1-9][0-9]*))?", name)
    counted = match is not None and (match[2] is not None) == (match[1] == "stride")
    if match is None or not (counted or match[1] == "lift"):
        if network is None or not re.fullmatch(r"[\w.+-]+", name):
            raise ValueError(f"the cost of {name!r} cannot be counted; expected a method of lift-fast eval")
        kind, number = "label", 1
    else:
        kind, number = match[1], int(match[2] or 1)
    pixels = 2 * size if kind == "double-size" else size
    if pixels < backbone.patch_size:
        raise ValueError(f"images of {pixels} pixels are smaller than a patch of {backbone.patch_size}")
    if kind == "stride":
        backbone = backbone.strided(number)
    count = sum(p.numel() for p in backbone.model.parameters())
    flops, published = _backbone_flops(backbone, pixels), published_backbone_count(backbone, pixels)
    grid = backbone.grid(pixels, pixels)
    if kind in ("lift", "random-lift", "label"):
        network = network if network is not None else _published_lift(backbone)
        count += sum(p.numel() for p in network.parameters())
        seen = _seen_by(network, backbone, size)
        for step in range(number):
            picture, cells = (seen[0] << step, seen[1] << step), (grid[0], grid[1])
            more, more_published, grid = _upsampler_flops(network, backbone, picture, cells)
            flops, published = flops + more, published + more_published
    elif kind == "bilinear":
        grid = (2 * grid[0], 2 * grid[1])
    return Cost(name, size, grid, count, flops / 1e9, published / 1e9, milliseconds)


def published_backbone_count(backbone: FrozenViT, size: int) -> int:
    """What the LiFT paper's cost table counts for a backbone.

    DINO S/16 has 4.34 "GFLOPs" there at 224 pixels and 17.28 at 448. This rule gives both: multiply-adds, counted once,
    of the linear and convolution layers of the whole network; 4 operations for each element of a LayerNorm; no
    products of attention, which are no layers; and the qkv layer of the chosen block twice, for the extractor of Amir
    et al. that the paper builds on computes it a second time to read the facet.
    """
    copy = shared_copy(backbone)
    model: Any = copy.model
    with _shapes_only(), torch.no_grad(), _LayerCount(model) as layers:
        imgs = _picture(backbone, size, size)
        grid = copy.grid(size, size)
        tokens, rotary = copy._embed(imgs, grid)
        for index, block in enumerate(model.blocks):
            before = layers.total
            tokens = copy._run(block, index, tokens, rotary)
            if index == copy.layer and copy.facet not in ("token", "final"):
                projection = getattr(block.attn, "qkv", None)
                again = projection.weight.numel() * tokens.shape[1] if projection is not None else 0
                layers.total = max(before, layers.total) + again
        model.norm(tokens)
    return layers.total


def published_count(network: nn.Module, *inputs: Tensor) -> int:
    """The same rule for any module: linear layers, convolutions and normalisations that run as modules.

    A transposed convolution counts its output's elements times its whole kernel, as the paper's tool does, which is
    stride^2 times what it computes: LiFT's four times too many.
    """
    with torch.no_grad(), _LayerCount(network) as layers:
        network(*inputs)
    return layers.total


class _LayerCount:
    """Sums up what modules do while it is active."""

    def __init__(self, network: nn.Module) -> None:
        self.network, self.total = network, 0

    def __enter__(self) -> _LayerCount:
        kinds = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.LayerNorm, nn.BatchNorm2d)
        self._hooks = [m.register_forward_hook(self._add) for m in self.network.modules() if isinstance(m, kinds)]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _add(self, module: Any, _: object, out: Tensor) -> None:
        if isinstance(module, nn.Linear):
            self.total += out.numel() * module.in_features
        elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            self.total += out.numel() * (module.in_channels // module.groups) * math.prod(module.kernel_size)
        else:
            self.total += out.numel() * (_NORM_OPERATIONS if module.weight is not None else _NORM_OPERATIONS // 2)


def _shapes_only() -> FakeTensorMode:
    return FakeTensorMode(allow_non_fake_inputs=True)


@contextmanager
def flop_counter() -> Iterator[FlopCounterMode]:
    """PyTorch's counter of FLOPs, attention included whatever the release and the device."""
    # Attention as matrix products: which of its fused operators the counter knows depends on PyTorch's version, and
    # the CPU's is not among them everywhere.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter


def _picture(backbone: FrozenViT, height: int, width: int) -> Tensor:
    return torch.empty(1, 3, height, width, dtype=backbone.dtype, device=backbone.device)


def _backbone_flops(backbone: FrozenViT, size: int) -> int:
    # A copy, because the position embeddings that it keeps would be made of nothing.
    copy = shared_copy(backbone)
    with _shapes_only(), torch.no_grad(), flop_counter() as counter:
        copy(_picture(backbone, size, size))
    return int(counter.get_total_flops())


def _published_lift(backbone: FrozenViT) -> LiFT:
    """An untrained LiFT beside the backbone, whatever PyTorch's defaults are."""
    with backbone.device:
        return LiFT(backbone.embed_dim, backbone.patch_size).to(backbone.dtype)


def _seen_by(network: nn.Module, backbone: FrozenViT, size: int) -> tuple[int, int]:
    """(height, width) of what ``network`` sees of an image: a LiFT whole patches, one for each token."""
    if not isinstance(network, LiFT):
        return size, size
    h, w = backbone.grid(size, size)
    return backbone.patch_size * h, backbone.patch_size * w


def _upsampler_flops(
    network: nn.Module, backbone: FrozenViT, size: tuple[int, int], cells: tuple[int, int]
) -> tuple[int, int, tuple[int, int]]:
    """FLOPs, the published count, and the grid of what ``network`` makes of the tokens of ``cells``."""
    copy: Any = shared_copy(network).eval()
    if isinstance(copy, LiFT):
        # The folded plan is one operator, of which the counter sees nothing.
        copy.fused, copy.pre_shape, copy.post_shape = False, True, False
    with _shapes_only():
        imgs = _picture(backbone, *size)
        h, w = cells
        tokens = imgs.new_empty(1, h * w, backbone.embed_dim)
        with torch.no_grad(), flop_counter() as counter:
            out = copy(imgs, tokens)
        published = published_count(copy, imgs, tokens)
    if out.dim() == 4:
        fine = (int(out.shape[2]), int(out.shape[3]))
    else:
        factor = round(math.sqrt(out.shape[1] / (h * w)))
        fine = (factor * h, factor * w)
    return int(counter.get_total_flops()), published, fine


def measure(run: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    """Milliseconds of one call: the median of ``repeats`` after two to warm up, the device's queue drained."""

    def drain() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    times = []
    for number in range(repeats + 2):
        drain()
        start = time.perf_counter()
        run()
        drain()
        if number >= 2:
            times.append(time.perf_counter() - start)
    return 1e3 * sorted(times)[len(times) // 2]


def as_content(costs: Iterable[Cost]) -> dict[str, Any]:
    """As JSON holds them."""
    return {"protocol": "cost", "costs": [asdict(cost) for cost in costs], "skipped": {}}


def table(costs: Sequence[Cost]) -> Table:
    """Costs by method and size."""
    columns = [
        Column("cells", "", 0),
        Column("parameters, M", "", 2),
        Column("GFLOPs", "", 2),
        Column("GFLOPs as published", "", 2),
    ]
    timed = any(cost.milliseconds is not None for cost in costs)
    if timed:
        columns.append(Column("ms", "", 2))
    rows = []
    for cost in costs:
        cells: list[Any] = [
            math.prod(cost.grid),
            cost.parameters / 1e6,
            cost.gflops,
            cost.published_gflops,
        ]
        rows.append((f"{cost.method}, {cost.size}", cells + ([cost.milliseconds] if timed else [])))
    return Table("Cost of one image", columns, rows)


def accuracies(runs: Iterable[Run], metric: str) -> dict[tuple[str, int], Estimate]:
    """A metric by method and size.

    Args:
        runs: results of protocols that have figures by size, see :func:`lift_fast.evaluation.runs.read_run`.
        metric: e.g. ``PCK@0.1``.

    Raises:
        ValueError: if no result has the metric; says which there are.
    """
    figures = [figure for run in runs for figure in run.figures if figure.size is not None]
    found = {}
    for figure in figures:
        if figure.metric == metric and figure.size is not None:
            value = figure.value
            known = value if isinstance(value, Estimate) else Estimate(value, math.nan, math.nan)
            found[figure.method, figure.size] = known
    if not found:
        there = ", ".join(sorted({figure.metric for figure in figures}))
        raise ValueError(f"no result has {metric!r}; there are {there or 'no figures by size'}")
    return found


def score_table(costs: Sequence[Cost], scores: dict[tuple[str, int], Estimate], metric: str) -> Table:
    """A metric beside the cost that it takes, cheapest first."""
    rows: list[tuple[str, list[Any]]] = []
    for cost in sorted(costs, key=lambda cost: cost.gflops):
        if (cost.method, cost.size) in scores:
            cells = [cost.gflops, cost.published_gflops, scores[cost.method, cost.size]]
            rows.append((f"{cost.method}, {cost.size}", cells))
    columns = [Column("GFLOPs", "", 2), Column("GFLOPs as published", "", 2), Column(metric)]
    return Table(f"{metric} against cost", columns, rows)


def draw_curve(
    costs: Sequence[Cost],
    scores: dict[tuple[str, int], Estimate],
    metric: str,
    published: bool = False,
) -> Image.Image:
    """Accuracy against cost: a line for each method over the sizes, cost on a logarithmic axis.

    Raises:
        ValueError: if no cost has a score.
    """
    if not any((cost.method, cost.size) in scores for cost in costs):
        there = ", ".join(f"{method} at {size}" for method, size in sorted(scores))
        raise ValueError(f"nothing to draw: of these methods and sizes no result has {metric}; there are {there}")
    series = []
    for method in dict.fromkeys(cost.method for cost in costs):
        known = [c for c in costs if c.method == method and (c.method, c.size) in scores]
        values = [scores[c.method, c.size] for c in known]
        if known:
            spent = [c.published_gflops if published else c.gflops for c in known]
            points = [(x, one.value) for x, one in zip(spent, values, strict=True)]
            series.append(Series(method, points, [(one.low, one.high) for one in values]))
    x = "GFLOPs as published" if published else "GFLOPs"
    return line_chart(series, title=f"{metric} against cost", x=x, y=metric, log_x=True)
