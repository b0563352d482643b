"""Ctrl-C in the command line: the process ends at once, whatever native code is running, and says so in one line.

Python delivers a signal between two of its own instructions, so that one would wait for a long native call, and raises
KeyboardInterrupt in whatever runs then. A command has nothing to unwind but the files that it was writing.
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

from ._files import remove_unfinished

STATUS = 130
_COMMAND = "lift-fast"
_ending = threading.Lock()
_MODULES = ("lift_fast", "lift_fast.cli", "lift_fast.__main__", "lift_fast.cli.__main__")


def quiet_start() -> None:
    """Where the command line starts: while PyTorch is being imported a Ctrl-C ends the process without a traceback.

    To be called by the package before it imports anything: no line of the command line runs earlier. The system's own
    way to end is all that works while a library is being loaded; shells show it as status 130.
    """
    if _starting() and _in_main_thread() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _starting() -> bool:
    first = sys.argv[0] if sys.argv else ""
    # What Python puts there until it has found the module of -m.
    if first == "-m":
        return any(name in _MODULES for name in sys.orig_argv)
    return os.path.splitext(os.path.basename(first))[0] == _COMMAND


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextmanager
def ending_at_once(command: str) -> Iterator[None]:
    """While the context lasts, SIGINT removes unfinished files, says ``command: interrupted`` and exits with 130.

    Nothing is unwound, so this is for a process that does nothing else. It happens in whichever thread comes first: the
    main one, or one that waits for the byte that Python sends the moment a signal arrives. Elsewhere than in the main
    thread, and where SIGINT is ignored or somebody else's, nothing changes; a handler that code inside installs, as
    training does, has its way.
    """
    former = signal.getsignal(signal.SIGINT)
    if not _in_main_thread() or former not in (signal.default_int_handler, signal.SIG_DFL):
        yield
        return
    # A pair of sockets, since Windows waits for nothing else.
    read, write = socket.socketpair()
    write.setblocking(False)
    said = f"\n{command}: interrupted\n".encode("utf-8", "backslashreplace")

    def handle(number: int, frame: Any) -> None:
        _end(said)

    def watch() -> None:
        while numbers := read.recv(64):
            if signal.SIGINT in numbers and signal.getsignal(signal.SIGINT) is handle:
                _end(said)

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


def _end(said: bytes) -> None:
    # Never released: the second thread that comes here waits for the end.
    _ending.acquire()
    remove_unfinished()
    with suppress(OSError):
        os.write(2, said)
    os._exit(STATUS)
