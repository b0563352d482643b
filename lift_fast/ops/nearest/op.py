"""``nearest``: for each query descriptor its most similar key descriptors, without ever forming the N x M matrix.

A backend only searches, see :func:`lift_fast.ops.nearest.plain.search`. The operator decides the length of its lists,
which matches are valid, and how many to return.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .. import library
from . import cpu, gpu, plain

Search: TypeAlias = Callable[
    [Tensor, Tensor, int, bool, "list[int] | None", bool, bool], "tuple[Tensor, Tensor, Tensor | None]"
]

library.define(
    "nearest(Tensor query, Tensor key, int k, bool mutual, float? ratio, int[]? window, bool normalize,"
    " bool fast=False) -> (Tensor, Tensor, Tensor)"
)


def depth_of(k: int, ratio: float | None) -> int:
    """Length of a query's list: the ratio test needs a second match even for k = 1."""
    return k if ratio is None else max(k, 2)


def nearest_by(
    search: Search,
    query: Tensor,
    key: Tensor,
    k: int,
    mutual: bool,
    ratio: float | None,
    window: list[int] | None,
    normalize: bool,
    fast: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator with one backend's search: similarity and index ``[B, N, k]``, valid ``[B, N]``."""
    similarity, index, mutually = search(query, key, depth_of(k, ratio), mutual, window, normalize, fast)
    valid = index[..., 0] >= 0 if mutually is None else mutually
    if ratio is not None:
        # |a - b|^2 = 2 - 2 cos for unit vectors: Lowe's ratio of distances, squared. No second match (-inf) passes.
        valid = valid & (1 - similarity[..., 0] <= ratio**2 * (1 - similarity[..., 1]))
    return similarity[..., :k].contiguous(), index[..., :k].contiguous(), valid


def _search_for(query: Tensor, key: Tensor, k: int, window: list[int] | None, normalize: bool) -> Search:
    """The fastest backend that can run; every backend has room for the second match of k = 1."""
    if not normalize and plain.beyond_range(query, key):
        return plain.search_beyond_range
    if cpu.can_run(query, k, window)[0]:
        return cpu.search
    return gpu.search if gpu.can_run(query, key, k, window)[0] else plain.search


def _nearest(
    query: Tensor,
    key: Tensor,
    k: int,
    mutual: bool,
    ratio: float | None,
    window: list[int] | None,
    normalize: bool,
    fast: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    query, key = library.resolved(query), library.resolved(key)
    search = _search_for(query, key, k, window, normalize)
    return nearest_by(search, query, key, k, mutual, ratio, window, normalize, fast)


def _fake_nearest(query: Tensor, key: Tensor, k: int, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch, n = query.shape[:2]
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    similarity = query.new_empty((batch, n, k), dtype=dtype)
    return similarity, query.new_empty((batch, n, k), dtype=torch.int64), query.new_empty((batch, n), dtype=torch.bool)


library.implement("nearest", _nearest, fake=_fake_nearest)
