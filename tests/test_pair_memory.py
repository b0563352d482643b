"""Peak memory of a pair at 896 x 896: at most 1.5 times the weights and 1 GiB, PyTorch's libraries included."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "examples/photographs"
PROGRAM = """
import json, re, sys, torch
from pathlib import Path
from lift_fast import FrozenViT, ViTLiFTExtractor, match_images
from lift_fast.backbones.network import VisionTransformer

torch.manual_seed(0)
# What DINO's file makes of "dino_vits16"; random weights by that name would import timm.
model = VisionTransformer(384, 12, 6, 16, (14, 14)).eval()
for weight in model.parameters():
    torch.nn.init.trunc_normal_(weight, std=0.02)
extractor = ViTLiFTExtractor(
    model=FrozenViT(model), channel=None, patch=None, stride=None, layer=None,
    random_lift=True, device="cpu", silent=True, dtype=getattr(torch, sys.argv[1]),
)
del model
found = match_images(*sys.argv[2:], extractor=extractor, size=(896, 896), normalize="grid")
print(json.dumps({
    "matches": list(found.valid.shape),
    "weights": sum(weight.nbytes for weight in extractor.parameters()),
    # Not ru_maxrss, which begins with the peak of the process that started this one.
    "peak": int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) << 10,
}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_of_a_pair(dtype):
    # In a process of its own; what else runs in this one would count.
    names = [str(FOLDER / name) for name in ("cat.jpg", "cat_second_view.jpg")]
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, dtype, *names], capture_output=True, text=True, timeout=550, check=False
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["matches"] == [896, 896]
    assert found["peak"] <= 1.5 * found["weights"] + (1 << 30), found
