"""Builds the native core ``lift_fast._C`` from csrc/: C++ for the CPU, CUDA C++ where a CUDA compiler is found.

No PyTorch header is included, so no PyTorch is needed to build and one binary serves every version of it.

Environment:
    LIFT_FAST_NATIVE=0       install without the native core; everything falls back to plain PyTorch
    LIFT_FAST_CUDA=auto|1|0  CUDA part: if nvcc is found (default) | required | left out
    TORCH_CUDA_ARCH_LIST     architectures as PyTorch writes them, e.g. "8.0 9.0+PTX"
    MAX_JOBS                 compilers to run at one time (default: one per core and GB of free memory)
    CXX, CUDA_HOME           compilers to use
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHITECTURES = "8.0 8.6 8.9 9.0 10.0 12.0"
X86 = platform.machine().lower() in ("x86_64", "amd64")
# csrc/cpu/*_kernel.cpp are compiled for each of these, and the core chooses among them at run time. Unless aligned,
# short loops gain or lose a tenth of their speed with the place that the linker gives them.
ISA_FLAGS = {"baseline": [], "avx2": ["-mavx2", "-mfma", "-mf16c", "-falign-loops=32"]}
ISA_FLAGS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", *ISA_FLAGS["avx2"]]
# The kernels in MORE_ISAS are compiled for these too, as listed in the operator's Kernels<>.
MORE_FLAGS = {
    "avx512_int16": [*ISA_FLAGS["avx512"], "-mavx512vnni"],
    "avx512_bf16": [*ISA_FLAGS["avx512"], "-mavx512bf16"],
}
MORE_ISAS = {
    "nearest_kernel": ("avx512_int16", "avx512_bf16"),
    "lift_forward_kernel": ("avx512_bf16",),
    "vit_kernel": ("avx512_bf16",),
}
# nvcc and the bindings take 0.25 to 0.4 GB.
COMPILER_MEMORY = 1 << 30
WARNINGS = ["-Wall", "-Wextra", "-Werror=return-type", "-Werror=uninitialized"]


def fail(message: str) -> SystemExit:
    return SystemExit(f"lift_fast: {message}")


def cpu_units(x86: bool = X86) -> list[tuple[Path, str, list[str]]]:
    """The objects of csrc/cpu/, kernels first: source, name of the object, flags in addition to the common ones."""
    units: list[tuple[Path, str, list[str]]] = []
    for source in sorted(ROOT.glob("csrc/cpu/*_kernel.cpp")):
        isas = [*ISA_FLAGS, *MORE_ISAS.get(source.stem, ())] if x86 else ["baseline"]
        for isa in isas:
            flags = [f"-DLIFT_FAST_ISA={isa}", *{**ISA_FLAGS, **MORE_FLAGS}[isa]]
            units.append((source, f"{source.stem}_{isa}", flags))
    others = sorted(path for path in ROOT.glob("csrc/cpu/*.cpp") if not path.stem.endswith("_kernel"))
    return units + [(source, source.stem, []) for source in others]


def choice(name: str, allowed: tuple[str, ...]) -> str:
    value = os.environ.get(name, allowed[0])
    if value not in allowed:
        raise fail(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    return value


def run(command: list[str]) -> str:
    """Run a compiler; an error has its whole output."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    sys.stderr.write(done.stderr)
    return done.stdout


def find_nvcc() -> tuple[Path | None, str]:
    """The CUDA compiler, or the reason why there is none. Needs no GPU."""
    looked = []
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            looked.append(str(Path(os.environ[variable], "bin", "nvcc")))
    on_path = shutil.which("nvcc")
    candidates = [*looked, *([on_path] if on_path else []), "/usr/local/cuda/bin/nvcc"]
    for candidate in candidates:
        if Path(candidate).is_file():
            return Path(candidate), ""
    return None, "no nvcc in CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda"


