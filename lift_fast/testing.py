"""What tests and benchmarks of this package, and of code built on it, share: shapes, weights, error measures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)

# Where bugs live: one element, primes, odd, rectangular, vector widths and tile sizes plus and minus one.
AWKWARD_COUNTS = (0, 1, 2, 3, 7, 13, 15, 16, 17, 31, 33, 64, 97, 131)
AWKWARD_GRIDS = ((1, 1), (1, 2), (2, 1), (1, 7), (5, 1), (2, 3), (3, 5), (7, 7), (8, 4), (13, 11))


def randomize(module: Module, seed: int) -> Module:
    """Give every BatchNorm random affine weights and statistics, so that folding them is visible. In place.

    Fresh modules have mean 0, variance 1, scale 1 and shift 0, with which a wrong fold goes unnoticed.
    """
    generator = torch.Generator().manual_seed(seed)
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            with torch.no_grad():
                for tensor, low, high in (
                    (norm.weight, 0.5, 1.5),
                    (norm.bias, -0.5, 0.5),
                    (norm.running_mean, -0.5, 0.5),
                    (norm.running_var, 0.3, 2.0),
                ):
                    if tensor is not None:
                        random = torch.empty(tensor.shape).uniform_(low, high, generator=generator)
                        tensor.copy_(random)
    return module


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected| in the Euclidean norm, computed in float64; infinite if ``actual`` holds NaN."""
    actual, expected = actual.detach().double(), expected.detach().double()
    scale = torch.linalg.vector_norm(expected).clamp_min(torch.finfo(torch.float64).tiny)
    error = float(torch.linalg.vector_norm(actual - expected) / scale)
    return error if error == error else float("inf")


@contextmanager
def poisoned_outputs() -> Iterator[None]:
    """Fill every floating-point tensor that ``Tensor.new_empty`` makes with NaN: what no kernel writes then shows."""
    empty = Tensor.new_empty

    def poisoned(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = empty(self, *args, **kwargs)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    Tensor.new_empty = poisoned  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        Tensor.new_empty = empty  # type: ignore[method-assign]
