"""What every launcher needs: the current device, launches that cost the host little, rounding of float32 products.

Triton's own launcher binds the arguments' names, finds what to compile for each and looks up the kernel by a string of
all that: 13 us a launch, as long as a small kernel runs. :func:`run` leaves the first two launches of a kernel with
given sizes to Triton, records how Triton calls the compiled kernel, and later calls it directly: 4 us.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _env

# The functions behind torch.cuda.current_device() and current_stream(), which Triton uses too: less than 1 us both.
_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
_current_stream: Callable[[int], int] = getattr(
    torch._C, "_cuda_getCurrentRawStream", lambda device: torch.cuda.current_stream(device).cuda_stream
)
# Triton compiles for addresses that are multiples of this.
ALIGNMENT = 16
# Releases of Triton with a known launcher: it passes its arguments on, except for scratch memory and the sanitizer.
_KNOWN = ("3.6", "3.7", "3.8", "3.9")
_SIMPLE = (int, float, type(None))
# Most entries of both tables; a program that exceeds it has ever new sizes and gains nothing from them.
_CAPACITY = 4096


class Ready(NamedTuple):
    """A compiled kernel on its device, and its launch's arguments except grid, stream and the launcher's own."""

    kernel: Any
    compiled: Any
    """Kept because Triton unloads a kernel without references."""
    run: Callable[..., Any]
    rest: tuple[Any, ...]
    """The arguments after the stream."""
    nested: bool
    """The arguments follow as one tuple."""
    fill: tuple[int, ...]
    """Ones that complete the grid."""
    constants: tuple[Any, ...]
    """In the kernel's order."""


_Key = tuple[Any, ...]
# The compiled form of each first launch, with the kernel, whose address is part of the key.
_seen: dict[_Key, tuple[Any, Any]] = {}
# None if Triton calls its kernels in a way that this module does not know.
_ready: dict[_Key, Ready | None] = {}
_lock = threading.Lock()


class Launch(NamedTuple):
    """A launch without Triton's launcher."""

    ready: Ready
    grid: tuple[int, ...]
    args: Sequence[Any]


class _Journal(threading.local):
    launches: list[Launch | None] | None = None


_journal = _Journal()


@contextmanager
def journal() -> Iterator[list[Launch | None]]:
    """Collects this thread's launches through :func:`run`; None for each launch that was left to Triton."""
    before, launches = _journal.launches, []  # type: ignore[var-annotated]
    _journal.launches = launches
    try:
        yield launches
    finally:
        _journal.launches = before


def device_of(tensor: Tensor) -> int:
    """Number of a tensor's GPU, -1 for tensors elsewhere."""
    return tensor.get_device()


def is_current(device: int) -> bool:
    """Whether a GPU is the current one, the only one that Triton launches on."""
    return device == _current_device()


def current_stream(device: int) -> int:
    """Address of a GPU's current stream."""
    return _current_stream(device)


def run(kernel: Any, grid: tuple[int, ...], *args: Tensor | int | float | None, **options: Any) -> None:
    """``kernel[grid](*args, **options)`` on the device of the first argument.

    Args:
        kernel: a function under ``triton.jit``.
        grid: one to three numbers of blocks.
        args: the arguments before the constants, in the kernel's order, a tensor first.
        options: every ``tl.constexpr`` of the kernel, and ``num_warps`` and the like.
    """
    device = device_of(args[0])  # type: ignore[arg-type]
    if device < 0:
        # Triton's interpreter, and stand-ins that record launches.
        _left_to_triton()
        kernel[grid](*args, **options)
    elif is_current(device):
        _launch(device, kernel, grid, args, options)
    else:
        with torch.cuda.device(device):
            _launch(device, kernel, grid, args, options)


def on(tensor: Tensor) -> AbstractContextManager[object]:
    """Make a tensor's GPU the current one, for launches that :func:`run` does not serve: with tensor descriptors."""
    device = device_of(tensor)
    return nullcontext() if device < 0 or is_current(device) else torch.cuda.device(device)


def forget() -> None:
    """Leave the next launches to Triton."""
    with _lock:
        _seen.clear()
        _ready.clear()


def _launch(device: int, kernel: Any, grid: tuple[int, ...], args: Sequence[Any], options: dict[str, Any]) -> None:
    # All that Triton specialises on: types, sizes (1 and multiples of 16 differ), constants; not the values of floats.
    # Addresses come below.
    # True, 1 and 1.0 are equal, but Triton compiles a kernel for each.
    constants = options.values()
    key: list[Any] = [id(kernel), device, len(grid), *options, *constants, *map(type, constants)]
    addresses, foreign = 0, False
    plain: list[Any] = []
    for arg in args:
        if isinstance(arg, Tensor):
            address = arg.data_ptr()
            addresses |= address
            plain.append(address)
            key.append(arg.dtype)
        else:
            # Anything else, such as a tensor descriptor or a bool, is left to Triton.
            foreign = foreign or type(arg) not in _SIMPLE
            plain.append(arg)
            key.append(float if type(arg) is float else arg)
    name = () if foreign else tuple(key)
    aside = foreign or addresses % ALIGNMENT or watched() or getattr(kernel, "pre_run_hooks", None)
    ready = None if aside else _ready.get(name)
    if ready is None:
        _left_to_triton()
    elif _journal.launches is not None:
        _journal.launches.append(Launch(ready, grid, args))
    if ready is not None:
        plain += ready.constants
        given = (tuple(plain),) if ready.nested else plain
        ready.run(*grid, *ready.fill, _current_stream(device), *ready.rest, *given)
    elif aside or name in _ready:
        kernel[grid](*args, **options)
    elif name in _seen:
        _second(name, device, kernel, grid, args, options)
    else:
        _first(name, kernel, grid, args, options)