def architectures(nvcc: Path) -> tuple[list[str], list[str]]:
    """nvcc's flags and the architectures' names, from TORCH_CUDA_ARCH_LIST or the defaults that this nvcc supports."""
    known = {int(number) for number in re.findall(r"compute_(\d+)", run([str(nvcc), "--list-gpu-arch"]))}
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    default = [name for name in DEFAULT_ARCHITECTURES.split() if int(name.replace(".", "")) in known]
    if not wanted and not default:
        raise fail(f"{nvcc} supports none of {DEFAULT_ARCHITECTURES}; set TORCH_CUDA_ARCH_LIST or LIFT_FAST_CUDA=0")
    flags, names = [], []
    # The newest PTX also runs on later GPUs.
    for item in re.split(r"[\s;,]+", wanted or " ".join(default) + "+PTX"):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", item)
        if not match:
            raise fail(f"TORCH_CUDA_ARCH_LIST: {item!r} is not an architecture; expected e.g. '8.0 9.0+PTX'")
        number, suffix, ptx = int(match[1] + match[2]), match[3], match[4]
        if number not in known:
            raise fail(f"TORCH_CUDA_ARCH_LIST: {nvcc} does not support {item}; it supports {sorted(known)}")
        flags.append(f"-gencode=arch=compute_{number}{suffix},code=sm_{number}{suffix}")
        names.append(f"sm_{number}{suffix}")
        if ptx:
            flags.append(f"-gencode=arch=compute_{number}{suffix},code=compute_{number}{suffix}")
            names[-1] += "+PTX"
    return flags, names


def compilers_at_once() -> int:
    """MAX_JOBS, or the number that cores and free memory allow; at least one."""
    wanted = os.environ.get("MAX_JOBS", "").strip()
    if wanted:
        if not wanted.isdecimal() or int(wanted) == 0:
            raise fail(f"MAX_JOBS must be a whole number above zero, got {wanted!r}")
        return int(wanted)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, free_memory() // COMPILER_MEMORY))


