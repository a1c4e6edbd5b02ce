"""Receives in a thread of its own, while what came before is worked on."""

import threading
from collections.abc import Generator, Iterable
from concurrent.futures import Executor
from queue import Empty, SimpleQueue
from typing import TypeVar

from secateur_server.errors import IdleTimeout

Item = TypeVar("Item")

# How many items wait at most: they are memory.
DEPTH = 2


def ahead(
    items: Iterable[Item], receivers: Executor, timeout: float | None = None
) -> Generator[Item, None, None]:
    """The same items; from the second one on, up to DEPTH are there before they are asked for.

    Of who has asked for no second one there is no more: it may have to wait for its turn.
    receivers: has a thread for it.  timeout: seconds to wait for each item.
    What raises in the iteration of `items` raises here, in its turn.  Errors: IdleTimeout.
    """
    waiting: SimpleQueue[tuple[Item] | Exception | None] = SimpleQueue()
    asked = threading.Semaphore(0)
    is_left = threading.Event()

    def receive() -> None:
        try:
            for item in items:
                waiting.put((item,))
                asked.acquire()
                if is_left.is_set():
                    return
            waiting.put(None)
        except Exception as error:
            waiting.put(error)

    receivers.submit(receive)
    try:
        more = DEPTH + 1
        while (found := _next(waiting, timeout)) is not None:
            yield found[0]
            asked.release(more)
            more = 1
    finally:
        is_left.set()
        asked.release()


def _next(
    waiting: "SimpleQueue[tuple[Item] | Exception | None]", timeout: float | None
) -> tuple[Item] | None:
    try:
        item = waiting.get(timeout=timeout)
    except Empty:
        raise IdleTimeout("call", f"no message has come for {timeout:g} seconds") from None
    if isinstance(item, Exception):
        try:
            raise item
        finally:
            del item  # else it and this frame keep each other, and the caller's model with them
    return item