def _left_to_triton() -> None:
    if _journal.launches is not None:
        _journal.launches.append(None)


def _first(name: _Key, kernel: Any, grid: tuple[int, ...], args: Sequence[Any], options: dict[str, Any]) -> None:
    compiled = kernel[grid](*args, **options)
    with _lock:
        for table in (_seen, _ready):
            if len(table) >= _CAPACITY:
                table.clear()
        _seen[name] = kernel, compiled
        if not hasattr(kernel, "pre_run_hooks") or _env.direct_launch_disabled():
            _ready[name] = None


def _second(
    name: _Key, device: int, kernel: Any, grid: tuple[int, ...], args: Sequence[Any], options: dict[str, Any]
) -> None:
    """Launch through Triton and record how it calls the compiled kernel, unless that form of call is unknown."""
    with _lock:
        # Unless another thread was faster.
        compiled = _seen.pop(name)[1] if name in _seen else None
        launcher = getattr(compiled, "_run", None)
        with _spied(compiled, "_run") as outer, _spied(launcher, "launch") as inner:
            kernel[grid](*args, **options)
        if compiled is None or len(outer) > 1:
            return
        _ready[name] = None
        names = kernel.arg_names[len(args) :]
        if outer and all(parameter in options for parameter in names):
            fill = (1,) * (3 - len(grid))
            constants = tuple(options[parameter] for parameter in names)
            start = (*grid, *fill, _current_stream(device))
            rest = (compiled.function, compiled.packed_metadata)
            # A description and two hooks for profilers follow; none are set.
            hooks = outer[0][6:9]
            if _same(outer[0], (*start, *rest, *hooks, *args, *constants)):
                ready = Ready(kernel, compiled, launcher, (*rest, None, None, None), False, fill, constants)  # type: ignore[arg-type]
                _ready[name] = _deeper(ready, inner, start, hooks, (*args, *constants))


def _deeper(
    ready: Ready, inner: list[tuple[Any, ...]], start: Sequence[Any], hooks: Sequence[Any], arguments: Sequence[Any]
) -> Ready:
    """The same with the C function that Triton's launcher calls, 1 us less; unchanged if the launcher does more."""
    launcher = ready.run
    sizes = [getattr(launcher, name, None) for name in ("global_scratch_size", "profile_scratch_size")]
    if len(inner) != 1 or sizes != [0, 0] or getattr(launcher, "gsan_enabled", False) or _triton() not in _KNOWN:
        return ready
    given = inner[0]
    nested = isinstance(given[-1], tuple)
    count = 1 if nested else len(arguments)
    first, rest, last = given[: len(start)], given[len(start) : -count], given[-count:]
    if not _same(first, start) or not _same(last[0] if nested else last, arguments):
        return ready
    rest = tuple(None if any(item is hook for hook in hooks) else item for item in rest)
    return ready._replace(run=launcher.launch, rest=rest, nested=nested)  # type: ignore[attr-defined]


@contextmanager
def _spied(owner: Any, name: str) -> Iterator[list[tuple[Any, ...]]]:
    """Collects the arguments of calls to a method of an object; nothing if there is no such method."""
    real = getattr(owner, name, None)
    given: list[tuple[Any, ...]] = []

    def spy(*args: Any) -> Any:
        given.append(args)
        return real(*args)  # type: ignore[misc]

    if callable(real):
        setattr(owner, name, spy)
    try:
        yield given
    finally:
        if callable(real):
            setattr(owner, name, real)


def _same(ours: Sequence[Any], theirs: Sequence[Any]) -> bool:
    return len(ours) == len(theirs) and all(
        a is b or (type(a) is type(b) and not isinstance(a, Tensor) and a == b)
        for a, b in zip(ours, theirs, strict=True)
    )


def watched() -> bool:
    """Whether a profiler listens to Triton's launches."""
    runtime = _runtime()
    before, after = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(before, "calls", before) or getattr(after, "calls", after))


@cache
def _runtime() -> Any:
    from triton import knobs

    return knobs.runtime


@cache
def _triton() -> str:
    import triton

    return ".".join(triton.__version__.split(".")[:2])


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability, by which tiles are chosen."""
    # Tensors on the CPU get here only in Triton's interpreter, where any tile runs.
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


@cache
def multiprocessors(device: torch.device) -> int:
    """How many blocks a device runs side by side, at least."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 2


def tf32_allowed() -> bool:
    """Whether float32 convolutions may round their operands to TF32: PyTorch's own setting, by default yes."""
    # The older switch, allow_tf32, sets this too; anything but "tf32" means full precision.
    return bool(torch.backends.cudnn.conv.fp32_precision == "tf32")


def product_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of a kernel's products; three TF32 products for full float32."""
    return "tf32" if dtype != torch.float32 or tf32_allowed() else "tf32x3"
