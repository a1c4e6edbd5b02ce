"""Thread pools whose threads all exist before the first request.

ThreadPoolExecutor starts a thread when work arrives. Where the system refuses to start one, that
work fails; in gRPC's serving loop it would end the loop.
"""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

Done = TypeVar("Done")
Task = tuple["Future[Any]", Callable[[], Any]]


class Pool(Executor):
    """A pool of daemon threads that have all been started.

    The thread that was used last is used first, as its stack is still in the caches: of a server's
    hundreds of threads only as many are ever touched as work at once.

    Args:
        count: At least 1.
        name: A prefix of the threads' names.
        initializer: Is called in each thread.

    Raises:
        RuntimeError: The system refuses to start so many threads.
    """

    def __init__(
        self, count: int, name: str, initializer: Callable[[], None] = lambda: None
    ) -> None:
        self._lock = threading.Lock()
        self._idle: list[SimpleQueue[Task | None]] = []
        self._waiting: deque[Task] = deque()
        self._is_shut_down = False
        try:
            for index in range(count):
                threading.Thread(
                    target=self._run, args=(initializer,), name=f"{name}_{index}", daemon=True
                ).start()
        except RuntimeError:
            self.shutdown()
            raise

    def submit(self, function: Callable[..., Done], /, *args: Any, **kwargs: Any) -> "Future[Done]":
        """As Executor.submit. After the shutdown the future is cancelled."""
        future: Future[Done] = Future()
        task = future, partial(function, *args, **kwargs)
        with self._lock:
            thread = self._idle.pop() if self._idle else None
            if self._is_shut_down:
                future.cancel()
            elif thread is None:
                self._waiting.append(task)
        if thread is not None:
            thread.put(task)
        return future

    def shutdown(self, wait: bool = False, *, cancel_futures: bool = False) -> None:
        """Ends the threads, once they have done the work that was submitted. Does not wait."""
        with self._lock:
            self._is_shut_down = True
            idle, self._idle = self._idle, []
        for thread in idle:
            thread.put(None)

    def _run(self, initializer: Callable[[], None]) -> None:
        initializer()
        mine: SimpleQueue[Task | None] = SimpleQueue()
        while (task := self._next(mine)) is not None:
            _do(*task)
            del task  # it refers to a request

    def _next(self, mine: "SimpleQueue[Task | None]") -> Task | None:
        """The next task. None: there will be none."""
        with self._lock:
            if self._waiting:
                return self._waiting.popleft()
            if self._is_shut_down:
                return None
            self._idle.append(mine)
        return mine.get()


def _do(future: "Future[Any] | None", work: Callable[[], Any]) -> None:
    assert future is not None
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(work())
    except BaseException as error:
        future.set_exception(error)
        future = None  # the error has this frame: they would keep each other, and the model
