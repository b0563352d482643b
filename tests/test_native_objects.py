"""The native core's objects: each operator under sanitizers, and no code shared between instruction sets."""

from __future__ import annotations

import platform
import re
import shutil

import compiled
import native_build
import pytest

pytestmark = pytest.mark.slow

# Sources of csrc/cpu/, the operator first; whether to test several calls at one time too.
OPERATORS = {
    ("bit_matrix",): False,
    ("cosine_loss",): True,
    ("dense_match", "dense_match_image", "descriptor_norms", "map_products"): True,
    ("lift_forward", "scratch"): True,
    ("nearest",): False,
    ("vit", "scratch"): True,
    ("window_nearest",): True,
}
CASES = [pytest.param("address", sources, id=f"address-{sources[0]}") for sources in OPERATORS]
CASES += [pytest.param("thread", sources, id=f"thread-{sources[0]}") for sources, calls in OPERATORS.items() if calls]
SANITIZERS = {
    "address": ["-fopenmp", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    # libgomp is not instrumented: its barriers look like races, so each thread of the program works alone.
    "thread": ["-fsanitize=thread", "-Wno-unknown-pragmas"],
}


@pytest.mark.parametrize(("sanitizer", "sources"), CASES)
def test_sanitizers(sanitizer, sources):
    """Exactly sized heap blocks under AddressSanitizer and UBSan; two threads at once under ThreadSanitizer."""
    operator = sources[0]
    more = ",".join(f"CpuIsa::{isa}" for isa in native_build.setup().MORE_ISAS.get(f"{operator}_kernel", ()))
    main = (native_build.NATIVE / "sanitize.cpp", "sanitize", [f"-DLIFT_FAST_MORE_ISAS={more}"])
    units = [*native_build.core(*sources), main, *native_build.own(f"{operator}_sanitize")]
    program = native_build.program(f"{sanitizer}-{operator}", units, ["-O1", "-g1", *SANITIZERS[sanitizer]])
    assert "baseline ok" in compiled.run([program])


@pytest.mark.skipif(shutil.which("nm") is None or shutil.which("g++") is None, reason="needs g++ and nm")
@pytest.mark.skipif(platform.system() != "Linux", reason="reads ELF symbols")
def test_no_function_is_shared_between_instruction_sets(tmp_path):
    """The linker keeps one copy of a function in several objects, perhaps one with a newer CPU's instructions."""
    # Without optimisation nothing is inlined, so all functions that could be shared exist.
    units = [unit for unit in native_build.core() if unit[0].stem.endswith("_kernel")]
    assert units
    for made in native_build.objects(units, ["-O0", "-fopenmp"], tmp_path):
        symbols = re.findall(r" ([A-Za-z]) (.*)", compiled.run(["nm", "--demangle", "--defined-only", made]))
        shared = [name for kind, name in symbols if kind in "uVW" and not name.startswith("DW.ref.")]
        public = [name for kind, name in symbols if kind in "TDRBG"]
        assert not shared, (made.name, shared)
        assert len(public) == 1, (made.name, public)
        assert public[0].startswith("lift_fast::Compiled<"), (made.name, public)
