"""Resuming: a saved state is checked as a whole before a run goes on from it, and a folder belongs to one run."""

from __future__ import annotations

import copy
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial

import numpy as np
import pytest
import torch
import training_runs
from PIL import Image

from lift_fast import LiFT, locks
from lift_fast.training import train
from lift_fast.training.schema import check_state

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """20 images, five batches in an epoch."""
    root = tmp_path_factory.mktemp("pictures")
    values = np.random.default_rng(0)
    for number in range(20):
        Image.fromarray(values.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(root / f"{number:02d}.bmp")
    return root


settings = partial(training_runs.settings, use_image=False, max_steps=STEPS)


@pytest.fixture(scope="module")
def saved(folder, tmp_path_factory):
    """What a run of seven steps has saved: one epoch and two batches."""
    out = tmp_path_factory.mktemp("run")
    train(settings(folder, out), quiet=True)
    return out


def state_of(saved):
    return torch.load(saved / "last.pth", weights_only=True)


def put(path, value):
    """Set the entry ``path`` of a state; a class removes it."""

    def change(state):
        *outer, last = path
        for name in outer:
            state = state[name]
        if value is KeyError:
            del state[last]
        else:
            state[last] = value(state[last]) if callable(value) else value

    return change


def test_the_state_itself_resumes(folder, saved, tmp_path):
    torch.save(state_of(saved), tmp_path / "last.pth")
    figures = train(settings(folder, tmp_path), resume=True, quiet=True)
    assert (figures["resumed"], figures["steps"]) == (STEPS, STEPS)


NOT_WHOLE = "a whole number of at least"
MOMENT = ("optimizer", "state", 0)
CHANGES = [
    (put(["format"], KeyError), "format"),
    (put(["format"], True), "format"),
    (put(["format"], torch.ones(2)), "format a tensor of shape"),
    *((put([part], KeyError), f"{part} missing") for part in ("lift", "optimizer", "scaler", "progress", "random")),
    (put(["description"], KeyError), "description missing"),
    (put(["module.lift"], {}), "not a valid training state: module.lift unknown"),
    (put(["description"], [1]), "entry description is a list"),
    (put(["description", "loss"], torch.zeros(2)), "description.loss is a tensor"),
    (put(["description", "loss"], KeyError), "loss: saved None, now 'cosine'"),
    (put(["description", "loss"], "x" * 10**6), "loss: saved 'xxx"),
    (put(["description", "picture_sizes"], "0"), r"picture_sizes \(other files under the same names\): saved '0'"),
    (put(["lift"], None), "entry lift is a NoneType"),
    (put(["lift", "outc.weight"], KeyError), r"lift does not fit .*1 missing \(outc.weight\)"),
    (put(["lift", "outc.weight"], lambda w: w[:5]), r"outc.weight: file \[5, 96, 1, 1\], model \[192, 96, 1, 1\]"),
    (put(["lift", "outc.weight"], lambda w: w * np.nan), "'outc.weight' are not finite"),
    (put(["lift", "outc.weight"], lambda w: w.to_sparse()), "'outc.weight' is sparse"),
    (put(["lift", "outc.weight"], lambda w: w.long()), "'outc.weight' is torch.int64"),
    (put(["progress", "step"], -1), f"progress.step is '-1'; expected {NOT_WHOLE} 1"),
    (put(["progress", "step"], 0), f"progress.step is '0'; expected {NOT_WHOLE} 1"),
    (put(["progress", "step"], 7.0), "progress.step is '7.0'"),
    (put(["progress", "step"], 10**70), "progress.step is an int"),
    (put(["progress", "step"], 8), "epoch '1', batch '2' and step '8' do not agree"),
    (put(["progress", "batch"], 10**18), "batch '1000000000000000000' and step '7' do not agree"),
    (put(["progress", "batch"], True), "progress.batch is 'True'"),
    (put(["progress", "epoch"], torch.tensor(1)), "progress.epoch is a tensor"),
    (put(["progress", "epoch"], KeyError), "progress lacks epoch"),
    (put(["progress", "surplus"], 1), "progress has an unknown entry surplus"),
    (put(["progress", "losses"], []), "progress.losses is a list; expected a list of 1 finite numbers"),
    (put(["progress", "losses"], [float("nan")]), "progress.losses"),
    (put(["progress", "losses"], ["a"]), "progress.losses"),
    (put(["progress", "epoch_sum"], float("inf")), "progress.epoch_sum is 'inf'"),
    (put(["progress", "unreadable"], {"a": "b"}), "progress.unreadable"),
    (put(["optimizer", "state"], {}), "optimizer.state is an empty dictionary"),
    (put(["optimizer", "param_groups"], []), "optimizer.param_groups is a list"),
    (put(["optimizer", "param_groups", 0, "lr"], float("nan")), "param_groups.lr is 'nan'; expected 0.001"),
    (put(["optimizer", "param_groups", 0, "lr"], KeyError), "param_groups lacks lr"),
    (put(["optimizer", "param_groups", 0, "betas"], [2, 0.9]), "param_groups.betas"),
    (put(["optimizer", "param_groups", 0, "betas"], torch.zeros(2)), "param_groups.betas"),
    (put(["optimizer", "param_groups", 0, "params"], [0]), "param_groups.params"),
    (put(["optimizer", "param_groups", 0, "params"], [torch.zeros(2)]), "param_groups.params"),
    (put([*MOMENT], KeyError), "optimizer.state is a dictionary"),
    (put([*MOMENT], 3), "optimizer.state.0 is an int"),
    (put([*MOMENT, "exp_avg"], KeyError), "optimizer.state.0 lacks exp_avg"),
    (put([*MOMENT, "exp_avg"], lambda m: m[:1]), "state.0.exp_avg is a tensor of shape .* expected torch.float32 of"),
    (put([*MOMENT, "exp_avg"], lambda m: m.double()), "state.0.exp_avg"),
    (put([*MOMENT, "exp_avg"], lambda m: m * np.inf), "optimizer.state.0.exp_avg' are not finite"),
    (put([*MOMENT, "exp_avg_sq"], lambda m: m - 1), "exp_avg_sq contains negative"),
    (put([*MOMENT, "step"], lambda m: m + 1), "state.0.step .* expected the run's steps, 7"),
    (put([*MOMENT, "step"], lambda m: m.expand(2).clone()), "state.0.step"),
    (put([*MOMENT, "step"], 7), "entry 'optimizer.state.0.step' is an int"),
    (put(["scaler"], {"scale": 1.0}), "scaler has an unknown entry scale"),
    (put(["random", "torch"], lambda s: s[:100]), "random.torch is a tensor of shape .100.; expected 5056 bytes"),
    (put(["random", "torch"], lambda s: s.float()), "random.torch"),
    (put(["random", "torch"], lambda s: s * 0 + 255), "random.torch is not a valid state of that random generator"),
    (put(["random", "torch"], KeyError), "random lacks torch"),
    (put(["random", "python"], (3, (1, 2), None)), "random.python is not a valid state"),
    (put(["random", "python"], lambda s: (*s[:2], "x")), "random.python is not a valid state"),
    (put(["random", "numpy", 1], lambda s: s[:9]), "random.numpy is not a valid state"),
    (put(["random", "numpy", 1], lambda s: -s - 1), "random.numpy is not a valid state"),
    (put(["random", "numpy", 0], "Philox"), "random.numpy is not a valid state"),
    (put(["random", "numpy"], []), "random.numpy is not a valid state"),
    (put(["random", "cuda"], None), "random.cuda is 'None'; expected a list"),
    (put(["random", "cuda"], [3]), "entry 'random.cuda' is an int"),
]


@pytest.mark.parametrize("index", range(len(CHANGES)))
def test_a_state_that_cannot_be_is_refused(index, folder, saved, tmp_path):
    change, words = CHANGES[index]
    content = state_of(saved)
    change(content)
    torch.save(content, tmp_path / "last.pth")
    before = random.getstate()
    with pytest.raises(ValueError, match=words) as caught:
        train(settings(folder, tmp_path, max_steps=STEPS + 1), resume=True, quiet=True)
    text = str(caught.value)
    assert text.startswith(str(tmp_path / "last.pth"))
    assert "\n" not in text
    assert len(text) < 1000
    # Nothing has begun: no file written, no generator set.
    assert os.listdir(tmp_path) == ["last.pth"]
    assert random.getstate() == before


def test_states_of_compiled_networks_and_of_other_versions_resume(folder, saved, tmp_path):
    content = state_of(saved)
    content["lift"] = {f"_orig_mod.{name}": value for name, value in content["lift"].items()}
    # Of a version that kept names alone, on a PyTorch with an option less and one with another.
    for name in ("picture_sizes", "picture_times"):
        del content["description"][name]
    del content["optimizer"]["param_groups"][0]["maximize"]
    content["optimizer"]["param_groups"][0]["novelty"] = 3
    torch.save(content, tmp_path / "last.pth")
    train(settings(folder, tmp_path, max_steps=STEPS + 1), resume=True, quiet=True)
    train(settings(folder, tmp_path / "straight", max_steps=STEPS + 1), quiet=True)
    one, other = (torch.load(path / "lift.pth", weights_only=True) for path in (tmp_path, tmp_path / "straight"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert one.keys() == other.keys()


def test_a_scaler_that_left_steps_out(saved, tmp_path):
    """float16 on a GPU leaves out steps that overflow; the optimiser then counts fewer than the run."""
    lift = LiFT(192, 16, use_image=False)
    optimizer = torch.optim.Adam(lift.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)

    def check(**changes):
        content = copy.deepcopy(state_of(saved))
        content["scaler"] = {**scaler.state_dict(), "scale": 3.0, "_growth_tracker": 5, **changes}
        for entry in content["optimizer"]["state"].values():
            entry["step"] -= 2
        check_state(content, tmp_path / "last.pth", optimizer, scaler, 5)

    check()
    for name, value in (("scale", 0.0), ("scale", float("nan")), ("_growth_tracker", -1), ("growth_factor", 1.5)):
        with pytest.raises(ValueError, match=f"scaler.{name} is"):
            check(**{name: value})


def copied(folder, target):
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
        os.utime(target / path.name, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    return target


def test_other_images_under_the_same_names_are_noticed(folder, saved, tmp_path, capsys):
    content = state_of(saved)
    torch.save(content, tmp_path / "last.pth")
    data = copied(folder, tmp_path / "data")
    train(settings(data, tmp_path), resume=True)
    assert "have been rewritten since" not in capsys.readouterr().err
    # A copy, a checkout or a touch changes no more than the times.
    os.utime(data / "03.bmp")
    train(settings(data, tmp_path), resume=True)
    assert "have been rewritten since, with the same names and sizes" in capsys.readouterr().err
    Image.new("RGB", (70, 70)).save(data / "03.bmp")
    with pytest.raises(ValueError, match=r"picture_sizes \(other files under the same names\): saved"):
        train(settings(data, tmp_path), resume=True, quiet=True)


def test_a_damaged_log_is_no_hindrance(folder, saved, tmp_path):
    torch.save(state_of(saved), tmp_path / "last.pth")
    log = (saved / "log.csv").read_bytes()
    (tmp_path / "log.csv").write_bytes(
        log + b"\xb2,1,1,1,1,1,1\r\n\x00\xff," + b"9" * 200_000 + b"\n" + b"9" * 30 + b",,,,,,"
    )
    train(settings(folder, tmp_path), resume=True, quiet=True)
    assert (tmp_path / "log.csv").read_bytes() == log


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("device", ["meta", "cuda"])
def test_defaults_of_the_program_change_no_bit(dtype, device, folder, saved, tmp_path):
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            train(settings(folder, tmp_path, max_steps=3, workers=1), quiet=True)
            train(settings(folder, tmp_path), resume=True, quiet=True)
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(torch.float32)
    found, expected = state_of(tmp_path), state_of(saved)
    assert found["progress"]["losses"] == expected["progress"]["losses"]
    for index, entry in expected["optimizer"]["state"].items():
        for name, value in entry.items():
            assert torch.equal(found["optimizer"]["state"][index][name], value)
            assert found["optimizer"]["state"][index][name].dtype == value.dtype


HOLD = """
    import sys, time
    from pathlib import Path
    from lift_fast.locks import reserved
    with reserved(Path(sys.argv[1]), "training"):
        print("held", flush=True)
        time.sleep(600)
"""


def hold(folder):
    """Another process that holds ``folder``."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLD), str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def end(process):
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}])
def test_a_folder_belongs_to_one_training(options, folder, tmp_path):
    process = hold(tmp_path)
    try:
        words = rf"another training \(process {process.pid} on .*\) writes to .*; end it, or give another folder$"
        with pytest.raises(ValueError, match=words):
            train(settings(folder, tmp_path), quiet=True, **options)
        assert [path.name for path in tmp_path.iterdir()] == [".lift_fast-lock"]
    finally:
        end(process)
    # SIGKILL leaves the file, and no lock.
    assert (tmp_path / ".lift_fast-lock").exists()
    train(settings(folder, tmp_path, max_steps=1), quiet=True, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pth", "lift.pth", "log.csv"]


def test_a_training_that_is_killed_leaves_its_folder_free(folder, tmp_path):
    command = [
        *(
            sys.executable,
            "-m",
            "lift_fast",
            "train",
            folder,
            "--out",
            tmp_path,
            "--model",
            training_runs.TINY["model"],
        ),
        *("--random-weights", "--layer", "1", "--size", "64", "--batch-size", "4", "--device", "cpu", "--no-image"),
        *("--precision", "float32", "--threads", "1", "--quiet", "--workers", "2"),
    ]
    command = [str(part) for part in command]
    process = subprocess.Popen([*command, "--epochs", "5000", "--save-every", "1"], start_new_session=True)
    deadline = time.monotonic() + 300
    while not (tmp_path / "last.pth").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    second = subprocess.run([*command, "--resume"], capture_output=True, text=True, check=False)
    assert second.returncode == 2
    assert second.stderr.startswith(f"lift-fast train: another training (process {process.pid} on ")
    assert second.stderr.count("\n") == 1
    # Alone: the processes that read images live on for a while, and must not hold the lock.
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    step = state_of(tmp_path)["progress"]["step"]
    leftover = tmp_path / ".last.0123abcd.lift_fast-tmp.pth"
    leftover.write_bytes(b"half")
    more = ["--epochs", "5000", "--max-steps", str(step + 1), "--resume"]
    third = subprocess.run([*command, *more], capture_output=True, text=True, check=False)
    assert (third.returncode, third.stderr) == (0, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pth", "lift.pth", "log.csv"]


def test_without_locks_the_process_id_decides(folder, tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(locks.fcntl, "flock", unsupported)
    one_step = settings(folder, tmp_path, max_steps=1)
    process = hold(tmp_path)
    owner = (tmp_path / ".lift_fast-lock").read_text()
    try:
        assert owner.startswith(f"process {process.pid} on ")
        with pytest.raises(ValueError, match=rf"process {process.pid} on .*if that process no longer runs, delete"):
            train(one_step, quiet=True)
    finally:
        end(process)
    assert (tmp_path / ".lift_fast-lock").read_text() == owner
    train(one_step, quiet=True)
    assert not (tmp_path / ".lift_fast-lock").exists()
    # Of another machine nobody knows.
    (tmp_path / ".lift_fast-lock").write_text("process 1 on elsewhere")
    with pytest.raises(ValueError, match=r"another training \(process 1 on elsewhere\).*delete"):
        train(one_step, overwrite=True, quiet=True)
    (tmp_path / ".lift_fast-lock").write_text("")
    train(one_step, overwrite=True, quiet=True)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: os.symlink("/etc/passwd", path)])
def test_a_lock_file_that_is_none(make, folder, tmp_path):
    make(tmp_path / ".lift_fast-lock")
    with pytest.raises(ValueError, match=r"lift_fast-lock cannot be locked; delete it"):
        train(settings(folder, tmp_path), quiet=True)
    assert (tmp_path / ".lift_fast-lock").lstat()
