"""Parameters and floating point operations of methods, and what accuracy they buy."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
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
from .results import Estimate, as_estimate
from .runs import Run
from .tables import Column, Table

# Of layers with an affine part, as in the published count.
_NORM_OPERATIONS = 4
_shapes_only = partial(FakeTensorMode, allow_non_fake_inputs=True)


@dataclass(frozen=True)
class Cost:
    """What one method costs for one image of S x S pixels."""

    method: str
    size: int
    grid: tuple[int, int]
    """Cells (h, w) of its map."""
    parameters: int
    """Of the whole backbone (the published tables count all of it) and of the network after it."""
    gflops: float
    """2 x multiply-adds of the matrix products, attention and convolutions of the plain graph, in 10^9; of the backbone
    only what the facet needs."""
    published_gflops: float
    """As the LiFT paper counts, see :func:`published_count`."""
    milliseconds: float | None = None


def method_cost(
    name: str, backbone: FrozenViT, size: int, network: nn.Module | None = None, milliseconds: float | None = None
) -> Cost:
    """Cost of a method for one image.

    Only shapes run through the networks, so large sizes cost nothing and weights do not matter.

    Args:
        name: ``backbone``, ``bilinear``, ``double-size``, ``stride-S``, ``lift``, ``lift-N``, ``random-lift``, or with
            ``network`` any label.
        backbone: the frozen backbone.
        size: side of the image in pixels.
        network: what follows the backbone: a ``LiFT`` or any module with ``forward(imgs, x)``. None takes a LiFT of the
            published form for the methods that have one.
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
    grid: tuple[int, int] = backbone.grid(pixels, pixels)
    if kind in ("lift", "random-lift", "label"):
        if network is None:
            # Whatever PyTorch's default device and dtype are.
            with backbone.device:
                network = LiFT(backbone.embed_dim, backbone.patch_size).to(backbone.dtype)
        count += sum(p.numel() for p in network.parameters())
        # A LiFT sees whole patches, one for each token.
        height, width = (backbone.patch_size * n for n in grid) if isinstance(network, LiFT) else (size, size)
        for step in range(number):
            seen = (height << step, width << step)
            more, more_published, grid = _upsampler_flops(network, backbone, seen, grid)
            flops, published = flops + more, published + more_published
    elif kind == "bilinear":
        grid = (2 * grid[0], 2 * grid[1])
    return Cost(name, size, grid, count, flops / 1e9, published / 1e9, milliseconds)


def published_backbone_count(backbone: FrozenViT, size: int) -> int:
    """What the LiFT paper's cost table counts for a backbone.

    DINO S/16 has 4.34 "GFLOPs" there at 224 pixels and 17.28 at 448. This rule gives both: multiply-adds, counted once,
    of the linear and convolution layers of the whole network; 4 operations for each element of a LayerNorm; nothing
    for the products of attention, which are not layers; and the qkv layer of the chosen block twice, because the
    extractor of Amir et al., on which the paper builds, computes it again to read the facet.
    """
    copy = shared_copy(backbone)
    model: Any = copy.model
    with _shapes_only(), torch.no_grad(), _layer_operations(model) as operations:
        imgs = _empty_image(backbone, size, size)
        tokens, rotary = copy._embed(imgs, copy.grid(size, size))
        for index, block in enumerate(model.blocks):
            tokens = copy._run(block, index, tokens, rotary)
            projection = getattr(block.attn, "qkv", None)
            if index == copy.layer and copy.facet not in ("token", "final") and projection is not None:
                operations.append(projection.weight.numel() * tokens.shape[1])
        model.norm(tokens)
    return sum(operations)


def published_count(network: nn.Module, *inputs: Tensor) -> int:
    """The same rule for any module: linear layers, convolutions and normalisations that run as modules.

    A transposed convolution counts its output's elements times its whole kernel, as the paper's tool does. This is
    stride^2 times what it computes: four times too many for LiFT.
    """
    with torch.no_grad(), _layer_operations(network) as operations:
        network(*inputs)
    return sum(operations)


@contextmanager
def _layer_operations(network: nn.Module) -> Iterator[list[int]]:
    """The operations of each layer that runs in the meantime."""
    operations: list[int] = []

    def add(module: Any, _: object, out: Tensor) -> None:
        if isinstance(module, nn.Linear):
            each = module.in_features
        elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            each = (module.in_channels // module.groups) * math.prod(module.kernel_size)
        else:
            each = _NORM_OPERATIONS if module.weight is not None else _NORM_OPERATIONS // 2
        operations.append(out.numel() * each)

    kinds = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.LayerNorm, nn.BatchNorm2d)
    hooks = [m.register_forward_hook(add) for m in network.modules() if isinstance(m, kinds)]
    try:
        yield operations
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def flop_counter() -> Iterator[FlopCounterMode]:
    """PyTorch's counter of FLOPs; it counts attention in every release and on every device."""
    # Attention as matrix products: which fused attention the counter knows depends on PyTorch's version, and the CPU's
    # is often missing.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter


