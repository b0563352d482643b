"""Programs of csrc/cpu/ and tests/native/, compiled with the flags that setup.py has for each instruction set.

A program is compiled once for all workers of a run, and not again until a source, a flag or the compiler changes; it
lies in build/tests.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
NATIVE = ROOT / "tests" / "native"
# A source, what its object is called, and its own flags.
Unit = tuple[Path, str, Sequence[str]]


@cache
def setup() -> ModuleType:
    """setup.py as a module, which builds nothing."""
    spec = importlib.util.spec_from_file_location("lift_fast_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def core(*operators: str) -> list[Unit]:
    """What setup.py makes of csrc/cpu/ for these operators, or for all."""
    units = setup().cpu_units()
    names = {"isa", *operators, *(f"{operator}_kernel" for operator in operators)}
    return [unit for unit in units if not operators or unit[0].stem in names]


def own(*names: str) -> list[Unit]:
    """Sources of tests/native/."""
    return [(NATIVE / f"{name}.cpp", name, ()) for name in names]


def objects(units: Iterable[Unit], flags: Sequence[str], folder: Path) -> list[Path]:
    """Compile each unit into ``folder``."""

    def compile_one(unit: Unit) -> Path:
        source, name, more = unit
        command = ["g++", "-std=c++17", *flags, *more, f"-I{ROOT / 'csrc'}", f"-I{NATIVE}", "-c", str(source)]
        run([*command, "-o", str(folder / f"{name}.o")])
        return folder / f"{name}.o"

    with ThreadPoolExecutor(setup().compilers_at_once()) as pool:
        return list(pool.map(compile_one, units))


def program(name: str, units: Iterable[Unit], flags: Sequence[str]) -> Path:
    """Compile and link a program; skips the test where g++ or a sanitizer's library is missing."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    units = list(units)
    key = hashlib.sha256(repr([run(["g++", "--version"]), units, flags]).encode())
    for path in sorted([*(ROOT / "csrc" / "cpu").rglob("*"), *NATIVE.rglob("*")]):
        if path.is_file():
            key.update(str(path).encode() + path.read_bytes())
    folder = ROOT / "build" / "tests" / f"{name}-{key.hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / name).exists():
            probe = folder / "probe.cpp"
            probe.write_text("int main() { return 0; }\n")
            link = ["g++", *flags, "-pthread", "-o"]
            if subprocess.run([*link, str(folder / "probe"), str(probe)], capture_output=True, check=False).returncode:
                pytest.skip(f"g++ cannot link with {' '.join(flags)}")
            made = objects(units, flags, folder)
            run([*link, str(folder / "linked"), *map(str, made)])
            (folder / "linked").rename(folder / name)
    return folder / name


def run(command: Sequence[str]) -> str:
    """What a program says, which must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout
