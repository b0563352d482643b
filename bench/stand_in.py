"""A stand-in for a GPU: the host's whole path to each launch runs, on CPU tensors, and the launch does nothing.

It needs a process of its own, because it replaces parts of PyTorch, Triton and this package for good. Triton's
``JITFunction`` runs unchanged, and with ``native=True`` so does its launcher, above a CUDA driver whose functions
return at once. Nothing is compiled or computed: results are zeros, or uninitialised with ``native``.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

# The functions that Triton's launcher and loader call: they succeed, and answer if the answer is read.
_DRIVER = r"""
#include <stddef.h>
#include <stdint.h>
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGetCount(int *count) { *count = 2; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = 232448; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)1; return 0; }
int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
int cuCtxSetCurrent(void *context) { return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuCtxGetLimit(size_t *value, int limit) { *value = 0; return 0; }
int cuCtxSetLimit(int limit, size_t value) { return 0; }
int cuModuleLoadData(void **module, const void *image) { *module = (void *)2; return 0; }
int cuModuleUnload(void *module) { return 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) { *function = (void *)3; return 0; }
int cuFuncGetAttribute(int *value, int attribute, void *function) { *value = attribute ? 0 : 1024; return 0; }
int cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(void *function, int config) { return 0; }
int cuGetErrorString(int error, const char **text) { *text = "stand-in"; return 0; }
int cuOccupancyMaxActiveClusters(int *count, void *function, void *config) { *count = 1; return 0; }
int cuPointerGetAttribute(void *value, int attribute, uint64_t address) { *(uint64_t *)value = address; return 0; }
int cuStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
int cuTensorMapEncodeTiled(void) { return 0; }
int cuTensorMapEncodeIm2col(void) { return 0; }
/* The grid, the stream and the first six arguments, addresses, of every launch. */
static uint64_t seen[64][10];
static int count;
int cuLaunchKernelEx(const void *config, void *function, void **arguments, void **extra) {
  uint64_t *one = seen[count++ % 64];
  const unsigned *grid = (const unsigned *)config;
  one[0] = grid[0], one[1] = grid[1], one[2] = grid[2];
  one[3] = *(const uint64_t *)((const char *)config + 32);
  for (int i = 0; i < 6; i++) one[4 + i] = *(const uint64_t *)arguments[i];
  return 0;
}
int stand_in_launches(uint64_t *to) {
  for (int i = 0; i < 10 * 64; i++) to[i] = seen[0][i];
  int result = count;
  count = 0;
  return result;
}
"""

_library: ctypes.CDLL | None = None


def native_launches() -> list[tuple[int, ...]]:
    """(grid, stream, six addresses) of the native stand-in's launches since the last call, 64 at most.

    For kernels whose first six arguments are addresses.
    """
    assert _library is not None
    to = (ctypes.c_uint64 * (10 * 64))()
    count = _library.stand_in_launches(to)
    return [tuple(to[10 * i : 10 * i + 10]) for i in range(count)]


class Launched(NamedTuple):
    """One launch as the device would see it."""

    kernel: str
    device: int
    """the current one"""
    stream: int
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]


class Device:
    """The devices' state. All tensors lie on device ``home``; ``log`` keeps launches that are not native."""

    def __init__(self) -> None:
        self.current, self.home = 0, 0
        self.log: list[Launched] = []
        self.triton_calls = 0

    def stream(self, device: int) -> int:
        return 1000 + device

    @contextmanager
    def chosen(self, device: int) -> Iterator[None]:
        """torch.cuda.device."""
        before, self.current = self.current, device
        try:
            yield
        finally:
            self.current = before


def install(native: bool = False) -> Device:
    """Pretend in this process that there are two GPUs of compute capability 9.0.

    Args:
        native: launch through Triton's own launcher, above a driver that does nothing; needs a C compiler. Otherwise
            launches end in the device's log.
    """
    os.environ.pop("TRITON_INTERPRET", None)
    if native:
        _build_driver()
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    device = Device()
    torch.cuda.device = device.chosen  # type: ignore[assignment,misc]
    torch.cuda.get_device_capability = lambda of=None: (9, 0)
    driver = _driver(native)
    driver.get_current_device = lambda: device.current
    driver.get_current_stream = device.stream
    driver.get_device_capability = lambda of=None: (9, 0)
    driver.get_current_target = lambda: GPUTarget("cuda", 90, 32)
    triton.runtime.driver.set_active(driver)
    triton.compiler.compile = lambda src, target, options, **_: _compiled(src, target, driver, device, native)

    run = JITFunction.run

    def counted(*args: Any, **kwargs: Any) -> Any:
        device.triton_calls += 1
        return run(*args, **kwargs)

    JITFunction.run = counted
    if not native:
        from lift_fast import memory

        # Some results are indices.
        memory.new_empty = torch.Tensor.new_zeros  # type: ignore[assignment]
        memory.empty, memory.empty_like = torch.zeros, torch.zeros_like
    _pretend(device, native)
    return device


def _build_driver() -> None:
    folder = Path(tempfile.mkdtemp())
    (folder / "driver.c").write_text(_DRIVER)
    library = folder / "libcuda.so.1"
    compiler = os.environ.get("CC", "cc")
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O2", "-w", "-Wl,-soname,libcuda.so.1", "-o", library, folder / "driver.c"],
        check=True,
    )
    global _library
    _library = ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    # Processes with another driver must not find the launchers that Triton builds above this one.
    os.environ["TRITON_CACHE_DIR"] = str(folder / "cache")


