"""The GPU report's arithmetic, and a rehearsal of the whole command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lift_fast import LiFT

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from bench.gpu.cost import Cost, forward_cost  # noqa: E402
from bench.gpu.state import State  # noqa: E402


def test_cost_of_the_published_network():
    cost = forward_cost(1, 28, 28, 384)
    fine = 4 * 28 * 28
    # Multiplications per fine pixel, counted by hand from the layers' shapes.
    assert cost["upsample"].flops == 2 * 374_784 * fine
    assert cost["head"].flops == 2 * (331_776 + 73_728) * fine
    assert cost["upsample"].bytes == 2 * (784 * (384 + 32) + fine * (32 + 192) + (16 * 416 + 288) * 192)
    assert cost["head"].bytes == 2 * (fine * (192 + 384) + 9 * 192**2 + 192 * 384)


@pytest.mark.parametrize("patch", [8, 16])
def test_encoder_and_head_cost_what_the_plain_graph_does(patch):
    lift = LiFT(32, patch).eval()
    lift.fused = False
    with torch.no_grad(), FlopCounterMode(display=False, depth=10) as counter:
        lift(torch.randn(2, 3, 3 * patch, 5 * patch), torch.randn(2, 15, 32))
    counts = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    cost = forward_cost(2, 3, 5, 32, pool=patch == 16)
    assert cost["image encoder"].flops == counts["LiFT.image_convs_1"] + counts["LiFT.image_convs_2"]
    assert cost["head"].flops == counts["LiFT.up1.conv_1.double_conv.3"] + counts["LiFT.outc"]


def test_floor_is_the_slower_of_the_two():
    assert Cost(100, 10).floor(10, 10) == 10
    assert Cost(100, 10).floor(1000, 1) == 10
    assert Cost(1, 2) + Cost(3, 4) == Cost(4, 6)


def state(tmp_path, budget=100.0):
    return State(tmp_path / "r", torch.device("cpu"), True, budget, 1)


def test_sections_are_skipped_when_the_time_is_spent(tmp_path):
    ran = []
    now = state(tmp_path, budget=5)
    now.run("long", lambda _: ran.append(1), least=60)
    now.run("short", lambda _: ran.append(2), least=1)
    assert ran == [2]
    assert len(now.skipped) == 1
    assert now.skipped[0].startswith("long: ")
    assert now.skipped[0].endswith("it wants 60")


def test_a_failing_section_is_named_and_the_rest_is_kept(tmp_path):
    def fail(_):
        raise RuntimeError("no such thing\nsecond line")

    now = state(tmp_path)
    now.run("good", lambda s: s.results.update(figure=1), least=0)
    now.run("bad", fail, least=0)
    content = json.loads((tmp_path / "r.json").read_text())
    assert content["figure"] == 1
    assert content["failures"] == ["bad: RuntimeError: no such thing"]


def test_goals_are_judged_in_their_direction(tmp_path):
    now = state(tmp_path)
    for value, at_least in ((2.0, True), (2.0, False), (None, True)):
        now.goal("x", value, 1.0, at_least=at_least)
    assert [goal["met"] for goal in now.goals] == [True, False, None]


def report(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.gpu_report", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.slow
def test_rehearsal(tmp_path):
    pytest.importorskip("triton")
    pytest.importorskip("matplotlib")
    done = report("--rehearse", "--out", str(tmp_path / "r"), "--seed", "7")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("0 failures; written to " + f"{tmp_path / 'r'}.json, .md, .png")
    content = json.loads((tmp_path / "r.json").read_text())
    assert content["rehearsal"] is True
    assert content["seed"] == 7
    assert {row["kernel"] for row in content["equality"]} >= {"upsample", "head", "head, normalised", "forward"}
    assert all(row["error"] <= row["limit"] for row in content["equality"])
    assert {row["encoder"] for row in content["image encoders"]} == {"triton"}
    assert {row["what"] for row in content["forward"]} >= {"image encoder", "upsample", "head", "forward"}
    assert all(row["error"] <= row["limit"] for row in content["matching"]["errors"])
    assert {row["what"] for row in content["matching"]["times"]} >= {"nearest bf16, mutual", "nearest fp32"}
    assert {row["what"] for row in content["training"]["times"]} == {"plain float32", "plain autocast", "ours"}
    assert all(row["error"] <= row["limit"] for row in content["training"]["errors"])
    text = (tmp_path / "r.md").read_text()
    assert "## Matching" in text
    assert "## Training step" in text
    assert "REHEARSAL" in text
    assert (tmp_path / "r.png").stat().st_size > 1000


@pytest.mark.slow
def test_a_wrong_kernel_fails_the_report(tmp_path):
    code = f"""
import sys
from bench import gpu_report
from bench.gpu import equality
equality.LIMITS = {{dtype: 1e-12 for dtype in equality.LIMITS}}
sys.exit(gpu_report.main(["--rehearse", "--only", "equality", "--out", {str(tmp_path / "r")!r}]))
"""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAILED  equality: " in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_what_it_asks_for(tmp_path):
    done = report()
    assert done.returncode == 2
    assert "--rehearse runs everything on the CPU, without figures" in done.stderr
    assert "needs --out" in report("--rehearse").stderr
    assert "no section 'nonsense'; there are build, environment, equality" in (
        report("--rehearse", "--out", str(tmp_path / "r"), "--only", "nonsense").stderr
    )
