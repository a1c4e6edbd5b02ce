"""Thread pools whose threads all exist before the first request.

ThreadPoolExecutor starts a thread when work arrives. Where the system refuses to start one, that
work fails; in gRPC's serving loop it would end the loop.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor


def started_pool(
    count: int, name: str, initializer: Callable[[], None] | None = None
) -> ThreadPoolExecutor:
    """A pool of `count` threads that have all been started.

    Args:
        count: At least 1.
        name: A prefix of the threads' names.
        initializer: Is called in each thread.

    Raises:
        RuntimeError: The system refuses to start so many threads.
    """
    pool = ThreadPoolExecutor(count, name, initializer)
    try:
        start_all(pool, count)
    except RuntimeError:
        pool.shutdown(wait=False)
        raise
    return pool


def start_all(pool: ThreadPoolExecutor, count: int) -> None:
    """Starts the `count` threads that a pool may have. Raises as started_pool."""
    are_started = threading.Event()  # each thread waits for it, so that none takes two tasks
    try:
        for _ in range(count):
            pool.submit(are_started.wait)
    finally:
        are_started.set()
