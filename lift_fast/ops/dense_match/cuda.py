"""``dense_match``'s search and mutual check in the native core's CUDA kernels, on tables of cell similarities."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ... import _native, memory
from ...kernels import launch
from ...kernels.strips import SPAN, Band, Scales, Strips

# Limits of the mutual check: query pixels between the same four cells, which are compared all with all; key cells, as a
# row of their similarities must fit into a block's memory. And the 4-byte words that a match to check occupies.
MOST_MUTUAL_GROUP, MOST_MUTUAL_CELLS, _CANDIDATE_WORDS = 4096, 24000, 8


class When(NamedTuple):
    """Condition of a launch, read on the device: of two launches with opposite conditions one runs."""

    flag: Tensor
    """[] int32"""
    wanted: bool
    """True: run if the flag is not zero; False: run if it is zero."""


def _axis(strips: Strips) -> tuple[int, ...]:
    return (*strips.arguments(), strips.longest)


def _factors(scales: Scales | None) -> tuple[int, ...]:
    if scales is None:
        return (0,) * 5
    if scales.spans is None:
        raise ValueError("the kernels need the scales' spans, see spans()")
    parts = (scales.pixel, scales.high, scales.low, scales.rows, scales.spans)
    return tuple(part.data_ptr() for part in parts)


def _condition(when: When | None) -> tuple[int, bool]:
    return (0, True) if when is None else (when.flag.data_ptr(), when.wanted)


def _where(tensor: Tensor) -> tuple[int, int]:
    """Index of a tensor's device, and the device's current stream."""
    device = launch.device_of(tensor)
    return device, launch.current_stream(device)


def _check(device: torch.device, **tensors: tuple[Tensor, tuple[int, ...], torch.dtype]) -> None:
    for name, (tensor, shape, dtype) in tensors.items():
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != device:
            raise ValueError(
                f"{name} must be {list(shape)} {dtype} on {device}, got {list(tensor.shape)} {tensor.dtype} on "
                f"{tensor.device}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")


def _check_image(device: torch.device, name: str, axes: tuple[Strips, Strips], scales: Scales | None) -> None:
    for axis, letter in zip(axes, "yx", strict=True):
        _check(
            device,
            **{
                f"{name} {letter} low": (axis.low, (axis.count,), torch.int32),
                f"{name} {letter} high": (axis.high, (axis.count,), torch.int32),
                f"{name} {letter} first": (axis.first, (axis.count + 1,), torch.int32),
                f"{name} {letter} weight": (axis.weight, (axis.pixels,), torch.float32),
            },
        )
    if scales is not None:
        y, x = axes
        _check(
            device,
            **{
                f"{name} scale": (scales.pixel, (y.pixels * x.pixels,), torch.float32),
                f"{name} scale, high": (scales.high, (y.count * x.count,), torch.float32),
                f"{name} scale, low": (scales.low, (y.count * x.count,), torch.float32),
                f"{name} scale, rows": (scales.rows, (y.pixels * x.count,), torch.float32),
            },
        )
        if scales.spans is not None:
            _check(device, **{f"{name} spans": (scales.spans, (y.count * x.count, SPAN), torch.float32)})


def _check_when(device: torch.device, when: When | None) -> None:
    if when is not None:
        _check(device, flag=(when.flag, (), torch.int32))


def spans(gram: Tensor, strips: tuple[Strips, Strips], high: Tensor) -> Tensor:
    """What bounds the cosines in an image's patches, ``Scales.spans``.

    Args:
        gram: ``[5, h, w]`` float64 contiguous, the products of neighbouring cells in ``Norms.gram``.
        strips: the image's strips along y and x.
        high: ``Scales.high``.

    Raises:
        ValueError: if dtypes, devices or shapes do not fit.
        RuntimeError: if the native core has no CUDA part, or CUDA fails.
    """
    y, x = strips
    _check_image(gram.device, "key", strips, None)
    _check(
        gram.device,
        gram=(gram, (5, y.cells, x.cells), torch.float64),
        **{"key scale, high": (high, (y.count * x.count,), torch.float32)},
    )
    written = memory.new_empty(high, (y.count * x.count, SPAN))
    _native.require().dense_match_spans(
        gram.data_ptr(), _axis(y), _axis(x), high.data_ptr(), written.data_ptr(), *_where(gram)
    )
    return written


def match(
    table: Tensor,
    key: tuple[Strips, Strips],
    scales: Scales | None,
    similarity: Tensor,
    index: Tensor,
    query: tuple[Strips, Strips] | None = None,
    band: Band | None = None,
    when: When | None = None,
) -> None:
    """Write each query pixel's similarity and best key pixel, -inf and -1 if there is none.

    Args:
        table: ``[rows, h * w]`` float32 contiguous, similarities to the key's cells: one row for each point, or for
            each cell of the query's ``band``.
        key: the key image's strips along y and x.
        scales: scales of the key's pixels, or None for ones.
        similarity, index: float32 and int64 ``[points]``, or ``[H * W]`` of the query image; only the pixels of
            ``band`` are written.
        query, band: None for points.
        when: condition under which the launch runs; None for always.

    Raises:
        ValueError: if dtypes, devices or shapes do not fit.
        RuntimeError: if the native core has no CUDA part, or CUDA fails.
    """
    y, x = key
    device, rows = table.device, table.shape[0]
    count = rows if query is None else query[0].pixels * query[1].pixels
    _check_image(device, "key", key, scales)
    _check(
        device,
        table=(table, (rows, y.cells * x.cells), torch.float32),
        similarity=(similarity, (count,), torch.float32),
        index=(index, (count,), torch.int64),
    )
    source = (table.data_ptr(), rows, _axis(y), _axis(x), _factors(scales))
    _check_when(device, when)
    results = (similarity.data_ptr(), index.data_ptr())
    if query is None or band is None:
        _native.require().dense_match_points(*source, *results, _condition(when), *_where(table))
        return
    _check_image(device, "query", query, None)
    cut = (*band.strips_y, *band.strips_x, band.top, band.left, band.width)
    _native.require().dense_match_groups(*source, *map(_axis, query), cut, *results, _condition(when), *_where(table))


def mutual(
    table: Tensor,
    query: tuple[Strips, Strips],
    scales: Scales | None,
    key: tuple[Strips, Strips],
    index: Tensor,
    valid: Tensor,
    when: When | None = None,
) -> None:
    """Write whether each query pixel is the best query pixel of its match.

    Args:
        table: ``[query cells, key cells]`` float32 contiguous similarities.
        query, key: the images' strips along y and x; at most ``MOST_MUTUAL_GROUP`` query pixels between four cells,
            and ``MOST_MUTUAL_CELLS`` key cells.
        scales: scales of the query's pixels, or None for ones.
        index: ``[H * W]`` int64, each query pixel's match from :func:`match` on the same similarities.
        valid: ``[H * W]`` bool, the result.
        when: condition under which the launch runs; None for always.

    Raises:
        ValueError: if dtypes, devices or shapes do not fit.
        RuntimeError: if the native core has no CUDA part, or CUDA fails.
    """
    device = table.device
    for name, axes in (("query", query), ("key", key)):
        _check_image(device, name, axes, scales if name == "query" else None)
    key_cells, query_cells = (axes[0].cells * axes[1].cells for axes in (key, query))
    _check(
        device,
        table=(table, (query_cells, key_cells), torch.float32),
        index=(index, (query[0].pixels * query[1].pixels,), torch.int64),
        valid=(valid, (query[0].pixels * query[1].pixels,), torch.bool),
    )
    _check_when(device, when)
    most = 4 * query[0].count * query[1].count if scales is None else index.shape[0]
    scratch = memory.zeros(_CANDIDATE_WORDS * (most + 1), dtype=torch.int32, device=device)
    _native.require().dense_match_mutual(
        table.data_ptr(),
        *map(_axis, query),
        _factors(scales),
        *map(_axis, key),
        index.data_ptr(),
        valid.data_ptr(),
        scratch.data_ptr(),
        scratch.shape[0],
        _condition(when),
        *_where(table),
    )
