"""Results that a thread writes while the next are computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

_MOST_BYTES = 256 << 20


class BackgroundWriter:
    """Runs writes in a thread, in order; their errors are raised in the calling thread.

    Leaving the context waits for all; after an error, those not begun are left out.

    Args:
        done: called in the calling thread after each write, in order.
    """

    def __init__(self, done: Callable[[], object]) -> None:
        self._done = done
        self._pool = ThreadPoolExecutor(1, "lift-fast writer")
        self._begun: deque[tuple[int, Future[None]]] = deque()
        self._bytes = 0

    def put(self, size: int, write: Callable[[], None]) -> None:
        """Write soon. Waits while more than 256 MiB are unwritten; ``size`` is what ``write`` holds, in bytes."""
        self._bytes += size
        self._begun.append((size, self._pool.submit(write)))
        while self._begun and (self._bytes > _MOST_BYTES or self._begun[0][1].done()):
            self._finish()

    def _finish(self) -> None:
        size, future = self._begun.popleft()
        self._bytes -= size
        future.result()
        self._done()

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        try:
            while error is None and self._begun:
                self._finish()
        finally:
            self._pool.shutdown(cancel_futures=True)
