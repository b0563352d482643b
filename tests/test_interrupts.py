"""Ctrl-C in the command line, with real signals: at once, one line, no traceback, nothing half-written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lift_fast import _native

# Without one the native call alone takes many seconds.
SECONDS = 1.0
# A command that works in one native call; files and handlers of its own are put in.
COMMAND = """
import sys, torch, lift_fast
from lift_fast.cli import info, main
from lift_fast._files import atomic_path

def work():
    torch.set_num_threads(1)
    rows = torch.randn(60_000, 64)
    print("working", flush=True)
    lift_fast.nearest(rows, rows, mutual=True)
    return 0

def run(arguments):
    {body}

info.run = run
sys.argv = ["lift-fast", "info"]
sys.exit(main())
"""


def start(*command: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def interrupt(process: subprocess.Popen[str]) -> tuple[float, str]:
    """Seconds until the process has ended, and what it said on stderr."""
    begun = time.perf_counter()
    process.send_signal(signal.SIGINT)
    try:
        said = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    return time.perf_counter() - begun, said


@pytest.mark.parametrize("call", ["lift_fast.nearest(rows, rows, mutual=True)", "torch.linalg.eigvalsh(rows @ rows.T)"])
def test_a_native_call_is_left_at_once(call):
    """The package's own, which asks for signals, and one of PyTorch's, which does not."""
    rows = "60_000, 64" if "nearest" in call else "5000, 5000"
    command = COMMAND.replace("60_000, 64", rows).replace("lift_fast.nearest(rows, rows, mutual=True)", call)
    process = start("-c", command.format(body="return work()"))
    assert process.stdout.readline() == "working\n"
    time.sleep(0.3)
    seconds, said = interrupt(process)
    assert (process.returncode, said) == (130, "\nlift-fast info: interrupted\n")
    assert seconds < SECONDS


def test_what_is_being_written_is_removed(tmp_path):
    body = f"""
    with atomic_path({str(tmp_path / "result.npz")!r}) as temporary:
        temporary.write_bytes(b"half")
        return work()
"""
    process = start("-c", COMMAND.format(body=body))
    assert process.stdout.readline() == "working\n"
    assert len(os.listdir(tmp_path)) == 1
    interrupt(process)
    assert process.returncode == 130
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("delay", [0.0, 0.3, 0.7])
def test_extract_leaves_whole_files_only(delay, tmp_path):
    """With threads that read and write beside the main one."""
    image = Image.fromarray(np.random.default_rng().integers(0, 256, (300, 400, 3), dtype=np.uint8))
    for number in range(300):
        image.save(tmp_path / f"{number}.png", compress_level=0)
    out = tmp_path / "out"
    process = start("-m", "lift_fast", "extract", str(tmp_path), "--out", str(out), "--size", "160", "--no-lift")
    begun = time.monotonic()
    while not (out.is_dir() and any(out.glob("*.npz"))):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() - begun < 60
        time.sleep(0.01)
    time.sleep(delay)
    seconds, said = interrupt(process)
    assert process.returncode == 130
    assert said.endswith("\nlift-fast extract: interrupted\n")
    assert seconds < SECONDS
    names = os.listdir(out)
    assert 1 <= len(names) < 300
    for name in names:
        assert name.endswith(".npz")
        with np.load(out / name) as data:
            assert data["descriptors"].shape == (10, 13, 192)


def test_no_file_is_begun_while_the_process_ends(tmp_path):
    """A file that another thread began after the others were removed would stay behind."""
    code = f"""
import os, threading, time
from lift_fast import _files
def write():
    for number in range(1000000):
        try:
            with _files.atomic_path({str(tmp_path)!r} + f"/{{number}}"):
                pass
        except FileNotFoundError:
            pass
threading.Thread(target=write, daemon=True).start()
time.sleep(0.3)
_files.begin_no_more()
time.sleep(0.1)
before = os.listdir({str(tmp_path)!r})
time.sleep(0.2)
os._exit(7 if before == os.listdir({str(tmp_path)!r}) else 8)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (7, "")
    assert [name for name in os.listdir(tmp_path) if name.startswith(".")] == []


def test_python_code_is_left_at_once_whatever_it_catches():
    body = """
    print("working", flush=True)
    while True:
        try:
            sum(range(100_000))
        except BaseException:
            pass
"""
    process = start("-c", COMMAND.format(body=body))
    assert process.stdout.readline() == "working\n"
    seconds, said = interrupt(process)
    assert (process.returncode, said) == (130, "\nlift-fast info: interrupted\n")
    assert seconds < SECONDS


def test_a_handler_of_the_command_has_its_way():
    body = """
    import signal, time
    came = []
    former = signal.signal(signal.SIGINT, lambda *_: came.append(1))
    print("working", flush=True)
    while not came:
        time.sleep(0.01)
    time.sleep(0.2)
    signal.signal(signal.SIGINT, former)
    print("saved", flush=True)
    return 5
"""
    process = start("-c", COMMAND.format(body=body))
    assert process.stdout.readline() == "working\n"
    process.send_signal(signal.SIGINT)
    out, said = process.communicate(timeout=60)
    assert (process.returncode, out, said) == (5, "saved\n", "")


@pytest.mark.parametrize("delay", [0.15, 0.5, 1.0])
def test_the_first_seconds(delay):
    """PyTorch is being imported, by ``python -m`` before any line of the command line can run."""
    process = start("-X", "importtime", "-m", "lift_fast", "info")
    # Python itself is not ours: from the package's first line on.
    for line in process.stderr:
        if "lift_fast._interrupts" in line:
            break
    time.sleep(delay)
    if process.poll() is not None:
        pytest.skip("the machine is faster than this")
    seconds, said = interrupt(process)
    # Ended by the signal itself, which shells show as 130, or where the command had begun with that status.
    assert process.returncode in (-signal.SIGINT, 130)
    assert "Traceback" not in said
    assert seconds < SECONDS


