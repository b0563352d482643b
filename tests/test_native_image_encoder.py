"""The native image encoder without a GPU: its kernel's own source runs on the CPU, with emulated tensor cores."""

import itertools
import struct
import subprocess
from pathlib import Path

import compiled
import pytest
import torch
import torch.nn.functional as F

import lift_fast
from lift_fast import LiFT, _native, devices
from lift_fast.ops.lift_forward import gpu as gpu_plan
from lift_fast.ops.lift_forward import image_encoder_cuda
from lift_fast.ops.lift_forward.plan import build_plan
from lift_fast.testing import randomize

numeric = pytest.mark.numeric("image_encoder (CUDA C++)")
TYPES = [torch.bfloat16, torch.float16, torch.float32]
CUTS = ["walk", "stream", "spread"]
# Relative to the largest value: a stored value's rounding and a few roundings in the other direction.
LIMITS = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2**-10}
H200 = (132, 227 << 10, 228 << 10)
A100 = (108, 163 << 10, 164 << 10)
SMALL = (10, 99 << 10, 100 << 10)


def plan_of(patch, seed, **options):
    torch.manual_seed(seed)
    lift = randomize(LiFT(8, patch, **options), seed).eval()
    return build_plan(*lift._plan_sources(), lift.architecture)


def rounded_reference(plan, imgs, dtype):
    """f and g in float64 with every operand rounded as the kernel's are."""

    def operand(value):
        return image_encoder_cuda.round_operand(value, dtype).double()

    def conv(value, layer):
        return F.conv2d(operand(value), operand(layer.weight), layer.bias, layer.stride, padding=1).relu()

    first, second = plan.image_convs_1
    f = conv(conv(imgs.double(), first), second)
    if plan.pool:
        f = F.max_pool2d(f, 2)
    g = conv(f.to(dtype).double(), plan.image_convs_2[0])
    return f.permute(0, 2, 3, 1), g.permute(0, 2, 3, 1)


def in_frame(imgs, layout):
    """The storage of an image tensor of some layout, the tensor's start in it, and its strides."""
    if layout == "contiguous":
        return imgs.contiguous().flatten(), 0, imgs.contiguous().stride()
    if layout == "channels_last":
        last = imgs.contiguous(memory_format=torch.channels_last)
        return last.permute(0, 2, 3, 1).flatten(), 0, last.stride()
    if layout == "expanded":
        return imgs[:1].contiguous().flatten(), 0, (0, *imgs[:1].contiguous().stride()[1:])
    # A crop of a larger image; in "aligned crop" its rows can still be copied 16 bytes at a time.
    top, left, right = (1, 2, 3) if layout == "crop" else (1, 8, 16)
    frame = imgs.new_full((*imgs.shape[:2], imgs.shape[2] + 3, imgs.shape[3] + left + right), torch.nan)
    view = frame[:, :, top : top + imgs.shape[2], left : left + imgs.shape[3]]
    view.copy_(imgs)
    reach = sum((n - 1) * s for n, s in zip(view.shape, view.stride(), strict=True)) + 1
    return frame.flatten()[view.storage_offset() : view.storage_offset() + reach], 0, view.stride()


