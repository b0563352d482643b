"""Programs of csrc/cpu/ and tests/native/, compiled with the flags that setup.py has for each instruction set."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType

import compiled
import pytest
from compiled import ROOT

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
        compiled.run([*command, "-o", folder / f"{name}.o"])
        return folder / f"{name}.o"

    with ThreadPoolExecutor(setup().compilers_at_once()) as pool:
        return list(pool.map(compile_one, units))


def program(name: str, units: Iterable[Unit], flags: Sequence[str]) -> Path:
    """Compile and link a program; skips the test where g++ or a sanitizer's library is missing."""
    units, link = list(units), [*flags, "-pthread"]
    if not compiled.understands(link):
        pytest.skip(f"g++ cannot link with {' '.join(flags)}")

    def make(target: Path) -> None:
        compiled.run(["g++", *link, *objects(units, flags, target.parent), "-o", target])

    return compiled.artifact(name, [compiled.version("g++"), *units, *flags], make)
