"""Pieces anywhere in a Ray cluster. Ray chooses the node, and repeats tasks that a node loses.

A task and its piece travel as bytes, and so does the result. The other process does them on one
thread, with a request of its own that has the same deadline.
"""

import math
import pickle
import signal
import socket
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Generic

import torch

from secateur_server.backends import backend_for
from secateur_server.backends.protocol import Backend
from secateur_server.cut.drivers.packets import pickled, work
from secateur_server.cut.drivers.protocol import Task
from secateur_server.errors import Cancelled, ClusterFailed, OutOfMemory, RequestError
from secateur_server.runtime.context import Found, Item, RequestContext

# Seconds between checks for cancellation.
CHECK_SECONDS = 0.2
# Seconds for cancelled tasks to end, before their processes are ended.
CANCEL_SECONDS = 1.0
# Seconds until an address that nobody answers at counts as wrong.
CONNECT_SECONDS = 5.0
# Tasks that wait at a core: so no core waits for the next one, and few are in Ray's queue.
WAITING = 2
# Files whose nodes are remembered.
MOST_PLACES = 100_000
# How often a task is repeated whose process or node was lost.
RETRIES = 3


class NoCluster(Exception):
    """The cluster cannot be used. The message says why."""


@dataclass(frozen=True)
class Ray:
    """Works in tasks of a cluster.

    Attributes:
        backend: Of this process.
        threads: The cores of the cluster, when the server started.
        work_memory: Bytes of memory for each task.
        nodes: The node of the last task on each of some files, by what its pieces say is their
            place.
        count: Functions that count tasks by their outcome (finished, failed or cancelled), those
            that are repeated, and bytes that are sent to tasks and received from them.
    """

    backend: Backend
    threads: int
    work_memory: int
    count: Mapping[str, Callable[[float], None]]
    nodes: OrderedDict[Any, str] = field(default_factory=OrderedDict)

    @classmethod
    def at(
        cls, address: str, work_memory: int, count: Mapping[str, Callable[[float], None]]
    ) -> "Ray":
        """Connects this process to a cluster.

        Args:
            address: auto, HOST:PORT, or local for a private cluster on this machine.
            work_memory: Bytes of memory for each task.
            count: As of Ray.

        Raises:
            NoCluster: Ray is not installed, or no cluster answers.
        """
        ray = _ray()
        _check_address(address)
        with _signals_kept():
            try:
                ray.init(address=address, log_to_driver=False, configure_logging=False)
            except (ConnectionError, RuntimeError, ValueError, OSError) as error:
                reason = " ".join(str(error).split())
                raise NoCluster(f"no Ray cluster answers at {address!r}: {reason}") from None
        cores = max(1, int(ray.cluster_resources().get("CPU", 1)))
        return cls(backend_for(torch.device("cpu")), cores, work_memory, count)

    def close(self) -> None:
        """Leaves the cluster. A private one ends."""
        _ray().shutdown()

    def map(
        self, context: RequestContext, task: Task[Item, Found], pieces: Iterable[Item]
    ) -> list[Found]:
        found = dict(self.as_finished(context, task, list(pieces)))
        return [found[index] for index in range(len(found))]

    def as_finished(
        self, context: RequestContext, task: Task[Item, Found], pieces: list[Item]
    ) -> Iterator[tuple[int, Found]]:
        running = _Running(self, context, task, pieces)
        try:
            while running.start():
                context.check()
                yield from running.finished()
        finally:
            running.cancel()


