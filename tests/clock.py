"""Time that passes when a test says so, for a server in the test's own process."""

import threading
from queue import Empty, SimpleQueue
from typing import Any

import pytest

from secateur_server.operate import send_timeout
from secateur_server.wire import prefetch
from tests.conftest import eventually


class Clock:
    """Stands still until `advance`.

    looks: how often the thread that looks for callers who take nothing has read it.
    """

    def __init__(self) -> None:
        self.now, self.looks = 0.0, 0

    def monotonic(self) -> float:
        if threading.current_thread().name == "idle":
            self.looks += 1
        return self.now

    def step(self, seconds: float) -> None:
        """Lets time pass."""
        self.now += seconds

    def advance(self, seconds: float) -> None:
        """Lets time pass, and the thread that looks for callers see that it has."""
        self.step(seconds)
        looks = self.looks
        eventually(lambda: self.looks > looks + 1, True)


def install(clock: Clock, patch: pytest.MonkeyPatch) -> None:
    """Makes `clock` the one by which idle callers are cut off."""

    class Queue(SimpleQueue[Any]):
        """Waits by `clock` for what does not come."""

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