def free_memory(root: Path = Path("/")) -> int:
    """Free bytes, within the limit of a container; if unknown, enough for eight compilers."""

    def read(name: str) -> str:
        try:
            return Path(root, name).read_text()
        except OSError:
            return ""

    free = [8 * COMPILER_MEMORY]
    if available := re.search(r"^MemAvailable:\s+(\d+) kB", read("proc/meminfo"), re.MULTILINE):
        free = [int(available[1]) << 10]
    # Both versions of control groups; cached files count as used but can be dropped.
    for group, limit, used in (
        ("sys/fs/cgroup", "memory.max", "memory.current"),
        ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        most, now = read(f"{group}/{limit}").strip(), read(f"{group}/{used}").strip()
        files = re.findall(r"^(?:in)?active_file (\d+)", read(f"{group}/memory.stat"), re.MULTILINE)
        if most.isdecimal() and now.isdecimal():
            free.append(int(most) - int(now) + sum(map(int, files)))
    return max(0, min(free))


def is_fresh(target: Path, listed: Path) -> bool:
    """Whether an object is newer than all of its sources, which the compiler has listed (``-MMD``)."""
    if not (target.exists() and listed.exists()):
        return False
    # A make rule: "object: source header ...", with backslashes before line ends and before spaces in names.
    rule = listed.read_text().replace("\\\n", " ").partition(": ")[2]
    names = [Path(name.replace("\\ ", " ")) for name in re.findall(r"(?:\\.|\S)+", rule)]
    made = target.stat().st_mtime
    return all(name.exists() and name.stat().st_mtime < made for name in names)


class BuildNative(build_ext):
    """Compiles each source that is out of date with its own flags, several at a time."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        if sys.platform == "win32":
            raise fail("the native core is not built on Windows; set LIFT_FAST_NATIVE=0 to install without it")
        folder = Path(self.build_temp, "objects")
        folder.mkdir(parents=True, exist_ok=True)
        compiler = (os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++").split()
        if shutil.which(compiler[0]) is None:
            raise fail(f"no C++ compiler ({compiler[0]}); install one, or set LIFT_FAST_NATIVE=0 to install without it")
        openmp = self.openmp_flags(compiler)
        includes = [f"-I{path}" for path in (ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include"))]
        common = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-DNDEBUG", *WARNINGS, *includes, *openmp]
        cuda_flags, cuda_names, cuda_reason, nvcc = self.cuda()
        described = ", ".join(cuda_names)
        macros = [
            f'-DLIFT_FAST_CUDA_ARCHITECTURES="{described}"',
            f'-DLIFT_FAST_CUDA_REASON="{cuda_reason}"',
            f"-DLIFT_FAST_CUDA={int(nvcc is not None)}",
        ]
        # The longest compilations begin first.
        jobs: list[tuple[Path, list[str]]] = []
        if nvcc is not None:
            host = ["-Xcompiler", "-fPIC,-Wall,-Wextra,-fvisibility=hidden"]
            device = ["-std=c++17", "-O3", "-DNDEBUG", "--threads", "2", "-Werror", "all-warnings"]
            for source in sorted(ROOT.glob("csrc/cuda/*.cu"), reverse=True):
                command = [str(nvcc), *device, *host, *cuda_flags, *macros, f"-I{ROOT / 'csrc'}", "-c", str(source)]
                jobs.append((folder / f"cuda_{source.stem}.o", command))
        for source in sorted(ROOT.glob("csrc/bindings/*.cpp")):
            jobs.append((folder / f"bind_{source.stem}.o", [*compiler, *common, *macros, "-c", str(source)]))
        for source, name, flags in cpu_units():
            jobs.append((folder / f"{name}.o", [*compiler, *common, *flags, "-c", str(source)]))
        try:
            with ThreadPoolExecutor(compilers_at_once()) as pool:
                list(pool.map(self.compile, *zip(*jobs, strict=True)))
            objects = [str(target) for target, _ in jobs]
            if nvcc is None:
                link = [*compiler, "-shared", *openmp, *objects]
            else:
                # nvcc finds its static runtime; the binary then needs no CUDA library.
                openmp_link = [f"-Xcompiler={flag}" for flag in openmp]
                link = [str(nvcc), "-shared", "--cudart", "static", *openmp_link, *objects]
            if sys.platform == "darwin":
                link += ["-undefined", "dynamic_lookup"]
            output = Path(self.get_ext_fullpath(ext.name))
            output.parent.mkdir(parents=True, exist_ok=True)
            run([*link, "-o", str(output)])
        except RuntimeError as error:
            hint = " (LIFT_FAST_CUDA=0 builds without CUDA, LIFT_FAST_NATIVE=0 without any native code)"
            raise fail(f"the native core does not compile{hint}:\n{error}") from None
        isas = (", ".join(reversed(ISA_FLAGS)) if X86 else "baseline") + ("" if openmp else ", no OpenMP")
        if nvcc is not None:
            print(f"lift_fast: built the native core for the CPU ({isas}) and CUDA for {described}", flush=True)
        else:
            print(f"lift_fast: built the native core for the CPU only ({isas}); no CUDA: {cuda_reason}", flush=True)

    @staticmethod
    def compile(target: Path, command: list[str]) -> None:
        """Run the command unless ``target`` is its result and no source has changed since."""
        stamp, listed = target.with_suffix(".command"), target.with_suffix(".d")
        if stamp.exists() and stamp.read_text() == " ".join(command) and is_fresh(target, listed):
            return
        stamp.unlink(missing_ok=True)
        run([*command, "-MMD", "-MF", str(listed), "-o", str(target)])
        stamp.write_text(" ".join(command))

    def openmp_flags(self, compiler: list[str]) -> list[str]:
        """-fopenmp if the compiler accepts it (Apple's clang does not)."""
        probe = Path(self.build_temp, "openmp.cpp")
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
        try:
            run([*compiler, "-fopenmp", str(probe), "-o", str(probe.with_suffix(".out"))])
        except RuntimeError:
            return []
        return ["-fopenmp"]

    @staticmethod
    def cuda() -> tuple[list[str], list[str], str, Path | None]:
        """Compiler flags, architectures, the reason if there is no CUDA part, and nvcc."""
        wish = choice("LIFT_FAST_CUDA", ("auto", "1", "0"))
        if wish == "0":
            return [], [], "LIFT_FAST_CUDA=0", None
        nvcc, reason = find_nvcc()
        if nvcc is None:
            if wish == "1":
                raise fail(f"LIFT_FAST_CUDA=1, but there is {reason}; install the CUDA toolkit or set CUDA_HOME")
            return [], [], reason, None
        flags, names = architectures(nvcc)
        return flags, names, "", nvcc


if __name__ == "__main__":
    native = choice("LIFT_FAST_NATIVE", ("1", "0")) == "1"
    setup(
        ext_modules=[Extension("lift_fast._C", sources=[])] if native else [],
        cmdclass={"build_ext": BuildNative},
    )
