"""The build's messages, and the contents of the source distribution and the wheel."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import packages
import pytest
import setuptools
import torch

pytestmark = pytest.mark.slow


def names_in_wheel(folder):
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return wheel, archive.namelist()


def import_from(wheel, folder, code):
    """Run code with the unpacked wheel in front; without ``site``, so that no editable install is found."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    paths = [str(folder), str(Path(torch.__file__).parents[1])]
    prefix = f"import json, sys; sys.path[:0] = {paths!r}\n"
    command = [sys.executable, "-I", "-S", "-c", prefix + code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def built():
    """The tree after building a source distribution and from it a wheel, without CUDA; the build's output."""
    folder = packages.built()
    return folder / "tree", (folder / "output.txt").read_text()


def test_build_says_in_one_line_what_it_built(built):
    _, output = built
    lines = [line.strip() for line in output.splitlines() if "lift_fast: built" in line]
    assert len(lines) == 1, output
    assert lines[0].startswith("lift_fast: built the native core for the CPU only")
    assert lines[0].endswith("no CUDA: LIFT_FAST_CUDA=0")


def test_wheel_holds_the_package_alone(built):
    tree, _ = built
    _, names = names_in_wheel(tree / "dist")
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"lift_fast"}
    for folder, place in (("lift_fast", "lift_fast"), ("kernels", "lift_fast/kernels")):
        wanted = {f"{place}/{path.relative_to(tree / folder)}" for path in (tree / folder).rglob("*.py")}
        assert wanted <= set(names), wanted - set(names)
    assert "lift_fast/kernels/__init__.py" in names
    assert {"lift_fast/py.typed", "lift_fast/evaluation/published.json", "lift_fast/show/page.html"} <= set(names)
    assert len([name for name in names if name.startswith("lift_fast/_C.") and name.endswith(".so")]) == 1
    assert any(name.endswith("/LICENSE") for name in names)
    weights = {f"lift_fast/weights/{name}.safetensors" for name in ("demo_vitt16", "lift_demo_vitt16")}
    assert {name for name in names if name.startswith("lift_fast/weights/")} == weights
    allowed = (".py", ".so", "py.typed", *weights, "lift_fast/evaluation/published.json", "lift_fast/show/page.html")
    assert [n for n in names if ".dist-info/" not in n and not n.endswith(allowed)] == []


