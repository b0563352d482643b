"""The backbone as an OpenVINO model for Intel and AMD processors: one model for every batch and grid."""

from __future__ import annotations

import copy
import io
import os
import sys
import threading
import warnings
from functools import cache
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ... import _env, memory
from ..._text import said
from ...defaults import plain_defaults
from ...precision import without_autocast
from ..position import Grid
from . import store
from .errors import EngineError
from .graph import Network, PlainGraph, parts_of

# To be increased when what is built from the same network changes.
_FORMAT = 1
_THREAD_COUNTS = 2
DTYPES = (torch.float32, torch.bfloat16)
# The largest difference from PyTorch on the trial images, relative to the largest value. Float32's rounding and that of
# bfloat16 after a dozen blocks lie well below, a wrong result above.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15}


# The process that uses OpenVINO.
_user = 0


@cache
def _openvino() -> Any:
    """The package, without its optional reporter of usage, which would send events over the network."""
    global _user
    _user = os.getpid()
    reporter = "openvino_telemetry"
    quiet = reporter not in sys.modules
    if quiet:
        sys.modules[reporter] = None  # type: ignore[assignment]
    try:
        import openvino
    finally:
        if quiet:
            del sys.modules[reporter]
    return openvino


@cache
def _core() -> Any:
    return _openvino().Core()


def installed() -> tuple[bool, str]:
    """Whether OpenVINO runs on this machine's processor, and its version, or the reason if not."""
    if _env.openvino_disabled():
        return False, "switched off by LIFT_FAST_DISABLE_OPENVINO=1"
    return _probe()


@cache
def _probe() -> tuple[bool, str]:
    try:
        openvino = _openvino()
    except ImportError as error:
        return False, f'OpenVINO cannot be imported: {error}; pip install "lift_fast[openvino]"'
    try:
        name = _core().get_property("CPU", "FULL_DEVICE_NAME")
    except RuntimeError as error:
        return False, f"OpenVINO {openvino.__version__} has no CPU plugin: {' '.join(str(error).split())}"
    return True, f"OpenVINO {openvino.__version__.partition('-')[0]} on {name.strip()}"


def forked() -> bool:
    """Whether this process was forked from one that had used OpenVINO, whose threads it would wait for without end."""
    return _openvino.cache_info().currsize > 0 and _user != os.getpid()


