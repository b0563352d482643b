"""A run in which an operator's numeric kernel tests did not pass is red where that is asked for."""

import subprocess
import sys
from pathlib import Path

import pytest
from numeric_count import OPERATORS

FIRST = OPERATORS[0]
OTHERS = f"""
import pytest

@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.numeric(name)) for name in {OPERATORS[1:]}])
def test_others(name):
    pass

def test_without_a_kernel():
    pass
"""
PASSES = f"""
@pytest.mark.numeric({FIRST!r})
def test_that_passes():
    pass
"""
SKIPPED = f"""
@pytest.mark.numeric({FIRST!r})
@pytest.mark.skip("not here")
def test_that_is_skipped():
    pass
"""
SKIPS = f"""
@pytest.mark.numeric({FIRST!r})
def test_that_skips():
    pytest.skip("not here")
"""
FIXTURE_SKIPS = f"""
@pytest.fixture
def program():
    pytest.skip("needs a compiler")

@pytest.mark.numeric({FIRST!r})
def test_that_cannot_start(program):
    pass
"""
FAILS = f"""
@pytest.mark.numeric({FIRST!r})
def test_that_fails():
    assert False
"""
MODULE_SKIPS = f"""
pytest.skip("not here", allow_module_level=True)
{PASSES}
"""
GPU = f"""
@pytest.mark.gpu
{PASSES.strip()}
"""


def run(folder, *options, tests):
    if "-n" in options:
        pytest.importorskip("xdist")
    (folder / "test_others.py").write_text(OTHERS)
    (folder / "test_first.py").write_text("import pytest\n" + tests)
    # Settings and fixtures of this repository stay out of it.
    command = [sys.executable, "-m", "pytest", "-q", "-c", "/dev/null", "--rootdir", ".", "-p", "numeric_count"]
    environment = {"PYTHONPATH": str(Path(__file__).parent)}
    return subprocess.run(
        [*command, *options, "."], cwd=folder, capture_output=True, text=True, check=False, env=environment
    )


def complaints(done):
    return [line for line in done.stdout.splitlines() if line.startswith(("No numeric", "Numeric"))]


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["one process", "pytest-xdist"])
def test_all_passed(workers, tmp_path):
    done = run(tmp_path, "--require-numeric", *workers, tests=PASSES)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"numeric kernel tests passed: {', '.join(f'{name} 1' for name in OPERATORS)}\n" in done.stdout
    assert complaints(done) == []


@pytest.mark.parametrize(
    ("tests", "skipped", "options"),
    [
        (SKIPPED, 1, ()),
        (SKIPS, 1, ()),
        (FIXTURE_SKIPS, 1, ()),
        (SKIPS + SKIPPED, 2, ("-n", "2")),
        (MODULE_SKIPS, 0, ()),
        (GPU, 0, ("-m", "not gpu")),
    ],
    ids=["marked", "by itself", "by a fixture", "two, in pytest-xdist", "the module", "deselected"],
)
def test_none_passed(tests, skipped, options, tmp_path):
    done = run(tmp_path, "--require-numeric", *options, tests=tests)
    assert done.returncode == 1, done.stdout + done.stderr
    expected = [f"No numeric kernel test of {FIRST} passed."]
    assert complaints(done) == expected + [f"Numeric kernel tests of {FIRST} were skipped: {skipped}."] * bool(skipped)


def test_unless_it_is_asked_for_the_run_is_green(tmp_path):
    done = run(tmp_path, tests=SKIPPED)
    assert done.returncode == 0, done.stdout + done.stderr
    assert complaints(done) == []


def test_one_of_two_was_skipped(tmp_path):
    done = run(tmp_path, "--require-numeric", tests=PASSES + SKIPPED)
    assert done.returncode == 1, done.stdout + done.stderr
    assert complaints(done) == [f"Numeric kernel tests of {FIRST} were skipped: 1."]


def test_a_failure_is_no_pass(tmp_path):
    done = run(tmp_path, "--require-numeric", tests=FAILS)
    assert done.returncode == 1
    assert complaints(done) == [f"No numeric kernel test of {FIRST} passed."]


def test_nothing_ran(tmp_path):
    done = run(tmp_path, "--require-numeric", "-k", "absent", tests=PASSES)
    assert done.returncode == 1
    assert complaints(done) == [f"No numeric kernel test of {name} passed." for name in OPERATORS]


def test_an_unknown_operator(tmp_path):
    done = run(tmp_path, tests=PASSES.replace(FIRST, "nearset"))
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "test_first.py::test_that_passes: numeric takes one of 'lift_forward', 'nearest', " in done.stderr
    assert done.stderr.rstrip().endswith("got 'nearset'; add a new operator to OPERATORS here")
