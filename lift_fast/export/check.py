"""An ONNX file against the network that it was made of."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._files import require_regular_file
from .._text import shown
from ..checks import check_whole
from ..defaults import plain_defaults
from ..extractor import ViTLiFTExtractor
from ..lift import LiFT
from ..precision import without_autocast
from .graph import Network
from .onnx_file import METADATA, require_onnx

ENGINES = ("onnxruntime", "openvino")
_Run = Callable[[dict[str, Any]], Any]


class Deviation(NamedTuple):
    """How far a file's output is from the network's, for one batch."""

    engine: str
    shape: tuple[int, int, int]
    """Images, height and width of the batch."""
    relative_error: float
    """The largest difference, divided by the largest absolute value of the network's output."""


def compare_onnx(
    path: str | os.PathLike[str],
    network: Network,
    shapes: Sequence[tuple[int, int, int]],
    *,
    engine: str = "onnxruntime",
    seed: int = 0,
) -> list[Deviation]:
    """Run a file of :func:`lift_fast.export_onnx` and its network on random images, in float32.

    Args:
        path: the file.
        network: that it was made of.
        shapes: (images, height, width) of the batches; those that the file serves.
        engine: ``"onnxruntime"`` or ``"openvino"``, both on the CPU.
        seed: of the inputs.

    Raises:
        ValueError: for an unknown engine, a file of another program, and shapes that the file does not serve.
        FileNotFoundError: if there is no file at ``path``.
        ImportError: without the engine, with the command that installs it.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine must be 'onnxruntime' or 'openvino', got {shown(engine)}")
    require_regular_file(path, "ONNX file")
    about = _read_metadata(path)
    run = _onnxruntime(path) if engine == "onnxruntime" else _openvino(path)
    found = []
    for shape in shapes:
        batch, height, width = (check_whole(f"shapes, {shape}", side, 1) for side in shape)
        with plain_defaults(), torch.inference_mode(), without_autocast("cpu"):
            inputs = _random_inputs(network, batch, height, width, torch.Generator().manual_seed(seed))
            expected = _own(network, inputs, about)
        try:
            given = torch.from_numpy(run({name: tensor.numpy() for name, tensor in inputs.items()}))
        except Exception as error:
            # Engines have errors of their own.
            raise ValueError(f"{engine} cannot run the file on images {shape}: {error}") from error
        if given.shape != expected.shape:
            raise ValueError(
                f"{engine} gives {list(given.shape)} for images {shape}, the network {list(expected.shape)}"
            )
        deviation = float((given - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
        found.append(Deviation(engine, (batch, height, width), deviation))
    return found


def _random_inputs(
    network: Network, batch: int, height: int, width: int, generator: torch.Generator
) -> dict[str, Tensor]:
    inputs = {"imgs": torch.randn(batch, 3, height, width, generator=generator)}
    if isinstance(network, LiFT):
        h, w = height // network.patch_size, width // network.patch_size
        shape = (batch, h * w, network.in_channels) if network.pre_shape else (batch, network.in_channels, h, w)
        inputs["tokens"] = torch.randn(shape, generator=generator)
    return inputs


def _own(network: Any, inputs: dict[str, Tensor], about: dict[str, Any]) -> Tensor:
    """The network's own result, on its own device and in its own dtype."""
    like = next(network.parameters())
    values: Any = [tensor.to(like.device, like.dtype) for tensor in inputs.values()]
    if about["output"] != "matching_map":
        extra = [about["iterations"]] if isinstance(network, ViTLiFTExtractor) else []
        out = (network.extract_descriptors_iterative_lift if extra else network)(*values, *extra)
    elif isinstance(network, LiFT):
        out = network.matching_map(values[0], values[1], about["normalized"])
    else:
        out = network.matching_map(*values, about["iterations"])
        out = torch.nn.functional.normalize(out, dim=1) if about["normalized"] else out
    result: Tensor = out.cpu().float()
    return result


def _read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    onnx = require_onnx()
    try:
        entries = onnx.load(path, load_external_data=False).metadata_props
        about = {e.key.removeprefix(METADATA): json.loads(e.value) for e in entries if e.key.startswith(METADATA)}
    except Exception as error:
        # The reader of protocol buffers has errors of its own.
        raise ValueError(f"{path} cannot be read as an ONNX file: {error}") from error
    if "output" not in about:
        raise ValueError(f"{path} was not written by lift_fast.export_onnx: it has no metadata {METADATA}output")
    return about


def _onnxruntime(path: str | os.PathLike[str]) -> _Run:
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError(f"onnxruntime cannot be imported ({error}): pip install onnxruntime") from error
    session = onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    known = {item.name for item in session.get_inputs()}
    return lambda inputs: session.run(None, {name: value for name, value in inputs.items() if name in known})[0]


def _openvino(path: str | os.PathLike[str]) -> _Run:
    try:
        import openvino
    except ImportError as error:
        raise ImportError(f'openvino cannot be imported ({error}): pip install "lift_fast[openvino]"') from error
    # By default it computes in bfloat16 where the processor does.
    model = openvino.Core().compile_model(os.fspath(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    known = {name for item in model.inputs for name in item.names}
    return lambda inputs: model({name: value for name, value in inputs.items() if name in known})[0]
