"""Writing in a thread: in order, within a bound, and what goes wrong is told where the work is."""

from __future__ import annotations

import threading
import time

import pytest

from lift_fast.cli import written
from lift_fast.cli.written import BackgroundWriter


def writers():
    return [thread for thread in threading.enumerate() if "lift-fast writer" in thread.name]


def test_in_order_beside_the_work():
    came, counted = [], []
    main = threading.get_ident()
    with BackgroundWriter(lambda: counted.append(threading.get_ident())) as writer:
        for number in range(50):
            writer.put(1, lambda number=number: came.append((number, threading.get_ident())))
        assert len(writers()) == 1
    assert [number for number, _ in came] == list(range(50))
    assert main not in {thread for _, thread in came}
    assert counted == [main] * 50
    assert writers() == []


def test_what_is_unwritten_is_bounded(monkeypatch):
    monkeypatch.setattr(written, "_MOST_BYTES", 10)
    waiting = most = 0
    lock = threading.Lock()

    def write():
        nonlocal waiting
        time.sleep(0.002)
        with lock:
            waiting -= 4

    with BackgroundWriter(lambda: None) as writer:
        for _ in range(30):
            with lock:
                waiting += 4
            writer.put(4, write)
            most = max(most, waiting)
        # One that is larger than all room is written too.
        writer.put(100, lambda: None)
    assert waiting == 0
    assert most <= 8


def test_an_error_ends_it():
    came = []

    def fail():
        raise OSError(28, "No space left on device")

    def write_many():
        with BackgroundWriter(lambda: came.append("done")) as writer:
            writer.put(1, lambda: came.append("first"))
            writer.put(1, fail)
            for _ in range(1000):
                time.sleep(0.001)
                writer.put(1, lambda: came.append("later"))

    with pytest.raises(OSError, match="No space left"):
        write_many()
    assert came.count("done") == 1
    # Told at the next call, not at the end.
    assert came.count("later") < 100
    assert writers() == []


def test_an_error_in_the_last_write_is_told():
    def write_one():
        with BackgroundWriter(lambda: None) as writer:
            writer.put(1, lambda: 1 // 0)

    with pytest.raises(ZeroDivisionError):
        write_one()


def test_an_error_of_the_work_leaves_out_what_is_not_begun():
    came, gate = [], threading.Event()

    def write():
        came.append(1)
        gate.wait(10)

    def work():
        with BackgroundWriter(lambda: None) as writer:
            for _ in range(5):
                writer.put(1, write)
            while not came:
                time.sleep(0.001)
            threading.Timer(0.1, gate.set).start()
            raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        work()
    assert came == [1]
