"""``lift-fast train`` and ``torchrun`` as users start them: options, signals, several processes."""

from __future__ import annotations

import contextlib
import csv
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from training_runs import write_images

from lift_fast.cli import main
from lift_fast.training import stopping

TINY = ["--model", "vit_tiny_patch16_224", "--random-weights", "--layer", "1", "--size", "64", "--batch-size", "4"]
TINY += ["--device", "cpu", "--precision", "float32", "--threads", "1"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("pictures"), 17)


def run(*arguments):
    return main([str(argument) for argument in arguments])


def losses(out):
    with (out / "log.csv").open(newline="") as file:
        return [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]


def start(*arguments, processes=1):
    command = [sys.executable]
    if processes > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", str(port)]
    command += ["-m", "lift_fast", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finish(process):
    try:
        out, err = process.communicate(timeout=600)
    except subprocess.TimeoutExpired:
        # With all that it has started: whoever waits for the tests would wait for those, too.
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, out, err


def test_figures_as_json(folder, tmp_path, capsys):
    assert run("train", folder, "--out", tmp_path, *TINY, "--epochs", 1, "--holdout", "--json", "--quiet") == 0
    captured = capsys.readouterr()
    figures = json.loads(captured.out)
    assert captured.err == ""
    assert (figures["pictures"], figures["held_out"], figures["steps"]) == (16, 1, 4)
    assert figures["lift"] == str(tmp_path / "lift.pth")
    # The result goes straight into another command.
    out = tmp_path / "features"
    assert run(
        "extract", folder / "00.png", "--out", out, *TINY[:5], "--lift", tmp_path / "lift.pth", "--size", 64,
        "--device", "cpu", "--quiet",
    ) == 0  # fmt: skip
    assert np.load(out / "00.npz")["descriptors"].shape == (8, 8, 192)


def test_remarks_go_to_standard_error(folder, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    for path in folder.iterdir():
        (tmp_path / "data" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "data" / "bad.png").write_bytes(b"no image")
    assert run("train", tmp_path / "data", "--out", tmp_path / "o", *TINY[:-6], "--batch-size", 18, "--epochs", 1,
               "--device", "cpu") == 0  # fmt: skip
    captured = capsys.readouterr()
    assert captured.out == ""
    for part in ("18 images, 0 held out", "(random weights)", "epoch 1: mean loss", "bad.png", "after 1 steps"):
        assert part in captured.err, part


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--resume", "--overwrite"], "exclude each other"),
        (["--size", "72"], "image_size (--size) must be a multiple of four patches"),
        (["--batch-size", "99"], "fewer than one batch of 99; give a batch_size (--batch-size) of 17 or less"),
        (
            ["--batch-size", "1"],
            "give a batch_size (--batch-size) of at least 2, or an image_size (--size) of at least",
        ),
        (["--jitter", "2"], "jitter must lie in 0 to 0.5"),
        (["--lr", "0"], "learning_rate must be a positive number"),
        (["--model", "nonsense"], "unknown backbone"),
        (["--weights", "nowhere.pth", "--model", "dino_vits16"], "random_weights"),
        (["--device", "warp"], "does not exist"),
        (["--out", __file__], "is a file; expected a folder for the results"),
        (["--out", f"{__file__}/below"], "Not a directory; give another one"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(folder, tmp_path, capsys, extra, message):
    assert run("train", folder, "--out", tmp_path / "out", *TINY, *extra) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("lift-fast train: ")
    assert "Traceback" not in error


@pytest.mark.parametrize("extra", [["--batch-size", "2"], ["--size", "128"], ["--no-image"]])
def test_the_smallest_batches_that_train(folder, tmp_path, extra):
    options = [*TINY, "--batch-size", "1", *extra, "--max-steps", "1", "--workers", "0", "--quiet"]
    assert run("train", folder, "--out", tmp_path / "out", *options) == 0


def test_the_folder_of_images_receives_no_results(folder, tmp_path, capsys):
    before = sorted(folder.iterdir())
    (tmp_path / "link").symlink_to(folder)
    for out in (folder, tmp_path / "link"):
        assert run("train", folder, "--out", out, *TINY) == 2
        assert "is the folder of the images" in capsys.readouterr().err
    assert sorted(folder.iterdir()) == before


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux to end processes with their parent")
def test_reading_processes_end_with_a_killed_training(folder, tmp_path):
    process = start("train", folder, "--out", tmp_path / "out", *TINY, "--workers", "3", "--epochs", "100000")
    try:
        until = time.monotonic() + 120
        while not (tmp_path / "out" / "log.csv").exists() or len(_children(process.pid)) < 3:
            assert time.monotonic() < until
            assert process.poll() is None
            time.sleep(0.1)
        readers = _children(process.pid)
        process.kill()
        process.wait()
        until = time.monotonic() + 3
        while alive := [pid for pid in readers if _status(pid)[:1] not in ([], ["Z"])]:
            assert time.monotonic() < until, alive
            time.sleep(0.05)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()
        process.stderr.close()


def _children(pid):
    return [int(path.name) for path in Path("/proc").glob("[0-9]*") if _status(path.name)[1:2] == [str(pid)]]


def _status(pid):
    """State and parent of a process, as Linux tells; nothing of one that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return []


def test_a_second_training_in_one_folder_needs_a_word(folder, tmp_path, capsys):
    arguments = ("train", folder, "--out", tmp_path, *TINY, "--max-steps", 1, "--quiet")
    assert run(*arguments) == 0
    assert run(*arguments) == 2
    assert "resume it (--resume), overwrite it (--overwrite), or give another folder (--out)" in capsys.readouterr().err
    assert run(*arguments, "--overwrite") == 0
    assert run(*arguments, "--resume") == 0
    assert run(*arguments, "--resume", "--loss", "l1") == 2
    assert "loss: saved 'cosine', now 'l1'" in capsys.readouterr().err


def test_a_finished_training_says_that_nothing_is_left(folder, tmp_path, capsys):
    arguments = ("train", folder, "--out", tmp_path, *TINY, "--epochs", 1)
    assert run(*arguments, "--quiet") == 0
    assert run(*arguments, "--resume") == 0
    said = capsys.readouterr().err
    assert "complete after 4 steps (1 epochs); nothing to do, give more --epochs\n" in said
    assert "wrote" not in said


def test_divergence_has_its_own_status(folder, tmp_path, capsys):
    assert run("train", folder, "--out", tmp_path, *TINY, "--loss", "l2", "--lr", "1e30", "--quiet") == 1
    assert "use a lower learning rate" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_resume_goes_on_bit_exactly(folder, tmp_path, number):
    # Never reached.
    epochs = 5000
    process = start("train", folder, "--out", tmp_path / "a", *TINY, "--epochs", epochs, "--workers", 1)
    deadline = time.monotonic() + 600
    # The fifth step stands in the log: in the middle of the second epoch.
    while not (tmp_path / "a" / "log.csv").exists() or len(losses(tmp_path / "a")) < 5:
        assert process.poll() is None, finish(process)
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    status, _, err = finish(process)
    assert status == 128 + number, err
    assert f"stopped by {signal.Signals(number).name} after step" in err
    assert "Traceback" not in err
    state = torch.load(tmp_path / "a" / "last.pth", weights_only=True)["progress"]
    assert 5 <= state["step"] < 4 * epochs
    end = 4 * state["epoch"] + 10
    common = ("train", folder, *TINY, "--epochs", epochs, "--max-steps", end, "--quiet", "--workers", 0)
    assert run(*common, "--out", tmp_path / "a", "--resume") == 0
    assert run(*common, "--out", tmp_path / "b") == 0
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    one, other = (torch.load(tmp_path / name / "lift.pth", weights_only=True) for name in "ab")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_second_signal_leaves_at_once():
    code = """
import importlib.util, os, signal, sys
# The module alone: the package would bring PyTorch along.
spec = importlib.util.spec_from_file_location("stopping", sys.argv[2])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
StopSignals = module.StopSignals
# However slow the machine is.
module._ECHO_SECONDS = 3600.0
with StopSignals(echoed=sys.argv[1] == "echoed") as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.number == signal.SIGTERM
    os.kill(os.getpid(), signal.SIGTERM)
    print("still here", flush=True)
assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
"""
    command = [sys.executable, "-c", code]
    alone = subprocess.run([*command, "no", stopping.__file__], capture_output=True, text=True, check=False)
    assert (alone.returncode, alone.stdout) == (-signal.SIGTERM, ""), alone.stderr
    echoed = subprocess.run([*command, "echoed", stopping.__file__], capture_output=True, text=True, check=False)
    assert (echoed.returncode, echoed.stdout) == (0, "still here\n"), echoed.stderr


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no distributed package")
def test_two_processes_with_synchronised_batchnorm_train_as_one(folder, tmp_path):
    common = ("train", folder, *TINY, "--epochs", 2, "--workers", 0, "--sync-batchnorm", "--json")
    process = start(*common, "--out", tmp_path / "two", processes=2)
    # Meanwhile; sync-batchnorm changes nothing in one process.
    assert run(*common, "--out", tmp_path / "one", "--quiet") == 0
    status, out, err = finish(process)
    assert status == 0, err
    # One process prints.
    figures = json.loads(out)
    assert (figures["processes"], figures["steps"], figures["images"]) == (2, 8, 32)
    assert err.count("17 images, 0 held out") == 1
    assert "FutureWarning" not in err
    two, one = np.array(losses(tmp_path / "two")), np.array(losses(tmp_path / "one"))
    assert np.array_equal(two[:, 0], one[:, 0])
    # Adam divides by the root of the gradient's square: rounding may turn a step where that is next to nothing.
    assert np.abs(two[:, 1] - one[:, 1]).max() < 1e-3
    assert np.abs(two[:2, 1] - one[:2, 1]).max() < 1e-5
    a, b = (torch.load(tmp_path / name / "lift.pth", weights_only=True) for name in ("one", "two"))
    assert list(a) == list(b)
    name = "up1.conv_1.double_conv.1.running_var"
    assert torch.allclose(a[name], b[name], rtol=1e-2)


def test_numbers_that_may_be_zero_say_so(folder, tmp_path, capsys):
    for text in ("-1", "many"):
        with pytest.raises(SystemExit):
            run("train", folder, "--out", tmp_path, "--workers", text)
        assert f"expected a whole number of at least 0, got '{text}'" in capsys.readouterr().err


def test_a_training_that_cannot_be_saved_ends_in_one_line(folder, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("lift_fast.training.state.save", full)
    assert run("train", folder, "--out", tmp_path, *TINY, "--max-steps", 1, "--quiet") == 1
    error = capsys.readouterr().err
    assert error.startswith(f"lift-fast train: cannot write to {tmp_path} at step 1: No space left on device. ")
    assert error.count("\n") == 1
    monkeypatch.setattr("numpy.savez", full)
    common = ("extract", folder, *TINY[:-8], "--size", 64, "--device", "cpu", "--quiet")
    assert run(*common, "--out", tmp_path / "f") == 2
    error = capsys.readouterr().err
    assert "00.npz: No space left on device; fix the problem and run the same command again" in error
    assert error.count("\n") == 1


def test_processes_of_extract_wait_for_one_another_as_long_as_it_takes(folder, tmp_path, monkeypatch):
    asked = {}

    def stop(backend, timeout):
        asked.update(backend=backend, timeout=timeout)
        raise ValueError("far enough")

    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.distributed.init_process_group", stop)
    with pytest.raises(ValueError, match="far enough"):
        run("extract", folder, "--out", tmp_path, *TINY[:-8], "--device", "cpu")
    assert asked["backend"] == "gloo"
    assert asked["timeout"].days > 30


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no distributed package")
def test_extract_shares_a_folder_among_processes(folder, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for path in sorted(folder.iterdir())[:5]:
        (data / path.name).write_bytes(path.read_bytes())
    (data / "bad.png").write_bytes(b"no image")
    common = ("extract", data, *TINY[:-8], "--size", 64, "--device", "cpu", "--threads", 1, "--json")
    process = start(*common, "--out", tmp_path / "two", processes=2)
    assert run(*common, "--out", tmp_path / "one", "--quiet") == 1
    status, out, err = finish(process)
    # The image that cannot be read, whichever process met it.
    assert status == 1
    figures = json.loads(out)
    assert (figures["written"], figures["kept"], len(figures["failed"])) == (5, 0, 1)
    assert "bad.png" in figures["failed"][0]
    assert err.count("skipped: ") == 1
    for file in sorted((tmp_path / "one").iterdir()):
        one, two = np.load(file)["descriptors"], np.load(tmp_path / "two" / file.name)["descriptors"]
        assert np.allclose(one, two, rtol=1e-4, atol=1e-5)
    assert len(list((tmp_path / "two").iterdir())) == 5
