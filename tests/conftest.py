"""Fixtures that several test modules share."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from lift_fast.testing import poisoned_outputs

# Without a GPU the Triton kernels run in Triton's interpreter, which must be asked for before Triton is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def poisoned(request: pytest.FixtureRequest) -> Iterator[None]:
    """In every test: what operators allocate is full of NaN until a kernel writes it, and guarded at both ends."""
    with nullcontext() if request.node.get_closest_marker("unpoisoned") else poisoned_outputs():
        yield


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small models are many tiny operations; on busy cores several threads make them ten times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def interpreter_loops() -> None:
    """Skips where Triton's interpreter cannot count to a number that a kernel computes."""
    if torch.cuda.is_available():
        return
    triton = pytest.importorskip("triton")
    older = tuple(map(int, re.findall(r"\d+", triton.__version__)[:2])) < (3, 9)
    try:
        int(np.zeros(1))
    except TypeError:
        if older:
            pytest.skip("the interpreter of this Triton needs an older NumPy")
