"""The package imported from a checkout, which hides an install: with the wheel installed, and with nothing."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import packages
import pytest
import torch

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A checkout that nothing was built in."""
    return packages.copy_tree(tmp_path_factory.mktemp("checkout") / "lift_fast_repo")


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """A Python whose site-packages hold the wheel, and after it what the tests' own hold."""
    folder = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    found = folder / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([found, "-c", code], capture_output=True, text=True, check=True).stdout.strip())
    (wheel,) = (packages.built() / "tree" / "dist").glob("*.whl")
    install = [sys.executable, "-m", "pip", "--python", found, "install", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True, capture_output=True)
    # A path added this way activates no editable install.
    (site / "dependencies.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    return found


def run(python, folder, *arguments):
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    return subprocess.run(
        [python, *arguments], cwd=folder, capture_output=True, text=True, check=False, env=environment
    )


def output(python, folder, *arguments):
    done = run(python, folder, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


IMPORT = """
import json, lift_fast, lift_fast._native, lift_fast.kernels
from lift_fast.kernels import cosine_loss
print(json.dumps([lift_fast.__file__, cosine_loss.__file__, lift_fast._native.require().__file__]))
"""


def test_a_regular_install_serves_its_checkout(python, checkout):
    package, kernel, core = json.loads(output(python, checkout, "-c", IMPORT))
    assert package == str(checkout / "lift_fast" / "__init__.py")
    assert kernel == str(checkout / "kernels" / "cosine_loss.py")
    assert Path(core).is_relative_to(python.parents[1])


def test_commands_run_in_the_checkout(python, checkout):
    parts = json.loads(output(python, checkout, "-m", "lift_fast", "info", "--json"))["backends"]
    assert parts["cpu native"]["runs"], parts
    assert "No module" not in parts["triton"]["detail"]
    assert output(python, checkout, "-m", "bench.gpu_report", "--help").startswith("usage: ")


def test_every_kernel_is_found_in_the_checkout(python, checkout):
    pytest.importorskip("triton")
    code = """
import importlib, inspect, pkgutil, lift_fast.kernels
names = [f"lift_fast.kernels.{module.name}" for module in pkgutil.iter_modules(lift_fast.kernels.__path__)]
print(*(inspect.getsourcefile(importlib.import_module(name)) for name in names), sep="\\n")
"""
    found = output(python, checkout, "-c", code).splitlines()
    kernels = {str(path) for path in (checkout / "kernels").glob("*.py")} - {str(checkout / "kernels" / "__init__.py")}
    assert set(found) == kernels


def test_a_core_of_other_sources_is_not_taken(python, checkout, tmp_path):
    """It may take other arguments, addresses among them."""
    changed = shutil.copytree(checkout, tmp_path / "changed")
    with (changed / "lift_fast" / "lift.py").open("a") as file:
        file.write("# Changed.\n")
    parts = json.loads(output(python, changed, "-m", "lift_fast", "info", "--json"))["backends"]
    site = next(python.parents[1].rglob("lift_fast-*.dist-info")).parent
    assert parts["cpu native"] == {
        "runs": False,
        "detail": f"lift_fast._C cannot be imported: lift_fast is imported from the checkout at {changed}, which has "
        f"no native core and differs from the lift_fast installed in {site}; run: pip install -e {changed}",
    }
    assert parts["triton"]["detail"].startswith("Triton ")


def test_without_an_install_one_sentence_says_what_to_do(checkout):
    # Without ``site``, so that no editable install is found.
    done = run(sys.executable, checkout, "-S", "-c", "import lift_fast")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"ImportError: lift_fast is imported from the checkout at {checkout}, but not installed; "
        f"run: pip install -e {checkout}"
    )
