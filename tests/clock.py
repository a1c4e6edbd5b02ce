"""A clock that a test advances, for a server in the process of the test."""

import threading
from queue import Empty, SimpleQueue
from typing import Any

import pytest

from secateur_server.operate import send_timeout
from secateur_server.wire import prefetch
from tests.conftest import eventually


class Clock:
    """Stands still until `advance`.

    Attributes:
        reads: How often the server's thread that finds idle callers has read the clock.
    """

    def __init__(self) -> None:
        self.now, self.reads = 0.0, 0

    def monotonic(self) -> float:
        if threading.current_thread().name == "idle":
            self.reads += 1
        return self.now

    def step(self, seconds: float) -> None:
        """Advances the clock."""
        self.now += seconds

    def advance(self, seconds: float) -> None:
        """Advances the clock, and waits until the thread that finds idle callers has read it."""
        self.step(seconds)
        reads = self.reads
        eventually(lambda: self.reads > reads + 1, True)


def install(clock: Clock, patch: pytest.MonkeyPatch) -> None:
    """Makes the server measure the idle times of callers by `clock`."""

    class Queue(SimpleQueue[Any]):
        """Its timeouts are measured by `clock`."""

        def get(self, block: bool = True, timeout: float | None = None) -> Any:
            end = None if timeout is None else clock.now + timeout
            while True:
                is_over = end is not None and clock.now >= end
                try:
                    return super().get(timeout=0.005)
                except Empty:
                    if is_over:
                        raise

    patch.setattr(send_timeout, "time", clock)
    patch.setattr(send_timeout, "CHECK_SECONDS", 0.005)
    patch.setattr(prefetch, "SimpleQueue", Queue)
    patch.setattr(prefetch, "time", clock)
