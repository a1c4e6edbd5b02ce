"""Receives messages in another thread while earlier ones are processed."""

import math
import threading
import time
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Executor
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import TypeVar

from secateur_server.errors import IdleTimeout

Item = TypeVar("Item")

# The largest number of items received ahead, since they take memory.
DEPTH = 2
# The interval between checks for cancellation while no item arrives.
CHECK_SECONDS = 0.2


class MinThroughput:
    """The lowest throughput allowed of a sender, over the time that the server waits for it.

    Args:
        limit: Bytes a second.
        grace: Seconds that the sender may fall behind. It never gains a lead: bytes that arrived
            fast do not excuse later silence.
    """

    def __init__(self, limit: int, grace: float) -> None:
        self._limit, self._grace, self._left = limit, grace, grace

    def count(self, waited: float, size: int) -> None:
        """Counts a message.

        Args:
            waited: Seconds that the server waited for it.
            size: Bytes.

        Raises:
            IdleTimeout: The sender is too slow.
        """
        self._left = min(self._grace, self._left - waited + size / self._limit)
        if self._left < 0:
            raise IdleTimeout(
                "call",
                f"the data has arrived at less than {self._limit} bytes a second "
                f"(--min-throughput) for more than {self._grace:g} seconds",
            )


def prefetch(
    items: Iterable[Item],
    receivers: Executor,
    timeout: float | None = None,
    count: Callable[[float, Item], None] = lambda waited, item: None,
    check: Callable[[], None] = lambda: None,
) -> Generator[Item, None, None]:
    """Yields the same items, and receives up to DEPTH of them ahead.

    Receiving ahead begins when the second item is asked for: before that the request may have to
    wait in a queue, and must not hold more memory there.

    Args:
        items: The source, which may block. Its errors are raised here, in their order.
        receivers: Has a thread that iterates over `items`.
        timeout: Seconds to wait for each item; None: no limit.
        count: Called with the seconds that the server waited for each item, and the item.
        check: Called every CHECK_SECONDS while no item arrives. May raise an error.

    Yields:
        The items.

    Raises:
        IdleTimeout: No item has arrived within `timeout`.
    """
    source = iter(items)
    waiting: SimpleQueue[tuple[Item] | Exception | None] = SimpleQueue()
    asked = threading.Semaphore(DEPTH)
    is_closed = threading.Event()

    def receive_one() -> bool:
        """Returns whether another item may follow."""
        try:
            for item in source:
                waiting.put((item,))
                return True
            waiting.put(None)
        except Exception as error:
            waiting.put(error)
        return False

    def receive_rest() -> None:
        while receive_one():
            asked.acquire()
            if is_closed.is_set():
                return

    # Most requests are one item. Its thread is free again when the item has arrived.
    receivers.submit(receive_one)
    go_on: Callable[[], object] = partial(receivers.submit, receive_rest)
    try:
        begun = time.monotonic()
        while (found := _next(waiting, timeout, check)) is not None:
            count(time.monotonic() - begun, found[0])
            yield found[0]
            go_on()
            go_on = asked.release
            begun = time.monotonic()
    finally:
        is_closed.set()
        asked.release()


def _next(
    waiting: "SimpleQueue[tuple[Item] | Exception | None]",
    timeout: float | None,
    check: Callable[[], None],
) -> tuple[Item] | None:
    item = _wait(waiting, timeout, check)
    if isinstance(item, Exception):
        try:
            raise item
        finally:
            del item  # or the error and this frame form a cycle that keeps the model alive
    return item


def _wait(
    waiting: "SimpleQueue[tuple[Item] | Exception | None]",
    timeout: float | None,
    check: Callable[[], None],
) -> tuple[Item] | Exception | None:
    """The next entry of the queue. Raises IdleTimeout, and the errors of `check`."""
    end = math.inf if timeout is None else time.monotonic() + timeout
    while (remaining := end - time.monotonic()) > 0:
        with suppress(Empty):
            return waiting.get(timeout=min(CHECK_SECONDS, remaining))
        check()
    raise IdleTimeout("call", f"no message has arrived for {timeout:g} seconds (--idle-timeout)")