class Case:
    """One launch for the emulation, and its expected results."""

    def __init__(
        self,
        dtype,
        patch,
        grid,
        batch=1,
        layout="contiguous",
        device=H200,
        cut="walk",
        blocks=(0, 0),
        late=0,
        order=0,
        nan=(),
    ):
        self.text = f"{dtype} patch {patch} {grid} x{batch} {layout} {device[0]} {cut} {blocks} late {late} {order}"
        self.dtype, self.shape = dtype, (batch, *grid)
        seed = int(torch.randint(1 << 20, ()))
        self.text += f" seed {seed}"
        plan = plan_of(patch, seed)
        imgs = torch.randn(batch, 3, patch * grid[0], patch * grid[1]).to(dtype)
        for at in nan:
            imgs[at] = torch.nan
            self.text += f" NaN at {at}"
        if layout == "expanded":
            imgs = imgs[:1].expand(batch, -1, -1, -1)
        self.expected = rounded_reference(plan, imgs, dtype)
        weights = image_encoder_cuda.pack_encoder(plan, torch.device("cpu"), dtype)
        storage, _, strides = in_frame(imgs, layout)
        self.content = struct.pack(
            "<19q",
            *(TYPES.index(dtype), int(plan.pool), batch, *grid, *strides, storage.numel() * dtype.itemsize),
            *(CUTS.index(cut), *blocks, *device, late, order, seed),
        )
        self.content += b"".join(map(raw, (storage, weights.packed, weights.bias)))

    def check(self, out):
        values = torch.frombuffer(bytearray(out), dtype=self.dtype).double()
        batch, h, w = self.shape
        f, g = values.split([batch * 4 * h * w * 32, batch * h * w * 32])
        for name, actual, expected in zip("fg", (f, g), self.expected, strict=True):
            actual = actual.view(expected.shape)
            assert torch.equal(actual.isnan(), expected.isnan()), f"{name}, what holds NaN: {self.text}"
            error = float((actual - expected).nan_to_num().abs().max() / expected.nan_to_num().abs().max())
            assert error <= LIMITS[self.dtype], f"{name}: {self.text}"


def raw(tensor):
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


@pytest.fixture(scope="module")
def emulation():
    return compiled.emulation("image_encoder_emulate")


