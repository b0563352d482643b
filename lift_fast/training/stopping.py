"""SIGINT and SIGTERM: the first requests a stop after the current step, the second kills the process."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# torchrun forwards signals that the terminal has already sent to every process.
_ECHO_SECONDS = 2.0


class StopSignals:
    """Inside the context, ``number`` is 0 until a signal is received, then its number.

    With ``echoed``, signals within two seconds of the first count as one, since a request may arrive twice.
    """

    def __init__(self, echoed: bool) -> None:
        self.number = 0
        self._echo = _ECHO_SECONDS if echoed else 0.0
        self._first = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        # Only the main thread handles signals; the caller stops a run in another thread.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.number:
            self.number, self._first = number, time.monotonic()
        elif time.monotonic() - self._first >= self._echo:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