def test_source_distribution_is_complete(built):
    tree, _ = built
    (archive,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    wanted = {
        name
        for name in packages.sources()
        if name.startswith(packages.FOLDERS) and not name.startswith("bench/results")
    }
    wanted |= {"LICENSE", "README.md", "pyproject.toml", "setup.py", "MANIFEST.in"}
    assert wanted <= names, wanted - names
    assert [name for name in names if name.endswith((".so", ".pyc", ".o"))] == []


def test_wheel_works_from_another_folder(built, tmp_path):
    tree, _ = built
    wheel, _ = names_in_wheel(tree / "dist")
    code = """
import torch, lift_fast, lift_fast.kernels
index = lift_fast.nearest(torch.eye(40), torch.eye(40).flip(0)).index[:, 0]
right = torch.equal(index, torch.arange(40).flip(0))
print(json.dumps([lift_fast.__file__, right, lift_fast.backends().as_dict()]))
"""
    file, right, parts = import_from(wheel, tmp_path, code)
    assert Path(file).is_relative_to(tmp_path)
    assert right
    assert parts["cpu native"]["runs"], parts
    assert parts["cuda native"] == {"runs": False, "detail": "built without CUDA: LIFT_FAST_CUDA=0"}


def test_wheel_without_native_code(tmp_path):
    tree = packages.copy_tree(tmp_path / "tree")
    done = packages.run_build(tree, "--wheel", LIFT_FAST_NATIVE="0")
    assert done.returncode == 0, done.stdout + done.stderr
    wheel, names = names_in_wheel(tree / "dist")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not any(name.endswith(".so") for name in names)
    code = """
import torch, lift_fast
index = lift_fast.nearest(torch.eye(5), torch.eye(5)).index[:, 0].tolist()
print(json.dumps([index, lift_fast.backends().as_dict()["cpu native"]]))
"""
    index, part = import_from(wheel, tmp_path / "unpacked", code)
    assert index == [0, 1, 2, 3, 4]
    assert not part["runs"]
    assert "No module named 'lift_fast._C'" in part["detail"]


def fake_nvcc(folder, architectures=(80, 86, 90)):
    """A CUDA folder whose compiler can only list its architectures."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    listed = " ".join(f"compute_{number}" for number in architectures)
    nvcc.write_text(f"#!/bin/sh\nprintf '%s\\n' {listed}\n")
    nvcc.chmod(0o755)
    return nvcc


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"LIFT_FAST_CUDA": "maybe"}, "LIFT_FAST_CUDA must be one of auto, 1, 0, got 'maybe'"),
        ({"LIFT_FAST_NATIVE": "2"}, "LIFT_FAST_NATIVE must be one of 1, 0, got '2'"),
        ({"TORCH_CUDA_ARCH_LIST": "9.0 hopper"}, "TORCH_CUDA_ARCH_LIST: 'hopper' is not an architecture"),
        ({"CXX": "no-such-compiler"}, "no C++ compiler (no-such-compiler)"),
    ],
)
def test_build_names_what_is_wrong(environment, message, tmp_path):
    tree = packages.copy_tree(tmp_path / "tree")
    fake_nvcc(tmp_path / "cuda")
    done = packages.run_build(tree, "--wheel", CUDA_HOME=str(tmp_path / "cuda"), **environment)
    assert done.returncode != 0
    assert f"lift_fast: {message}" in done.stdout + done.stderr


@pytest.fixture
def setup_module(monkeypatch):
    """setup.py's functions, without the call that builds."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    for name in ("LIFT_FAST_CUDA", "LIFT_FAST_NATIVE", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("lift_fast_setup", packages.ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def hide_nvcc(monkeypatch):
    # One may lie in the default folder, which no variable hides.
    monkeypatch.setattr(Path, "is_file", lambda self: False)
    monkeypatch.setenv("PATH", "")


def test_cuda_without_a_compiler(setup_module, monkeypatch):
    hide_nvcc(monkeypatch)
    assert setup_module.BuildNative.cuda() == ([], [], "no nvcc in CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda", None)
    monkeypatch.setenv("LIFT_FAST_CUDA", "1")
    with pytest.raises(SystemExit, match=r"LIFT_FAST_CUDA=1, but there is no nvcc in .*; install"):
        setup_module.BuildNative.cuda()


def test_cuda_home_comes_first(setup_module, monkeypatch, tmp_path):
    first, second, third = (fake_nvcc(tmp_path / name) for name in ("first", "second", "third"))
    monkeypatch.setenv("PATH", str(third.parent))
    assert setup_module.find_nvcc() == (third, "")
    monkeypatch.setenv("CUDA_PATH", str(second.parents[1]))
    assert setup_module.find_nvcc() == (second, "")
    monkeypatch.setenv("CUDA_HOME", str(first.parents[1]))
    assert setup_module.find_nvcc() == (first, "")
    monkeypatch.setenv("LIFT_FAST_CUDA", "0")
    assert setup_module.BuildNative.cuda() == ([], [], "LIFT_FAST_CUDA=0", None)


@pytest.mark.parametrize(
    ("known", "names"),
    [
        ((70, 80, 86, 89, 90, 100, 120), ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120+PTX"]),
        # An older compiler skips architectures that it does not support; its newest PTX still runs on newer devices.
        ((50, 80, 86, 89, 90), ["sm_80", "sm_86", "sm_89", "sm_90+PTX"]),
    ],
)
def test_default_architectures(known, names, setup_module, tmp_path):
    flags, described = setup_module.architectures(fake_nvcc(tmp_path, known))
    assert described == names
    newest = names[-1].removeprefix("sm_").removesuffix("+PTX")
    assert flags[-1] == f"-gencode=arch=compute_{newest},code=compute_{newest}"
    assert len(flags) == len(names) + 1


@pytest.mark.parametrize("wanted", ["8.0;9.0a+PTX", "8.0 9.0a+PTX", " 8.0, 9.0a+PTX "])
def test_wanted_architectures(wanted, setup_module, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wanted)
    flags, names = setup_module.architectures(fake_nvcc(tmp_path))
    assert names == ["sm_80", "sm_90a+PTX"]
    assert flags == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90a,code=compute_90a",
    ]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [("9.0 8.x", "'8.x' is not an architecture"), ("99.0", r"does not support 99.0; it supports \[80, 86, 90\]")],
)
def test_bad_architectures_are_named(wanted, message, setup_module, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wanted)
    with pytest.raises(SystemExit, match=f"TORCH_CUDA_ARCH_LIST: .*{message}"):
        setup_module.architectures(fake_nvcc(tmp_path))


def test_a_compiler_too_old_for_every_architecture(setup_module, tmp_path):
    with pytest.raises(SystemExit, match="supports none of"):
        setup_module.architectures(fake_nvcc(tmp_path, (50, 60)))


