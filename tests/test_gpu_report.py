"""The GPU report's arithmetic, its reaction to a kernel that kills its process, and a rehearsal of the whole."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lift_fast import LiFT

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from bench import gpu_report  # noqa: E402
from bench.gpu import checks, crew, output, predictions, stages  # noqa: E402
from bench.gpu.context import Context, Job, Skip  # noqa: E402
from bench.gpu.cost import Cost, forward_cost  # noqa: E402
from bench.gpu.state import Listener, State  # noqa: E402


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


def state(tmp_path):
    return State(tmp_path / "r", True, 100.0, 1)


def report(*arguments, script=False):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = ["bash", "bench/gpu_quarter_hour.sh"] if script else [sys.executable, "-m", "bench.gpu_report"]
    # The script takes the python3 on the path.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    return subprocess.run(
        [*command, *arguments], cwd=ROOT, capture_output=True, text=True, check=False, env=environment
    )


def test_every_row_is_on_disk_when_it_is_known(tmp_path):
    now = state(tmp_path)
    listener = Listener(now, "smoke")
    listener.row("head", {"what": "head", "dtype": "bf16", "case": "(1,)", "error": 0.5, "limit": 0.1})
    listener.row("head", {"what": "head", "dtype": "bf16", "case": "(2,)", "error": float("nan"), "limit": 0.1})
    listener.failed("upsample", "illegal access")
    # JSON has no NaN.
    content = json.loads((tmp_path / "r.json").read_text(), parse_constant=pytest.fail)
    assert [row["what"] for row in content["smoke"]] == ["head", "head"]
    assert content["smoke"][1]["error"] == "nan"
    # NaN is above every limit.
    assert content["failures"] == [
        "smoke: head (1,) bf16: error 5.000e-01 > 1e-01",
        "smoke: head (2,) bf16: error nan > 1e-01",
        "smoke: upsample: illegal access",
    ]


def test_a_dot_in_the_files_name_is_kept(tmp_path):
    State(tmp_path / "h100, torch 2.11", True, 100.0, 1).write()
    assert [path.name for path in tmp_path.iterdir()] == ["h100, torch 2.11.json"]


def test_smoke_lines_begin_with_the_worst():
    rows = [
        {"what": "good", "dtype": "bf16", "case": "a", "error": 1e-3, "limit": 1e-2},
        {"what": "bad", "dtype": "fp32", "case": "b", "error": 1e-4, "limit": 1e-3},
        {"what": "bad", "dtype": "fp32", "case": "c", "error": 9e-4, "limit": 1e-3},
    ]
    lines = output.smoke_lines(rows)
    assert [line.split()[4] for line in lines] == ["bad", "good"]
    assert "at c  (2 cases)" in lines[0]


def test_predictions_stand_beside_outcomes():
    rows = [
        {"what": "ceiling: bf16 products", "ms": 2.0, "flops": 1600e9},
        {"what": "forward B64 448", "ms": 1.0, "flops": 480e9},
        {"what": "forward B1 448", "ms": 0.040},
    ]
    lines = {p.what: p.line(predictions.Figures(rows)) for p in predictions.table()}
    share = lines["forward B64 448, of the products' ceiling"]
    assert share["outcome"] == pytest.approx(0.6)
    assert share["met"] is True
    missed = lines["forward B1 448, graph replay"]
    assert (missed["outcome"], missed["goal"], missed["met"]) == (40.0, "<= 35", False)
    unknown = lines["nearest bf16, 50,176^2"]
    assert unknown["outcome"] is None
    assert unknown["met"] is None


# Stand-ins for jobs whose kernels are broken, run by real workers.
BROKEN = """
import os, signal, sys, time
from bench.gpu import stages, worker
from bench.gpu.context import Job, Skip
def good(context):
    yield {"what": "good", "seed": context.seed}
def wrong(context):
    yield {"what": "half"}
    raise RuntimeError("no such thing\\nsecond line")
def killed(context):
    yield {"what": "before the crash"}
    os.abort()
def devoured(context):
    yield {"what": "before the memory is spent"}
    os.kill(os.getpid(), signal.SIGKILL)
def left(context):
    yield {"what": "before it leaves"}
    os.write(2, b"\\xff is in no encoding")
    os._exit(0)
def stuck(context):
    yield {"what": "before it hangs"}
    time.sleep(600)
def skipped(context):
    raise Skip("not here")
    yield
functions = (good, wrong, killed, devoured, left, stuck, skipped)
jobs = [Job(f.__name__, f, 0.05) for f in functions] + [Job("last", good, 0.05)]
stages.jobs_of = lambda stage, rehearse: {"all": jobs}
if __name__ == "__main__":
    sys.exit(worker.main())
