"""Fixtures that several test modules share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from numeric_count import pytest_addoption, pytest_configure  # noqa: F401

from lift_fast import interpreter
from lift_fast.testing import poisoned_outputs

# Without a GPU the Triton kernels run in Triton's interpreter.
if not torch.cuda.is_available():
    interpreter.enable()

# No test fills the user's cache of compiled backbones.
os.environ.setdefault("LIFT_FAST_ENGINE_CACHE", "0")

# torch.compile takes CXX as the name of a program; .ci/run gives builds a command of several words.
if len(os.environ.get("CXX", "").split()) > 1:
    os.environ["BUILD_CXX"] = os.environ["CXX"]
    os.environ["CXX"] = os.environ["CXX"].split()[-1]

# Bytes that one process of the tests may take.
PROCESS_MEMORY = 2 << 30


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Whole folders are tested by as many processes as cores, of one thread each; with ``-n 0`` or ``--pdb`` by one."""
    option = config.option
    # Without pytest-xdist, in one of its workers, or where a GPU's tests would share it.
    if not hasattr(option, "numprocesses") or hasattr(config, "workerinput") or torch.cuda.is_available():
        return
    whole = all(Path(argument).is_dir() for argument in config.args)
    chosen = option.numprocesses is not None or option.dist != "no"
    if whole and not (chosen or option.usepdb or option.collectonly):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        processes = min(os.cpu_count() or 1, memory // PROCESS_MEMORY)
        option.numprocesses = processes if processes > 1 else 0
        # In order, so that a module's fixtures are rarely made twice; who is ready first takes over from the others.
        option.dist = "worksteal"
    if option.numprocesses:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        # Tests that ask for several threads do not keep the others' cores busy while those wait.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")


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
