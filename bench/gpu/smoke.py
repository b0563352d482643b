"""Every kernel in each of its dtypes on awkward sizes against float64: fresh inputs, poisoned outputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import lift_fast
from lift_fast import LiFT, devices
from lift_fast.ops import propagate_labels as propagate_op
from lift_fast.ops.cosine_loss import gpu as loss_gpu
from lift_fast.ops.cosine_loss import plain as loss_plain
from lift_fast.ops.dense_match import op as dense_op
from lift_fast.ops.lift_forward import gpu as gpu_plan
from lift_fast.ops.lift_forward import image_encoder_cuda, plain
from lift_fast.ops.lift_forward.plan import build_plan
from lift_fast.ops.nearest import gpu as nearest_gpu
from lift_fast.ops.nearest import plain as nearest_plain
from lift_fast.ops.nearest.op import nearest_by
from lift_fast.testing import poisoned_outputs, randomize, relative_error

from .context import Context, Job, Row, Skip

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# LiFT's stages, relative to float64 in the Euclidean norm; float32 products are rounded to TF32.
LIMITS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-3}
# (C, patch, h, w, B): prime, odd and rectangular grids, one token, widths that fill no tile, every scale.
NETWORKS = [(384, 16, 7, 5, 3), (768, 8, 3, 7, 1), (33, 14, 1, 1, 2)]
TINY_NETWORKS = [(32, 16, 2, 1, 1), (7, 8, 1, 3, 2)]
# (patch, h, w, B): less than a strip, several blocks in a row and in a column, a device full of them.
ENCODERS = [(16, 1, 1, 2), (8, 13, 23, 2), (16, 37, 41, 2), (8, 56, 57, 1)]
TINY_ENCODERS = [(16, 2, 1, 1), (8, 1, 3, 2)]
# Tiles cut by every border, channels that are looped over, tokens.
LOSSES = [(3, 384, 28, 28), (2, 97, 13, 7), (1, 2050, 5, 3), (5, 33, 1, 1)]
TINY_LOSSES = [(2, 3, 4, 5)]
# Of a position's gradient, relative to all gradients.
LOSS_LIMITS = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}
# (N, M, C, options): primes, one row, more matches than keys, windows beyond the grid, every path.
NEAREST: list[tuple[int, int, int, dict[str, Any]]] = [
    (1031, 3137, 384, {"mutual": True}),
    (997, 20011, 193, {"ratio": 0.95, "mutual": True}),
    (1, 77, 5, {"k": 3}),
    (31, 7, 33, {"k": 9}),
    (4099, 5003, 64, {"k": 5}),
    (777, 1013, 48, {"normalize": False}),
    (13 * 17, 3 * 13 * 17, 32, {"k": 5, "window": [3, 13, 17, 13, 17], "mutual": True}),
    (12 * 10, 7 * 9, 16, {"window": [40, 12, 10, 7, 9]}),
]
TINY_NEAREST: list[tuple[int, int, int, dict[str, Any]]] = [
    (3, 17, 5, {"mutual": True}),
    (2, 5, 3, {"k": 3}),
    (6, 12, 4, {"k": 2, "window": [1, 2, 3, 2, 3]}),
]
# Of the descriptors' products; above float32's rounding, because the largest of many thousands is compared.
SIMILARITY_LIMIT = 5e-6
# Of mutual checks: share of pixels whose result differs from float64's, where rounding may decide.
MUTUAL_LIMIT = 1e-3
# ((h, w) of both maps, (H, W) of both images)
MAPS = [
    ((14, 11), (13, 17), (97, 80), (101, 131)),
    ((1, 3), (2, 2), (5, 7), (6, 3)),
    ((9, 7), (6, 11), (40, 37), (50, 61)),
]
TINY_MAPS = [((2, 2), (2, 1), (3, 4), (4, 3))]
# (grid, frames, C, labels, k, radius)
PROPAGATIONS = [((13, 17), 3, 48, 4, 5, 3), ((29, 31), 8, 384, 7, 5, 12), ((1, 5), 2, 33, 1, 9, 40)]
TINY_PROPAGATIONS = [((2, 3), 2, 8, 3, 2, 1)]
# Similarities are divided by a temperature of 0.1 and exponentiated.
PROPAGATION_LIMIT = 1e-4

Case = tuple[Any, ...]


def groups(rehearse: bool) -> dict[str, list[Job]]:
    """The jobs of each process: one kernel's, in one dtype where there are many."""
    found: dict[str, list[Job]] = {}
    for dtype in DTYPES:
        name = _short(dtype)
        for stage in ("upsample", "head", "forward"):
            found[f"{stage} {name}"] = [Job(f"{stage} {name}", partial(_run_stage, stage, dtype), 15)]
        found[f"image encoders {name}"] = [
            Job(f"image encoder {kind} {name}", partial(_run_encoder, kind, dtype), 15) for kind in ("CUDA", "Triton")
        ]
        found[f"image encoder's other cuts {name}"] = [
            Job(f"image encoder CUDA, {cut} {name}", partial(_run_encoder, "CUDA", dtype, cut=cut), 10)
            for cut in ("stream", "spread")
        ]
        found[f"nearest {name}"] = [Job(f"nearest {name}", partial(_run_nearest, dtype), 25)]
    found["cosine loss"] = [Job("cosine loss", _run_loss, 20)]
    found["dense_match CUDA"] = [Job("dense_match CUDA", partial(_run_dense, "cuda"), 10)]
    found["dense_match Triton"] = [Job("dense_match Triton", partial(_run_dense, "triton"), 20)]
    found["propagate_labels"] = [Job("propagate_labels", _run_propagation, 15)]
    found["capture"] = [Job("capture", _run_capture, 20)]
    found["extract_images"] = [Job("extract_images", _run_stream, 15)]
    return found


