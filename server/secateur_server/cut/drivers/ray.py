"""Pieces anywhere in a Ray cluster. Ray chooses the node, and repeats tasks that a node loses.

A task and its piece travel as bytes, and so does the result. The other process does them on one
thread, with a request of its own that has the same deadline.
"""

import math
import pickle
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from typing import Any, Generic

import torch

from secateur_server.backends import backend_for
from secateur_server.cut.drivers.link import Link, NoCluster, Result, TaskLost
from secateur_server.cut.drivers.packets import pickled
from secateur_server.cut.drivers.protocol import Task
from secateur_server.errors import Cancelled, ClusterFailed, OutOfMemory, RequestError
from secateur_server.runtime.context import Found, Item, RequestContext

# Seconds between checks for cancellation.
CHECK_SECONDS = 0.2
# Seconds for cancelled tasks to end, before their processes are ended.
CANCEL_SECONDS = 1.0
# Tasks that wait at a core: so no core waits for the next one, and few are in Ray's queue.
WAITING = 2
# Files whose nodes are remembered.
MOST_PLACES = 100_000
# How often a task is repeated whose process or node was lost.
RETRIES = 3


class Ray:
    """Works in tasks of a cluster.

    Args:
        link: To the cluster.
        work_memory: Bytes of memory for each task.
        count: Functions that count tasks by their outcome (finished, failed or cancelled), those
            that are repeated, and bytes that are sent to tasks and received from them.

    Attributes:
        backend: Of this process.
        nodes: The node of the last task on each of some files, by what its pieces say is their
            place.
    """

    def __init__(
        self, link: Link, work_memory: int, count: Mapping[str, Callable[[float], None]]
    ) -> None:
        self.link, self.work_memory, self.count = link, work_memory, count
        self.backend = backend_for(torch.device("cpu"))
        self.nodes: OrderedDict[Any, str] = OrderedDict()
        self._lock = threading.Lock()
        self._calls: Counter[str] = Counter()  # that have tasks, by the owner of their tenant

    @classmethod
    def at(
        cls, address: str, work_memory: int, count: Mapping[str, Callable[[float], None]]
    ) -> "Ray":
        """Connects to a cluster.

        Args:
            address: auto, HOST:PORT, or local for a private cluster on this machine.
            work_memory: Bytes of memory for each task.
            count: As of Ray.

        Raises:
            NoCluster: Ray is not installed, or no cluster answers.
        """
        return cls(Link(address, work_memory), work_memory, count)

    @property
    def cores(self) -> int:
        """The cores of the cluster now; 0: it does not answer."""
        return self.link.cores

    @property
    def threads(self) -> int:
        return max(1, self.cores)

    def close(self) -> None:
        """Leaves the cluster. A private one ends."""
        self.link.close()

    def map(
        self, context: RequestContext, task: Task[Item, Found], pieces: Iterable[Item]
    ) -> list[Found]:
        found = dict(self.as_finished(context, task, list(pieces)))
        return [found[index] for index in range(len(found))]

    def as_finished(
        self, context: RequestContext, task: Task[Item, Found], pieces: list[Item]
    ) -> Iterator[tuple[int, Found]]:
        owner = context.tenant.owner
        running = _Running(self, context, task, pieces)
        with self._counted(owner):
            try:
                while running.start(self._share(owner)):
                    context.check()
                    yield from running.finished()
            except NoCluster as error:
                raise ClusterFailed("call", f"{error}; retry later") from None
            finally:
                running.cancel()

    @contextmanager
    def _counted(self, owner: str) -> Iterator[None]:
        with self._lock:
            self._calls[owner] += 1
        try:
            yield
        finally:
            with self._lock:
                self._calls[owner] -= 1
                self._calls += Counter()  # without owners that have no calls

    def _share(self, owner: str) -> int:
        """How many tasks a call may have in the cluster: tenants, and the calls of each, share."""
        with self._lock:
            of_tenant = WAITING * self.threads // len(self._calls)
            return max(1, of_tenant // self._calls[owner])


class _Running(Generic[Item, Found]):
    """The tasks of one call of `as_finished`."""

    def __init__(
        self, driver: Ray, context: RequestContext, task: Task[Item, Found], pieces: list[Item]
    ) -> None:
        self._driver, self._context, self._task, self._pieces = driver, context, task, pieces
        self._left = deque(range(len(pieces)))
        self._attempts = [0] * len(pieces)
        self._running: dict[Future[Result], tuple[int, int]] = {}  # number and index
        self._failed: dict[int, RequestError] = {}

    def start(self, most: int) -> bool:
        """Starts tasks, until `most` are in the cluster. Returns whether any runs.

        Raises:
            RequestError: That of the first piece whose task failed, as one process would.
            NoCluster: The cluster is lost.
        """
        while self._left and len(self._running) < most:
            index = self._left.popleft()
            number, future = self._started(self._pieces[index])
            self._running[future] = number, index
        first = min((index for _, index in self._running.values()), default=math.inf)
        if self._failed and min(self._failed) < first:
            raise self._failed[min(self._failed)]
        return bool(self._running)

    def _started(self, piece: Item) -> tuple[int, Future[Result]]:
        deadline = self._context.deadline
        seconds = None if deadline is None else deadline - time.monotonic()
        data = pickled((self._task, piece, seconds, self._driver.work_memory))
        self._driver.count["sent"](len(data))
        # The node of the last task on the same file has it in the page cache.
        return self._driver.link.submit(data, self._driver.nodes.get(getattr(piece, "place", None)))

    def _found_at(self, piece: Item, node: str) -> None:
        nodes, place = self._driver.nodes, getattr(piece, "place", None)
        if place is not None:
            nodes[place] = node
            nodes.move_to_end(place)
        while len(nodes) > MOST_PLACES:
            nodes.popitem(last=False)

    def finished(self) -> Iterator[tuple[int, Found]]:
        """Yields the results of tasks that end within a moment."""
        done, _ = wait(self._running, CHECK_SECONDS, FIRST_COMPLETED)
        for future in done:
            _, index = self._running.pop(future)
            try:
                node, data = future.result()
            except TaskLost as error:
                self._lost(index, error)
                continue
            self._found_at(self._pieces[index], node)
            self._driver.count["received"](len(data))
            result = pickle.loads(data)
            is_error = isinstance(result, RequestError)
            self._driver.count["failed" if is_error else "finished"](1)
            if not is_error:
                yield index, result
                continue
            if isinstance(result, Cancelled):  # by its deadline, which is that of this request
                self._context.check()
            self._fail(index, result)

    def _lost(self, index: int, error: TaskLost) -> None:
        """Repeats a task whose process or node was lost."""
        self._attempts[index] += 1
        if self._attempts[index] <= RETRIES:
            self._driver.count["repeated"](1)
            self._left.appendleft(index)
            return
        self._driver.count["failed"](1)
        times = f"each of {RETRIES + 1} times"
        if error.is_out_of_memory:
            self._fail(
                index,
                OutOfMemory(
                    "call",
                    f"a task of the Ray cluster ran out of memory {times}: {error}; use smaller "
                    "shards or larger nodes",
                ),
            )
        else:
            self._fail(
                index, ClusterFailed("call", f"the Ray cluster lost a task {times}: {error}")
            )

    def _fail(self, index: int, error: RequestError) -> None:
        """Starts no further task. Those of pieces before this one may fail as well."""
        self._failed[index] = error
        self._left = deque(other for other in self._left if other < index)

    def cancel(self) -> None:
        """Ends all tasks. The process of one that does not end soon is ended."""
        running, self._running = self._running, {}
        self._driver.count["cancelled"](len(running))
        for is_forced in (False, True):
            if running:
                numbers = [number for number, _ in running.values()]
                self._driver.link.cancel(numbers, is_forced)
                _, left = wait(running, CANCEL_SECONDS)
                running = {future: running[future] for future in left}
