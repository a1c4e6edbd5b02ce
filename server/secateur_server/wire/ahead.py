"""Receives in a thread of its own, while what came before is worked on."""

import threading
from collections.abc import Iterable, Iterator
from queue import Queue
from typing import TypeVar

Item = TypeVar("Item")

# How many items wait at most: they are memory.
DEPTH = 2


def ahead(items: Iterable[Item]) -> Iterator[Item]:
    """The same items; up to DEPTH are there before they are asked for.

    What raises in the iteration of `items` raises here, in its turn.
    """
    waiting: Queue[tuple[Item] | Exception | None] = Queue(DEPTH)
    is_left = threading.Event()

    def receive() -> None:
        try:
            for item in items:
                waiting.put((item,))
                if is_left.is_set():
                    return
            waiting.put(None)
        except Exception as error:
            waiting.put(error)

    threading.Thread(target=receive, name="ahead", daemon=True).start()
    try:
        while (item := waiting.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item[0]
    finally:
        is_left.set()
        while not waiting.empty():  # whoever waits to put something there goes on, and sees it
            waiting.get_nowait()
