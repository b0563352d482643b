"""Completes the package when it is imported from a checkout, which then hides an installed lift_fast.

In a checkout ``lift_fast.kernels`` lies in kernels/, next to the package. The native core comes from the installed
lift_fast if its sources are the same. An editable install needs neither.
"""

from __future__ import annotations

import filecmp
import sys
from collections.abc import Sequence
from importlib.machinery import EXTENSION_SUFFIXES, ModuleSpec
from importlib.metadata import distributions
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

PACKAGE = Path(__file__).parent
ROOT = PACKAGE.parent
_INSTALL = f"pip install -e {ROOT}"


def enable() -> None:
    """Find ``lift_fast.kernels`` and ``lift_fast._C`` if nothing else does; ImportError without an install."""
    if not any(True for _ in distributions(name="lift_fast")):
        raise ImportError(f"lift_fast is imported from the checkout at {ROOT}, but not installed; run: {_INSTALL}")
    sys.meta_path.append(_Finder())


class _Finder:
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name == "lift_fast.kernels":
            folder = ROOT / "kernels"
            return spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])
        return spec_from_file_location(name, installed_core()) if name == "lift_fast._C" else None


def installed_core() -> Path:
    """The native core of an installed lift_fast with the Python sources of this checkout, or ModuleNotFoundError."""
    problem = "has no native core"
    for distribution in distributions(name="lift_fast"):
        installed = Path(str(distribution.locate_file("lift_fast")))
        cores = [core for suffix in EXTENSION_SUFFIXES if (core := installed / f"_C{suffix}").is_file()]
        if cores and _same_sources(installed):
            return cores[0]
        if cores:
            problem += f" and differs from the lift_fast installed in {installed.parent}"
    raise ModuleNotFoundError(
        f"lift_fast is imported from the checkout at {ROOT}, which {problem}; run: {_INSTALL}",
        name="lift_fast._C",
    )


def _same_sources(installed: Path) -> bool:
    # Python passes addresses to the core: a core with other arguments would write anywhere.
    names = [str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if "kernels" not in path.parts]
    _, differ, missing = filecmp.cmpfiles(PACKAGE, installed, names, shallow=False)
    return not differ and not missing