def test_a_library_keeps_pythons_handler():
    code = "import signal, lift_fast; assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_ignored_signal_stays_ignored():
    """As in what a shell starts in the background."""
    body = """
    import os, signal
    os.kill(os.getpid(), signal.SIGINT)
    return 7
"""
    code = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)" + COMMAND.format(body=body)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (7, "")


CALLS = {
    "nearest": "rows = torch.randn(60_000, 64); call = lambda: lift_fast.nearest(rows, rows)",
    "nearest both ways": "rows = torch.randn(60_000, 64); call = lambda: lift_fast.nearest(rows, rows, mutual=True)",
    "nearest of many batches": "rows = torch.randn(600, 64).repeat(8000, 1, 1);"
    "call = lambda: lift_fast.nearest(rows, rows, k=8)",
    "dense_match": "maps = torch.randn(2, 1, 64, 150, 150);"
    "call = lambda: lift_fast.dense_match(*maps, (1500, 1500), (1500, 1500))",
    "dense_match of points": "maps = torch.randn(2, 1, 64, 300, 300); points = torch.randint(1500, (1, 40_000, 2));"
    "call = lambda: lift_fast.dense_match(*maps, (1500, 1500), (1500, 1500), points=points)",
    "propagate_labels": "rows = torch.randn(200 * 400, 64);"
    "call = lambda: lift_fast.propagate_labels(rows, rows, rows[:, :4], grid=(200, 400), radius=100)",
}
LIBRARY = """
import sys, time, threading, torch, lift_fast
torch.set_num_threads({threads})
{call}
print("working", flush=True)
try:
    call()
except KeyboardInterrupt:
    print(time.time(), flush=True)
    rows = torch.randn(50, 8)
    assert (lift_fast.nearest(rows, rows).index[:, 0] == torch.arange(50)).all()
    print("sound", flush=True)
"""


# Has everything imported, and forks for each line: a program, and the files that it writes to.
NURSERY = """
import json, os, sys, traceback, torch, lift_fast
# One thread: there is none beside it to be lost in a fork.
torch.set_num_threads(1)
# PyTorch imports much at the first call of some functions, and does not recover from an interruption of that.
small = torch.randn(4, 8)
lift_fast.nearest(small, small, mutual=True)
lift_fast.propagate_labels(small, small, small, grid=(2, 2))
for line in sys.stdin:
    code, out, err = json.loads(line)
    child = os.fork()
    if child == 0:
        status = 1
        os.dup2(os.open(out, os.O_WRONLY), 1)
        os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT), 2)
        try:
            exec(code, {"__name__": "__main__"})
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Nursery:
    """Programs of one process that has imported PyTorch and this package."""

    def __init__(self, folder):
        self.folder = folder
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", NURSERY]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def interrupted(self, code: str) -> tuple[float, int, str, str]:
        """When SIGINT was sent to a program that said "working" half a second before; its status and outputs."""
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            os.mkfifo(out)
            self.process.stdin.write(json.dumps([code, str(out), str(err)]) + "\n")
            self.process.stdin.flush()
            child = int(self.process.stdout.readline())
            watchdog = threading.Timer(120, os.kill, (child, signal.SIGKILL))
            watchdog.start()
            with out.open() as said:
                assert said.readline() == "working\n"
                time.sleep(0.5)
                begun = time.time()
                os.kill(child, signal.SIGINT)
                rest = said.read()
            status = int(self.process.stdout.readline())
            watchdog.cancel()
            return begun, status, rest, err.read_text()

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
    found = Nursery(tmp_path_factory.mktemp("nursery"))
    yield found
    found.close()


@pytest.mark.skipif(not _native.can_run()[0], reason="the native core asks; PyTorch does not")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", CALLS)
def test_the_native_core_lets_python_raise(name, threads, nursery):
    """In a program of somebody else's the call ends, and the next one is as right as ever."""
    begun, status, out, said = nursery.interrupted(LIBRARY.format(call=CALLS[name], threads=threads))
    ended, last = out.splitlines()
    assert (status, last, said) == (0, "sound", "")
    assert float(ended) - begun < SECONDS


@pytest.mark.skipif(not _native.can_run()[0], reason="as above")
def test_a_handler_that_does_not_raise_does_not_end_the_call():
    code = """
import os, signal, threading, torch, lift_fast
came = []
signal.signal(signal.SIGINT, lambda *_: came.append(torch.ones(3).sum()))
torch.set_num_threads(2)
rows = torch.randn(20_000, 64)
expected = lift_fast.nearest(rows, rows, mutual=True)
timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
timer.start()
found = lift_fast.nearest(rows, rows, mutual=True)
timer.join()
assert came and all(torch.equal(*pair) for pair in zip(found, expected))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_command_may_be_interrupted_while_pytorch_loads():
    """The command line looks after Ctrl-C before it asks for PyTorch, which takes seconds to load."""
    code = """
import signal, sys
class Watch:
    def find_spec(self, name, path, target=None):
        if name == "torch":
            print(signal.getsignal(signal.SIGINT) is signal.SIG_DFL)
            sys.exit(3)
sys.meta_path.insert(0, Watch())
sys.argv = ["lift-fast", "info"]
from lift_fast.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (3, "True\n"), done.stderr
