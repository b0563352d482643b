"""ONNX files of LiFT, backbones and extractors."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from .._files import atomic_path, collect_leftovers, require_writable
from .._text import quoted, said
from ..checks import check_whole
from ..lift import LiFT
from .graph import Network, describe
from .program import export_program, untouched_by_settings

# A file of Google's protocol buffers ends at 2 GiB; the graph and the names take the rest.
_MOST_BYTES = (1 << 31) - (1 << 26)
_OPSETS = (18, 23)
METADATA = "lift_fast."
"""Begins the names of a file's metadata."""


def export_onnx(
    network: Network,
    path: str | os.PathLike[str],
    dynamic: bool = True,
    *,
    output: str = "descriptors",
    size: tuple[int, int] | None = None,
    batch: int = 1,
    iterations: int = 1,
    normalize: bool = False,
    opset: int = 18,
) -> Path:
    """Write a network's inference graph as an ONNX file for ONNX Runtime, OpenVINO and others; float32.

    Inputs: ``imgs [batch, 3, height, width]``, normalised with ``mean`` and ``std``; a LiFT's also ``tokens
    [batch, tokens, C]``, or ``[batch, C, h, w]`` without ``pre_shape``. Output: ``descriptors [batch, cells, C]``,
    row-major on the grid (a map ``[batch, C, rows, columns]`` of a LiFT without ``post_shape``), or ``matching_map
    [batch, c + 1, rows, columns]``. The file's metadata hold, as JSON under names that begin with ``lift_fast.``,
    ``mean``, ``std``, ``patch_size``, ``stride``, ``model`` and others.

    The file is written atomically. Weights of more than almost 2 GiB, which the format does not hold, go to a second
    file next to it, whose name is that of ``path`` with a checksum; keep both together. The second file of a replaced
    ``path`` is removed, unless another .onnx file there names it.

    Args:
        network, dynamic, output, size, batch, iterations, normalize: as :func:`lift_fast.export.export_program`.
        path: ends in ``.onnx``.
        opset: version of ONNX's operators, 18 to 23.

    Returns:
        ``path``.

    Raises:
        TypeError, ValueError: as :func:`lift_fast.export.export_program`; ValueError also if ``path`` does not end in
            .onnx or cannot be written.
        ImportError: without onnx and onnxscript, with the command that installs them.
    """
    opset, path = check_whole("opset", opset, *_OPSETS), Path(path)
    if path.suffix.lower() != ".onnx":
        raise ValueError(f"path must end in .onnx, got {quoted(path)}")
    try:
        require_writable(path)
    except ValueError as error:
        raise ValueError(f"{quoted(path)}: {error}") from error
    onnx = require_onnx()
    program = export_program(
        network, dynamic, output=output, size=size, batch=batch, iterations=iterations, normalize=normalize
    )
    inputs = ["imgs", "tokens"] if isinstance(network, LiFT) else ["imgs"]
    try:
        with untouched_by_settings():
            translated: Any = torch.onnx.export(
                program, input_names=inputs, output_names=[output], opset_version=opset, dynamo=True, verbose=False
            )
    except Exception as error:
        raise ValueError(f"PyTorch cannot translate this network to ONNX: {said(error)}") from error
    large = sum(tensor.nbytes for tensor in program.state_dict.values()) > _MOST_BYTES
    about = describe(network, output, iterations, normalize)
    collect_leftovers(path.parent)
    # A link stays a file of others, with its weights.
    own = re.compile(re.escape(path.name) + r"\.[0-9a-f]{12}\.data")
    present = {file for file in path.parent.iterdir() if own.fullmatch(file.name)}
    moved: set[Path] = set()
    replaced = {file for file in present if not path.is_symlink() and _names(path, file.name)}
    try:
        with atomic_path(path) as temporary:
            weights = temporary.with_name(f"{temporary.name}.data")
            try:
                translated.save(temporary, external_data=large)
                model = onnx.load(temporary, load_external_data=False)
                _annotate(model, about, dynamic)
                if large:
                    moved.add(_move_weights(model, weights, path))
                temporary.write_bytes(model.SerializeToString())
            finally:
                weights.unlink(missing_ok=True)
    except BaseException:
        _remove_unused(moved - present)
        raise
    _remove_unused(replaced)
    return path


def _names(path: Path, name: str) -> bool:
    """Whether the bytes of a file contain ``name``; a model names its second file as plain text."""
    with (
        suppress(OSError, ValueError),
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as m,
    ):
        return m.find(name.encode()) >= 0
    return False


def _remove_unused(files: Iterable[Path]) -> None:
    """Remove files of weights that no .onnx file next to them names."""
    for file in files:
        with suppress(OSError):
            models = [other for other in file.parent.iterdir() if other.suffix.lower() == ".onnx"]
            if not any(_names(model, file.name) for model in models):
                file.unlink()


def require_onnx() -> Any:
    """The onnx package; ImportError with what to install if it or onnxscript is missing."""
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f'ONNX files need onnx and onnxscript, which cannot be imported ({error}): pip install "lift_fast[onnx]"'
        ) from error
    return onnx


def _annotate(model: Any, about: dict[str, Any], dynamic: bool) -> None:
    """Metadata and names of free sizes; without what names this program's files and symbols."""
    graph = model.graph
    # Sizes of intermediate results in PyTorch's symbols, which every engine infers itself.
    del graph.value_info[:]
    for item in (model, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        if hasattr(item, "metadata_props"):
            del item.metadata_props[:]
        item.doc_string = ""
    for key, value in about.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = METADATA + key, json.dumps(value)
    model.producer_name = "lift_fast"
    if not dynamic:
        return
    for value in (*graph.input, *graph.output):
        shape = value.type.tensor_type.shape.dim
        if value.name == "imgs":
            names = ["batch", "", "height", "width"]
        elif len(shape) == 4:
            names = ["batch", "", *(["h", "w"] if value.name == "tokens" else ["rows", "columns"])]
        else:
            names = ["batch", value.name if value.name == "tokens" else "cells", ""]
        for dim, name in zip(shape, names, strict=True):
            if name:
                dim.dim_param = name


def _move_weights(model: Any, weights: Path, path: Path) -> Path:
    """Put the file of weights next to ``path`` under a name of its own, which is returned, so that an older file of
    ``path`` keeps its weights until it is replaced."""
    digest = hashlib.sha256()
    with weights.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    name = f"{path.name}.{digest.hexdigest()[:12]}.data"
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = name
    moved = path.with_name(name)
    os.replace(weights, moved)
    return moved