def _driver(native: bool) -> Any:
    from triton.backends.nvidia.driver import CudaDriver

    if native:
        return CudaDriver()
    driver = CudaDriver.__new__(CudaDriver)
    driver.utils = SimpleNamespace(unload_module=lambda module: None)
    return driver


def _compiled(src: Any, target: Any, driver: Any, device: Device, native: bool) -> Any:
    """A compiled and loaded kernel without code."""
    from triton.compiler import CompiledKernel, make_backend

    metadata = SimpleNamespace(
        name=src.fn.__name__,
        target=target,
        num_warps=4,
        num_ctas=1,
        cluster_dims=(1, 1, 1),
        shared=0,
        global_scratch_size=0,
        global_scratch_align=1,
        profile_scratch_size=0,
        profile_scratch_align=1,
        launch_cooperative_grid=False,
        launch_pdl=False,
        tensordesc_meta=None,
        instrumentation_mode="",
    )
    kernel = CompiledKernel.__new__(CompiledKernel)
    kernel.src, kernel.hash, kernel.name, kernel.metadata = src, "", metadata.name, metadata
    kernel.metadata_group, kernel.asm = {}, {}
    kernel.packed_metadata = make_backend(target).pack_metadata(metadata)
    kernel.module, kernel.function = 2, 3

    def log(*given: Any) -> None:
        device.log.append(Launched(kernel.name, device.current, given[3], given[:3], given[9:]))

    kernel._run = driver.launcher_cls(src, metadata) if native else log
    return kernel


def _pretend(device: Device, native: bool) -> None:
    """Let the package treat CPU tensors as tensors of the device."""
    from lift_fast import _env, devices
    from lift_fast.kernels import launch
    from lift_fast.ops.dense_match import cuda as dense_match_cuda
    from lift_fast.ops.lift_forward import gpu as gpu_plan
    from lift_fast.ops.lift_forward import image_encoder_cuda

    # They answer as on a GPU and take as long.
    where = torch.device("cuda", 0)
    kernels_run = devices.kernels_run
    devices._probe_triton = cache(lambda of: (True, "stand-in"))
    devices.kernels_run = lambda of, dtype: kernels_run(where, dtype)
    devices.cuda_runs = lambda of: (not (_env.cuda_disabled() or _env.native_disabled()), "stand-in")
    gpu_plan._route.cache_clear()
    launch.device_of = lambda tensor: device.home
    launch._current_device = lambda: device.current
    launch._current_stream = device.stream
    launch.capability = lambda of: (9, 0)
    launch.multiprocessors = lambda of: 132

    def core(name: str) -> Any:
        def call(*given: Any) -> None:
            if not native:
                # A name, such as the image encoder's cut, may follow the device and the stream.
                *rest, where, stream = given[:-1] if isinstance(given[-1], str) else given
                device.log.append(Launched(name, where, stream, (), tuple(rest)))

        return call

    names = ("image_encoder", *(f"dense_match_{one}" for one in ("spans", "points", "groups", "mutual")))
    stand_in = SimpleNamespace(**{name: core(name) for name in names})
    for module in (image_encoder_cuda, dense_match_cuda):
        module._native = SimpleNamespace(require=lambda: stand_in)