def _short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]


def _launched_directly(call: Callable[[], Any], device: torch.device) -> Any:
    """The result of a call whose kernels are launched directly, after the two launches through Triton."""
    for _ in range(2 if device.type == "cuda" else 0):
        call()
    return call()


def _row(kernel: str, case: object, dtype: torch.dtype, error: float, limit: float) -> Row:
    return {"what": kernel, "case": str(case), "dtype": _short(dtype), "error": error, "limit": limit}


def _run_stage(stage: str, dtype: torch.dtype, context: Context) -> Iterator[Row]:
    for number, case in enumerate(TINY_NETWORKS if context.rehearse else NETWORKS):
        for what, error in stage_errors(stage, case, dtype, context.device, context.seed + number).items():
            yield _row(what, case, dtype, error, LIMITS[dtype])


def stage_errors(stage: str, case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> dict[str, float]:
    """Relative errors of a kernel of LiFT, given the exact inputs of its stage in ``dtype``; or of the whole."""
    channels, patch, h, w, batch = case
    torch.manual_seed(seed)
    lift = randomize(LiFT(channels, patch), seed).eval()
    side = 8 if patch == 8 else 16
    imgs, x = torch.randn(batch, 3, side * h, side * w), torch.randn(batch, h, w, channels)
    exact = copy.deepcopy(lift).double()
    seen: dict[str, Tensor] = {}
    keep = {"f": exact.scale_adapter, "g": exact.image_convs_2, "u": exact.up1.conv_1.double_conv[2]}
    for name, module in keep.items():
        # ReLU works in place: keep its result before the next layer changes it.
        module.register_forward_hook(lambda _, __, out, name=name: seen.__setitem__(name, out.clone()))
    with torch.no_grad():
        y = exact._forward_plain(imgs.double(), x.double().permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    inner = {name: value.permute(0, 2, 3, 1) for name, value in seen.items()}

    def to(value: Tensor) -> Tensor:
        return value.to(device, dtype).contiguous()

    with torch.no_grad(), poisoned_outputs():
        plan = gpu_plan.prepare_gpu(build_plan(*lift._plan_sources(), lift.architecture), device, dtype)
        if stage == "upsample":
            given = to(x), to(inner["f"]), to(inner["g"])
            u = _launched_directly(lambda: gpu_plan.upsample(plan, *given), device)
            return {"upsample": relative_error(u.cpu(), inner["u"])}
        if stage == "head":
            given_u = to(inner["u"])
            out = _launched_directly(lambda: gpu_plan.head(plan, given_u), device)
            unit = _launched_directly(lambda: gpu_plan.head(plan, given_u, normalize=True), device)
            return {
                "head": relative_error(out.cpu(), y),
                "head, normalised": relative_error(unit.cpu(), F.normalize(y, dim=-1)),
            }
        # Triton launches twice, then its compiled kernels are launched directly, at last with addresses only.
        worst, held = 0.0, []
        for _ in range(4 if device.type == "cuda" else 1):
            given = to(imgs), to(x)
            worst = max(worst, relative_error(gpu_plan.run_gpu_plan(plan, *given).cpu(), y))
            # A call that reads an earlier call's inputs gets NaN.
            held += [tensor.fill_(torch.nan) for tensor in given]
        return {"forward": worst}


def _run_encoder(kind: str, dtype: torch.dtype, context: Context, cut: str = "walk") -> Iterator[Row]:
    if kind == "CUDA":
        _needs_cuda(context)
    reasons = []
    for number, case in enumerate(TINY_ENCODERS if context.rehearse else ENCODERS):
        reason = _triton_leaves_out(case, dtype, context.device) if kind == "Triton" else None
        if reason is not None:
            reasons.append(f"{case}: {reason}")
            continue
        error = encoder_error(kind.lower(), case, dtype, context.device, context.seed + number, cut=cut)
        name = f"image encoder, {kind}" + ("" if cut == "walk" else f", {cut}")
        yield _row(name, case, dtype, error, LIMITS[dtype])
    if reasons:
        raise Skip("; ".join(reasons))


def _triton_leaves_out(case: Case, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the package would not run the Triton image encoder for a case."""
    from lift_fast.ops.lift_forward.gpu_weights import encoder_unsupported

    lift = LiFT(8, case[0])
    return encoder_unsupported(build_plan(*lift._plan_sources(), lift.architecture), device, dtype)


def _needs_cuda(context: Context) -> None:
    """A missing native kernel is a failure on a GPU; elsewhere there is none."""
    runs, reason = devices.cuda_runs(context.device)
    if not runs and context.rehearse:
        raise Skip(reason)
    if not runs:
        raise RuntimeError(reason)


@torch.no_grad()
def encoder_error(
    encoder: str,
    case: Case,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    layouts: int = 3,
    cut: str = "walk",
) -> float:
    """The largest relative error of f and g against float64, over images as they are, cropped and channels last.

    ``cut``: of the CUDA encoder, as :func:`lift_fast.ops.lift_forward.image_encoder_cuda.encode_image` takes it.
    """
    patch, h, w, batch = case
    torch.manual_seed(seed)
    lift = randomize(LiFT(8, patch), seed).eval()
    plan = build_plan(*lift._plan_sources(), lift.architecture)
    imgs = torch.randn(batch, 3, patch * h, patch * w).to(device, dtype)
    exact = plain.prepare_encoder(plan, device, torch.float64)
    expected = [part.permute(0, 2, 3, 1) for part in plain.encode_image(exact, imgs.double())]
    # Pixels outside a crop must not be read.
    frame = imgs.new_full((batch, 3, patch * h + 3, patch * w + 5), torch.nan)
    crop = frame[:, :, 1:-2, 2:-3].copy_(imgs)
    worst = 0.0
    with poisoned_outputs():
        ready = gpu_plan.prepare_gpu(plan, device, dtype, encoder)
        for images in (imgs, crop, imgs.contiguous(memory_format=torch.channels_last))[:layouts]:
            if cut == "walk":
                found = gpu_plan.encode_image(ready, images)
            else:
                found = image_encoder_cuda.encode_image(images, ready.encoder_weights, cut)
            for actual, wanted in zip(found, expected, strict=True):
                worst = max(worst, relative_error(actual, wanted))
    return worst


def _run_loss(context: Context) -> Iterator[Row]:
    torch.manual_seed(context.seed)
    for dtype, limit in LOSS_LIMITS.items():
        for shape in TINY_LOSSES if context.rehearse else LOSSES:
            for layout in (torch.contiguous_format, torch.channels_last):
                error = loss_error(shape, dtype, layout, context.device)
                name = str(layout).removeprefix("torch.")
                yield _row(f"cosine loss, {name}", shape, dtype, error, limit)


def loss_error(shape: Case, dtype: torch.dtype, layout: torch.memory_format, device: torch.device) -> float:
    """Relative error of the loss and its gradient."""
    x, y = (torch.randn(shape, device=device).to(dtype).contiguous(memory_format=layout) for _ in range(2))
    with poisoned_outputs():
        loss, gradient = _launched_directly(lambda: loss_gpu.loss_and_gradient(x, y, 1, "sum", True), device)
    assert gradient is not None
    wanted, slope = loss_plain.loss_and_gradient(x.double(), y.double(), 1, "sum", True)
    return max(relative_error(loss, wanted), relative_error(gradient, slope))


@torch.no_grad()
def _run_nearest(dtype: torch.dtype, context: Context) -> Iterator[Row]:
    torch.manual_seed(context.seed)
    for case in TINY_NEAREST if context.rehearse else NEAREST:
        yield _row("nearest", case, dtype, nearest_error(*case, dtype, context.device), SIMILARITY_LIMIT)


def nearest_error(
    n: int, m: int, channels: int, options: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> float:
    """How far the chosen keys and their similarities are from the best in float64; infinite for invalid results."""
    arguments = {"k": 1, "mutual": False, "ratio": None, "window": None, "normalize": True, **options}
    query, key = (torch.randn(1, count, channels, device=device).to(dtype) for count in (n, m))
    with poisoned_outputs():
        call = partial(nearest_by, nearest_gpu.search, query, key, **arguments)
        similarity, index, valid = _launched_directly(call, device)
    exact, _, accepted = nearest_by(nearest_plain.search, query.double(), key.double(), **arguments)
    there = torch.isfinite(exact)
    if not torch.equal(index >= 0, there) or float((valid != accepted).double().mean()) > 1e-2:
        return float("inf")
    rows = query.double().expand(index.shape[2], -1, -1).permute(1, 0, 2), key[0][index[0].clamp_min(0)].double()
    if arguments["normalize"]:
        rows = F.normalize(rows[0], dim=-1), F.normalize(rows[1], dim=-1)
    chosen = (rows[0] * rows[1]).sum(-1)[None]
    scale = exact[there].abs().max().clamp_min(1)
    errors = torch.stack([(chosen - exact)[there].abs().max(), (similarity.double() - exact)[there].abs().max()])
    return float(errors.nan_to_num(torch.inf).max() / scale)


@torch.no_grad()
def _run_dense(backend: str, context: Context) -> Iterator[Row]:
    if backend == "cuda":
        _needs_cuda(context)
    torch.manual_seed(context.seed)
    for maps in TINY_MAPS if context.rehearse else MAPS:
        for normalize in ("grid", "pixel", "none"):
            name = f"dense_match {backend}, {normalize}"
            error, differ, at_points = dense_error(*maps, normalize, context.device, backend)
            yield _row(name, maps, torch.float32, error, SIMILARITY_LIMIT)
            yield _row(f"{name}, points", maps, torch.float32, at_points, SIMILARITY_LIMIT)
            yield _row(f"{name}, mutual", maps, torch.float32, differ, MUTUAL_LIMIT)


def dense_error(
    grid: tuple[int, int],
    other: tuple[int, int],
    size: tuple[int, int],
    other_size: tuple[int, int],
    normalize: str,
    device: torch.device,
    backend: str,
) -> tuple[float, float, float]:
    """The same for every pixel of an image, the share of pixels whose mutual check differs, and the same for points."""
    # Positive: norms that nearly cancel would magnify rounding.
    maps = [torch.randn(1, 24, *side, device=device).abs() for side in (grid, other)]
    sizes = list(size), list(other_size)
    points = torch.stack([torch.randint(side, (1, 5), device=device) for side in (size[1], size[0])], dim=-1)
    with poisoned_outputs():
        match = partial(dense_op.dense_match, *maps, *sizes, backend=backend)
        similarity, _, valid = _launched_directly(lambda: match(points=None, normalize=normalize, mutual=True), device)
        some = _launched_directly(lambda: match(points=points, normalize=normalize, mutual=False), device)[0]
    exact, _, mutual = dense_op.dense_match(*(m.double() for m in maps), *sizes, None, normalize, True, exhaustive=True)
    scale = exact.abs().max().clamp_min(1)
    error = float((similarity.double() - exact).abs().nan_to_num(torch.inf).max() / scale)
    there = exact[:, points[0, :, 1] * size[1] + points[0, :, 0]]
    at_points = float((some.double() - there).abs().nan_to_num(torch.inf).max() / scale)
    return error, float((valid != mutual).double().mean()), at_points


@torch.no_grad()
def _run_propagation(context: Context) -> Iterator[Row]:
    torch.manual_seed(context.seed)
    for case in TINY_PROPAGATIONS if context.rehearse else PROPAGATIONS:
        error = propagation_error(*case, context.device)
        yield _row("propagate_labels", case, torch.float32, error, PROPAGATION_LIMIT)


def propagation_error(
    grid: tuple[int, int], frames: int, channels: int, objects: int, k: int, radius: int, device: torch.device
) -> float:
    """How far propagated labels of 0 to 1 are from those in float64."""
    count = grid[0] * grid[1]
    query, key = (torch.randn(2, n, channels, device=device) for n in (count, frames * count))
    labels = torch.rand(2, frames * count, objects, device=device)
    window = [radius, *grid, *grid]
    with poisoned_outputs():
        call = partial(propagate_op.propagate_labels_triton, query, key, labels, window, k, 0.1, True)
        ours = _launched_directly(call, device)
    exact = propagate_op.propagate_labels_plain(query.double(), key.double(), labels.double(), window, k, 0.1, True)
    # If the k-th and the next key are equal within rounding, either may be averaged.
    off = (ours.double() - exact).abs().amax(-1)
    deeper = nearest_plain.search(query.double(), key.double(), k + 1, False, window, True)[0]
    clear = deeper[..., k - 1] - deeper[..., k] > SIMILARITY_LIMIT
    # Missing matches leave a difference of NaN (-inf - -inf) and cannot be confused.
    return float(off[clear | ~deeper[..., k].isfinite()].nan_to_num(torch.inf).max())


@torch.no_grad()
def _run_capture(context: Context) -> Iterator[Row]:
    """``lift_fast.capture`` against the eager extractor; a rehearsal does not record the graph."""
    dtypes = ((torch.float32, 1e-5), (torch.bfloat16, 1e-2))
    model, shape = ("vit_tiny_patch16_224", (1, 3, 32, 48)) if context.rehearse else ("dino_vits16", (2, 3, 80, 112))
    for dtype, limit in dtypes[: 1 if context.rehearse else 2]:
        module = lift_fast.ViTLiFTExtractor(
            model, random_weights=True, random_lift=True, device=context.device, dtype=dtype, silent=True
        )
        captured: Callable[[Tensor], Tensor] = module if context.rehearse else lift_fast.capture(module, shape)
        batch = torch.randn(shape, device=context.device, dtype=dtype)
        yield _row("capture", shape, dtype, relative_error(captured(batch), module(batch)), limit)


@torch.no_grad()
def _run_stream(context: Context) -> Iterator[Row]:
    """``extract_images`` against one image after the other: batches, copies beside the networks, order."""
    module = lift_fast.ViTLiFTExtractor(
        "vit_tiny_patch16_224", random_weights=True, random_lift=True, device=context.device, silent=True
    )
    sizes = [(32 + 16 * (number % 3), 48) for number in range(6 if context.rehearse else 200)]
    images = [torch.randint(256, (*size, 3), dtype=torch.uint8).numpy() for size in sizes]
    batches = (2,) if context.rehearse else (None, 1, 7)
    for batch_size in batches:
        found = list(lift_fast.extract_images(images, extractor=module, size=None, batch_size=batch_size))
        expected = [module(module.preprocess(Image.fromarray(image))[0])[0].cpu() for image in images]
        error = max(
            relative_error(one.descriptors.flatten(0, 1), other) for one, other in zip(found, expected, strict=True)
        )
        yield _row("extract_images", batch_size, torch.float32, error, 2e-3)