def run_cases(program, folder, cases):
    files = []
    for number, case in enumerate(cases):
        files.append(folder / str(number))
        files[-1].write_bytes(case.content)
    done = subprocess.run([str(program), *map(str, files)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    for file, case in zip(files, cases, strict=True):
        case.check(Path(f"{file}.out").read_bytes())


# Odd, prime and rectangular grids, one cell, two images.
GRIDS = [((1, 1), 2), ((1, 3), 1), ((3, 2), 2), ((5, 1), 1), ((2, 7), 1)]


@numeric
@pytest.mark.slow
@pytest.mark.parametrize("patch", [8, 16])
@pytest.mark.parametrize("dtype", TYPES)
def test_equals_the_rounded_reference(dtype, patch, emulation, tmp_path):
    cases = [Case(dtype, patch, grid, batch) for grid, batch in GRIDS]
    run_cases(emulation, tmp_path, cases)


@numeric
@pytest.mark.slow
@pytest.mark.parametrize("dtype", TYPES)
def test_any_strides(dtype, emulation, tmp_path):
    """Pixels beside a crop are NaN; beyond them memory is out of bounds."""
    layouts = ["channels_last", "crop", "aligned crop", "expanded"]
    run_cases(emulation, tmp_path, [Case(dtype, p, (2, 3), 2, layout) for p in (8, 16) for layout in layouts])


@numeric
@pytest.mark.slow
@pytest.mark.parametrize("patch", [8, 16])
def test_any_cut_into_blocks(patch, emulation, tmp_path):
    """Blocks that begin inside the image, in rows and columns, of one warp and of several."""
    sizes = [(1, 1), (1, 2), (2, 1), (2, 3), (3, 5)]
    cases = [Case(torch.bfloat16, patch, (4, 9), 1, blocks=size) for size in sizes]
    cases += [Case(torch.float32, patch, (2, 7), 1, blocks=size) for size in sizes[1:3]]
    cases += [Case(torch.float16, patch, (3, 5), 2, device=device) for device in (A100, SMALL, (1, *H200[1:]))]
    run_cases(emulation, tmp_path, cases)


@numeric
@pytest.mark.slow
@pytest.mark.parametrize("patch", [8, 16])
@pytest.mark.parametrize("dtype", TYPES)
def test_rows_one_after_the_other(dtype, patch, emulation, tmp_path):
    stream = {"cut": "stream"}
    cases = [Case(dtype, patch, grid, batch, **stream) for grid, batch in GRIDS]
    cases += [Case(dtype, patch, (2, 3), 2, layout, **stream) for layout in ("channels_last", "aligned crop")]
    cases += [Case(dtype, patch, (5, 9), blocks=size, **stream) for size in ((1, 1), (2, 2), (3, 4))]
    cases += [Case(dtype, patch, (4, 6), blocks=(2, 2), late=1, order=order, **stream) for order in (0, 1, 2)]
    cases.append(Case(dtype, patch, (4, 7), blocks=(1, 3), nan=[(0, 1, 31, 40)], **stream))
    run_cases(emulation, tmp_path, cases)


@pytest.mark.slow
@pytest.mark.parametrize("patch", [8, 16])
@pytest.mark.parametrize("dtype", TYPES)
def test_steps_side_by_side(dtype, patch, emulation, tmp_path):
    """Spread blocks: those at the top have a warp too many, those at the bottom fewer rows than others."""
    spread = {"cut": "spread"}
    cases = [Case(dtype, patch, grid, batch, **spread) for grid, batch in GRIDS]
    cases += [Case(dtype, patch, (2, 3), 2, layout, **spread) for layout in ("channels_last", "crop", "aligned crop")]
    sizes = [(1, 1), (1, 2), (1, 3), (2, 1)] if patch == 16 else [(1, 1), (1, 7), (2, 3), (4, 1)]
    cases += [Case(dtype, patch, (5, 9), blocks=size, **spread) for size in sizes]
    run_cases(emulation, tmp_path, cases)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TYPES)
def test_nan_reaches_its_windows_alone(dtype, emulation, tmp_path):
    """In every column of a chunk of eight pixels, in each channel, at a strip's and a block's edge."""
    places = [(0, 1, 40 + column, 24 + column) for column in range(8)] + [
        (0, 0, 17, 63),
        (0, 2, 31, 64),
        (0, 2, 16, 95),
    ]
    cases = [Case(dtype, 8, (8, 13), blocks=(1, 3), nan=[at]) for at in places]
    cases += [Case(dtype, 16, (4, 7), blocks=(2, 2), nan=[at]) for at in places[::3]]
    cases += [Case(dtype, 8, (8, 13), cut="spread", blocks=(1, 3), nan=[at]) for at in places[::4]]
    cases += [Case(dtype, 16, (4, 7), cut="spread", blocks=(2, 1), nan=[at]) for at in places[::4]]
    run_cases(emulation, tmp_path, cases)


@numeric
@pytest.mark.slow
@pytest.mark.parametrize("patch", [8, 16])
def test_no_order_of_warps_and_copies_changes_the_result(patch, emulation, tmp_path):
    orders = list(itertools.product((0, 1), (0, 1, 2)))
    cases = [Case(torch.bfloat16, patch, (4, 6), blocks=(2, 2), late=n, order=o) for n, o in orders]
    cases += [Case(torch.bfloat16, patch, (4, 6), cut="spread", blocks=(2, 1), late=n, order=o) for n, o in orders]
    run_cases(emulation, tmp_path, cases)


@pytest.mark.parametrize("dtype", TYPES)
def test_packing_keeps_every_weight(dtype):
    plan = plan_of(16, 3)
    packed, bias, pool = image_encoder_cuda.pack_encoder(plan, torch.device("cpu"), dtype)
    assert pool
    (first, second), (third,) = plan.image_convs_1, plan.image_convs_2
    assert torch.equal(bias, torch.stack([first.bias, second.bias, third.bias]).float())
    octet, lane, value = torch.meshgrid(torch.arange(4), torch.arange(32), torch.arange(8), indexing="ij")
    out, t = 8 * octet + lane // 4, lane % 4
    for layer, start in ((second, 1), (third, 10)):
        weight = torch.full((9, 32, 32), torch.nan, dtype=torch.float64)
        weight[:, out, 8 * (value // 2) + 2 * t + value % 2] = packed[start : start + 9].double()
        exact = layer.weight.flatten(2).permute(2, 0, 1)
        assert torch.equal(weight, image_encoder_cuda.round_operand(exact, dtype).double())
    # The first convolution: 27 weights, the bias in three parts and two zeros for each output channel.
    rows = torch.zeros(32, 32, dtype=torch.float64)
    rows[out, 8 * t + value] = packed[0].double()
    exact = image_encoder_cuda.round_operand(first.weight, dtype).double().flatten(1)
    # Lane t holds the middle and right pixels of lines t and t + 4, then their left ones; line = 3 row + channel.
    for line in range(9):
        row, channel = divmod(line, 3)
        middle, left = (8 * (line % 4) + 2 * (line // 4), 8 * (line % 4) + 4 + line // 4) if line < 8 else (6, 14)
        assert torch.equal(rows[:, [left, middle, middle + 1]], exact[:, 9 * channel + 3 * row :][:, :3])
    parts = rows[:, [22, 23, 30]]
    torch.testing.assert_close(parts.sum(1), first.bias, rtol=2**-22, atol=2**-23)
    assert bool((rows[:, [15, 31]] == 0).all())


def test_tf32_rounding():
    value = torch.tensor([1.0, 1 + 2**-11, 1 + 2**-12, -1 - 2**-11, 3e38, 0.0], dtype=torch.float64)
    expected = torch.tensor([1.0, 1 + 2**-10, 1.0, -1 - 2**-10], dtype=torch.float64)
    rounded = image_encoder_cuda.round_operand(value, torch.float32).double()
    assert torch.equal(rounded[:4], expected)
    assert bool(rounded.isfinite().all())
    assert rounded[5] == 0


needs_native = pytest.mark.skipif(not _native.can_run()[0], reason=_native.can_run()[1])


def call(**changes):
    arguments = {
        "imgs": 1 << 20,
        "strides": (768, 256, 16, 1),
        "packed": 1 << 20,
        "packed_elements": 19 * 1024,
        "bias": 1 << 20,
        "f": 1 << 20,
        "f_elements": 128,
        "g": 1 << 20,
        "g_elements": 32,
        "batch": 1,
        "h": 1,
        "w": 1,
        "pool": True,
        "dtype": "bfloat16",
        "device": 0,
        "stream": 0,
    }
    _native.require().image_encoder(**{**arguments, **changes})


@needs_native
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float64"}, "dtype must be bfloat16, float16 or float32, got float64"),
        ({"cut": "thin"}, "cut must be walk, stream or spread, got thin"),
        ({"strides": (1, 2, 3)}, "4 strides, got 3"),
        ({"batch": -1}, "must not be negative, got -1 images"),
        ({"h": -1}, "must not be negative"),
        ({"w": -5}, "must not be negative"),
        ({"h": (1 << 24) + 1}, "too large"),
        ({"batch": 1 << 31}, "too large"),
        ({"batch": 1 << 30, "h": 1 << 24, "w": 1 << 24}, "more than 2\\^58 elements"),
        ({"strides": (1 << 60, 1, 1, 1)}, "stride 1152921504606846976 is out of range"),
        ({"strides": (1, 1 << 57, 1 << 57, 1)}, "beyond 2\\^58 elements"),
        ({"imgs": 0}, "imgs is null"),
        ({"packed": 0}, "packed is null"),
        ({"bias": 0}, "bias is null"),
        ({"f": 0}, "f is null"),
        ({"g": 0}, "g is null"),
        ({"imgs": 1048577}, "imgs must be aligned to 2 bytes"),
        ({"f": 1048578}, "f must be aligned to 16 bytes"),
        ({"packed": 1048584}, "packed must be aligned to 16 bytes"),
        ({"packed_elements": 19 * 1024 - 1}, "packed must have 19456 elements, got 19455"),
        ({"f_elements": 127}, "f must have 128 elements, got 127"),
        ({"g_elements": 33}, "g must have 32 elements, got 33"),
        ({"device": -1}, "device -1 does not exist"),
    ],
)
def test_bad_arguments_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)


@needs_native
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_a_device_it_says_so():
    with pytest.raises(RuntimeError, match="image_encoder: "):
        call()


def test_inputs_that_do_not_fit_the_weights_are_refused():
    weights = image_encoder_cuda.pack_encoder(plan_of(16, 4), torch.device("cpu"), torch.float16)
    with pytest.raises(ValueError, match=r"imgs must be \[B, 3, 16 h, 16 w\], got \[1, 3, 16, 24\]"):
        image_encoder_cuda.encode_image(torch.zeros(1, 3, 16, 24, dtype=torch.float16), weights)
    with pytest.raises(ValueError, match=r"the weights are torch\.float16 on cpu, imgs torch\.bfloat16"):
        image_encoder_cuda.encode_image(torch.zeros(1, 3, 16, 16, dtype=torch.bfloat16), weights)
    with pytest.raises(ValueError, match="needs a CUDA device, got cpu"):
        image_encoder_cuda.encode_image(torch.zeros(1, 3, 16, 16, dtype=torch.float16), weights)


class TestChoice:
    """The image encoder that a plan is prepared for."""

    @pytest.fixture(autouse=True)
    def runs(self, monkeypatch):
        pytest.importorskip("triton")
        monkeypatch.setattr(devices, "cuda_runs", lambda device: (True, "as if"))
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)

    def encoder(self, dtype=torch.bfloat16, wish=None, patch=16, **options):
        plan = plan_of(patch, 5, **options)
        return gpu_plan.prepare_gpu(plan, torch.device("cpu"), dtype, wish).encoder

    @pytest.mark.parametrize("dtype", TYPES)
    def test_the_native_one_comes_first(self, dtype):
        assert self.encoder(dtype) == "cuda"
        for wish in ("cuda", "triton", "torch"):
            assert self.encoder(dtype, wish) == wish

    def test_full_precision_stays_with_triton(self, monkeypatch):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
        assert self.encoder(torch.float32) == "triton"
        assert self.encoder(torch.bfloat16) == "cuda"
        with pytest.raises(RuntimeError, match="full precision"):
            self.encoder(torch.float32, "cuda")

    def test_other_networks(self):
        assert self.encoder(image_channels=20) == "triton"
        assert self.encoder(extra_image_blocks=1) == "torch"
        assert self.encoder(use_image=False) == "none"
        with pytest.raises(RuntimeError, match="20 channels wide, the kernel 32"):
            self.encoder(wish="cuda", image_channels=20)
        with pytest.raises(RuntimeError, match="has 3 convolutions, the kernel has 2"):
            self.encoder(wish="cuda", extra_image_blocks=1)

    def test_where_it_cannot_run_triton_does(self, monkeypatch):
        monkeypatch.setattr(devices, "cuda_runs", lambda device: (False, "no such luck"))
        assert self.encoder() == "triton"
        with pytest.raises(RuntimeError, match="no such luck"):
            self.encoder(wish="cuda")


def test_switched_off(monkeypatch):
    monkeypatch.setenv("LIFT_FAST_DISABLE_CUDA", "1")
    reason = "switched off by LIFT_FAST_DISABLE_CUDA=1"
    assert devices.cuda_runs(torch.device("cuda", 0)) == (False, reason)
    if _native.can_run()[0]:
        assert lift_fast.backends()["cuda native"].detail == reason
    monkeypatch.setenv("LIFT_FAST_DISABLE_CUDA", "0")
    assert devices.cuda_runs(torch.device("cpu"))[0] is False
