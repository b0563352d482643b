"""Label propagation in video: ``propagate_labels`` carries the labels of context frames to the next frame."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from ._text import shown
from .checks import as_tensor, check_dense, check_flag, check_pair, check_sets, check_whole, check_window
from .ops import propagate_labels as _propagate_labels_op  # noqa: F401  registers torch.ops.lift_fast.propagate_labels

_LARGEST = sys.float_info.max


def propagate_labels(
    query: Tensor | npt.NDArray[Any],
    key: Tensor | npt.NDArray[Any],
    labels: Tensor | npt.NDArray[Any],
    *,
    grid: tuple[int, int],
    radius: int | None = 12,
    k: int = 5,
    temperature: float = 0.1,
    key_grid: tuple[int, int] | None = None,
    normalize: bool = True,
) -> Tensor:
    """Labels of a frame's patches from those of the most similar patches nearby in the context frames. No gradients.

    Finds for each query the ``k`` most similar keys within the window of all context frames together. The query's label
    is the average of their labels with weights exp(similarity / temperature), normalised to sum to one. With the
    defaults this is the rule of DINO's evaluation on DAVIS 2017 (radius 12, top 5, temperature 0.1; the first frame and
    the 7 before the query as context), except that among keys that tie for the k-th place only the first ones count.
    Never stores the affinity of all pairs.

    A query with fewer than ``k`` keys in its window averages the available ones; without any, its label is zero. A
    descriptor that holds NaN or infinity is ignored: as a key it is never chosen, as a query its label is zero.

    Feature maps ``[B, C, h, w]`` become tokens by ``map.flatten(2).transpose(1, 2)``, and labels of ``[B, L, h, w]``
    likewise; several context frames are concatenated along the tokens, ``torch.cat([first, *queue], dim=-2)``. The
    result becomes a map again by ``.transpose(-1, -2).unflatten(-1, grid)``.

    Args:
        query: ``[..., N, C]`` float32, bfloat16, float16 or float64, row-major cells of ``grid``. NumPy arrays, also
            below, are taken as tensors on the CPU.
        key: ``[..., M, C]``, same dtype and device: any number of context frames, each a ``key_grid``, one after the
            other.
        labels: ``[..., M, L]`` floating point, same device: one row for each key, such as one-hot or soft masks of L
            objects. Leading dimensions of the three broadcast.
        grid: (h, w) with h * w = N.
        radius: the window in cells of the key grid in each direction, >= 0: a square of side 2 * radius + 1. None for
            no window.
        k: keys to average, >= 1.
        temperature: temperature of the weights, > 0.
        key_grid: (h, w) of each context frame, by default ``grid``. Grids of different size are compared by cell
            centres, as in :class:`lift_fast.Window`.
        normalize: cosine similarity (each descriptor divided by max(norm, 1e-12)); False: dot product.

    Returns:
        A tensor ``[..., N, L]``, float32 (float64 for float64 descriptors).

    Raises:
        TypeError: for inputs that are neither tensors nor arrays, or of another dtype.
        ValueError: for shapes, devices or options that do not fit.
    """
    query, key, labels = as_tensor("query", query), as_tensor("key", key), as_tensor("labels", labels)
    check_pair("query", query, "key", key)
    if isinstance(labels, Tensor) and labels.dtype in (torch.uint8, torch.int32, torch.int64, torch.bool):
        raise TypeError(
            f"labels must be floating point, got {labels.dtype}; "
            "turn class numbers into rows with torch.nn.functional.one_hot(...).float()"
        )
    check_dense("labels", labels)
    if labels.dtype == torch.float64 and query.dtype != torch.float64 and not labels.is_meta and labels.numel():
        largest = float(labels.detach().nan_to_num(0, 0, 0).abs().amax())
        if largest > torch.finfo(torch.float32).max:
            raise ValueError(f"labels of up to {largest:.3g} leave the range of the float32 result; scale them")
    if labels.device != key.device:
        raise ValueError(f"labels are on {labels.device}, key on {key.device}; move them to one device")
    if query.dim() < 2 or key.dim() < 2 or labels.dim() < 2:
        raise ValueError(
            "query must be [..., N, C], key [..., M, C] and labels [..., M, L], "
            f"got {list(query.shape)}, {list(key.shape)} and {list(labels.shape)}"
        )
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"query and key must have the same number of channels, got {list(query.shape)} and {list(key.shape)}"
        )
    if labels.shape[-2] != key.shape[-2]:
        raise ValueError(f"labels must have one row for each of the {key.shape[-2]} keys, got {list(labels.shape)}")
    leading, batches = check_sets(("query", query), ("key", key), ("labels", labels))
    k = min(check_whole("k", k, 1, math.inf), max(1, key.shape[-2]))
    normalize = check_flag("normalize", normalize)
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)) or not 0 < temperature <= _LARGEST:
        raise ValueError(f"temperature must be a positive number, got {shown(temperature)}")
    radius = sys.maxsize if radius is None else radius
    window = check_window(("radius", "grid", "key_grid"), radius, grid, key_grid, query.shape[-2], key.shape[-2])
    out: Tensor = torch.ops.lift_fast.propagate_labels(*batches, window, k, float(temperature), normalize)
    return out.view(*leading, *out.shape[-2:])
