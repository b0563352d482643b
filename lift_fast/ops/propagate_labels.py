"""``propagate_labels``: each query's label is the average of its nearest keys' labels, weighted by similarity.

This is the rule of label propagation in video: all context frames together, within a window on the grid. The affinity
of all pairs and the labels of all matches are never stored. On the CPU the native core searches the windows and
``embedding_bag`` averages; on GPUs one Triton kernel does both.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import devices
from . import library
from .nearest import cpu, plain

library.define(
    "propagate_labels(Tensor query, Tensor key, Tensor labels, int[] window, int k, float temperature, bool normalize)"
    " -> Tensor"
)


def average_labels(similarity: Tensor, index: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Average of the matches' labels with weights exp(similarity / temperature); zeros where there is no match.

    Args:
        similarity, index: ``[B, N, k]``, descending; index -1 where there is no match.
        labels: ``[B, M, L]`` in the dtype of ``similarity``.
        temperature: > 0.

    Returns:
        ``[B, N, L]`` in the dtype of ``similarity``.
    """
    batch, n, _ = index.shape
    out = labels.new_zeros((batch, n, labels.shape[2]))
    if not out.numel() or not labels.shape[1]:
        return out
    found = index >= 0
    # Relative to the best match, whose weight is 1: no overflow and no zero sum. A temperature too small for the dtype
    # keeps only the best match.
    temperature = max(temperature, torch.finfo(similarity.dtype).tiny)
    weight = torch.where(found, ((similarity - similarity[..., :1]) / temperature).exp(), 0)
    weight = weight / weight.sum(-1, keepdim=True).clamp_min(1)
    # A missing match repeats the best one with weight zero, so no unrelated non-finite label enters the sum.
    index = torch.where(found, index, index[..., :1]).clamp_min(0)
    # PyTorch's fast embedding_bag needs contiguous rows.
    labels = labels.contiguous()
    for b in range(batch):
        out[b] = F.embedding_bag(index[b], labels[b], mode="sum", per_sample_weights=weight[b])
    return out.masked_fill_(~found[..., :1], 0)


def propagate_labels_plain(
    query: Tensor, key: Tensor, labels: Tensor, window: list[int], k: int, temperature: float, normalize: bool
) -> Tensor:
    """The plain PyTorch implementation, from the masked affinity in tiles: reference and fallback."""
    similarity, index, _ = plain.search(query, key, k, False, window, normalize)
    return average_labels(similarity, index, labels.to(similarity.dtype), temperature)


def _rows(rows: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """``rows [B, N, C]`` for the Triton kernel, and ``[B, N]``: 0, or NaN for a row to ignore."""
    rows = rows.float()
    if normalize:
        rows = plain.unit_rows(rows)
    finite = rows.isfinite().all(-1)
    part = torch.zeros_like(finite, dtype=torch.float32).masked_fill_(~finite, torch.nan)
    return rows.where(finite[..., None], 0).contiguous(), part


def propagate_labels_triton(
    query: Tensor, key: Tensor, labels: Tensor, window: list[int], k: int, temperature: float, normalize: bool
) -> Tensor:
    """The Triton kernel, in float32."""
    from ..kernels import propagate_labels as kernel

    (queries, query_part), (keys, key_part) = _rows(query, normalize), _rows(key, normalize)
    # Temperatures beyond float32's range behave like its smallest and largest number.
    limits = torch.finfo(torch.float32)
    temperature = min(max(temperature, limits.tiny), limits.max)
    return kernel.propagate_labels(
        queries, keys, query_part, key_part, labels.float().contiguous(), window, k, temperature
    )


def _fits_triton(query: Tensor, key: Tensor, k: int) -> bool:
    if not devices.kernels_run(query.device, query.dtype)[0]:
        return False
    from ..kernels.propagate_labels import MOST_MATCHES

    # The kernel numbers keys and blocks in 32 bits and counts up to one block past the last key.
    return k <= MOST_MATCHES and max(key.shape[1], query.shape[0] * query.shape[1]) < 2**31 - 1024


def _propagate_labels(
    query: Tensor, key: Tensor, labels: Tensor, window: list[int], k: int, temperature: float, normalize: bool
) -> Tensor:
    query, key, labels = map(library.resolved, (query, key, labels))
    if not normalize and plain.beyond_range(query, key):
        queries, keys, exponent = plain.within_range(query, key)
        # Scale the temperature like the similarities. One that underflows keeps only the best match.
        temperature *= 2.0 ** -max(-1000, min(1000, exponent))
        out = propagate_labels_plain(queries, keys, labels, window, k, temperature, False)
        return out.to(torch.promote_types(query.dtype, torch.float32))
    if cpu.can_run(query, k, window)[0]:
        similarity, index = cpu.search_windows(query, key, k, window, normalize)
        return average_labels(similarity, index, labels.float(), temperature)
    if _fits_triton(query, key, k):
        return propagate_labels_triton(query, key, labels, window, k, temperature, normalize)
    return propagate_labels_plain(query, key, labels, window, k, temperature, normalize)


def _fake_propagate_labels(query: Tensor, key: Tensor, labels: Tensor, *_: Any) -> Tensor:
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty((query.shape[0], query.shape[1], labels.shape[2]), dtype=dtype)


library.implement("propagate_labels", _propagate_labels, fake=_fake_propagate_labels)
