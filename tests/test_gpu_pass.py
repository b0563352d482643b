"""Recorded passes compute the same as first ones: in Triton's interpreter, launched by address."""

import os

import pytest
import torch

from lift_fast import LiFT, memory
from lift_fast.ops.lift_forward import gpu as gpu_plan
from lift_fast.ops.lift_forward import gpu_pass
from lift_fast.ops.lift_forward.plan import build_plan
from lift_fast.testing import randomize

triton = pytest.importorskip("triton")
from lift_fast.kernels import launch  # noqa: E402
from lift_fast.kernels import lift_forward_head as head  # noqa: E402
from lift_fast.kernels import lift_forward_image_encoder as image_encoder  # noqa: E402
from lift_fast.kernels import lift_forward_upsample as upsample  # noqa: E402

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before Triton is imported", allow_module_level=True)

CPU = torch.device("cpu")


class Memory:
    """Finds the tensor of an address among registered tensors and those made by ``new_empty``."""

    def __init__(self, monkeypatch):
        self.tensors = []
        empty = memory.new_empty

        def remembered(tensor, *size, **options):
            out = empty(tensor, *size, **options)
            self.tensors.append(out.fill_(torch.nan))
            return out

        monkeypatch.setattr(memory, "new_empty", remembered)

    def at(self, address, dtype):
        """The rest of the tensor from the address on."""
        for tensor in self.tensors:
            first = tensor.data_ptr()
            if first <= address < first + tensor.numel() * tensor.itemsize:
                flat = torch.as_strided(tensor, (tensor.numel(),), (1,), tensor.storage_offset())
                return flat.view(torch.uint8)[address - first :].view(dtype)
        raise AssertionError(f"{address} lies in no tensor")


class Compiled:
    """A compiled kernel's stand-in: takes tensors or addresses, and interprets the kernel."""

    function, packed_metadata = 3, (4, 1, 0)

    def __init__(self, kernel, memory):
        self.kernel, self.memory, self.dtypes, self.by_address = kernel, memory, {}, 0

    def _run(self, x, y, z, stream, function, metadata, described, before, after, *given):
        assert (stream, function, metadata) == (7, self.function, self.packed_metadata)
        constants = {name: given[at] for at, name in enumerate(self.kernel.arg_names) if name.isupper()}
        arguments = list(given[: len(given) - len(constants)])
        for at, argument in enumerate(arguments):
            if isinstance(argument, torch.Tensor):
                self.dtypes[at] = argument.dtype
                self.memory.tensors.append(argument)
            elif at in self.dtypes:
                arguments[at] = self.memory.at(argument, self.dtypes[at])
                self.by_address += 1
        self.kernel[(x, y, z)](*arguments, **constants)


class Kernel:
    """A kernel with the attributes of Triton's compiled ones that a direct launch reads."""

    def __init__(self, module, name, memory, monkeypatch):
        self.kernel = getattr(module, name)
        self.arg_names, self.pre_run_hooks, self.compiled = self.kernel.arg_names, [], Compiled(self.kernel, memory)
        monkeypatch.setattr(module, name, self)

    def __getitem__(self, grid):
        def run(*args, num_warps, **constants):
            ordered = [constants[name] for name in self.arg_names[len(args) :]]
            fill = (1,) * (3 - len(grid))
            self.compiled._run(
                *grid,
                *fill,
                7,
                self.compiled.function,
                self.compiled.packed_metadata,
                None,
                None,
                None,
                *args,
                *ordered,
            )
            return self.compiled

        return run


@pytest.fixture
def kernels(monkeypatch):
    """Treat kernels as compiled and CPU tensors as tensors on the current GPU."""
    memory = Memory(monkeypatch)
    monkeypatch.setattr(launch, "device_of", lambda tensor: 0)
    monkeypatch.setattr(launch, "_current_device", lambda: 0)
    monkeypatch.setattr(launch, "_current_stream", lambda device: 7)
    launch.forget()
    parts = ((image_encoder, "fine_kernel"), (image_encoder, "coarse_kernel"))
    parts += ((upsample, "upsample_kernel"), (head, "head_kernel"))
    yield [Kernel(module, name, memory, monkeypatch) for module, name in parts]
    launch.forget()


def shown(kernels, *tensors):
    kernels[0].compiled.memory.tensors += tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("channels", "h", "w", "batch", "options"),
    [(24, 2, 1, 2, {}), (33, 1, 2, 1, {}), (16, 3, 2, 1, {"use_image": False}), (8, 1, 1, 1, {"image_channels": 20})],
)
def test_it_computes_what_the_first_pass_does(kernels, channels, h, w, batch, options, dtype):
    torch.manual_seed(channels)
    lift = randomize(LiFT(channels, 8, **options), channels).eval()
    plan = gpu_plan.prepare_gpu(build_plan(*lift._plan_sources(), lift.architecture), CPU, dtype)
    for normalize in (False, True):
        inputs = []
        for _ in range(3):
            imgs = torch.randn(batch, 3, 8 * h, 8 * w).to(dtype)
            x = torch.randn(batch, h, w, channels).to(dtype)
            inputs.append((imgs, x))
            shown(kernels, imgs, x)
        results = [gpu_plan.run_gpu_plan(plan, *pair, normalize) for pair in inputs]
        used = [kernel for kernel in kernels if kernel.compiled.dtypes]
        assert len(used) == (4 if lift.use_image else 2)
        assert all(kernel.compiled.by_address for kernel in used)
        assert len(plan.passes) == 1
        plan.passes.clear()
        launch.forget()
        for pair, result in zip(inputs, results, strict=True):
            # Stage by stage.
            assert torch.equal(gpu_plan.run_gpu_plan(plan, *pair, normalize), result)
            assert not result.isnan().any()
            launch.forget()
            plan.passes.clear()


def test_what_lies_between_the_kernels_does_not_overlap(kernels):
    sizes = {gpu_pass._F: 513, gpu_pass._G: 1, gpu_pass._U: 512}
    seen = []
    places = ((0, gpu_pass._F), (1, gpu_pass._G), (2, gpu_pass._U))
    one = gpu_pass._Launch(lambda stream, *given: seen.extend(given), (), (), False, [0, 0, 0], places, None)
    made = gpu_pass.Pass(0, lambda imgs, f, g, stream: seen.extend((f, g)), [one], sizes, torch.Size([1]))
    made.run(torch.zeros(1), torch.zeros(1))
    f, g, *given = seen
    assert given == [f, g, f + 1536]
    assert g == f + 1024
    assert made._bytes == 2048


def test_memory_of_unknown_origin_is_left_alone():
    """A launcher that allocates a tensor cannot be repeated by address."""
    ready = launch.Ready(None, None, None, (), False, (), ())
    x, out, weight = (torch.zeros(2) for _ in range(3))
    tensors = (None, x, None, None, None, out)
    known = launch.Launch(ready, (1,), (x, weight, out, 3))
    assert gpu_pass.build([known], tensors, [weight], None) is not None
    assert gpu_pass.build([known], tensors, [], None) is None
    assert gpu_pass.build([known, None], tensors, [weight], None) is None
    assert gpu_pass.build([], tensors, [weight], None) is None
