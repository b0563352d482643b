"""The Triton kernels against the plain module in float64: on a GPU where there is one, else in Triton's interpreter."""

import copy
import os

import pytest
import torch
import torch.nn.functional as F

from lift_fast import LiFT, devices, tuning
from lift_fast.ops.lift_forward import gpu as gpu_plan
from lift_fast.ops.lift_forward import op as lift_forward
from lift_fast.ops.lift_forward import plain
from lift_fast.ops.lift_forward import tiles as tile_table
from lift_fast.ops.lift_forward.plan import build_plan
from lift_fast.testing import randomize, relative_error

triton = pytest.importorskip("triton")
from lift_fast.kernels import launch, tiles  # noqa: E402
from lift_fast.ops.lift_forward import gpu_weights  # noqa: E402

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 before Triton is imported", allow_module_level=True)

numeric = pytest.mark.numeric("lift_forward")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LIMITS = {torch.float32: 1e-3 if DEVICE.type == "cuda" else 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# The native encoder has no interpreter; tests/test_native_image_encoder.py runs it without a GPU.
ENCODERS = ["triton", "cuda"] if DEVICE.type == "cuda" else ["triton"]
# (C, patch, h, w, B, options): both scales, odd and rectangular grids, one token, widths that fill no tile.
CASES = [
    (32, 16, 2, 3, 2, {}),
    (384, 8, 3, 2, 1, {}),
    (384, 16, 1, 1, 1, {}),
    (768, 8, 1, 1, 1, {}),
    (33, 8, 5, 1, 2, {}),
    (7, 16, 1, 3, 1, {}),
    (2, 8, 2, 2, 1, {}),
    (48, 14, 3, 2, 1, {}),
    (40, 16, 3, 4, 1, {"use_image": False}),
    (24, 8, 2, 3, 1, {"image_channels": 20}),
    (24, 8, 2, 2, 1, {"extra_image_blocks": 1}),
]


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    """The interpreter multiplies exactly: there the kernels must not round for TF32 products either."""
    if DEVICE.type != "cuda":
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


class Network:
    """A random LiFT, its inputs aligned for the operator, and the plain module's result."""

    def __init__(self, channels, patch, h, w, batch, options, seed=None):
        self.seed = int(torch.randint(1 << 30, ())) if seed is None else seed
        torch.manual_seed(self.seed)
        self.lift = randomize(LiFT(channels, patch, **options), self.seed).eval()
        self.plan = build_plan(*self.lift._plan_sources(), self.lift.architecture)
        side = 16 if patch != 8 else 8
        self.imgs = torch.randn(batch, 3, side * h, side * w)
        self.x = torch.randn(batch, h, w, channels)
        twin = copy.deepcopy(self.lift).double()
        x = self.x.double().permute(0, 3, 1, 2)
        with torch.no_grad():
            self.exact = twin._forward_plain(self.imgs.double(), x).permute(0, 2, 3, 1)

    def inputs(self, dtype):
        return self.imgs.to(DEVICE, dtype), self.x.to(DEVICE, dtype)

    def prepare(self, dtype, encoder=None, basis=False):
        plan = self.plan.in_basis() if basis else self.plan
        return gpu_plan.prepare_gpu(plan, DEVICE, dtype, encoder)


@numeric
@pytest.mark.parametrize(
    # The interpreter is slow: wide networks in one dtype.
    ("case", "dtype"),
    [
        (case, dtype)
        for case in CASES
        for dtype in LIMITS
        if case[0] < 384 or DEVICE.type == "cuda" or dtype.itemsize == 4
    ],
    ids=str,
)
def test_forward_equals_the_plain_module(case, dtype):
    network = Network(*case)
    with torch.no_grad():
        plan = network.prepare(dtype)
        out = gpu_plan.run_gpu_plan(plan, *network.inputs(dtype))
    assert out.is_contiguous()
    assert relative_error(out.cpu(), network.exact) <= LIMITS[dtype], network.seed


@numeric
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("patch", [8, 16])
@pytest.mark.parametrize("grid", [(1, 1), (1, 3), (3, 2), (5, 1)])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_image_encoder(encoder, grid, patch, dtype):
    if encoder == "cuda" and not devices.cuda_runs(DEVICE)[0]:
        pytest.skip(devices.cuda_runs(DEVICE)[1])
    network = Network(8, patch, *grid, 2, {})
    reason = gpu_weights.encoder_unsupported(network.plan, DEVICE, dtype)
    if encoder == "triton" and reason:
        pytest.skip(reason)
    exact = plain.prepare_encoder(network.plan, torch.device("cpu"), torch.float64)
    f, g = plain.encode_image(exact, network.imgs.double())
    imgs, _ = network.inputs(dtype)
    # A crop is a view of a larger image; pixels outside the view must not be read.
    framed = torch.full((*imgs.shape[:2], imgs.shape[2] + 3, imgs.shape[3] + 5), torch.nan, dtype=dtype, device=DEVICE)
    view = framed[:, :, 1:-2, 2:-3].copy_(imgs)
    for images in (imgs, view, imgs.contiguous(memory_format=torch.channels_last)):
        with torch.no_grad():
            ours = gpu_plan.encode_image(network.prepare(dtype, encoder), images)
        for actual, expected in zip(ours, (f, g), strict=True):
            assert actual.is_contiguous()
            assert relative_error(actual.cpu(), expected.permute(0, 2, 3, 1)) <= LIMITS[dtype], network.seed


@numeric
@pytest.mark.parametrize(
    ("rows", "accumulators", "merged", "cached"),
    [(16, 1, 1, 0), (32, 3, 1, 0), (64, 1, 1, 0), (128, 3, 1, 0), (128, 3, 1, 1), (64, 3, 2, 0), (256, 3, 2, 1)],
)
def test_tiles_do_not_change_the_result(rows, accumulators, merged, cached):
    network = Network(384, 8, 3, 2, 2, {})
    with torch.no_grad():
        plan = network.prepare(torch.float32, "torch")
        imgs, x = network.inputs(torch.float32)
        f, g = gpu_plan.encode_image(plan, imgs)
        tile = tiles.Tile(rows, 64, accumulators, 32, 8, 2, merged, cached)
        u = gpu_plan.upsample(plan, x, f, g, tile)
        out = gpu_plan.head(plan, u, tile=tile._replace(accumulators=3))
    assert relative_error(out.cpu(), network.exact) <= LIMITS[torch.float32], network.seed


@numeric
@pytest.mark.parametrize("channels", [2, 7, 48, 192])
def test_basis_keeps_products_and_norms(channels):
    network = Network(channels, 8, 2, 3, 1, {})
    exact = network.exact.flatten(0, 2)
    with torch.no_grad():
        out = gpu_plan.run_gpu_plan(network.prepare(torch.float32, basis=True), *network.inputs(torch.float32))
    assert out.shape[3] == channels // 2 + 1
    ours = out.cpu().flatten(0, 2).double()
    assert relative_error(ours @ ours.T, exact @ exact.T) <= 2 * LIMITS[torch.float32], network.seed


@numeric
@pytest.mark.parametrize("basis", [False, True])
@pytest.mark.parametrize("channels", [7, 48, 192])
def test_normalized_on_the_way_out(channels, basis):
    network = Network(channels, 8, 3, 2, 1, {})
    exact = F.normalize(network.exact, dim=-1).flatten(0, 2)
    with torch.no_grad():
        plan = network.prepare(torch.float32, basis=basis)
        out = gpu_plan.run_gpu_plan(plan, *network.inputs(torch.float32), normalize=True).cpu().flatten(0, 2).double()
    if basis:
        assert relative_error(out @ out.T, exact @ exact.T) <= 2 * LIMITS[torch.float32], network.seed
    else:
        assert relative_error(out, exact) <= LIMITS[torch.float32], network.seed
    # Only the rounding of the stored values.
    assert float((out.norm(dim=1) - 1).abs().max()) <= 1e-6


@numeric
def test_a_zero_descriptor_stays_zero():
    network = Network(8, 8, 1, 2, 1, {}, seed=1)
    with torch.no_grad():
        network.lift.outc.weight.zero_()
        network.lift.outc.bias.zero_()
        plan = build_plan(*network.lift._plan_sources(), network.lift.architecture)
        ready = gpu_plan.prepare_gpu(plan, DEVICE, torch.float32)
        out = gpu_plan.run_gpu_plan(ready, *network.inputs(torch.float32), normalize=True)
    assert float(out.abs().max()) == 0


@numeric
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("channels", [7, 16])
@pytest.mark.parametrize("shape", [(1, 1, 2), (3, 5, 4)])
def test_nan_reaches_its_neighbourhood_and_no_further(shape, channels, normalize):
    """A direct convolution, and a ReLU that keeps NaN: the cells whose windows hold it, and no others."""
    network = Network(channels, 8, *shape[:2], 1, {"use_image": False})
    imgs, x = network.inputs(torch.float32)
    x[0, 0, 0, 3] = torch.nan
    with torch.no_grad():
        out = gpu_plan.run_gpu_plan(network.prepare(torch.float32), imgs, x, normalize).cpu()
        twin = copy.deepcopy(network.lift).double()
        plain = twin._forward_plain(network.imgs.double(), x.cpu().double().permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    assert torch.equal(out.isnan(), plain.isnan())


@numeric
@pytest.mark.parametrize("patch", [8, 16])
@pytest.mark.parametrize("width", [20, 32])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_spoilt_pixel_spoils_what_it_spoils_in_the_plain_module(patch, width, value):
    network = Network(8, patch, 3, 4, 2, {"image_channels": width})
    reason = gpu_weights.encoder_unsupported(network.plan, DEVICE, torch.float32)
    if reason:
        pytest.skip(reason)
    imgs, _ = network.inputs(torch.float32)
    imgs[1, 2, 3, 5] = value
    exact = plain.prepare_encoder(network.plan, torch.device("cpu"), torch.float64)
    expected = plain.encode_image(exact, imgs.cpu().double())
    with torch.no_grad():
        ours = gpu_plan.encode_image(network.prepare(torch.float32, "triton"), imgs)
    for actual, wanted in zip(ours, expected, strict=True):
        wanted = wanted.permute(0, 2, 3, 1)
        assert torch.equal(actual.cpu().isnan(), wanted.isnan())
        assert torch.equal(actual.cpu().isfinite(), wanted.isfinite())


@numeric
@pytest.mark.parametrize("channels", [6, 32])
def test_an_infinite_channel_does_not_meet_the_padding_of_the_weights(channels):
    network = Network(channels, 8, 1, 1, 1, {"use_image": False})
    hidden = network.plan.conv.shape[-1]
    u = torch.rand(1, 5, 5, hidden, device=DEVICE)
    u[0, 0, 0, 0] = torch.inf
    with torch.no_grad():
        ready = network.prepare(torch.float32)
        out = gpu_plan.head(ready, u).cpu()
        conv = network.plan.conv.permute(3, 2, 0, 1).double()
        v = F.conv2d(u.cpu().double().permute(0, 3, 1, 2), conv, network.plan.conv_bias.double(), padding=1).relu()
        plain = F.linear(v.permute(0, 2, 3, 1), network.plan.out.t().double(), network.plan.out_bias.double())
    assert torch.equal(out.isnan(), plain.isnan())
    assert torch.equal(out.isinf(), plain.isinf())


@numeric
@pytest.mark.slow
def test_images_may_be_spread_beyond_the_range_of_int32():
    network = Network(8, 8, 1, 1, 1, {})
    imgs, _ = network.inputs(torch.float16)
    step = (1 << 31) // 7 + 8
    # Only pages that are written take memory on the CPU.
    spread = torch.empty(7 * step + 200, dtype=torch.float16, device=DEVICE)
    spread = spread.as_strided(imgs.shape, (192, 64, 8, step)).copy_(imgs)
    ready = network.prepare(torch.float16, "triton")
    with torch.no_grad():
        expected, ours = gpu_plan.encode_image(ready, imgs), gpu_plan.encode_image(ready, spread)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def merged(plan):
    """Merged tiles for the stages of a plan of any width: accumulators of half the usual width, two of them merged."""
    found = []
    for weights, counts in ((plan.upsample, plan.upsample_counts), (plan.head, plan.head_counts)):
        columns = tiles.columns_of(weights.channels) // 2
        found.append(tiles.Tile(16, columns, 2 * max(counts), 16, 4, 2, 2))
    return found


def merged_pass(plan, imgs, x, normalize=False):
    f, g = gpu_plan.encode_image(plan, imgs) if plan.encoder != "none" else (None, None)
    first, second = merged(plan)
    return gpu_plan.head(plan, gpu_plan.upsample(plan, x, f, g, first), normalize, second)


# Channels that fill no step and no accumulator, networks without image, one cell and cells at every border.
WIDE_CASES = [
    (384, 16, 3, 5, 1, {}),
    (33, 8, 5, 1, 2, {}),
    (33, 14, 1, 1, 2, {}),
    (200, 8, 2, 3, 1, {"use_image": False}),
    (24, 8, 2, 3, 1, {"image_channels": 20}),
]


@numeric
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, dtype) for case in WIDE_CASES for dtype in LIMITS if case[0] < 384 or dtype.itemsize == 4],
    ids=str,
)
def test_wide_accumulators_equal_the_plain_module(case, dtype, normalize):
    network = Network(*case)
    exact = F.normalize(network.exact, dim=-1) if normalize else network.exact
    with torch.no_grad():
        plan = network.prepare(dtype)
        out = merged_pass(plan, *network.inputs(dtype), normalize)
    assert out.is_contiguous()
    assert relative_error(out.cpu(), exact) <= LIMITS[dtype], network.seed


