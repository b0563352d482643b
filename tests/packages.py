"""Builds the source distribution and the wheel of a copy of this checkout, once for all tests that look at them."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from functools import cache
from pathlib import Path

import compiled

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("lift_fast", "kernels", "csrc", "tests", "bench")


@cache
def sources() -> list[str]:
    """Names of the project's own files, relative to its root."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
        return [name for name in names if name and (ROOT / name).is_file()]
    files = [path for path in ROOT.iterdir() if path.suffix in (".py", ".toml", ".md", ".in") or path.name == "LICENSE"]
    files += [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if "__pycache__" not in path.parts]
    return [str(path.relative_to(ROOT)) for path in files if path.is_file() and path.suffix != ".so"]


def copy_tree(target: Path) -> Path:
    """A copy to build in: nothing is left in the checkout, and none of its old objects are found."""
    for name in sources():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target / name)
    return target


def caching_compiler() -> str:
    """For CXX: most objects are the same from one build to the next, whatever tree they are made in."""
    given = os.environ.get("BUILD_CXX") or os.environ.get("CXX")
    compiler = given or sysconfig.get_config_var("CXX") or "c++"
    script = ROOT / "tests" / "compiler_cache.py"
    # .ci/run has set it for all of its builds.
    return (
        compiler if script.name in compiler else f"{sys.executable} {script} {compiled.FOLDER / 'objects'} {compiler}"
    )


def run_build(tree: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("LIFT_FAST_", "TORCH_CUDA_ARCH"))}
    inherited["CXX"] = caching_compiler()
    command = [sys.executable, "-m", "build", "--outdir", str(tree / "dist"), *options, str(tree)]
    if importlib.util.find_spec("pybind11"):
        # Isolation would fetch the build requirements again, and needs a network for it.
        command.insert(3, "--no-isolation")
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tree.parent, env={**inherited, **environment}
    )


def built() -> Path:
    """A folder that is not to be changed: the copy in tree/, with dist/ and what the build said in output.txt."""

    def make(folder: Path) -> None:
        tree = copy_tree(folder / "tree")
        done = run_build(tree, LIFT_FAST_CUDA="0")
        assert done.returncode == 0, done.stdout + done.stderr
        (folder / "output.txt").write_text(done.stdout)

    contents = (hashlib.sha256((ROOT / name).read_bytes()).hexdigest() for name in sources())
    return compiled.artifact("packages", [sys.version, *zip(sources(), contents, strict=True)], make)
