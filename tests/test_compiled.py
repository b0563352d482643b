"""What tests compile is compiled once, and again when something that it is made of has changed."""

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import compiled
import pytest

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "FOLDER", tmp_path / "made")
    return tmp_path / "made"


def test_is_made_once_for_all_who_ask_at_one_time(folder):
    calls = []

    def make(target):
        calls.append(target)
        target.write_text("made")

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: compiled.artifact("some.file", ["flags"], make), range(8)))
    assert len(calls) == 1
    assert len(set(found)) == 1
    assert found[0].read_text() == "made"
    assert found[0].suffix == ".file"


def test_is_made_anew_of_other_ingredients_and_the_old_one_goes(folder):
    first = compiled.artifact("folder", ["-O1"], lambda target: target.mkdir())
    second = compiled.artifact("folder", ["-O2"], lambda target: target.mkdir())
    other = compiled.artifact("another", ["-O1"], lambda target: target.write_text(""))
    assert first != second
    assert not first.exists()
    assert second.is_dir()
    assert other.is_file()


def test_what_fails_leaves_nothing(folder):
    def fail(target):
        target.write_text("half")
        raise AssertionError("it does not compile")

    with pytest.raises(AssertionError, match="it does not compile"):
        compiled.artifact("broken", [], fail)
    assert [path.name for path in folder.rglob("*") if path.is_file()] == ["lock"]


@needs_compiler
def test_a_program_of_several_sources(folder, tmp_path):
    (tmp_path / "value.cpp").write_text("int value() { return BASE + 1; }\n")
    (tmp_path / "main.cpp").write_text("int value();\nint main() { return value() == 5 ? 0 : 1; }\n")
    sources = [tmp_path / "main.cpp", tmp_path / "value.cpp"]
    program = compiled.program("sum", sources, ["-DBASE=4"])
    compiled.run([program])
    with pytest.raises(AssertionError, match=r"value\.cpp"):
        compiled.program("sum", sources)
    assert program.exists()


@needs_compiler
def test_flags_that_the_compiler_lacks():
    assert compiled.understands(["-O1"])
    assert not compiled.understands(["-fsanitize=nonsense"])


@needs_compiler
def test_the_caching_compiler(tmp_path):
    """One object for a source wherever it lies; another for another header or flag, and none of what is wrong."""
    kept = tmp_path / "kept"

    def compile_in(folder, *flags, value=1, valid=True):
        folder.mkdir(exist_ok=True)
        (folder / "value.h").write_text(f"constexpr int kValue = {value};\n")
        (folder / "a.cpp").write_text('#include "value.h"\nint value() { return kValue; }\n' + "" if valid else "int (")
        own = [f"-I{folder}", "-MMD", "-MF", str(folder / "a.d"), "-o", str(folder / "a.o")]
        command = [sys.executable, compiled.ROOT / "tests" / "compiler_cache.py", kept, "g++", *flags]
        done = subprocess.run([*command, "-c", folder / "a.cpp", *own], capture_output=True, check=False)
        return done.returncode, len(list(kept.glob("*.o")))

    assert compile_in(tmp_path / "one") == (0, 1)
    assert compile_in(tmp_path / "two") == (0, 1)
    assert (tmp_path / "one" / "a.o").read_bytes() == (tmp_path / "two" / "a.o").read_bytes()
    assert "value.h" in (tmp_path / "two" / "a.d").read_text()
    assert compile_in(tmp_path / "one", value=2) == (0, 2)
    assert compile_in(tmp_path / "one", "-O2", value=2) == (0, 3)
    status, objects = compile_in(tmp_path / "one", valid=False)
    assert status
    assert objects == 3
