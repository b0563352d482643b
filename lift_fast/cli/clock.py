"""When this process began, so that the seconds of a command include its imports."""

from __future__ import annotations

import os
import time
from pathlib import Path

_IMPORTED = time.perf_counter()
# The field starttime of Linux's /proc/PID/stat, counted after the name, which may contain spaces.
_STARTTIME = 19
_MOST_SECONDS = 60.0


def process_start() -> float:
    """The start of this process on the clock of :func:`time.perf_counter`, to a hundredth of a second on Linux.

    Elsewhere, and if the system gives no plausible answer, the import of this module, a tenth of a second later.
    """
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[_STARTTIME]) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, IndexError, ValueError):
        return _IMPORTED
    start = time.perf_counter() - age
    return start if 0 <= _IMPORTED - start <= _MOST_SECONDS else _IMPORTED