@numeric
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(("channels", "use_image"), [(7, False), (16, True), (48, True)])
def test_wide_accumulators_spoil_what_the_plain_module_spoils(channels, use_image, value):
    network = Network(channels, 8, 3, 5, 1, {"use_image": use_image})
    imgs, x = network.inputs(torch.float32)
    x[0, 0, 0, 3] = value
    plan = network.prepare(torch.float32)
    with torch.no_grad():
        f, g = gpu_plan.encode_image(plan, imgs) if use_image else (None, None)
        first, second = merged(plan)
        usual, wide = gpu_plan.upsample(plan, x, f, g), gpu_plan.upsample(plan, x, f, g, first)
        twin = copy.deepcopy(network.lift).double()
        plain = twin._forward_plain(network.imgs.double(), x.cpu().double().permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        out = gpu_plan.head(plan, wide, tile=second)
    assert torch.equal(usual.isnan(), wide.isnan())
    assert torch.equal(usual.isinf(), wide.isinf())
    if value != value:
        # Infinities cancel differently in composed weights than in the plain module.
        assert torch.equal(out.isnan().cpu(), plain.isnan())


@numeric
@pytest.mark.parametrize("channels", [6, 32, 200])
def test_an_infinite_channel_does_not_meet_the_padding_of_wide_accumulators(channels):
    network = Network(channels, 8, 1, 1, 1, {"use_image": False})
    u = torch.rand(1, 5, 5, network.plan.conv.shape[-1], device=DEVICE)
    u[0, 0, 0, 0] = torch.inf
    with torch.no_grad():
        plan = network.prepare(torch.float32)
        usual, wide = gpu_plan.head(plan, u), gpu_plan.head(plan, u, tile=merged(plan)[1])
    assert torch.equal(usual.isnan(), wide.isnan())
    assert torch.equal(usual.isinf(), wide.isinf())


@numeric
@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("value", [1.0, torch.nan, torch.inf])
def test_float32_is_rounded_to_tf32_between_products(value, merge, monkeypatch):
    """To the nearest, so that the tensor cores cut off only zeros."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    network = Network(16, 8, 3, 2, 1, {})
    imgs, x = network.inputs(torch.float32)
    x[0, 0, 0, 3] = value
    with torch.no_grad():
        plan = network.prepare(torch.float32, "triton")
        tile = merged(plan)[0] if merge else None
        f, g = gpu_plan.encode_image(plan, imgs)
        u = gpu_plan.upsample(plan, x, f, g, tile)
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
        exact = gpu_plan.upsample(plan, x, f, g, tile)
    for rounded in (f, g, u):
        assert int((rounded.view(torch.int32) & 0x1FFF).masked_fill(~rounded.isfinite(), 0).abs().max()) == 0
    assert torch.equal(u.isfinite(), exact.isfinite())
    finite = exact.isfinite()
    limit = 2**-11 * (3 if DEVICE.type == "cuda" else 1.01)
    assert float(((u - exact)[finite].abs() / exact[finite].clamp_min(1e-3)).max()) <= limit, network.seed
    # Both signs: cutting off would make all magnitudes smaller.
    assert bool((u > exact).any())
    assert bool((u < exact).any())


@numeric
def test_what_the_head_keeps_is_rounded_to_tf32(monkeypatch):
    """In the interpreter, whose products are exact, an output channel that copies a hidden one shows it."""
    network = Network(16, 8, 3, 2, 1, {"use_image": False})
    with torch.no_grad():
        network.lift.outc.weight.zero_()[:8, :, 0, 0].fill_diagonal_(1)
        network.lift.outc.bias.zero_()
        plan = build_plan(*network.lift._plan_sources(), network.lift.architecture)
        ready = gpu_plan.prepare_gpu(plan, DEVICE, torch.float32)
        u = torch.rand(1, 5, 5, plan.conv.shape[-1], device=DEVICE)
        for tile in (None, merged(ready)[1]):
            monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
            exact = gpu_plan.head(ready, u, tile=tile)
            monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
            rounded = gpu_plan.head(ready, u, tile=tile)
            assert int((rounded.view(torch.int32) & 0x1FFF).abs().max()) == 0
            assert int((exact.view(torch.int32) & 0x1FFF).abs().max()) > 0


CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize("runs", [False, True])
def test_float32_with_pooling_leaves_the_triton_encoder_aside_on_a_gpu(runs, monkeypatch):
    """It gave wrong results on a GPU: PyTorch's convolutions run where the CUDA kernel cannot."""
    monkeypatch.setattr(devices, "cuda_runs", lambda device: (runs, "as if"))
    pooled, unpooled = (Network(8, patch, 1, 1, 1, {}).plan for patch in (16, 8))
    for allowed in (False, True):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
        served = "cuda" if runs and allowed else None
        assert gpu_plan._best_encoder(pooled, CUDA, torch.float32) == (served or "torch")
        assert gpu_plan._best_encoder(unpooled, CUDA, torch.float32) == (served or "triton")
        assert gpu_plan._best_encoder(pooled, CUDA, torch.bfloat16) == ("cuda" if runs else "triton")
        assert gpu_plan._best_encoder(pooled, torch.device("cpu"), torch.float32) == (served or "triton")
    with pytest.raises(RuntimeError, match=r"the Triton image encoder cannot run: .* gave wrong results on an H200"):
        gpu_plan.prepare_gpu(pooled, CUDA, torch.float32, "triton")


def test_the_triton_encoder_says_what_it_does_not_serve():
    plan = Network(8, 8, 1, 1, 1, {"extra_image_blocks": 1}).plan
    with pytest.raises(RuntimeError, match="cannot run: the first image encoder has 3 convolutions"):
        gpu_plan.prepare_gpu(plan, DEVICE, torch.float32, "triton")


def test_float32_products_follow_pytorchs_setting(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert launch.product_precision(torch.float32) == "tf32x3"
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert launch.product_precision(torch.float32) == "tf32"
    assert launch.product_precision(torch.bfloat16) == "tf32"


def test_switched_off(monkeypatch):
    monkeypatch.setenv("LIFT_FAST_DISABLE_TRITON", "1")
    assert devices.triton_runs() == (False, "switched off by LIFT_FAST_DISABLE_TRITON=1")
    assert devices.kernels_run(DEVICE, torch.bfloat16)[0] is False


def test_operator_falls_back_without_the_kernels(monkeypatch):
    """On any device: the same network through PyTorch's convolutions."""
    monkeypatch.setenv("LIFT_FAST_DISABLE_TRITON", "1")
    network = Network(24, 8, 3, 2, 2, {})
    lift = network.lift.to(DEVICE)
    with torch.no_grad():
        out = lift_forward.lift_forward(*network.inputs(torch.float32), *lift._plan_sources(), lift.architecture)
    assert relative_error(out.cpu(), network.exact) <= 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
class TestOnAGpu:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_module(self, dtype):
        network = Network(384, 16, 7, 5, 3, {})
        lift = network.lift.to(DEVICE, dtype)
        imgs, x = network.inputs(dtype)
        with torch.no_grad():
            out = lift(imgs, x.flatten(1, 2))
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                again = lift(imgs, x.flatten(1, 2))
            stream.synchronize()
            compiled = torch.compile(lift, fullgraph=True)(imgs, x.flatten(1, 2))
        assert relative_error(out.cpu(), network.exact.flatten(1, 2)) <= LIMITS[dtype], network.seed
        assert torch.equal(out, again)
        assert torch.equal(out, compiled)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    @pytest.mark.parametrize("patch", [8, 16])
    # One strip and less, several blocks in a row and in a column, and enough of them to fill a device.
    @pytest.mark.parametrize("case", [(1, 1, 2), (7, 29, 1), (31, 37, 3), (28, 28, 8)])
    def test_native_image_encoder(self, case, patch, dtype):
        runs, reason = devices.cuda_runs(DEVICE)
        if not runs:
            pytest.skip(reason)
        network = Network(8, patch, *case, {})
        imgs, _ = network.inputs(dtype)
        exact = plain.prepare_encoder(network.plan, DEVICE, torch.float64)
        expected = [part.permute(0, 2, 3, 1).cpu() for part in plain.encode_image(exact, imgs.double())]
        plan = network.prepare(dtype, "cuda")
        out = gpu_plan.encode_image(plan, imgs)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            again = gpu_plan.encode_image(plan, imgs)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = gpu_plan.encode_image(plan, imgs)
        graph.replay()
        torch.cuda.synchronize()
        for position, wanted in enumerate(expected):
            assert relative_error(out[position].cpu(), wanted) <= LIMITS[dtype], network.seed
            assert torch.equal(out[position], again[position])
            assert torch.equal(out[position], captured[position])

    def test_native_image_encoder_without_images(self):
        runs, reason = devices.cuda_runs(DEVICE)
        if not runs:
            pytest.skip(reason)
        plan = Network(8, 16, 1, 1, 1, {}).prepare(torch.bfloat16, "cuda")
        f, g = gpu_plan.encode_image(plan, torch.empty(0, 3, 32, 48, dtype=torch.bfloat16, device=DEVICE))
        assert f.shape == (0, 4, 6, 32)
        assert g.shape == (0, 2, 3, 32)

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
    def test_native_image_encoder_on_another_device(self):
        other = torch.device("cuda", 1)
        runs, reason = devices.cuda_runs(other)
        if not runs:
            pytest.skip(reason)
        network = Network(8, 16, 3, 2, 1, {})
        ours = [
            gpu_plan.encode_image(
                gpu_plan.prepare_gpu(network.plan, device, torch.float32, "cuda"), network.imgs.to(device)
            )
            for device in (torch.device("cuda", 0), other)
        ]
        assert torch.cuda.current_device() == 0
        assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(*ours, strict=True))

    def test_autocast(self):
        network = Network(384, 16, 7, 5, 1, {})
        lift = network.lift.to(DEVICE)
        imgs, x = network.inputs(torch.float32)
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            out = lift(imgs, x.flatten(1, 2))
        assert out.dtype == torch.bfloat16
        assert relative_error(out.cpu(), network.exact.flatten(1, 2)) <= 1e-2

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
    def test_second_device(self):
        network = Network(384, 16, 7, 5, 1, {})
        lift = network.lift.to("cuda:1")
        with torch.no_grad():
            out = lift(network.imgs.to("cuda:1"), network.x.flatten(1, 2).to("cuda:1"))
        assert relative_error(out.cpu(), network.exact.flatten(1, 2)) <= LIMITS[torch.float32]

    def test_tune(self, monkeypatch, tmp_path):
        monkeypatch.setenv("LIFT_FAST_CACHE", str(tmp_path))
        tile_table.forget()
        network = Network(32, 8, 4, 4, 1, {})
        chosen = tuning.tune(network.lift.to(DEVICE), (1, 3, 32, 32), torch.bfloat16, quiet=True)
        assert len(chosen) == 2
        assert tile_table.cache_file(DEVICE).is_file()
        tile_table.forget()
