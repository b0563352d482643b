"""Ctrl-C in the command line: the process exits immediately, even inside native code, with a message of one line.

By default Python handles a signal between two bytecode instructions, after a long native call, and raises
KeyboardInterrupt wherever it is. A command only has to clean up the files that it was writing.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ._files import begin_no_more, remove_unfinished

STATUS = 130
_COMMAND = "lift-fast"
_ending = threading.Lock()
_MODULES = ("lift_fast", "lift_fast.cli", "lift_fast.__main__", "lift_fast.cli.__main__")


def quiet_start() -> None:
    """At the start of a command, let Ctrl-C end the process without a traceback while PyTorch is imported.

    The package calls it before its imports, since no code of the command line runs earlier. Only the system's default
    action works while a library is loaded; shells show it as status 130.
    """
    if _starting() and _in_main_thread() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _starting() -> bool:
    first = sys.argv[0] if sys.argv else ""
    # Python's placeholder until it has found the module of -m.
    if first == "-m":
        return any(name in _MODULES for name in sys.orig_argv)
    return os.path.splitext(os.path.basename(first))[0] == _COMMAND


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextmanager
def ending_at_once(command: str) -> Iterator[None]:
    """Inside the context, SIGINT removes unfinished files, prints ``command: interrupted`` and exits with 130.

    The stack is not unwound, so use it only in a process of its own. The first of two threads acts: the main one, or a
    watcher that waits for the byte that Python writes when a signal arrives. Nothing changes outside the main thread or
    if SIGINT is ignored or has another handler. A handler installed inside, as by training, takes precedence.
    """
    former = signal.getsignal(signal.SIGINT)
    if not _in_main_thread() or former not in (signal.default_int_handler, signal.SIG_DFL):
        yield
        return
    # Sockets, because Windows supports nothing else here.
    read, write = socket.socketpair()
    write.setblocking(False)
    message = f"\n{command}: interrupted\n".encode("utf-8", "backslashreplace")

    def handle(number: int, frame: Any) -> None:
        _end(message)

    def watch() -> None:
        while numbers := read.recv(64):
            if signal.SIGINT in numbers and signal.getsignal(signal.SIGINT) is handle:
                _end(message)

    watcher = threading.Thread(target=watch, name="lift-fast interrupts", daemon=True)
    watcher.start()
    before = signal.set_wakeup_fd(write.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)
        signal.set_wakeup_fd(before)
        write.close()
        watcher.join()
        read.close()


def _end(message: bytes) -> None:
    # Never released, so that a second thread waits here until the process exits.
    _ending.acquire()
    begin_no_more()
    remove_unfinished()
    with suppress(OSError):
        os.write(2, message)
    os._exit(STATUS)
