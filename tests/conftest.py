"""Fixtures that several test modules share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from numeric_count import pytest_addoption, pytest_configure  # noqa: F401

from lift_fast import interpreter
from lift_fast.testing import poisoned_outputs

# Without a GPU the Triton kernels run in Triton's interpreter.
if not torch.cuda.is_available():
    interpreter.enable()


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
