"""Label propagation in video: ``propagate_labels`` carries the labels of context frames to the next frame."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .matching import _FLOATS, _check_int, _check_pair, _check_size, _shape
from .ops import propagate_labels as _propagate_labels_op  # noqa: F401  registers torch.ops.lift_fast.propagate_labels


def propagate_labels(
    query: Tensor,
    key: Tensor,
    labels: Tensor,
    *,
    grid: tuple[int, int],
    radius: int | None = 12,
    k: int = 5,
    temperature: float = 0.1,
    key_grid: tuple[int, int] | None = None,
    normalize: bool = True,
) -> Tensor:
    """Labels of a frame's patches from those of the most similar patches nearby in the context frames. No gradients.

    For each query the ``k`` most similar keys of all context frames together that lie within the window; its label is
    the average of their labels with weights exp(similarity / temperature), which sum to one. With the defaults this
    is the rule of DINO's evaluation on DAVIS 2017 (radius 12, top 5, temperature 0.1; the first frame and the 7
    before the query as context), except that of keys which tie for the k-th place only the first ones count. Never
    holds the affinity of all pairs.

    A query with fewer than ``k`` keys in its window averages those that there are; with none, its label is zero. A
    descriptor that holds NaN or infinity takes no part: as a key it is never chosen, as a query its label is zero.

    Feature maps ``[B, C, h, w]`` become tokens by ``map.flatten(2).transpose(1, 2)``, and labels of ``[B, L, h, w]``
    likewise; several context frames are concatenated along the tokens, ``torch.cat([first, *queue], dim=-2)``. The
    result becomes a map again by ``.transpose(-1, -2).unflatten(-1, grid)``.

    Args:
        query: ``[..., N, C]`` float32, bfloat16, float16 or float64, row-major cells of ``grid``.
        key: ``[..., M, C]``, same dtype and device: any number of context frames, each a ``key_grid``, one after the
            other.
        labels: ``[..., M, L]`` floating point, same device: one row for each key, such as one-hot or soft masks of L
            objects. Leading dimensions of the three broadcast.
        grid: (h, w) with h * w = N.
        radius: the window in cells of the key grid in each direction, >= 0: a square of side 2 * radius + 1. None for
            no window.
        k: keys to average, >= 1.
        temperature: of the weights, > 0.
        key_grid: (h, w) of each context frame, by default ``grid``. Grids of different size are compared by cell
            centres, as in :class:`lift_fast.Window`.
        normalize: cosine similarity (each descriptor divided by max(norm, 1e-12)); False: dot product.

    Returns:
        ``[..., N, L]`` float32 (float64 for float64 descriptors).

    Raises:
        TypeError: for inputs that are no tensors or of another dtype.
        ValueError: for shapes, devices or options that do not fit.
    """
    _check_pair("query", query, "key", key)
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a torch.Tensor, got {type(labels).__name__}")
    if labels.dtype not in _FLOATS:
        raise TypeError(
            f"labels must be float32, bfloat16, float16 or float64, got {labels.dtype}; "
            "turn class numbers into rows with torch.nn.functional.one_hot(...).float()"
        )
    if labels.device != key.device:
        raise ValueError(f"labels are on {labels.device}, key on {key.device}; move them to one device")
    if query.dim() < 2 or key.dim() < 2 or labels.dim() < 2:
        raise ValueError(
            "query must be [..., N, C], key [..., M, C] and labels [..., M, L], "
            f"got {_shape(query)}, {_shape(key)} and {_shape(labels)}"
        )
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"query and key must have the same number of channels, got {_shape(query)} and {_shape(key)}")
    if labels.shape[-2] != key.shape[-2]:
        raise ValueError(f"labels must have one row for each of the {key.shape[-2]} keys, got {_shape(labels)}")
    try:
        leading = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], labels.shape[:-2])
    except RuntimeError:
        raise ValueError(
            f"leading dimensions of query {_shape(query)}, key {_shape(key)} and labels {_shape(labels)} "
            "do not broadcast"
        ) from None
    _check_int("k", k, 1)
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)) or not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be a positive number, got {temperature!r}")
    window = _window(grid, radius, key_grid, query.shape[-2], key.shape[-2])

    def batch_of(tensor: Tensor) -> Tensor:
        return tensor.detach().expand(*leading, *tensor.shape[-2:]).reshape(math.prod(leading), *tensor.shape[-2:])

    out: Tensor = torch.ops.lift_fast.propagate_labels(
        batch_of(query), batch_of(key), batch_of(labels), window, k, float(temperature), normalize
    )
    return out.view(*leading, *out.shape[-2:])


def _window(grid: tuple[int, int], radius: int | None, key_grid: tuple[int, int] | None, n: int, m: int) -> list[int]:
    query_hw = _check_size("grid", grid)
    key_hw = query_hw if key_grid is None else _check_size("key_grid", key_grid)
    if query_hw[0] * query_hw[1] != n:
        raise ValueError(f"grid {tuple(query_hw)} does not hold the {n} queries")
    if m % (key_hw[0] * key_hw[1]):
        raise ValueError(f"key_grid {tuple(key_hw)} does not divide the {m} keys into whole frames")
    largest = max(key_hw)
    if radius is not None:
        _check_int("radius", radius, 0)
        # More than the grid is no more than all of it.
        largest = min(radius, largest)
    return [largest, *query_hw, *key_hw]