class TestCompilersAtOnce:
    @pytest.fixture(autouse=True)
    def machine(self, setup_module, monkeypatch):
        monkeypatch.delenv("MAX_JOBS", raising=False)
        monkeypatch.setattr(setup_module.os, "sched_getaffinity", lambda _: set(range(16)), raising=False)

    @pytest.mark.parametrize(("gigabytes", "compilers"), [(100, 16), (16, 16), (5, 5), (0, 1)])
    def test_memory_and_cores_bound_them(self, gigabytes, compilers, setup_module, monkeypatch):
        monkeypatch.setattr(setup_module, "free_memory", lambda: gigabytes << 30)
        assert setup_module.compilers_at_once() == compilers

    def test_max_jobs_decides(self, setup_module, monkeypatch):
        monkeypatch.setenv("MAX_JOBS", "3")
        assert setup_module.compilers_at_once() == 3
        for text in ("0", "-1", "many"):
            monkeypatch.setenv("MAX_JOBS", text)
            with pytest.raises(SystemExit, match=f"MAX_JOBS must be a whole number above zero, got '{text}'"):
                setup_module.compilers_at_once()

    def test_free_memory(self, setup_module, tmp_path):
        """The machine's free memory, within a container's limit, for both versions of control groups."""
        assert setup_module.free_memory(tmp_path) == 8 << 30
        (tmp_path / "proc").mkdir()
        (tmp_path / "proc" / "meminfo").write_text("MemTotal: 64000000 kB\nMemAvailable:   20971520 kB\n")
        assert setup_module.free_memory(tmp_path) == 20 << 30
        first = tmp_path / "sys" / "fs" / "cgroup"
        (first / "memory").mkdir(parents=True)
        (first / "memory.max").write_text("max\n")
        (first / "memory.current").write_text("5\n")
        assert setup_module.free_memory(tmp_path) == 20 << 30
        (first / "memory.max").write_text(f"{8 << 30}\n")
        (first / "memory.current").write_text(f"{2 << 30}\n")
        assert setup_module.free_memory(tmp_path) == 6 << 30
        (first / "memory.stat").write_text(f"anon 7\ninactive_file {1 << 30}\nactive_file {1 << 29}\n")
        assert setup_module.free_memory(tmp_path) == (15 << 30) // 2
        (first / "memory" / "memory.limit_in_bytes").write_text(f"{3 << 30}\n")
        (first / "memory" / "memory.usage_in_bytes").write_text(f"{4 << 30}\n")
        assert setup_module.free_memory(tmp_path) == 0


def test_kernels_are_compiled_for_each_instruction_set(setup_module):
    names = [name for _, name, _ in setup_module.cpu_units(x86=True)]
    assert len(set(names)) == len(names)
    kernels = [path.stem for path in packages.ROOT.glob("csrc/cpu/*_kernel.cpp")]
    assert {f"{kernel}_{isa}" for kernel in kernels for isa in ("baseline", "avx2", "avx512")} <= set(names)
    more = {"nearest_kernel_avx512_int16", "nearest_kernel_avx512_bf16", "lift_forward_kernel_avx512_bf16"}
    assert more <= set(names)
    # No other processor knows these flags.
    elsewhere = {name: flags for _, name, flags in setup_module.cpu_units(x86=False)}
    assert {name for name in elsewhere if "_kernel" in name} == {f"{kernel}_baseline" for kernel in kernels}
    assert not any(flag.startswith("-m") for flags in elsewhere.values() for flag in flags)
    assert {"isa", "nearest"} <= set(elsewhere)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_only_what_is_out_of_date_is_compiled(setup_module, tmp_path):
    folder = tmp_path / "a folder"
    folder.mkdir()
    header, other, source = folder / "used.hpp", folder / "other.hpp", folder / "source.cpp"
    header.write_text("#define VALUE 1\n")
    other.write_text("")
    source.write_text('#include "used.hpp"\nint value() { return VALUE; }\n')
    target = folder / "source.o"

    def compiles(*flags):
        before = target.stat().st_mtime_ns if target.exists() else 0
        setup_module.BuildNative.compile(target, ["g++", *flags, "-c", str(source)])
        return target.stat().st_mtime_ns != before

    def touch(path):
        later = target.stat().st_mtime + 1
        os.utime(path, (later, later))

    assert compiles()
    assert not compiles()
    touch(other)
    assert not compiles()
    touch(header)
    assert compiles()
    # The header is newer than the object.
    os.utime(header, (1, 1))
    assert not compiles()
    assert compiles("-O1")
    assert not compiles("-O1")
    source.write_text("broken")
    touch(source)
    with pytest.raises(RuntimeError, match="broken"):
        compiles("-O1")
    source.write_text("int value() { return 2; }\n")
    os.utime(source, (1, 1))
    # The remains of a failed compilation do not count as the object.
    assert compiles("-O1")
    header.unlink()
    assert not compiles("-O1")
