"""The native image encoder without a GPU: its kernel's own source, run on the CPU with the tensor cores emulated."""

import itertools
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lift_fast import LiFT
from lift_fast.ops import image_encoder, image_encoder_cuda
from lift_fast.plan import build_plan
from lift_fast.testing import randomize

ROOT = Path(__file__).resolve().parents[1]
TYPES = [torch.bfloat16, torch.float16, torch.float32]
# Relative to the largest value: what a stored value and a few roundings that fell the other way make of it.
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
    """The storage that a picture tensor of some layout lives in, where it starts in it, and its strides."""
    if layout == "contiguous":
        return imgs.contiguous().flatten(), 0, imgs.contiguous().stride()
    if layout == "channels_last":
        last = imgs.contiguous(memory_format=torch.channels_last)
        return last.permute(0, 2, 3, 1).flatten(), 0, last.stride()
    if layout == "expanded":
        return imgs[:1].contiguous().flatten(), 0, (0, *imgs[:1].contiguous().stride()[1:])
    # A crop of a larger picture; in "aligned crop" its rows can still be copied 16 bytes at a time.
    top, left, right = (1, 2, 3) if layout == "crop" else (1, 8, 16)
    frame = imgs.new_full((*imgs.shape[:2], imgs.shape[2] + 3, imgs.shape[3] + left + right), torch.nan)
    view = frame[:, :, top : top + imgs.shape[2], left : left + imgs.shape[3]]
    view.copy_(imgs)
    reach = sum((n - 1) * s for n, s in zip(view.shape, view.stride(), strict=True)) + 1
    return frame.flatten()[view.storage_offset() : view.storage_offset() + reach], 0, view.stride()


class Case:
    """One launch for the emulation, and what it should give."""

    def __init__(self, dtype, patch, grid, batch=1, layout="contiguous", device=H200, cut=(0, 0), late=0, order=0):
        self.text = f"{dtype} patch {patch} {grid} x{batch} {layout} {device[0]} {cut} late {late} order {order}"
        self.dtype, self.shape = dtype, (batch, *grid)
        seed = int(torch.randint(1 << 20, ()))
        self.text += f" seed {seed}"
        plan = plan_of(patch, seed)
        imgs = torch.randn(batch, 3, patch * grid[0], patch * grid[1]).to(dtype)
        if layout == "expanded":
            imgs = imgs[:1].expand(batch, -1, -1, -1)
        self.expected = rounded_reference(plan, imgs, dtype)
        weights = image_encoder_cuda.pack_encoder(plan, torch.device("cpu"), dtype)
        storage, _, strides = in_frame(imgs, layout)
        self.content = struct.pack(
            "<18q",
            *(TYPES.index(dtype), int(plan.pool), batch, *grid, *strides, storage.numel() * dtype.itemsize),
            *(*cut, *device, late, order, seed),
        )
        self.content += b"".join(map(raw, (storage, weights.packed, weights.bias)))

    def check(self, out):
        values = torch.frombuffer(bytearray(out), dtype=self.dtype).double()
        batch, h, w = self.shape
        f, g = values.split([batch * 4 * h * w * 32, batch * h * w * 32])
        for name, actual, expected in zip("fg", (f, g), self.expected, strict=True):
            actual = actual.view(expected.shape)
            assert bool(actual.isfinite().all()), f"{name} was not written everywhere: {self.text}"
            error = float((actual - expected).abs().max() / expected.abs().max())
            assert error <= LIMITS[self.dtype], f"{name}: {self.text}"


def raw(tensor):
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


@pytest.fixture(scope="module")
def emulation(tmp_path_factory):
    """The program, built with the sanitizers where the compiler has them."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("emulation")
    flags = ["-std=c++17", "-O1", "-g", "-fno-strict-aliasing", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    flags += [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests' / 'native'}"]
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    probe = folder / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    if subprocess.run(["g++", *sanitizers, str(probe), "-o", str(folder / "probe")], capture_output=True).returncode:
        sanitizers = []
    source = ROOT / "tests" / "native" / "image_encoder_emulate.cpp"
    done = subprocess.run(
        ["g++", *flags, *sanitizers, str(source), "-o", str(folder / "run")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder / "run"


def run_cases(program, folder, cases):
    files = []
    for number, case in enumerate(cases):
        files.append(folder / str(number))
        files[-1].write_bytes(case.content)
    done = subprocess.run([str(program), *map(str, files)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    for file, case in zip(files, cases, strict=True):
        case.check(Path(f"{file}.out").read_bytes())