"""


@pytest.mark.slow
def test_a_broken_kernel_ends_only_itself(tmp_path, monkeypatch):
    script = tmp_path / "broken.py"
    script.write_text(BROKEN)
    real = subprocess.Popen

    def start(command, **options):
        command = [sys.executable, str(script), *command[3:]]
        return real(command, **{**options, "env": {**options["env"], "PYTHONPATH": str(ROOT)}})

    monkeypatch.setattr(crew.subprocess, "Popen", start)
    jobs = [
        Job(name, None, 0.05) for name in ("good", "wrong", "killed", "devoured", "left", "stuck", "skipped", "last")
    ]
    now = State(tmp_path / "r", True, 500.0, 7)
    crew.run_group(jobs, Listener(now, "x"), patience=1)
    found = [(row["job"], row["what"]) for row in now.rows("x")]
    assert found == [
        ("good", "good"),
        ("wrong", "half"),
        ("killed", "before the crash"),
        ("devoured", "before the memory is spent"),
        ("left", "before it leaves"),
        ("stuck", "before it hangs"),
        ("last", "good"),
    ]
    assert now.rows("x")[0]["seed"] == 7
    assert now.failures[0] == "x: wrong: RuntimeError: no such thing ... second line"
    assert now.failures[1].startswith("x: killed: the worker ended with status -6")
    assert now.failures[2].startswith("x: devoured: the worker ended with status -9")
    assert now.failures[3].startswith("x: left: the worker ended with status 0: ")
    assert now.failures[4] == "x: stuck: it did not end in time"
    assert len(now.failures) == 5
    assert now.skipped == ["x: skipped: not here"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone ends children with their parent")
def test_workers_end_with_a_report_that_is_killed(tmp_path):
    (tmp_path / "broken.py").write_text(BROKEN)
    rows = tmp_path / "rows"
    code = (
        "import subprocess, sys\n"
        f"command = [sys.executable, {str(tmp_path / 'broken.py')!r}, '--stage', 'x', '--seed', '1', '--rehearse']\n"
        f"worker = subprocess.Popen([*command, '--out', {str(rows)!r}, 'stuck'])\n"
        "print(worker.pid, flush=True)\n"
        "worker.wait()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    worker = int(parent.stdout.readline())
    try:
        wait_for(lambda: rows.exists() and "before it hangs" in rows.read_text())
        parent.kill()
        parent.wait()
        # The process that adopts it may never reap it.
        wait_for(lambda: state_of(worker) in ("Z", None))
    finally:
        parent.kill()
        if state_of(worker) is not None:
            os.kill(worker, signal.SIGKILL)


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def state_of(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return None


def test_jobs_that_the_time_leaves_no_room_for_are_named(tmp_path):
    now = State(tmp_path / "r", False, 5.0, 1)
    crew.run_group([Job("long", None, 60)], Listener(now, "figures"))
    assert now.skipped == ["figures: long: no time left: it takes 60 s"]


def test_jobs_have_names_of_their_own():
    for stage in ("smoke", "figures", "profile"):
        for rehearse in (True, False):
            names = [job.name for jobs in stages.jobs_of(stage, rehearse).values() for job in jobs]
            assert len(names) == len(set(names))


def test_the_build_leaves_the_number_of_compilers_to_setup(tmp_path, monkeypatch):
    given = []

    def run(command, **options):
        given.append(options["env"])
        return subprocess.CompletedProcess(command, 0, "lift_fast: built\n", "")

    monkeypatch.delenv("MAX_JOBS", raising=False)
    monkeypatch.setattr(subprocess, "run", run)
    gpu_report.build(state(tmp_path))
    assert [environment["TORCH_CUDA_ARCH_LIST"] for environment in given] == ["9.0"]
    assert "MAX_JOBS" not in given[0]


def test_the_profilers_table_is_read():
    text = "\n".join([
        "==PROF== Connected",
        '"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"',
        '"0","upsample_kernel(int)","SpeedOfLight","Duration","us","260.1"',
        f'"0","upsample_kernel(int)","Command line profiler metrics","{checks.TENSOR}","%","61.5"',
        '"0","upsample_kernel(int)","SpeedOfLight","Something else","%","1"',
    ])  # fmt: skip
    assert checks.parse_profile(text) == {"upsample_kernel": {"Duration": "260.1 us", checks.TENSOR: "61.5 %"}}
    assert checks.parse_profile("no table") == {}


KERNELS = ("upsample", "head", "head, normalised", "forward", "image encoder, Triton", "nearest", "propagate_labels")
FIGURES = (
    "ceiling: copy", "forward B1 32", "forward B1 32, host alone", "upsample B1 32", "head B1 32",
    "nearest bf16, mutual", "nearest fp32", "chunked matmul + max, bf16", "cosine loss fp32", "cosine loss bf16",
    "training step, ours", "pair to mutual matches, demonstration pair, photographs, graph",
    "interpolate + argmax, 30 points", "keys of ViT-S/16 B2 32, graph", "extract_images 32, an image",
)  # fmt: skip


def test_an_encoder_that_the_package_leaves_aside_is_no_failure(monkeypatch):
    """The cases that Triton does not serve in float32 on a GPU are skipped with the reason, the others run."""
    pytest.importorskip("triton")
    from bench.gpu import smoke

    monkeypatch.setattr(smoke, "encoder_error", lambda *arguments, **options: 0.0)
    context = Context(torch.device("cuda", 0), rehearse=False, seed=1)
    for dtype, served in ((torch.float32, [8, 8]), (torch.bfloat16, [16, 8, 16, 8])):
        rows, skipped = [], ""
        try:
            for row in smoke._run_encoder("Triton", dtype, context):
                rows.append(row)
        except Skip as reason:
            skipped = str(reason)
        assert [row["case"] for row in rows] == [str(case) for case in smoke.ENCODERS if case[0] in served]
        assert ("(16, 37, 41, 2): " in skipped) == (16 not in served)
        assert ("gave wrong results on an H200" in skipped) == (16 not in served)


@pytest.mark.slow
def test_rehearsal_of_the_quarter_of_an_hour(tmp_path):
    """Both calls of the script: the second has every stage of the first."""
    pytest.importorskip("triton")
    pytest.importorskip("matplotlib")
    done = report("second", "--rehearse", "--out", str(tmp_path / "r"), "--seed", "7", script=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"0 failures; written to {tmp_path / 'r'}.json, .md, .png" in done.stdout
    assert "Every step runs" in done.stdout
    assert "Next: " not in done.stdout
    content = json.loads((tmp_path / "r.json").read_text())
    assert content["rehearsal"] is True
    assert content["seed"] == 7
    assert set(content["seconds"]) >= set(stages.STAGES)
    assert content["warm-up"]["compiled"] == 4
    smoke, figures = content["smoke"], content["figures"]
    for dtype in ("bf16", "fp16", "fp32"):
        assert {row["what"] for row in smoke if row["dtype"] == dtype} >= set(KERNELS[:-1])
    assert {row["what"] for row in smoke} >= {KERNELS[-1], "capture", "extract_images", "cosine loss, channels_last"}
    assert {row["what"] for row in figures} >= set(FIGURES)
    # What a rehearsal leaves out, and nothing else.
    allowed = ("needs a CUDA device", "compilation takes minutes", "not installed", "compile for minutes", "runs Gluon")
    assert [entry for entry in content["skipped"] if not any(reason in entry for reason in allowed)] == []
    names = [job.name for jobs in stages.jobs_of("figures", True).values() for job in jobs]
    for name in names:
        done_here = any(row["job"] == name for row in figures)
        assert done_here or any(f": {name}: " in entry for entry in content["skipped"]), name
    assert all(line["outcome"] is None for line in content["predictions"])
    text = (tmp_path / "r.md").read_text()
    assert "## Predictions and outcomes" in text
    assert "REHEARSAL" in text
    assert (tmp_path / "r.png").stat().st_size > 1000


@pytest.mark.slow
def test_a_wrong_kernel_fails_the_report(tmp_path):
    """Limits that nothing can meet simulate a wrong kernel; one is enough."""
    pytest.importorskip("triton")
    wrong = tmp_path / "sitecustomize.py"
    wrong.write_text(
        "import sys\n"
        "if any(name.startswith('bench.gpu') for name in sys.orig_argv):\n"
        "    from bench.gpu import smoke\n"
        "    smoke.LIMITS = {dtype: 1e-12 for dtype in smoke.LIMITS}\n"
        "    groups = smoke.groups\n"
        "    def heads(rehearse):\n"
        "        found = [job for jobs in groups(rehearse).values() for job in jobs]\n"
        "        return {'all': [job for job in found if job.name.startswith('head')]}\n"
        "    smoke.groups = heads\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "bench.gpu_report", "--rehearse", "--stage", "smoke", "--out", str(tmp_path / "r")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAILED  smoke: head (32, 16, 2, 1, 1) fp32: error" in done.stdout


def test_a_report_without_time_says_what_it_skipped(tmp_path):
    done = report("first", "--rehearse", "--out", str(tmp_path / "r"), "--budget", "0", script=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped smoke: 0 s of 0 left" in done.stdout
    assert f"written to {tmp_path / 'r'}.json, .md\n" in done.stdout
    assert "the lines that begin with skipped say what did not run" in done.stdout


def test_the_script_says_what_it_takes():
    done = report("third", script=True)
    assert done.returncode == 2
    assert "usage: bash bench/gpu_quarter_hour.sh [first|second]" in done.stderr
    assert "got 'third'" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_what_it_asks_for():
    done = report()
    assert done.returncode == 2
    assert "--rehearse runs everything on the CPU, without figures" in done.stderr
    assert "needs --out" in report("--rehearse").stderr
    assert "--out: " in report("--rehearse", "--out", str(Path(__file__) / "r")).stderr
    assert "invalid choice: 'nonsense'" in report("--rehearse", "--stage", "nonsense").stderr
    done = report(script=True)
    assert done.returncode == 2
    assert "The report did not run" in done.stdout
    assert "Next: " not in done.stdout


def test_where_it_cannot_write(tmp_path):
    (tmp_path / "file").touch()
    for out, message in (
        (tmp_path / "file" / "r", "is a file; expected a folder"),
        (tmp_path, "is a folder; expected the stem of files"),
    ):
        done = report("--rehearse", "--out", str(out))
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr
