"""What tests compile: once for all workers of a run, and not again until a source, a flag or the compiler changes.

    program = compiled.program("dense_match_emulate", sources, ["-fsanitize=address"])
    subprocess.run([program])

What is made lies in build/tests; ``rm -r build/tests`` makes all of it anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "tests"


def tool(name: str) -> str:
    """The path of a compiler or another program; skips the test where there is none."""
    found = shutil.which(name) or shutil.which(f"/usr/local/cuda/bin/{name}")
    if found is None:
        pytest.skip(f"needs {name}")
    return found


def run(command: Sequence[str | Path]) -> str:
    """Both outputs of a program, which must succeed."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}"
    return done.stdout


def program(name: str, sources: Iterable[Path], flags: Sequence[str] = (), compiler: str = "g++") -> Path:
    """Compile and link the sources with ``flags``.

    csrc/ and tests/native/ are searched for headers. A warning is an error only where ``flags`` say so.
    """
    command, sources = tool(compiler), list(sources)
    includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests' / 'native'}"]

    def make(target: Path) -> None:
        def compile_one(source: Path) -> Path:
            # Sources of different folders may share a name.
            result = target.parent / f"{sources.index(source)}-{source.stem}.o"
            run([command, *flags, *includes, "-c", source, "-o", result])
            return result

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            objects = list(pool.map(compile_one, sources))
        run([command, *flags, *objects, "-o", target])

    return artifact(name, [version(command), *sources, *flags], make)


def emulation(name: str) -> Path:
    """A program of tests/native/ that runs CUDA kernels on the CPU, with the sanitizers where the compiler has them."""
    flags = ["-std=c++17", "-O1", "-g", "-fno-strict-aliasing", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    flags += sanitizers if understands(sanitizers) else []
    return program(name, [ROOT / "tests" / "native" / f"{name}.cpp"], flags)


def understands(flags: Sequence[str], compiler: str = "g++") -> bool:
    """Whether a program compiled with ``flags`` links and runs: sanitizers need libraries that may be absent."""
    return _understands(tuple(flags), tool(compiler))


@cache
def _understands(flags: tuple[str, ...], compiler: str) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "probe.cpp"), Path(folder, "probe")
        source.write_text("int main() { return 0; }\n")
        compiles = subprocess.run([compiler, *flags, source, "-o", target], capture_output=True, check=False)
        return compiles.returncode == 0 and subprocess.run([target], capture_output=True, check=False).returncode == 0


def artifact(name: str, ingredients: Iterable[object], make: Callable[[Path], object]) -> Path:
    """The file or folder ``name``, made by ``make(path)`` unless it was made before of the same ingredients.

    Those are the files in csrc/ and tests/native/, and ``ingredients``: flags, a compiler's version.
    """
    key = hashlib.sha256(repr([_sources(), *map(str, ingredients)]).encode()).hexdigest()[:16]
    folder = FOLDER / name
    result = folder / f"{key}{Path(name).suffix}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not result.exists():
            with tempfile.TemporaryDirectory(dir=FOLDER) as scratch:
                made = Path(scratch, result.name)
                make(made)
                for outdated in folder.iterdir():
                    if outdated.is_dir():
                        shutil.rmtree(outdated)
                    elif outdated.name != "lock":
                        outdated.unlink()
                made.rename(result)
    return result


@cache
def version(compiler: str) -> str:
    return run([compiler, "--version"])


@cache
def _sources() -> str:
    """A digest of all native sources: any of them may be included by another."""
    digest = hashlib.sha256()
    for folder in (ROOT / "csrc", ROOT / "tests" / "native"):
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            digest.update(f"{path.relative_to(ROOT)}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return digest.hexdigest()
