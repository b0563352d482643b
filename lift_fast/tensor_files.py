"""Read tensor files (PyTorch and ``.safetensors``) from untrusted sources; errors are one line and name the file."""

from __future__ import annotations

import argparse
import os
import pickle
import re
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ._files import require_regular_file
from ._text import listed, named, said, with_article
from .defaults import plain_defaults

WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""Allowed dtypes of weights in files; all become float32."""

_CHUNK = 1 << 20


def read_tensor_file(path: str | os.PathLike[str]) -> dict[Any, Any]:
    """Read a checkpoint file without executing code from it; the suffix decides whether it is ``.safetensors``.

    The checksums of PyTorch's archives are verified first, to detect damaged files (``.safetensors`` has none).

    Returns:
        The file's mapping with tensors on the CPU. Names may have any type and tensors any kind, see
        :func:`plain_tensor`.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: naming the file, if it is not a readable checkpoint.
    """
    path = Path(path)
    require_regular_file(path, "checkpoint file (.pth, .pt, .bin, .ckpt or .safetensors)")
    try:
        with plain_defaults(), warnings.catch_warnings():
            # PyTorch warns about kinds of tensors that are refused here.
            warnings.simplefilter("ignore")
            content = _read(path)
    except PermissionError:
        raise
    except Exception as error:
        raise ValueError(f"{path} {_reason(error)}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} contains {described(content)}; expected a state dict (names to tensors)")
    return dict(content)


def plain_tensor(value: object, source: str | os.PathLike[str], name: object) -> Tensor:
    """``value`` as a dense CPU tensor whose elements do not overlap in memory.

    Raises:
        ValueError: for anything else; names ``source``, the entry and its kind.
    """
    if not isinstance(value, Tensor) or type(value) not in (Tensor, nn.Parameter):
        raise ValueError(f"{source}: entry {named(name)} is {described(value)}; expected a tensor")
    trouble = _trouble(value)
    if trouble is not None:
        raise ValueError(f"{source}: entry {named(name)} is {trouble}; expected a dense tensor")
    return value.detach().resolve_conj().resolve_neg()


def weight_tensor(value: object, source: str | os.PathLike[str], name: object) -> Tensor:
    """As :func:`plain_tensor`, and a dtype of :data:`WEIGHT_DTYPES` with values that are finite in float32.

    Raises:
        ValueError: as :func:`plain_tensor`, and for other dtypes and values.
    """
    tensor = plain_tensor(value, source, name)
    if tensor.dtype not in WEIGHT_DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in WEIGHT_DTYPES)
        raise ValueError(f"{source}: entry {named(name)} is {tensor.dtype}; expected floating point ({known})")
    finite = torch.isfinite(tensor.float() if tensor.dtype == torch.float64 else tensor)
    if not bool(finite.all()):
        bad = tensor.numel() - int(finite.sum())
        raise ValueError(
            f"{source}: {bad} of {tensor.numel()} values of {named(name)} are not finite (NaN or infinite in float32)"
        )
    return tensor


def uncompiled(name: str) -> str:
    """``name`` without the ``_orig_mod.`` that ``torch.compile`` adds."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def misfits(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """Differences between the names and shapes of a file and a network, as bounded text; empty without any."""
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    shapes = [
        f"{name}: file {list(state[name].shape)}, model {list(tensor.shape)}"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
    return "; ".join(f"{len(entries)} {kind} ({listed(entries)})" for kind, entries in kinds if entries)


def described(value: object) -> str:
    """The kind of ``value`` in a few words, without its content."""
    if isinstance(value, Tensor):
        if type(value) in (Tensor, nn.Parameter):
            return f"a tensor of shape {list(value.shape)[:8]}"
    elif isinstance(value, Mapping):
        return f"a dictionary of {len(value)} entries ({listed(value)})" if value else "an empty dictionary"
    return with_article(type(value).__name__)


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        # Clone, because its tensors are mapped to the file and change when it is overwritten.
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    with path.open("rb") as file:
        if file.read(4) == b"PK\x03\x04":
            _check_archive(path)
    # DINO's and SelfPatch's full checkpoints contain their command line in a Namespace.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _check_archive(path: Path) -> None:
    """Raise ValueError unless each record is uncompressed and matches its checksum."""
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
                raise ValueError(f"its record {listed([record.filename])} is compressed, which torch.save never does")
            # Optional (torch.serialization.set_crc32_options).
            if record.CRC == 0:
                continue
            expected, record.CRC = record.CRC, None  # type: ignore[assignment]
            checksum = 0
            with archive.open(record) as stream:
                while chunk := stream.read(_CHUNK):
                    checksum = zlib.crc32(chunk, checksum)
            if checksum != expected:
                raise ValueError(f"its record {listed([record.filename])} is damaged, the checksum differs")


def _reason(error: Exception) -> str:
    text = str(error)
    unsupported = re.search(r"(?:GLOBAL|Unsupported global:|Unsupported class) (?:GLOBAL )?([\w.]+)", text)
    if isinstance(error, pickle.UnpicklingError) and unsupported is not None:
        return (
            f"contains Python objects other than tensors ({listed([unsupported[1]])}), which are not loaded because "
            "they could run code; save only its state dict"
        )
    # The unpickler's own message follows advice that does not apply here.
    words = text.rpartition("WeightsUnpickler error:")[2].strip().splitlines()
    line = words[0].strip() if words else ""
    if not line or isinstance(error, LookupError) or "weights_only" in line:
        # The unpickler took other bytes for instructions; its message does not help.
        line = "its content is of another kind" if isinstance(error, (LookupError, pickle.UnpicklingError)) else ""
    line = said(line) if line else type(error).__name__
    return f"is not a readable checkpoint ({line}); expected a PyTorch or .safetensors file"


def _trouble(tensor: Tensor) -> str | None:
    """Why a tensor is not plain, or None."""
    if tensor.is_nested:
        return "nested"
    if tensor.layout != torch.strided:
        return f"sparse ({tensor.layout})"
    if tensor.is_quantized:
        return f"quantised ({tensor.dtype})"
    if tensor.device.type != "cpu":
        return f"without values (device {tensor.device})"
    if tensor.numel() == 0:
        return None
    span = 0
    # From the innermost dimension outwards, each stride must exceed the span of the inner ones.
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride <= span:
            return f"of overlapping elements (shape {list(tensor.shape)}, strides {list(tensor.stride())})"
        span += stride * (size - 1)
    held = tensor.untyped_storage().nbytes()
    if (tensor.storage_offset() + span + 1) * tensor.element_size() > held:
        return f"larger (shape {list(tensor.shape)}) than its memory of {held} bytes"
    return None
