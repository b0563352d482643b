"""Two tasks that leave Python's lock, such as decoding, at the same time."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

_T = TypeVar("_T")


def side_by_side(first: Callable[[], _T], second: Callable[[], _T]) -> tuple[_T, _T]:
    """Results of both, the second computed in another thread unless PyTorch was given one (``--threads 1``).

    Errors are those of calling one after the other: if both fail, the first one's.
    """
    if torch.get_num_threads() == 1:
        return first(), second()
    with ThreadPoolExecutor(1, "lift_fast") as pool:
        other = pool.submit(second)
        return first(), other.result()
