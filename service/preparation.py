"""One request on its way through the preprocess pool to the engine's thread, without a stop at the event loop.

In: what prepares it, and what takes the result or the error. Out: exactly one of the two is called, as a rule in the
pool's thread; or neither, once the event loop has called it off. A stop at the loop would be another thread to wake.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Preparation:
    """`on_done` and `on_error` are called under its lock: what `cancel` does next comes after them, or instead."""

    def __init__(
        self, work: Callable[[], object], on_done: Callable[[object], None], on_error: Callable[[BaseException], None]
    ) -> None:
        self._work, self._on_done, self._on_error = work, on_done, on_error
        self._lock = threading.Lock()
        self._is_over = False
        self._future: Future[object] | None = None

    def start(self, pool: ThreadPoolExecutor) -> None:
        if self._is_over:
            return
        try:
            future = self._future = pool.submit(self._work)
        except RuntimeError as error:  # the pool has been shut down
            self._end(self._on_error, error)
        else:
            future.add_done_callback(self._settle)

    def cancel(self) -> None:
        """Not begun, it never begins; begun, nobody hears of its end."""
        with self._lock:
            self._is_over = True
        future = self._future
        if future is not None:
            future.cancel()

    def _settle(self, future: Future[object]) -> None:
        # A future keeps its callbacks, and so us: holding it as well would keep the pictures until the garbage
        # collector comes by, which in a process with a model in it can take minutes.
        self._future = None
        if future.cancelled():
            return
        if (error := future.exception()) is not None:
            self._end(self._on_error, error)
        else:
            self._end(self._on_done, future.result())

    def _end(self, then: Callable[..., None], result: object) -> None:
        with self._lock:
            if not self._is_over:
                self._is_over = True
                then(result)
