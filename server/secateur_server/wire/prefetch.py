"""Receives in a thread of its own, while what came before is worked on."""

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

# How many items wait at most: they are memory.
DEPTH = 2
# How soon a request that waits for an item sees that it has been cancelled.
CHECK_SECONDS = 0.2


class MinThroughput:
    """The least throughput of a sender, over the time that the server waits for it.

    Args:
        least: Bytes a second.
        grace: Seconds that the sender may be behind. It is never ahead: bytes that came fast do
            not excuse silence later.
    """

    def __init__(self, least: int, grace: float) -> None:
        self._least, self._grace, self._left = least, grace, grace

    def count(self, waited: float, size: int) -> None:
        """Counts a message of `size` bytes that the server waited for.

        Raises:
            IdleTimeout: The sender is too slow.
        """
        self._left = min(self._grace, self._left - waited + size / self._least)
        if self._left < 0:
            raise IdleTimeout(
                "call",
                f"the data comes more slowly than {self._least} bytes a second "
                f"(--min-throughput), for more than {self._grace:g} seconds",
            )


def prefetch(
    items: Iterable[Item],
    receivers: Executor,
    timeout: float | None = None,
    count: Callable[[float, Item], None] = lambda waited, item: None,
    check: Callable[[], None] = lambda: None,
) -> Generator[Item, None, None]:
    """The same items; from the second one on, up to DEPTH are there before they are asked for.

    Of who has asked for no second one there is no more: it may have to wait for its turn.
    receivers: has a thread for it.  timeout: seconds to wait for each item.
    count: is called with the seconds that each item was waited for, and the item.
    check: is called now and then while no item comes, and may raise.
    What raises in the iteration of `items` raises here, in its turn.  Errors: IdleTimeout.
    """
    source = iter(items)
    waiting: SimpleQueue[tuple[Item] | Exception | None] = SimpleQueue()
    asked = threading.Semaphore(DEPTH)
    is_left = threading.Event()

    def receive_one() -> bool:
        """Returns whether another item may come."""
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
            if is_left.is_set():
                return

    # Most requests are one item: its thread is free again when it has come.
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
        is_left.set()
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
            del item  # else it and this frame keep each other, and the caller's model with them
    return item


def _wait(
    waiting: "SimpleQueue[tuple[Item] | Exception | None]",
    timeout: float | None,
    check: Callable[[], None],
) -> tuple[Item] | Exception | None:
    """The next entry of the queue.  Errors: IdleTimeout, and those of `check`."""
    end = math.inf if timeout is None else time.monotonic() + timeout
    while (remaining := end - time.monotonic()) > 0:
        with suppress(Empty):
            return waiting.get(timeout=min(CHECK_SECONDS, remaining))
        check()
    raise IdleTimeout("call", f"no message has come for {timeout:g} seconds")