def _empty_image(backbone: FrozenViT, height: int, width: int) -> Tensor:
    return torch.empty(1, 3, height, width, dtype=backbone.dtype, device=backbone.device)


def _backbone_flops(backbone: FrozenViT, size: int) -> int:
    # A copy: the position embeddings that the backbone keeps would hold no values.
    copy = shared_copy(backbone)
    with _shapes_only(), torch.no_grad(), flop_counter() as counter:
        copy(_empty_image(backbone, size, size))
    return int(counter.get_total_flops())


def _upsampler_flops(
    network: nn.Module, backbone: FrozenViT, size: tuple[int, int], cells: tuple[int, int]
) -> tuple[int, int, tuple[int, int]]:
    """FLOPs, the published count, and the grid of the network's output for the tokens of ``cells``."""
    copy: Any = shared_copy(network).eval()
    if isinstance(copy, LiFT):
        # The counter does not see into the folded plan, which is one operator.
        copy.fused, copy.pre_shape, copy.post_shape = False, True, False
    with _shapes_only():
        imgs = _empty_image(backbone, *size)
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
    """Milliseconds of one call: the median of ``repeats`` after two warm-up calls; the device's queue is drained."""

    def drain() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    times = []
    for _ in range(repeats + 2):
        drain()
        start = time.perf_counter()
        run()
        drain()
        times.append(time.perf_counter() - start)
    return 1e3 * sorted(times[2:])[repeats // 2]


def as_content(costs: Iterable[Cost]) -> dict[str, Any]:
    """As JSON holds them."""
    return {"protocol": "cost", "costs": [asdict(cost) for cost in costs], "skipped": {}}


def table(costs: Sequence[Cost]) -> Table:
    """Costs by method and size."""
    titles = ("parameters, M", "GFLOPs", "GFLOPs as published")
    columns = [Column("cells", "", 0), *(Column(title, "", 2) for title in titles)]
    timed = any(cost.milliseconds is not None for cost in costs)
    if timed:
        columns.append(Column("ms", "", 2))
    rows = []
    for cost in costs:
        cells: list[Any] = [math.prod(cost.grid), cost.parameters / 1e6, cost.gflops, cost.published_gflops]
        rows.append((f"{cost.method}, {cost.size}", cells + ([cost.milliseconds] if timed else [])))
    return Table("Cost of one image", columns, rows)


def accuracies(runs: Iterable[Run], metric: str) -> dict[tuple[str, int], Estimate]:
    """A metric such as ``PCK@0.1`` by method and size, from results with figures by size.

    Raises:
        ValueError: if no result has the metric; lists those that there are.
    """
    found, known = {}, set()
    for figure in (figure for run in runs for figure in run.figures):
        if figure.size is not None:
            known.add(figure.metric)
            if figure.metric == metric:
                found[figure.method, figure.size] = as_estimate(figure.value)
    if not found:
        there = ", ".join(sorted(known))
        raise ValueError(f"no result has {metric!r}; there are {there or 'no figures by size'}")
    return found


def score_table(costs: Sequence[Cost], scores: dict[tuple[str, int], Estimate], metric: str) -> Table:
    """A metric and the cost that it takes, cheapest first."""
    rows: list[tuple[str, list[Any]]] = []
    for cost in sorted(costs, key=lambda cost: cost.gflops):
        if (cost.method, cost.size) in scores:
            cells = [cost.gflops, cost.published_gflops, scores[cost.method, cost.size]]
            rows.append((f"{cost.method}, {cost.size}", cells))
    columns = [Column("GFLOPs", "", 2), Column("GFLOPs as published", "", 2), Column(metric)]
    return Table(f"{metric} against cost", columns, rows)


def draw_curve(
    costs: Sequence[Cost], scores: dict[tuple[str, int], Estimate], metric: str, published: bool = False
) -> Image.Image:
    """Accuracy against cost, a line for each method; raises ``ValueError`` if no cost has a score."""
    if not any((cost.method, cost.size) in scores for cost in costs):
        there = ", ".join(f"{method} at {size}" for method, size in sorted(scores))
        raise ValueError(f"nothing to draw: no result has {metric} of these methods and sizes; there are {there}")
    series = []
    for method in dict.fromkeys(cost.method for cost in costs):
        known = [c for c in costs if c.method == method and (c.method, c.size) in scores]
        spent = (c.published_gflops if published else c.gflops for c in known)
        if known:
            series.append(Series.of(method, zip(spent, (scores[c.method, c.size] for c in known), strict=True)))
    x = "GFLOPs as published" if published else "GFLOPs"
    return line_chart(series, title=f"{metric} against cost", x=x, y=metric, log_x=True)
