"""What public functions take (dense tensors of real numbers, whole numbers, grids), and what they say to the rest."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from ._text import shown

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Sizes, strides and counts reach the native core and PyTorch in 64 bits; what is larger is no count of anything.
_MOST = 2**62
# Of a grid or a picture: products of two sides, and twice those, stay within 64 bits.
_MOST_SIDE = 2**30


def check_dense(name: str, value: object, dtypes: Sequence[torch.dtype] = FLOATS) -> None:
    """Refuse what is no dense tensor of one of ``dtypes``.

    Raises:
        TypeError: names what came, and what to do.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.is_nested:
        raise TypeError(f"{name} must be dense, got a nested tensor; pass its parts one by one, or pad them")
    if value.dtype not in dtypes:
        *most, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be {', '.join(most)} or {last}, got {value.dtype}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be dense, got {value.layout}; convert it with to_dense()")


def as_whole(value: object) -> int | None:
    """``value`` as an int if it is a whole number of Python's, NumPy's or the like, and no bool; else None."""
    if isinstance(value, (bool, Tensor)) or not isinstance(value, SupportsIndex):
        return None
    try:
        return operator.index(value)
    except TypeError:
        # Arrays have the method, and refuse.
        return None


def check_whole(name: str, value: Any, least: int, most: float = _MOST) -> Any:
    """``value`` as an int (a ``SymInt`` of a compiled graph stays one) from ``least`` to ``most``.

    Raises:
        ValueError: names what came, and the range.
    """
    if isinstance(value, torch.SymInt):
        return value
    whole = as_whole(value)
    if whole is None or whole < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {shown(value)}")
    if whole > most:
        raise ValueError(f"{name} must be at most {most}, got {shown(value)}")
    return whole


def check_size(name: str, size: Any, most: int = _MOST_SIDE) -> list[int]:
    """``size`` as [height, width], each from 1 to ``most``.

    Raises:
        ValueError: names what came.
    """
    try:
        height, width = size
    except Exception:
        # Whatever an object says that does not come in two.
        raise ValueError(f"{name} must be (H, W), two whole numbers, got {shown(size)}") from None
    return [check_whole(f"{name}[0]", height, 1, most), check_whole(f"{name}[1]", width, 1, most)]


def check_flag(name: str, value: object) -> bool:
    """``value`` as a bool.

    Raises:
        TypeError: for anything that is no True or False; names what came.
    """
    # numpy.bool, which knows nothing of bool, has this name too.
    if not isinstance(value, bool) and type(value).__name__ not in ("bool", "bool_"):
        raise TypeError(f"{name} must be True or False, got {shown(value)}")
    return bool(value)
