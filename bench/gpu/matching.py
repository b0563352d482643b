"""Matching: ``nearest``, ``dense_match`` and ``propagate_labels`` against brute force and what people run today."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lift_fast.ops import dense_match as dense_op
from lift_fast.ops import dense_match_cuda, nearest_gpu
from lift_fast.ops import propagate_labels as propagate_op
from lift_fast.ops.nearest import nearest_plain
from lift_fast.testing import poisoned_outputs

from .clock import milliseconds
from .state import State

# Sets of this many descriptors: all pixels of a quarter of a 448-pixel picture; width of ViT-S.
LARGE, CHANNELS = 50176, 384
# (N, M, C, options): primes, one row, more matches than keys, windows beyond the grid, every path.
CASES: list[tuple[int, int, int, dict[str, Any]]] = [
    (1031, 3137, 384, {"mutual": True}),
    (997, 20011, 193, {"ratio": 0.95, "mutual": True}),
    (1, 77, 5, {"k": 3}),
    (31, 7, 33, {"k": 9}),
    (4099, 5003, 64, {"k": 5}),
    (777, 1013, 48, {"normalize": False}),
    (13 * 17, 3 * 13 * 17, 32, {"k": 5, "window": [3, 13, 17, 13, 17], "mutual": True}),
    (12 * 10, 7 * 9, 16, {"window": [40, 12, 10, 7, 9]}),
]
TINY: list[tuple[int, int, int, dict[str, Any]]] = [(3, 17, 5, {"mutual": True}), (2, 5, 3, {"k": 2})]
MAPS = [((14, 11), (13, 17), (97, 80), (101, 131)), ((1, 3), (2, 2), (5, 7), (6, 3))]
TINY_MAPS = [((2, 2), (2, 1), (3, 4), (4, 3))]
# (grid, frames, C, labels, k, radius)
PROPAGATIONS = [((13, 17), 3, 48, 4, 5, 3), ((29, 31), 8, 384, 7, 5, 12), ((1, 5), 2, 33, 1, 9, 40)]
TINY_PROPAGATIONS = [((2, 3), 2, 8, 3, 2, 1)]
# Of the descriptors' products; beyond float32's rounding, as the largest of many thousands is compared.
LIMIT = 5e-6
# Of mutual checks: share of pixels whose verdict differs from float64's, which rounding alone may decide.
VERDICT_LIMIT = 1e-3
# Similarities are divided by a temperature of 0.1 and exponentiated.
PROPAGATION_LIMIT = 1e-4
# What publishes an exact search on the GPU; importable or listed as not installed.
PEERS = ("faiss", "flash_kmeans", "pykeops")


@torch.no_grad()
def run(state: State) -> None:
    """Writes ``matching``: errors, times, memory; and judges the goals."""
    results: dict[str, Any] = {"errors": [], "times": []}
    state.results["matching"] = results
    dtypes = [torch.float32, torch.float16] + ([] if state.rehearse else [torch.bfloat16])
    torch.manual_seed(state.seed)
    for case in TINY if state.rehearse else CASES:
        for dtype in dtypes:
            _judge_error(state, f"nearest {case} {dtype}", nearest_error(*case, dtype, state.device))
    runs, reason = dense_match_cuda.can_run(state.device)
    if not runs:
        state.skipped.append(f"native dense_match: {reason}")
        if not state.rehearse:
            state.failures.append(f"native dense_match: {reason}")
    backends = ("cuda", "triton") if runs else ("triton",)
    for maps in TINY_MAPS if state.rehearse else MAPS:
        for normalize in ("grid", "pixel", "none"):
            for backend in backends:
                name = f"dense_match {backend} {maps} {normalize}"
                error, differ = dense_error(*maps, normalize, state.device, backend)
                _judge_error(state, name, error)
                _judge_error(state, f"{name}, mutual", differ, VERDICT_LIMIT)
    for propagation in TINY_PROPAGATIONS if state.rehearse else PROPAGATIONS:
        error = propagation_error(*propagation, state.device)
        _judge_error(state, f"propagate_labels {propagation}", error, PROPAGATION_LIMIT)
    print(f"worst error: {max(row['error'] for row in results['errors']):.1e}")
    _time_nearest(state, results["times"])
    _time_dense(state, results["times"], backends)
    _time_propagation(state, results["times"])
    if not state.rehearse:
        _time_tiles(state, results["times"])
    for row in results["times"]:
        share = f"  {row['TFLOP/s']:.0f} TFLOP/s" if "TFLOP/s" in row else ""
        peak = f"  {row['peak bytes'] / 1e6:.0f} MB" if row.get("peak bytes") is not None else ""
        print(f"{row['what']:58} {row['ms']:10.3f} ms{share}{peak}", flush=True)
    _goals(state, {row["what"]: row for row in results["times"]})


def _judge_error(state: State, name: str, error: float, limit: float = LIMIT) -> None:
    state.results["matching"]["errors"].append({"case": name, "error": error, "limit": limit})
    if not error <= limit:
        state.failures.append(f"matching: {name}: {error:.2e} > {limit:.0e}")


def nearest_error(
    n: int, m: int, channels: int, options: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> float:
    """How far the chosen keys, and the similarities given, are from the best in float64; infinite for a wrong form."""
    arguments = {"k": 1, "mutual": False, "ratio": None, "window": None, "normalize": True, **options}
    query, key = (torch.randn(1, count, channels, device=device).to(dtype) for count in (n, m))
    with poisoned_outputs():
        similarity, index, _ = nearest_gpu.nearest_gpu(query, key, **arguments)
    exact = nearest_plain(query.double(), key.double(), **arguments)[0]
    there = torch.isfinite(exact)
    if not torch.equal(index >= 0, there):
        return float("inf")
    rows = query.double().expand(index.shape[2], -1, -1).permute(1, 0, 2), key[0][index[0].clamp_min(0)].double()
    if arguments["normalize"]:
        rows = F.normalize(rows[0], dim=-1), F.normalize(rows[1], dim=-1)
    chosen = (rows[0] * rows[1]).sum(-1)[None]
    scale = exact[there].abs().max().clamp_min(1)
    errors = torch.stack([(chosen - exact)[there].abs().max(), (similarity.double() - exact)[there].abs().max()])
    return float(errors.nan_to_num(torch.inf).max() / scale)


def dense_error(
    grid: tuple[int, int],
    other: tuple[int, int],
    size: tuple[int, int],
    other_size: tuple[int, int],
    normalize: str,
    device: torch.device,
    backend: str,
) -> tuple[float, float]:
    """The same for every pixel of a picture, and the share of them whose mutual check says something else."""
    # Positive: norms that nearly cancel would magnify rounding.
    maps = [torch.randn(1, 24, *side, device=device).abs() for side in (grid, other)]
    sizes = list(size), list(other_size)
    with poisoned_outputs():
        similarity, _, valid = dense_op.dense_match(*maps, *sizes, None, normalize, True, backend=backend)
    exact, _, mutual = dense_op.dense_match(*(m.double() for m in maps), *sizes, None, normalize, True, exhaustive=True)
    scale = exact.abs().max().clamp_min(1)
    error = float((similarity.double() - exact).abs().nan_to_num(torch.inf).max() / scale)
    return error, float((valid != mutual).double().mean())


def propagation_error(
    grid: tuple[int, int], frames: int, channels: int, objects: int, k: int, radius: int, device: torch.device
) -> float:
    """How far propagated labels of 0 to 1 are from those in float64."""
    count = grid[0] * grid[1]
    query, key = (torch.randn(2, n, channels, device=device) for n in (count, frames * count))
    labels = torch.rand(2, frames * count, objects, device=device)
    window = [radius, *grid, *grid]
    with poisoned_outputs():
        ours = propagate_op.propagate_labels_triton(query, key, labels, window, k, 0.1, True)
    exact = propagate_op.propagate_labels_plain(query.double(), key.double(), labels.double(), window, k, 0.1, True)
    # Where the k-th and the next key are equal within rounding, either may be averaged.
    off = (ours.double() - exact).abs().amax(-1)
    deeper = nearest_plain(query.double(), key.double(), k + 1, False, None, window, True)[0]
    clear = deeper[..., k - 1] - deeper[..., k] > LIMIT
    # Missing matches leave a difference of NaN (-inf - -inf): nothing to confuse.
    return float(off[clear | ~deeper[..., k].isfinite()].nan_to_num(torch.inf).max())


def _chunked(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """What people write: normalise, multiply in portions, take the maximum."""
    unit, keys = F.normalize(query, dim=-1), F.normalize(key, dim=-1).t()
    parts = [(part @ keys).max(dim=1) for part in unit.split(4096)]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


def _peak(state: State, call: Callable[[], Any]) -> int | None:
    """Bytes beyond what existed before."""
    if state.device.type != "cuda":
        return None
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _row(state: State, what: str, call: Callable[[], Any], flops: float | None = None) -> dict[str, Any]:
    row: dict[str, Any] = {"what": what, "ms": milliseconds(call, [()], state.device, seconds=0.5)}
    row["peak bytes"] = _peak(state, call)
    if flops is not None:
        row["TFLOP/s"] = flops / row["ms"] / 1e9
        ceilings = state.results.get("ceilings")
        if ceilings and not state.rehearse:
            row["of matmul"] = flops / (row["ms"] / 1e3) / ceilings["bf16 flops per second"]
    return row


def _time_nearest(state: State, rows: list[dict[str, Any]]) -> None:
    count, channels = (20, 8) if state.rehearse else (LARGE, CHANNELS)
    flops = 2.0 * count * count * channels
    exact = torch.randn(2, count, channels, device=state.device)
    half = exact.to(torch.float16 if state.rehearse else torch.bfloat16)

    def ours(pair: Tensor, **options: Any) -> Callable[[], Any]:
        arguments = {"k": 1, "mutual": False, "ratio": None, "window": None, "normalize": True, **options}
        return lambda: nearest_gpu.nearest_gpu(pair[:1], pair[1:], **arguments)

    rows.append(_row(state, "nearest bf16", ours(half), flops))
    rows.append(_row(state, "nearest bf16, mutual", ours(half, mutual=True), flops))
    rows.append(_row(state, "nearest bf16, ratio", ours(half, ratio=0.9), flops))
    rows.append(_row(state, "nearest bf16, k 5", ours(half, k=5), flops))
    rows.append(_row(state, "nearest fp32", ours(exact), flops))
    rows.append(_row(state, "nearest fp32, mutual", ours(exact, mutual=True), flops))
    rows.append(_row(state, "nearest fp32, fast", ours(exact, fast=True), flops))
    rows.append(_row(state, "chunked matmul + max, bf16", lambda: _chunked(*half), flops))
    rows.append(_row(state, "chunked matmul + max, fp32", lambda: _chunked(*exact), flops))
    if not state.rehearse:
        if state.left() < 250:
            state.skipped.append("matching: torch.compile of chunked matmul + max: no time left")
        else:
            compiled = torch.compile(_chunked)
            rows.append(_row(state, "chunked matmul + max, bf16, compiled", lambda: compiled(*half), flops))
            torch._dynamo.reset()
    _time_peers(state, rows, exact, half, flops)
    side, frames = (3, 2) if state.rehearse else (56, 7)
    some = half[:, : side * side]
    video = torch.randn(1, frames * side * side, channels, device=state.device).to(half.dtype)
    window = [1 if state.rehearse else 12, side, side, side, side]
    rows.append(
        _row(
            state,
            f"nearest bf16, {side} x {side} against {frames} frames, radius {window[0]}, k 5",
            lambda: nearest_gpu.nearest_gpu(some[:1], video, 5, False, None, window, True),
        )
    )


def _time_tiles(state: State, rows: list[dict[str, Any]]) -> None:
    """The search kernel alone with every tile worth measuring: what the default should be."""
    from lift_fast.kernels import launch, nearest

    half = torch.randn(2, LARGE, CHANNELS, device=state.device).bfloat16()
    flops = 2.0 * LARGE * LARGE * CHANNELS
    expected = None
    for tile in nearest.candidates(half.shape[2], launch.capability(state.device)):
        if state.left() < 250:
            state.skipped.append("matching: further tiles: no time left")
            return
        for both in (False, True):
            name = f"tile {tuple(tile)}{', mutual' if both else ''}"
            try:
                query, key = (nearest.prepare(part[None], True, half.dtype, tile.depth) for part in half)
                found = nearest.search(query, key, 1, tile, mutual=both)
                similarity = found.values.amax(1)
                expected = similarity if expected is None else expected
                if not torch.allclose(similarity, expected, rtol=1e-4):
                    state.failures.append(f"matching: {name}: another result")
                    continue
                call = lambda: nearest.search(query, key, 1, tile, mutual=both)  # noqa: B023, E731
                time = milliseconds(call, [()], state.device, seconds=0.1)
            except Exception as error:  # Triton's own: out of resources, or a compiler's failure on an odd tile.
                state.skipped.append(f"matching: {name}: {type(error).__name__}")
                continue
            rows.append({"what": name, "ms": time, "TFLOP/s": flops / time / 1e9})


def _time_peers(state: State, rows: list[dict[str, Any]], exact: Tensor, half: Tensor, flops: float) -> None:
    for name in PEERS:
        if importlib.util.find_spec(name) is None:
            state.skipped.append(f"matching: {name} is not installed")
            continue
        if state.rehearse:
            # Some compile for minutes.
            continue
        try:
            call = _peer(name, F.normalize(exact, dim=-1), F.normalize(half, dim=-1))
            rows.append(_row(state, name, call, flops))
        except Exception as error:  # A peer that does not run here is no failure of this package.
            state.skipped.append(f"matching: {name}: {type(error).__name__}: {str(error).splitlines()[:1]}")


def _peer(name: str, exact: Tensor, half: Tensor) -> Callable[[], Any]:
    if name == "faiss":
        import faiss
        import faiss.contrib.torch_utils

        resources = faiss.StandardGpuResources()
        return lambda: faiss.knn_gpu(resources, exact[0], exact[1], 1, metric=faiss.METRIC_INNER_PRODUCT)
    if name == "flash_kmeans":
        from flash_kmeans.assign_euclid_triton import cosine_assign_triton

        return lambda: cosine_assign_triton(half[:1], half[1:])
    from pykeops.torch import LazyTensor

    return lambda: (LazyTensor(exact[0][:, None]) | LazyTensor(exact[1][None])).argmax(dim=1)


def _time_dense(state: State, rows: list[dict[str, Any]], backends: tuple[str, ...]) -> None:
    side, size, channels, count = (2, 5, 8, 3) if state.rehearse else (56, 448, CHANNELS, 30)
    points = torch.randint(size, (1, count, 2), device=state.device)
    for width in (channels,) if state.rehearse else (193, channels):
        # With the neighbourhood correlation of ViT features: rough noise enlarged from half the grid.
        rough = torch.randn(2, width, max(1, side // 2), max(1, side // 2), device=state.device)
        maps = F.interpolate(rough, size=(side, side), mode="bilinear") + 0.3 * torch.randn(
            2, width, side, side, device=state.device
        )

        def ours(backend: str, normalize: str = "grid", mutual: bool = False, at: Tensor | None = None) -> Any:
            arguments = maps[:1], maps[1:], [size, size], [size, size], at, normalize, mutual  # noqa: B023
            return lambda: dense_op.dense_match(*arguments, backend=backend)

        for backend in backends:
            what = f"dense_match {backend}, {width} channels"
            rows.append(_row(state, f"{what}, every pixel of {size}", ours(backend)))
            rows.append(_row(state, f"{what}, every pixel of {size}, mutual", ours(backend, mutual=True)))
            if width != channels:
                continue
            cosines = f"{what}, every pixel of {size}, cosines of pixels"
            rows.append(_row(state, cosines, ours(backend, normalize="pixel")))
            rows.append(_row(state, f"{cosines}, mutual", ours(backend, normalize="pixel", mutual=True)))
            rows.append(_row(state, f"{what}, {count} points of {size}", ours(backend, at=points)))
            if state.device.type == "cuda":
                rows.append(_row(state, f"{what}, every pixel of {size}, captured", _captured(ours(backend))))
    flat = 1 + 0.05 * torch.randn_like(maps)
    for backend in backends:
        arguments = flat[:1], flat[1:], [size, size], [size, size], None, "grid", False
        call = lambda: dense_op.dense_match(*arguments, backend=backend)  # noqa: B023, E731
        rows.append(_row(state, f"dense_match {backend}, every pixel of {size}, flat features", call))

    def plain() -> Tensor:
        query, key = F.interpolate(F.normalize(maps, dim=1), size=(size, size), mode="bilinear").flatten(2)
        rows = points[0, :, 1] * size + points[0, :, 0]
        return (query[:, rows].T @ key).argmax(dim=1)

    rows.append(_row(state, f"interpolate + argmax, {count} points of {size}", plain))


def _captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """The same as a CUDA graph: without the time that Python and launches take."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _time_propagation(state: State, rows: list[dict[str, Any]]) -> None:
    """A step of DAVIS 2017 at patch 8: the queue of 7 frames and the first."""
    side, frames, channels, objects = (2, 2, 8, 2) if state.rehearse else (56, 8, CHANNELS, 4)
    count, window = side * side, [12, side, side, side, side]
    query, key = (torch.randn(1, n, channels, device=state.device) for n in (count, frames * count))
    labels = torch.rand(1, frames * count, objects, device=state.device)
    what = f"{side} x {side}, {frames} frames, radius 12, top 5"
    for name, call in (
        ("propagate_labels", propagate_op.propagate_labels_triton),
        ("propagate_labels, plain", propagate_op.propagate_labels_plain),
    ):
        rows.append(_row(state, f"{name}, {what}", lambda: call(query, key, labels, window, 5, 0.1, True)))  # noqa: B023


def _goals(state: State, rows: dict[str, dict[str, Any]]) -> None:
    if state.rehearse:
        return

    def ratio(one: str, other: str) -> float | None:
        return rows[one]["ms"] / rows[other]["ms"] if one in rows and other in rows else None

    share = rows.get("nearest bf16", {}).get("of matmul")
    state.goal("nearest bf16, share of matmul ceiling", share, 0.7, at_least=True)
    state.goal("nearest bf16, mutual over one direction", ratio("nearest bf16, mutual", "nearest bf16"), 1.15, False)
    for width in (193, CHANNELS):
        names = (f"dense_match {backend}, {width} channels, every pixel of 448" for backend in ("cuda", "triton"))
        # The one that the package chooses.
        name = next((name for name in names if name in rows), "")
        state.goal(f"{name}, ms", rows.get(name, {}).get("ms"), 1.0, at_least=False)
        state.goal(f"{name}, mutual over one direction", ratio(f"{name}, mutual", name), 1.15, at_least=False)