class OpenVINO:
    """One backbone in one dtype, compiled for the number of threads that PyTorch has at each call.

    Args:
        vit: the :class:`FrozenViT`; not kept.
        network: what it is now.

    Raises:
        EngineError: if OpenVINO cannot convert or compile it, or computes something else.
    """

    def __init__(self, vit: Any, network: Network) -> None:
        self._network = network
        self._lock = threading.Lock()
        self._compiled: dict[int, _Compiled] = {}
        _check(vit, self)

    def __call__(self, vit: Any, imgs: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
        """``[B, 3, H, W]`` images and the position embeddings of their grid to ``[B, h * w, C]``."""
        threads = torch.get_num_threads()
        with self._lock:
            compiled = self._compiled.get(threads)
            if compiled is None:
                compiled = _compiled(vit, self._network, threads)
                while len(self._compiled) >= _THREAD_COUNTS:
                    del self._compiled[next(iter(self._compiled))]
                self._compiled[threads] = compiled
        h, w = vit.grid(*imgs.shape[2:])
        out = memory.empty(imgs.shape[0], h * w, vit.embed_dim, dtype=imgs.dtype, device="cpu")
        compiled.run([imgs, *parts], out)
        return out


class _Compiled:
    """A compiled model and the requests that run it; calls may come from several threads."""

    def __init__(self, vit: Any, model: Any) -> None:
        self._model = model
        self._idle: list[Any] = []
        # What requests point to between calls, when the caller's memory may be freed.
        self._small = [
            *_plain(_example(vit, 1, (1, 1))),
            torch.zeros(1, 1, vit.embed_dim, dtype=vit.dtype, device="cpu"),
        ]

    def run(self, inputs: list[Tensor], out: Tensor) -> None:
        try:
            request = self._idle.pop()
        except IndexError:
            request = self._model.create_infer_request()
        # OpenVINO keeps no tensor alive: these names do, until it has finished.
        tensors = [*_plain(inputs), out]
        _bind(request, tensors)
        try:
            request.infer()
        except RuntimeError as error:
            raise EngineError(f"OpenVINO failed on {list(inputs[0].shape)}: {said(error)}") from error
        finally:
            _bind(request, self._small)
        self._idle.append(request)


def _bind(request: Any, tensors: list[Tensor]) -> None:
    """Let a request read all tensors but the last, and write that."""
    *inputs, out = map(_shared, tensors)
    for index, tensor in enumerate(inputs):
        request.set_input_tensor(index, tensor)
    request.set_output_tensor(0, out)


def _plain(tensors: list[Tensor]) -> list[Tensor]:
    """The same values in plain memory: copies only where a tensor is not contiguous, or lazily negated."""
    return [tensor.detach().contiguous().resolve_neg() for tensor in tensors]


def _shared(plain: Tensor) -> Any:
    """The same memory as a tensor of OpenVINO."""
    openvino = _openvino()
    if plain.dtype == torch.bfloat16:
        # NumPy has no bfloat16.
        return openvino.Tensor(plain.view(torch.int16).numpy(), openvino.Shape(plain.shape), openvino.Type.bf16)
    return openvino.Tensor(plain.numpy(), shared_memory=True)


# By fingerprint and threads: copies of a backbone share one.
_models: WeakValueDictionary[tuple[str | None, int], _Compiled] = WeakValueDictionary()


def _compiled(vit: Any, network: Network, threads: int) -> _Compiled:
    """The compiled model: another backbone's of the same weights, from the cache, or built and put there."""
    openvino, core = _openvino(), _core()
    name, abilities = (core.get_property("CPU", of) for of in ("FULL_DEVICE_NAME", "OPTIMIZATION_CAPABILITIES"))
    low = vit.dtype == torch.bfloat16 and "BF16" in abilities
    config = {
        "PERFORMANCE_HINT": "LATENCY",
        # Where the processor computes bfloat16, OpenVINO would also take it for float32.
        "INFERENCE_PRECISION_HINT": "bf16" if low else "f32",
        "INFERENCE_NUM_THREADS": threads,
        # Several processes would be pinned to the same cores.
        "ENABLE_CPU_PINNING": False,
    }
    shapes = [[tensor.dtype, *tensor.shape[2:]] for tensor in _example(vit, 1, (1, 1))]
    key = network.fingerprint(
        *("openvino", _FORMAT, openvino.__version__, torch.__version__, name, sorted(abilities), low, shapes)
    )
    found = None if key is None else _models.get((key, threads))
    if found is None:
        found = _Compiled(vit, _load(vit, key, config))
        if key is not None:
            _models[key, threads] = found
    return found


def _load(vit: Any, key: str | None, config: dict[str, Any]) -> Any:
    kept = None if key is None else store.read(key)
    if key is not None and kept is not None:
        try:
            return _core().import_model(io.BytesIO(kept), "CPU", config)
        except RuntimeError:
            store.discard(key)
    try:
        # The converted model reads the backbone's own weights: only this one has a copy, which nobody changes.
        whole = _core().compile_model(_convert(vit), "CPU", config).export_model().getvalue()
        model = _core().import_model(io.BytesIO(whole), "CPU", config)
    except Exception as error:
        raise EngineError(f"OpenVINO cannot compile {vit.name}: {said(error)}") from error
    if key is not None:
        store.write(key, whole)
    return model


def _convert(vit: Any) -> Any:
    openvino = _openvino()
    with plain_defaults(), torch.inference_mode(False), torch.no_grad(), without_autocast("cpu"):
        # Its constants are float32, whatever it computes in.
        exact = vit if vit.dtype == torch.float32 else copy.deepcopy(vit).float()
        one, other = _example(exact, 2, (2, 3)), _example(exact, 3, (5, 4))
        with warnings.catch_warnings():
            # PyTorch's and OpenVINO's of each other's interfaces.
            warnings.simplefilter("ignore")
            graph = PlainGraph(exact, parts_of(exact._position((2, 3)))[1])
            model = openvino.convert_model(graph, example_input=tuple(one))
            # OpenVINO may keep the graph for a while, but not the backbone.
            graph._vit = ()
    model.reshape(
        {
            index: openvino.PartialShape(
                [size if size == another else -1 for size, another in zip(*shapes, strict=True)]
            )
            for index, shapes in enumerate(zip((t.shape for t in one), (t.shape for t in other), strict=True))
        }
    )
    types = {torch.float32: openvino.Type.f32, torch.bfloat16: openvino.Type.bf16}
    ports = openvino.preprocess.PrePostProcessor(model)
    for index, tensor in enumerate(_example(vit, 1, (1, 1))):
        ports.input(index).tensor().set_element_type(types[tensor.dtype])
    ports.output(0).tensor().set_element_type(types[vit.dtype])
    return ports.build()


def _example(vit: Any, batch: int, grid: Grid) -> list[Tensor]:
    """Images of noise that make ``grid``, and its position embeddings."""
    size = [vit.patch_size + vit.stride * (side - 1) for side in grid]
    noise = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0), device="cpu", dtype=torch.float32)
    return [noise.to(vit.dtype), *parts_of(vit._position(grid))[0]]


def _check(vit: Any, engine: OpenVINO) -> None:
    """Compare with PyTorch on small images of noise."""
    grid = (4, 3)
    with plain_defaults(), torch.inference_mode(False), torch.no_grad(), without_autocast("cpu"):
        imgs, *parts = _example(vit, 2, grid)
        ours, theirs = engine(vit, imgs, tuple(parts)).float(), vit._in_torch(imgs, grid, vit._position(grid)).float()
    error = float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30))
    if not error <= _TOLERANCE[vit.dtype]:
        raise EngineError(
            f"OpenVINO's result for {vit.name} in {vit.dtype} is off by {error:.2g} of PyTorch's largest value"
        )