class _Running(Generic[Item, Found]):
    """The tasks of one call of `as_finished`."""

    def __init__(
        self, driver: Ray, context: RequestContext, task: Task[Item, Found], pieces: list[Item]
    ) -> None:
        self._driver, self._context, self._task, self._pieces = driver, context, task, pieces
        self._ray = _ray()
        self._submit = self._ray.remote(num_cpus=1, memory=driver.work_memory, max_retries=0)(
            _work_on_node
        )
        self._left = deque(range(len(pieces)))
        self._attempts = [0] * len(pieces)
        self._running: dict[Any, int] = {}
        self._failed: dict[int, RequestError] = {}

    def start(self) -> bool:
        """Starts tasks, as many as the cluster has cores for. Returns whether any runs.

        Raises:
            RequestError: That of the first piece whose task failed, as one process would.
        """
        while self._left and len(self._running) < WAITING * self._driver.threads:
            index = self._left.popleft()
            self._running[self._started(self._pieces[index])] = index
        if self._failed and min(self._failed) < min(self._running.values(), default=math.inf):
            raise self._failed[min(self._failed)]
        return bool(self._running)

    def _started(self, piece: Item) -> Any:
        deadline = self._context.deadline
        seconds = None if deadline is None else deadline - time.monotonic()
        data = pickled((self._task, piece, seconds, self._driver.work_memory))
        self._driver.count["sent"](len(data))
        return self._submit.options(scheduling_strategy=self._strategy(piece)).remote(data)

    def _strategy(self, piece: Item) -> Any:
        """Prefers the node of the last task on the same file, where it is in the page cache."""
        node = self._driver.nodes.get(getattr(piece, "place", None))
        if node is None:
            return "SPREAD"
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        return NodeAffinitySchedulingStrategy(node, soft=True, _spill_on_unavailable=True)

    def _found_at(self, piece: Item, node: str) -> None:
        nodes, place = self._driver.nodes, getattr(piece, "place", None)
        if place is not None:
            nodes[place] = node
            nodes.move_to_end(place)
        while len(nodes) > MOST_PLACES:
            nodes.popitem(last=False)

    def finished(self) -> Iterator[tuple[int, Found]]:
        """Yields the results of tasks that end within a moment."""
        done, _ = self._ray.wait(list(self._running), timeout=CHECK_SECONDS)
        for reference in done:
            index = self._running.pop(reference)
            try:
                node, data = self._ray.get(reference)
            except self._ray.exceptions.RayTaskError as error:
                raise error.cause from None  # a defect
            except self._ray.exceptions.RayError as error:
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

    def _lost(self, index: int, error: Exception) -> None:
        """Repeats a task whose process or node was lost."""
        self._attempts[index] += 1
        if self._attempts[index] <= RETRIES:
            self._driver.count["repeated"](1)
            self._left.appendleft(index)
            return
        self._driver.count["failed"](1)
        reason = str(error).strip().partition("\n")[0]
        times = f"each of {RETRIES + 1} times"
        if isinstance(error, self._ray.exceptions.OutOfMemoryError):
            self._fail(
                index,
                OutOfMemory(
                    "call",
                    f"a task of the Ray cluster ran out of memory {times}: {reason}; use smaller "
                    "shards or larger nodes",
                ),
            )
        else:
            self._fail(
                index, ClusterFailed("call", f"the Ray cluster lost a task {times}: {reason}")
            )

    def _fail(self, index: int, error: RequestError) -> None:
        """Starts no further task. Those of pieces before this one may fail as well."""
        self._failed[index] = error
        self._left = deque(other for other in self._left if other < index)

    def cancel(self) -> None:
        """Ends all tasks. The process of one that does not end soon is ended."""
        references, self._running = list(self._running), {}
        self._driver.count["cancelled"](len(references))
        for is_forced in (False, True):
            for reference in references:
                with suppress(self._ray.exceptions.RayError, ValueError):
                    self._ray.cancel(reference, force=is_forced)
            if references:
                _, references = self._ray.wait(
                    references, num_returns=len(references), timeout=CANCEL_SECONDS
                )


def _check_address(address: str) -> None:
    """Raises NoCluster if nothing listens there. Ray itself would try for two minutes."""
    if address in ("auto", "local"):
        return
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise NoCluster(f"no Ray cluster answers at {address!r}: {error}") from None


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Keeps the process's signal handlers: Ray's would abort it at SIGTERM, without a drain."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    if threading.current_thread() is threading.main_thread():
        for number, handler in kept.items():
            signal.signal(number, handler)


def _ray() -> Any:
    """The package. Raises NoCluster if it is missing."""
    try:
        import ray
    except ImportError as error:
        raise NoCluster(f"{error}; on the server: pip install 'secateur[ray]'") from None
    return ray


def _work_on_node(data: bytes) -> tuple[str, bytes]:
    """Does a task. Returns the id of the node, and what `work` returns."""
    return _ray().get_runtime_context().get_node_id(), work(data)
