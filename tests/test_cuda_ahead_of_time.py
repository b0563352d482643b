"""Every CUDA source, compiled for absent GPUs: no warnings, no spills, products on tensor cores."""

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import compiled
import pytest

SOURCES = sorted((compiled.ROOT / "csrc" / "cuda").glob("*.cu"))
# The kernels fill all registers; another compiler may need a few more bytes.
TUNED_FOR, ELSEWHERE = "release 13.0", 64
# Most static shared memory of a block, in addition to the dynamic part that the launcher fits to the device.
STATIC_SHARED = 1024
pytestmark = pytest.mark.slow


def nvidia_tool(name):
    """A program of the CUDA toolkit, or Triton's own copy."""
    triton = pytest.importorskip("triton")
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    found = str(bundled) if bundled.is_file() else shutil.which(name)
    if found is None:
        pytest.skip(f"needs {name}")
    return found


@pytest.fixture(scope="module", params=[80, 90])
def cubins(request):
    """{source: its code for one architecture}."""
    compiler = compiled.tool("nvcc")
    flags = ["-std=c++17", "-O3", "-DNDEBUG", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Werror"]
    flags += [f"-arch=sm_{request.param}", '-DLIFT_FAST_CUDA_ARCHITECTURES="one"', f"-I{compiled.ROOT / 'csrc'}"]

    def cubin(source):
        def make(target):
            assert not compiled.run([compiler, *flags, "-cubin", source, "-o", target]).strip()

        name = f"{source.stem}.sm_{request.param}.cubin"
        return compiled.artifact(name, [compiled.version(compiler), *flags], make)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip((source.stem for source in SOURCES), pool.map(cubin, SOURCES), strict=True))


def resources(cubin):
    """{kernel: {REG, STACK, SHARED, LOCAL}}."""
    command = [nvidia_tool("cuobjdump"), "--dump-resource-usage", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"Function (\S+):\s+(REG:.*)", text)
    return {name: {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage)} for name, usage in found}


def test_nothing_spills(cubins):
    limit = 0 if TUNED_FOR in compiled.version(compiled.tool("nvcc")) else ELSEWHERE
    kernels = [(name, usage) for cubin in cubins.values() for name, usage in resources(cubin).items()]
    assert len(kernels) >= 29
    # Some addresses of the streaming image encoder, used once for every row or less often.
    streams = re.compile("image_encoder_kernel.*EncoderCutE1")
    worst = [(name, usage) for name, usage in kernels if usage["STACK"] > (96 if streams.search(name) else limit)]
    assert worst == []
    assert [one for one in kernels if one[1]["LOCAL"]] == []
    assert [one for one in kernels if one[1]["SHARED"] > STATIC_SHARED] == []


def test_two_blocks_fit_in_the_registers(cubins):
    """Of the 16-bit image encoders; eight warps a block."""
    usage = {name: one["REG"] for name, one in resources(cubins["image_encoder"]).items()}
    assert len(usage) == 6
    assert all(registers <= 128 for name, registers in usage.items() if "Tf32" not in name)


def test_blocks_of_the_dense_matcher_share_a_multiprocessor(cubins):
    """Registers leave room for 24 warps that match groups and for 32 other warps; spans are few and short work."""
    usage = {name: one["REG"] for name, one in resources(cubins["dense_match"]).items()}
    assert len(usage) == 11
    assert all(
        registers <= (80 if "groups" in name else 64) for name, registers in usage.items() if "spans" not in name
    )


@pytest.mark.parametrize("source", ["image_encoder", "image_encoder_stream", "image_encoder_spread"])
def test_the_image_encoder_runs_on_tensor_cores(source, cubins):
    code = subprocess.run(
        [nvidia_tool("nvdisasm"), "-c", str(cubins[source])], capture_output=True, text=True, check=True
    ).stdout
    kernels = dict(part.split(",", 1) for part in re.split(r"\.section\s+\.text\.", code)[1:])
    assert len(kernels) == 6
    for name, text in kernels.items():
        kind = "16816.F32.BF16" if "Bfloat16" in name else "1688.F32.TF32" if "Tf32" in name else "16816.F32"
        # The step's 64 + 8 + 144 products of the first two convolutions, or those of one of its two rows; TF32 takes
        # twice as many.
        products = 216 if source == "image_encoder" else 32 + 8 + 72
        assert text.count(f"HMMA.{kind} ") >= products * (2 if "Tf32" in name else 1), name
        # Pixels outside the image are not read: their copies are switched off, not only of length zero.
        copies = re.findall(r"LDGSTS\.E\.BYPASS\.128 (.*?);", text)
        assert any(re.search(r", !?P\d", copy) for copy in copies), name
