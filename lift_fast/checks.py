"""Argument checks of the public functions: dense tensors, integers, flags, sizes and windows."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Sequence
from typing import Any, SupportsIndex

import numpy as np
import torch
from torch import Tensor

from ._text import said, shown

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Sizes, strides and counts reach the native core and PyTorch in 64 bits.
_MOST = 2**62
# Side of a grid or an image: twice the product of two sides stays within 64 bits.
_MOST_SIDE = 2**30


def check_dense(name: str, value: object, dtypes: Sequence[torch.dtype] = FLOATS) -> None:
    """Raise TypeError unless ``value`` is a dense tensor of one of ``dtypes``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.is_nested:
        raise TypeError(f"{name} must be dense, got a nested tensor; pass its parts one by one, or pad them")
    if value.dtype not in dtypes:
        *most, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be {', '.join(most)} or {last}, got {value.dtype}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be dense, got {value.layout}; convert it with to_dense()")


def as_tensor(name: str, value: Any) -> Tensor:
    """A NumPy array as a tensor on the CPU, of the same memory where a tensor can have it.

    Anything else is returned as it is; :func:`check_dense` tells whether it is a tensor.

    Raises:
        TypeError: for a masked array, and for an array of a dtype that PyTorch lacks.
    """
    if not isinstance(value, np.ndarray):
        unchanged: Tensor = value
        return unchanged
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array; fill it with NaN where it is masked, filled(np.nan)")
    # Tensors have neither the other byte order nor strides that are negative or no whole numbers of elements, such as
    # those of a field of records.
    array = value if value.dtype.isnative else value.astype(value.dtype.newbyteorder("="))
    size = array.dtype.itemsize
    array = array.copy() if size and any(stride < 0 or stride % size for stride in array.strides) else array
    try:
        with warnings.catch_warnings():
            # Nothing writes to it, although it may be read-only, such as a mapped file.
            warnings.simplefilter("ignore")
            return torch.from_numpy(array)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} cannot become a tensor: {said(error)}") from error


def as_whole(value: object) -> int | None:
    """``value`` as an int if it is an integer of Python, NumPy or the like, but not a bool; else None."""
    if isinstance(value, (bool, Tensor)) or not isinstance(value, SupportsIndex):
        return None
    try:
        return operator.index(value)
    except TypeError:
        # Arrays have ``__index__``, which raises.
        return None


def check_pair(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise TypeError or ValueError unless both are dense floating-point tensors of one dtype on one device."""
    check_dense(name, tensor)
    check_dense(other_name, other)
    if tensor.dtype != other.dtype:
        raise TypeError(f"{name} and {other_name} must have one dtype, got {tensor.dtype} and {other.dtype}")
    if tensor.device != other.device:
        raise ValueError(f"{name} and {other_name} must be on one device, got {tensor.device} and {other.device}")


def check_sets(*sets: tuple[str, Tensor]) -> tuple[torch.Size, list[Tensor]]:
    """The broadcast leading dimensions of (name, ``[..., n, C]``) pairs, and each tensor as ``[B, n, C]``, detached.

    ValueError if they do not broadcast.
    """
    try:
        leading = torch.broadcast_shapes(*(tensor.shape[:-2] for _, tensor in sets))
    except RuntimeError:
        *most, last = (f"{name} {list(tensor.shape)}" for name, tensor in sets)
        raise ValueError(f"leading dimensions of {', '.join(most)} and {last} do not broadcast") from None
    batch = math.prod(leading)
    return leading, [
        tensor.detach().expand(*leading, *tensor.shape[-2:]).reshape(batch, *tensor.shape[-2:]) for _, tensor in sets
    ]


def check_whole(name: str, value: Any, least: int, most: float = _MOST) -> Any:
    """``value`` as an int from ``least`` to ``most``, else ValueError; a compiled graph's ``SymInt`` is not checked."""
    if isinstance(value, torch.SymInt):
        return value
    whole = as_whole(value)
    if whole is None or whole < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {shown(value)}")
    if whole > most:
        raise ValueError(f"{name} must be at most {most}, got {shown(value)}")
    return whole


def check_size(name: str, size: Any, most: int = _MOST_SIDE) -> list[int]:
    """``size`` as [height, width], integers from 1 to ``most``, else ValueError."""
    try:
        height, width = size
    except Exception:
        # An object that cannot be unpacked may raise anything.
        raise ValueError(f"{name} must be (H, W), two integers, got {shown(size)}") from None
    return [check_whole(f"{name}[0]", height, 1, most), check_whole(f"{name}[1]", width, 1, most)]


def check_window(names: tuple[str, str, str], radius: Any, grid: Any, key_grid: Any, n: int, m: int) -> list[int]:
    """The operators' form of a window: ``[radius, query_h, query_w, key_h, key_w]``.

    Args:
        names: names of the radius and both grids, for messages.
        radius: cells of the key grid, >= 0; clamped to the grid.
        grid, key_grid: (h, w); ``key_grid`` None for the same.
        n, m: numbers of queries and keys.

    Raises:
        ValueError: for a radius or grids that do not fit.
    """
    radius = check_whole(names[0], radius, 0, math.inf)
    query_hw = check_size(names[1], grid)
    key_hw = query_hw if key_grid is None else check_size(names[2], key_grid)
    if query_hw[0] * query_hw[1] != n:
        raise ValueError(f"{names[1]} {tuple(query_hw)} does not hold the {n} queries")
    if m % (key_hw[0] * key_hw[1]):
        raise ValueError(f"{names[2]} {tuple(key_hw)} does not divide the {m} keys into whole grids")
    return [min(radius, max(key_hw)), *query_hw, *key_hw]


def check_flag(name: str, value: object) -> bool:
    """``value`` as a bool; TypeError if it is not True or False."""
    # numpy.bool, which is not a subclass of bool, is accepted by its name.
    if not isinstance(value, bool) and type(value).__name__ not in ("bool", "bool_"):
        raise TypeError(f"{name} must be True or False, got {shown(value)}")
    return bool(value)


def check_rule(normalize: object) -> str:
    """``normalize`` of a backbone's maps; ValueError unless it is "grid" or "pixel"."""
    if not isinstance(normalize, str) or normalize not in ("grid", "pixel"):
        raise ValueError(f'normalize must be "grid" or "pixel", got {normalize!r}; these maps are not unit length')
    return normalize
