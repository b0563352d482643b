"""Random calls of every public operator, each checked against a float64 brute force of its documentation.

``python tests/fuzz.py --calls 20000 --seed 0`` runs many; ``tests/test_fuzz.py`` a few. A call is one seed: values
(tiny, huge, mixed, equal, nearly parallel, NaN), layouts (permuted, strided, expanded, misaligned, negated), dtypes,
sizes, options, global defaults, and the implementation (native core by instruction set, plain, Triton interpreted).
What is not as documented must be refused by a ``TypeError`` or ``ValueError`` of this package.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import sys
import time
import traceback
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from lift_fast import interpreter

    interpreter.enable()

import torch
from fuzz_references import (
    Wrong,
    check_dense,
    check_nearest,
    expect,
    functional_lift,
    reference_loss,
    similarities,
    window_mask,
)
from torch.nn import functional as F

import lift_fast
from lift_fast import LiFT, cosine_loss, dense_match, nearest, propagate_labels
from lift_fast.ops import propagate_labels as propagate_op
from lift_fast.ops.cosine_loss import gpu as loss_gpu
from lift_fast.ops.dense_match import gpu as dense_match_gpu
from lift_fast.ops.dense_match import op as dense_op
from lift_fast.ops.lift_forward import gpu as gpu_plan
from lift_fast.ops.lift_forward.plan import build_plan
from lift_fast.ops.nearest import gpu as nearest_gpu
from lift_fast.ops.nearest.op import nearest_by
from lift_fast.ops.nearest.plain import beyond_range, full_matmul_precision
from lift_fast.testing import randomize

SIZES = (1, 1, 2, 3, 4, 5, 7, 8, 11, 13, 16, 17, 23, 31, 33)
DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)
REGIMES = ("normal", "normal", "tiny", "huge", "mixed", "zeros", "equal", "common", "broken", "whole", "parallel")
PACKAGE = str(Path(lift_fast.__file__).parent)


class Draw:
    """The random choices of one call, from one seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.notes: list[str] = []

    def pick(self, *options):
        return self.random.choice(options)

    def size(self) -> int:
        return self.pick(*SIZES)

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def note(self, **facts) -> None:
        self.notes += [f"{name}={value}" for name, value in facts.items()]

    def setting(self, autocast: bool = True) -> ExitStack:
        """Global settings that must not change a result, during one call."""
        stack = ExitStack()
        kind = self.pick("none", "none", "dtype", "device", "inference", "no_grad", "autocast" if autocast else "none")
        self.note(setting=kind)
        if kind == "dtype":
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(self.pick(torch.float64, torch.bfloat16, torch.float16))
        elif kind == "device":
            stack.enter_context(torch.device("meta"))
        elif kind == "inference":
            stack.enter_context(torch.inference_mode())
        elif kind == "no_grad":
            stack.enter_context(torch.no_grad())
        elif kind == "autocast":
            stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16))
        return stack

    def numbers(self, *shape: int, dtype: torch.dtype, regime: str, channel: int = -1) -> torch.Tensor:
        """Values of a regime, contiguous, already rounded to ``dtype``; descriptors along ``channel``."""
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        limit = math.log10(torch.finfo(dtype).max) - 2
        rows = [1 if axis == channel % len(shape) else size for axis, size in enumerate(shape)]
        if regime == "tiny":
            values = values * 10.0 ** -self.random.uniform(2, min(30, limit + 2))
        elif regime == "huge":
            values = values * 10.0 ** self.random.uniform(limit / 3, limit)
        elif regime == "mixed":
            power = torch.rand(rows, generator=self.generator, dtype=torch.float64)
            values = values * 10.0 ** ((power * 2 - 1) * min(18, limit))
        elif regime == "zeros":
            values = values * (torch.rand(rows, generator=self.generator) < 0.5)
        elif regime == "equal":
            flat = values.movedim(channel, -1).reshape(math.prod(rows), shape[channel])
            if len(flat):
                flat = flat[torch.randint(min(3, len(flat)), (len(flat),), generator=self.generator)]
            moved = [size for axis, size in enumerate(shape) if axis != channel % len(shape)]
            values = flat.view(*moved, shape[channel]).movedim(-1, channel)
        elif regime == "common":
            values = values * 1e-3 + torch.randn(
                [shape[channel] if axis == channel % len(shape) else 1 for axis in range(len(shape))],
                generator=self.generator,
                dtype=torch.float64,
            )
        elif regime == "broken" and values.numel():
            flat = values.flatten()
            for _ in range(self.random.randint(1, 3)):
                flat[self.random.randrange(len(flat))] = self.pick(math.nan, math.inf, -math.inf)
            values = flat.view(shape)
        elif regime == "whole":
            values = values.round()
        return values.to(dtype).contiguous()

    def laid(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same values in another memory layout."""
        kind = self.pick("as is", "as is", "permuted", "stepped", "misaligned", "negated", "offset", "parameter")
        self.note(layout=kind)
        if kind == "permuted":
            order = list(range(tensor.dim()))
            self.random.shuffle(order)
            back = [order.index(axis) for axis in range(tensor.dim())]
            return tensor.permute(order).contiguous().permute(back)
        if kind == "stepped" and tensor.numel():
            wide = torch.full([2 * size for size in tensor.shape], math.nan, dtype=tensor.dtype)
            out = wide[tuple(slice(None, None, 2) for _ in tensor.shape)]
            return out.copy_(tensor)
        if kind == "misaligned":
            room = torch.full((tensor.numel() + 3,), math.nan, dtype=tensor.dtype)
            return room[1 : 1 + tensor.numel()].view(tensor.shape).copy_(tensor)
        if kind == "negated" and tensor.dtype in (torch.float32, torch.float64):
            return torch.complex(torch.zeros_like(tensor), -tensor).conj().imag
        if kind == "offset" and tensor.dim() > 1 and tensor.numel():
            wide = torch.full([size + 2 for size in tensor.shape], math.nan, dtype=tensor.dtype)
            return wide[tuple(slice(1, -1) for _ in tensor.shape)].copy_(tensor)
        if kind == "parameter":
            return torch.nn.Parameter(tensor)
        return tensor


# One function for each operator: draws a call, runs it, checks the result.


def native_tolerance(dtype: torch.dtype) -> float:
    return 1e-12 if dtype == torch.float64 else 4e-6


def wide_of(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def run_nearest(draw: Draw, how: str) -> None:
    dtype, channels = draw.pick(*DTYPES), draw.size()
    regimes = draw.pick(*REGIMES), draw.pick(*REGIMES)
    window, n, m = None, draw.size(), draw.size()
    if draw.chance(0.4):
        grid = draw.random.randint(1, 6), draw.random.randint(1, 6)
        other = None if draw.chance(0.5) else (draw.random.randint(1, 6), draw.random.randint(1, 6))
        window = (draw.pick(0, 1, 2, 7), grid, other)
        n, cells = grid[0] * grid[1], math.prod(other or grid)
        m = cells * draw.random.randint(0 if draw.chance(0.1) else 1, 3)
    normalize = draw.chance(0.7)
    options = {
        "k": draw.pick(1, 1, 2, 3, 5, 9),
        "mutual": draw.chance(0.4),
        "ratio": draw.pick(None, None, 0.8, 1.0) if normalize else None,
        "window": window,
        "normalize": normalize,
    }
    batch = draw.pick((), (), (2,), (1, 2), (0,))
    query = draw.numbers(*batch, n, channels, dtype=dtype, regime=regimes[0])
    key = draw.numbers(*batch, m, channels, dtype=dtype, regime=regimes[1])
    if regimes[1] == "parallel" and m:
        at = torch.randint(n, (m,), generator=draw.generator)
        key = (query[..., at, :].double() * 1.5 + 1e-3 * key.double()).to(dtype)
    precision = "fast" if how == "auto" and draw.chance(0.1) else "exact"
    draw.note(
        op="nearest", dtype=dtype, regimes=regimes, shape=(*batch, n, m, channels), precision=precision, **options
    )
    if how == "triton":
        given = [t.reshape(math.prod(batch), *t.shape[-2:]) for t in (query, key)]
        flat = None
        if window is not None:
            radius, grid, other = window
            flat = [radius, *grid, *(other or grid)]
        expect_fits = nearest_gpu.fits(*given, options["k"], flat)[0]
        if not expect_fits or (not normalize and "huge" in regimes) or dtype == torch.float64:
            return
        arguments = (options["k"], options["mutual"], options["ratio"], flat, normalize)
        result = nearest_by(nearest_gpu.search, *(draw.laid(t).detach().resolve_neg() for t in given), *arguments)
    else:
        given = draw.laid(query), draw.laid(key)
        with draw.setting():
            result = nearest(*given, precision=precision, **options)
    if precision == "fast":
        tolerance = 2.0**-6
    elif how == "triton":
        tolerance = 2e-5
    else:
        tolerance = native_tolerance(dtype)
    count = math.prod(batch)
    result = [part.reshape(count, *part.shape[len(batch) if how != "triton" else 1 :]) for part in result]
    queries, keys = query.reshape(count, n, channels), key.reshape(count, m, channels)
    # Only the native core guarantees it: libraries sum the last rows of a product in another order.
    bitwise = how not in ("plain", "triton") and dtype != torch.float64 and precision == "exact"
    bitwise = bitwise and (normalize or not beyond_range(query, key))
    for b in range(count):
        check_nearest(queries[b], keys[b], options, [part[b] for part in result], tolerance, wide_of(dtype), bitwise)


def run_dense(draw: Draw, how: str) -> None:
    dtype, channels = draw.pick(*DTYPES), draw.pick(1, 2, 3, 7, 16)
    regimes = draw.pick(*REGIMES), draw.pick(*REGIMES)
    grids = [(draw.random.randint(1, 6), draw.random.randint(1, 6)) for _ in range(2)]
    sizes = [(draw.random.randint(1, 17), draw.random.randint(1, 17)) for _ in range(2)]
    if draw.chance(0.3):
        sizes = [(grid[0] * draw.pick(1, 2, 3, 4), grid[1] * draw.pick(1, 2, 3, 4)) for grid in grids]
    options = {"normalize": draw.pick("grid", "pixel", None), "mutual": draw.chance(0.4)}
    batch = draw.pick(1, 1, 2)
    query = draw.numbers(batch, channels, *grids[0], dtype=dtype, regime=regimes[0], channel=1)
    key = draw.numbers(batch, channels, *grids[1], dtype=dtype, regime=regimes[1], channel=1)
    points = None
    if draw.chance(0.4):
        count = draw.pick(0, 1, 3, 9)
        limit = torch.tensor([sizes[0][1], sizes[0][0]])
        points = torch.rand(batch, count, 2, generator=draw.generator) * limit
        points = torch.minimum(points, limit - 0.25).to(
            draw.pick(torch.float32, torch.float64, torch.int64, torch.int32)
        )
    draw.note(
        op="dense_match", dtype=dtype, regimes=regimes, channels=channels, grids=grids, sizes=sizes, points=points
    )
    draw.note(batch=batch, **options)
    if how == "triton":
        if dtype == torch.float64 or options["mutual"] or "huge" in regimes or "mixed" in regimes or "tiny" in regimes:
            return
        name = options["normalize"] or "none"
        results = []
        for b in range(batch):
            first, second = (
                dense_op.stretch(cells[b].float(), size, name) for cells, size in zip((query, key), sizes, strict=True)
            )
            if not dense_match_gpu.fits(first, second)[0]:
                return
            at = None if points is None else points[b].floor().long()
            if at is not None and not len(at):
                return
            with full_matmul_precision():
                similarity, index = dense_match_gpu.match(first, second, at, name == "pixel", "triton")
            xy = torch.stack([index % sizes[1][1], index.div(sizes[1][1], rounding_mode="floor")], -1)
            xy[index < 0] = -1
            results.append((similarity, xy, index >= 0))
    else:
        given = draw.laid(query), draw.laid(key)
        with draw.setting():
            found = dense_match(*given, *sizes, points=points, **options)
        results = [[part[b] for part in found] for b in range(batch)]
    tolerance = 1e-11 if dtype == torch.float64 else 2e-5 if how == "triton" else 8e-6
    for b in range(batch):
        at = None if points is None else points[b].double()
        check_dense(query[b], key[b], *sizes, at, options, results[b], tolerance, wide_of(dtype))


def run_loss(draw: Draw, how: str) -> None:
    dtype = draw.pick(*DTYPES)
    shape = [draw.size() for _ in range(draw.random.randint(1, 4))]
    if draw.chance(0.1):
        shape[draw.random.randrange(len(shape))] = 0
    while math.prod(shape) > 30000:
        shape[draw.random.randrange(len(shape))] = 2
    dim = draw.random.randrange(len(shape))
    regimes = draw.pick(*REGIMES), draw.pick(*REGIMES)
    prediction = draw.numbers(*shape, dtype=dtype, regime=regimes[0], channel=dim)
    target = draw.numbers(*shape, dtype=dtype, regime=regimes[1], channel=dim)
    if regimes[1] == "parallel":
        target = (prediction.double() * 1.5 + 1e-3 * target.double()).to(dtype)
    reduction, gradient = draw.pick("mean", "sum", "none"), draw.chance(0.7)
    draw.note(op="cosine_loss", dtype=dtype, shape=shape, dim=dim, regimes=regimes, reduction=reduction, grad=gradient)
    wanted, slope, length = reference_loss(prediction, target, dim)
    positions = wanted.numel()
    tolerance = 1e-12 if dtype == torch.float64 else 3e-6
    upstream = torch.randn(wanted.shape if reduction == "none" else (), generator=draw.generator, dtype=torch.float64)
    # Keeps gradients in the range of the dtype.
    finite = length[length.isfinite() & (length > 0)]
    upstream = (
        upstream * (float(finite.median()) if len(finite) else 1.0) * (positions or 1 if reduction == "mean" else 1)
    )
    upstream = upstream.clamp(-1e30, 1e30).to(wide_of(dtype))
    if how == "triton":
        if dtype == torch.float64 or not prediction.numel():
            return
        given = draw.laid(prediction).detach().resolve_neg(), draw.laid(target).detach().resolve_neg()
        loss, found = loss_gpu.loss_and_gradient(*given, dim, reduction, gradient, upstream if gradient else None)
    else:
        given = draw.laid(prediction).detach().requires_grad_(gradient), draw.laid(target).detach()
        with draw.setting():
            followed = torch.is_grad_enabled() and gradient
            loss = cosine_loss(*given, dim - len(shape) if draw.chance(0.5) else dim, reduction)
            found = torch.autograd.grad(loss, given[0], upstream)[0] if followed else None
        gradient = followed
    expect(loss.dtype == wide_of(dtype), "loss dtype")
    part = wanted.isfinite()
    if reduction == "none":
        expect(loss.shape == wanted.shape, "loss shape")
        expect((loss.double() - wanted)[part].abs().le(tolerance).all(), "loss")
        expect(not loss[~part].isfinite().any(), "loss of what is not finite")
    elif part.all() and positions:
        total = wanted.sum() / (positions if reduction == "mean" else 1)
        expect((loss.double() - total).abs() <= tolerance * (positions if reduction == "sum" else 1), "reduced loss")
    else:
        expect(not loss.isfinite() or (reduction == "sum" and not positions), "reduced loss of what is not finite")
    if not gradient or not prediction.numel():
        return
    assert found is not None
    expect(found.dtype == dtype and found.shape == prediction.shape, "gradient's dtype and shape")
    above = upstream.double() / (positions if reduction == "mean" else 1)
    above = above.unsqueeze(dim) if reduction == "none" else above
    exact = slope * above
    # Half precision is rounded when it is written, and bfloat16 once more when it is scaled.
    step = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}.get(dtype, tolerance)
    allowed = step * (above / length.unsqueeze(dim)).abs() + 1.5 * torch.finfo(dtype).tiny
    # Underflow of the scale and the factors of a very long vector.
    allowed = allowed + above.abs() * torch.finfo(dtype).tiny
    over = exact.abs() >= torch.finfo(dtype).max * 0.99
    finite = part.unsqueeze(dim).expand_as(exact) & ~over & exact.isfinite()
    expect(((found.double() - exact).abs() <= allowed)[finite].all(), "gradient")


def run_propagate(draw: Draw, how: str) -> None:
    dtype, channels, objects = draw.pick(*DTYPES), draw.size(), draw.pick(1, 2, 3, 7)
    regimes = draw.pick(*REGIMES), draw.pick(*REGIMES)
    grid = draw.random.randint(1, 6), draw.random.randint(1, 6)
    key_grid = None if draw.chance(0.5) else (draw.random.randint(1, 6), draw.random.randint(1, 6))
    n, cells = math.prod(grid), math.prod(key_grid or grid)
    m = cells * draw.random.randint(1, 3)
    options = {
        "radius": draw.pick(None, 0, 1, 2),
        "k": draw.pick(1, 2, 5, 100),
        "temperature": draw.pick(0.1, 1.0, 0.01),
    }
    normalize = draw.chance(0.8)
    query = draw.numbers(n, channels, dtype=dtype, regime=regimes[0])
    key = draw.numbers(m, channels, dtype=dtype, regime=regimes[1])
    labels = torch.rand(m, objects, generator=draw.generator, dtype=torch.float64).to(draw.pick(torch.float32, dtype))
    draw.note(op="propagate_labels", dtype=dtype, regimes=regimes, n=n, m=m, channels=channels, grid=grid)
    draw.note(key_grid=key_grid, normalize=normalize, objects=objects, **options)
    if how == "triton":
        if dtype == torch.float64 or not normalize or options["k"] > 32:
            return
        radius = max(key_grid or grid) if options["radius"] is None else options["radius"]
        window = [radius, *grid, *(key_grid or grid)]
        given = [draw.laid(t).detach().resolve_neg()[None] for t in (query, key, labels)]
        found = propagate_op.propagate_labels_triton(*given, window, options["k"], options["temperature"], True)[0]
    else:
        given = [draw.laid(t) for t in (query, key, labels)]
        with draw.setting():
            found = propagate_labels(*given, grid=grid, key_grid=key_grid, normalize=normalize, **options)
    expect(found.shape == (n, objects) and found.dtype == wide_of(dtype), "shape and dtype")
    table, lengths, exponent = similarities(query, key, normalize)
    good_q, good_k = query.isfinite().all(-1), key.isfinite().all(-1)
    allowed = good_q[:, None] & good_k
    if options["radius"] is not None:
        allowed &= window_mask((options["radius"], grid, key_grid), n, m)
    rounding = (2e-5 if how == "triton" else native_tolerance(dtype)) * lengths.nan_to_num(0, 0, 0)
    temperature = options["temperature"] * 2.0**-exponent
    for i in range(n):
        count = min(options["k"], int(allowed[i].sum()))
        if not count:
            expect((found[i] == 0).all(), f"row {i}: no match, label {found[i].tolist()}")
            continue
        row = torch.where(allowed[i], table[i], -torch.inf)
        order = row.sort(descending=True, stable=True)
        slack = float(rounding[i].max())
        if 4 * slack > temperature or (
            count < int(allowed[i].sum()) and order.values[count - 1] - order.values[count] <= 4 * slack
        ):
            # Rounding decides which keys belong; the label is one of theirs in any case.
            low, high = labels.double()[allowed[i]].amin(0), labels.double()[allowed[i]].amax(0)
            expect(((found[i] >= low - 1e-3) & (found[i] <= high + 1e-3)).all(), f"row {i}: label outside its matches'")
            continue
        weight = ((order.values[:count] - order.values[0]) / temperature).exp()
        exact = (weight / weight.sum()) @ labels.double()[order.indices[:count]]
        expect((found[i] - exact).abs().max() <= 8 * slack / temperature + 1e-5, f"row {i}: {found[i].tolist()}")


def run_lift(draw: Draw, how: str) -> None:
    dtype = draw.pick(*DTYPES)
    channels, patch, batch = draw.pick(2, 3, 7, 8, 16, 33), draw.pick(8, 16, 16, 14, 5), draw.pick(1, 1, 2)
    height, width = (draw.random.randint(patch, 4 * patch) for _ in range(2))
    h, w = height // patch, width // patch
    options = draw.pick({}, {}, {"use_image": False}, {"image_channels": 20}, {"extra_image_blocks": 1})
    pre, post, fused = draw.chance(0.5), draw.chance(0.5), draw.chance(0.8)
    lift = randomize(LiFT(channels, patch, pre, post, **options), draw.random.randrange(1 << 30)).to(dtype).eval()
    regime = draw.pick("normal", "normal", "tiny", "zeros", "common", "whole")
    imgs = draw.numbers(batch, 3, height, width, dtype=dtype, regime="normal")
    x = draw.numbers(batch, h * w, channels, dtype=dtype, regime=regime)
    narrow = draw.chance(0.3)
    draw.note(op="LiFT", dtype=dtype, channels=channels, patch=patch, size=(height, width), fused=fused, narrow=narrow)
    draw.note(pre=pre, post=post, batch=batch, regime=regime, **options)
    maps = x.transpose(1, 2).unflatten(2, (h, w))
    given_x = draw.laid(x if pre else maps.contiguous())
    given = draw.laid(imgs)
    side = 8 if patch == 8 else 16
    seen = imgs[:, :, : patch * h, : patch * w]
    aligned = (
        seen
        if patch in (8, 16)
        else F.interpolate(seen.float(), size=(16 * h, 16 * w), mode="bilinear", antialias=True)
    )
    state = {name: value.double() for name, value in lift.state_dict().items()}
    exact = functional_lift(state, aligned.to(dtype).double(), maps.double(), patch)
    assert exact.shape[2:] == (2 * h, 2 * w)
    assert aligned.shape[2] == side * h
    if how == "triton":
        if dtype == torch.float64:
            return
        plan = build_plan(*lift._plan_sources(), lift.architecture)
        prepared = gpu_plan.prepare_gpu(plan, torch.device("cpu"), dtype)
        tokens = x.view(batch, h, w, channels)
        with torch.no_grad():
            out = gpu_plan.run_gpu_plan(prepared, aligned.to(dtype), tokens).permute(0, 3, 1, 2)
        narrow = False
    else:
        lift.fused = fused
        with torch.no_grad(), draw.setting(autocast=False):
            if narrow:
                out = lift.matching_map(given, given_x)
                expect(out.shape == (batch, channels // 2 + 1, 2 * h, 2 * w), "shape of the matching map")
            else:
                out = lift(given, given_x)
                out = out.transpose(1, 2).unflatten(2, (2 * h, 2 * w)) if post else out
    expect(out.dtype == dtype, "dtype")
    limit = {torch.float64: 1e-10, torch.float32: 2e-5}.get(dtype, 0.06 if dtype == torch.bfloat16 else 0.01)
    if narrow:
        ours, rows = (t.double().flatten(2).transpose(1, 2) for t in (out, exact))
        ours, rows = ours @ ours.transpose(1, 2), rows @ rows.transpose(1, 2)
        scale = rows.abs().max() + 1e-30
        expect((ours - rows).abs().max() <= 4 * limit * scale, "inner products of the matching map")
        return
    error = (out.double() - exact).norm() / exact.norm().clamp_min(1e-30)
    expect(error <= limit, f"relative error {float(error):.2g}")


JUNK = (
    None, "a", 3, 2.5, -1, 2**62, 2**70, True, [], [1, 2], {}, (), (0, 0), (2**40, 3), math.nan, b"x", object(),
    torch.zeros(()), torch.zeros(0), torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.complex64),
    torch.zeros(2, 2).to_sparse(), torch.zeros(2, 2, device="meta"), torch.zeros(2, 2).to(torch.float8_e4m3fn),
    torch.zeros(1, 1, 1, 1, 1), torch.zeros(2, 3, 4, dtype=torch.bool), torch.zeros(2, 2).to_mkldnn(),
)  # fmt: skip


def run_junk(draw: Draw, how: str) -> None:
    """A valid call with one or two invalid arguments: an error of this package, or a result."""
    x, maps, points = torch.randn(6, 4), torch.randn(1, 4, 2, 3), torch.ones(1, 2, 2)
    calls = {
        "nearest": (nearest, {"query": x, "key": x, "k": 2, "mutual": True, "ratio": 0.9, "window": (1, (2, 3)),
                              "normalize": True, "precision": "exact"}),
        "dense_match": (dense_match, {"query_map": maps, "key_map": maps, "query_size": (5, 7), "key_size": (4, 4),
                                      "points": points, "normalize": "grid", "mutual": True}),
        "cosine_loss": (cosine_loss, {"prediction": x, "target": x, "dim": 1, "reduction": "mean"}),
        "propagate_labels": (propagate_labels, {"query": x, "key": x, "labels": x, "grid": (2, 3), "radius": 1, "k": 2,
                                                "temperature": 0.1, "key_grid": (2, 3), "normalize": True}),
        "LiFT": (LiFT, {"in_channels": 4, "patch_size": 8, "pre_shape": True, "post_shape": True, "use_image": True,
                        "image_channels": 2, "extra_image_blocks": 1}),
        "forward": (LiFT(4, 8).eval(), {"imgs": torch.randn(1, 3, 16, 24), "x": torch.randn(1, 6, 4)}),
        "matching_map": (LiFT(4, 8).eval().matching_map, {"imgs": torch.randn(1, 3, 16, 24), "x": torch.randn(1, 6, 4),
                                                          "normalize": True}),
    }  # fmt: skip
    name = draw.pick(*calls)
    call, arguments = calls[name]
    arguments = dict(arguments)
    for _ in range(draw.pick(1, 1, 2)):
        argument, value = draw.pick(*arguments), draw.pick(*JUNK)
        arguments[argument] = value
        draw.note(op=name, argument=argument, value=repr(value)[:60])
    try:
        call(**arguments)
    except (TypeError, ValueError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        expect(frames[-1].filename.startswith(PACKAGE), f"an error from {frames[-1].filename}: {error}")
        expect("\n" not in str(error) and 10 < len(str(error)) < 500, f"message: {error}")


OPERATORS = {
    "nearest": run_nearest,
    "dense_match": run_dense,
    "cosine_loss": run_loss,
    "propagate_labels": run_propagate,
    "lift": run_lift,
    "junk": run_junk,
}


def world(draw: Draw, how: str) -> ExitStack:
    """Global state that must not change."""
    stack = ExitStack()
    changes: dict[str, str | None] = dict.fromkeys(("LIFT_FAST_DISABLE_NATIVE", "LIFT_FAST_CPU_ISA"))
    if how == "plain":
        changes["LIFT_FAST_DISABLE_NATIVE"] = "1"
    elif how in ("avx2", "baseline"):
        changes["LIFT_FAST_CPU_ISA"] = how
    for name, value in changes.items():
        before = os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
        stack.callback(_restore, name, before)
    # The interpreter multiplies exactly, so TF32 products round nothing.
    stack.callback(setattr, torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)
    torch.backends.cudnn.allow_tf32 = False
    threads = torch.get_num_threads()
    torch.set_num_threads(draw.pick(1, 1, 1, 2))
    stack.callback(torch.set_num_threads, threads)
    return stack


def _restore(name: str, value: str | None) -> None:
    os.environ.pop(name, None)
    if value is not None:
        os.environ[name] = value


def one_call(seed: int, operator: str | None = None) -> tuple[str, str]:
    """Run and check one call; returns its operator and implementation.

    Raises:
        Wrong: if the result is not the documented one; any other exception is wrong too.
    """
    draw = Draw(seed)
    name = operator or draw.pick("nearest", "nearest", "dense_match", "dense_match", "cosine_loss", "cosine_loss",
                                 "propagate_labels", "lift", "junk")  # fmt: skip
    how = draw.pick(*["auto"] * 9, *["plain"] * 5, *["avx2"] * 2, *["baseline"] * 2, "triton")
    draw.note(seed=seed, how=how)
    try:
        with world(draw, how):
            OPERATORS[name](draw, how)
    except Exception as error:
        raise Wrong(f"{type(error).__name__}: {error}\n    {' '.join(draw.notes)}") from error
    return name, how


def main() -> int:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the first call")
    parser.add_argument("--operator", choices=list(OPERATORS))
    arguments = parser.parse_args()
    counts: Counter[tuple[str, str]] = Counter()
    wrong, start = 0, time.monotonic()
    for seed in range(arguments.seed, arguments.seed + arguments.calls):
        try:
            counts[one_call(seed, arguments.operator)] += 1
        except Wrong as error:
            wrong += 1
            print(f"wrong: {error}", flush=True)
    for (name, how), count in sorted(counts.items()):
        print(f"{name:18}{how:10}{count}")
    print(f"{arguments.calls} calls, {wrong} wrong, {time.monotonic() - start:.0f} s")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
