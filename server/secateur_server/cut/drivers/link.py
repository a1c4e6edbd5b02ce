"""The process that uses a Ray cluster for this one: how it is started, told what to do, and heard.

Ray ends a process that has lost its cluster, and cannot join another one in the same process. So
the tasks of a lost cluster fail here, and a new process joins the cluster once it is back.
"""

import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from importlib.util import find_spec
from itertools import count
from multiprocessing import Pipe
from typing import Any

log = logging.getLogger(__name__)

# Seconds until an address that nobody answers at counts as wrong. Ray itself tries for minutes.
CONNECT_SECONDS = 5.0
# Seconds for a process to join the cluster, and to leave it.
JOIN_SECONDS, LEAVE_SECONDS = 60.0, 10.0
# Seconds without a message from the process until the cluster counts as lost.
LOST_SECONDS = 10.0
# Seconds between attempts to join a lost cluster.
RETRY_SECONDS = 2.0

# The id of a node, and what a task returned there.
Result = tuple[str, bytes]


class NoCluster(Exception):
    """The cluster cannot be used. The message says why."""


class TaskLost(Exception):
    """The process or the node of a task was lost.

    Attributes:
        is_out_of_memory: Whether Ray ended it, since the node had no memory left.
    """

    def __init__(self, reason: str, is_out_of_memory: bool) -> None:
        super().__init__(reason)
        self.is_out_of_memory = is_out_of_memory


class Link:
    """Submits tasks to a cluster.

    Args:
        address: auto, HOST:PORT, or local for a private cluster on this machine.
        work_memory: Bytes of memory for each task.

    Attributes:
        cores: Of the cluster; 0: it is lost.

    Raises:
        NoCluster: Ray is not installed, or no cluster answers.
    """

    cores = 0

    def __init__(self, address: str, work_memory: int) -> None:
        self._address, self._work_memory = address, work_memory
        self._lock = threading.Lock()
        self._connection: Any = None
        self._numbers = count()
        self._futures: dict[int, Future[Result]] = {}
        self._closed = threading.Event()
        self._join()
        self._thread = threading.Thread(target=self._keep, name="ray", daemon=True)
        self._thread.start()

    def submit(self, data: bytes, node: str | None) -> tuple[int, Future[Result]]:
        """Submits a task.

        Args:
            data: The task, for packets.work.
            node: The id of the node that it prefers.

        Returns:
            Its number, and its result, or one of these errors: TaskLost, NoCluster, or RuntimeError
            for a defect.

        Raises:
            NoCluster: The cluster is lost.
        """
        future: Future[Result] = Future()
        with self._lock:
            if self._connection is None:
                raise NoCluster(f"no Ray cluster answers at {self._address!r}")
            number = next(self._numbers)
            self._futures[number] = future
            self._send("submit", number, data, node)
        return number, future

    def cancel(self, numbers: Sequence[int], is_forced: bool) -> None:
        """Cancels tasks; by force: ends their processes."""
        with self._lock:
            self._send("cancel", list(numbers), is_forced)

    def close(self) -> None:
        """Leaves the cluster. A private one ends."""
        self._closed.set()
        with self._lock:
            self._send()
        try:
            self._process.wait(LEAVE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._thread.join(LEAVE_SECONDS)

    def _send(self, *message: Any) -> None:
        """Sends the name of a method with its arguments; nothing: the process is to end."""
        if self._connection is not None:
            with suppress(OSError):  # the process has ended: _keep ends the tasks
                self._connection.send(message)

    def _join(self) -> None:
        """Starts a process, and waits until it has joined the cluster. Raises NoCluster."""
        if find_spec("ray") is None:
            raise NoCluster("No module named 'ray'; on the server: pip install 'secateur[ray]'")
        _check_address(self._address)
        connection, other = Pipe()
        with other:
            self._process = _start(other.fileno(), self._address, self._work_memory)
        first: tuple[str, Any] = "refused", "the process that was to join it has ended"
        with suppress(EOFError, OSError):
            has_answer = connection.poll(JOIN_SECONDS)
            first = connection.recv() if has_answer else ("refused", "it takes too long")
        if first[0] == "refused":
            self._process.kill()
            self._process.wait()
            raise NoCluster(f"no Ray cluster answers at {self._address!r}: {first[1]}")
        with self._lock:
            self._connection, self.cores = connection, first[1]

    def _keep(self) -> None:
        """Receives what becomes of tasks. Joins the cluster again if it is lost."""
        while True:
            reason = self._receive()
            self._leave(reason)
            if self._closed.is_set():
                return
            log.warning(
                "lost the Ray cluster at %s: %s; calls that need it fail until it answers",
                self._address,
                reason,
            )
            while self._connection is None:
                if self._closed.wait(RETRY_SECONDS):
                    return
                with suppress(NoCluster, OSError):
                    self._join()
            log.info("joined the Ray cluster at %s again: %d cores", self._address, self.cores)

    def _receive(self) -> str:
        """Receives messages as long as some come. Returns why they end."""
        try:
            while self._connection.poll(LOST_SECONDS):
                kind, *values = self._connection.recv()
                self._received(kind, *values)
        except (EOFError, OSError):
            return "Ray has ended the process that used it"
        return f"no answer for {LOST_SECONDS:g} s"

    def _received(self, kind: str, *values: Any) -> None:
        if kind == "cores":
            (self.cores,) = values
            return
        future = self._futures.pop(values[0], None)
        if future is None:
            return
        if kind == "found":
            future.set_result(values[1])
        elif kind == "lost":
            future.set_exception(TaskLost(*values[1:]))
        else:
            future.set_exception(RuntimeError(values[1]))

    def _leave(self, reason: str) -> None:
        """Ends the process, and all tasks."""
        self._process.kill()  # before the lock: another thread may be sending to it
        self._process.wait()
        with self._lock:
            self._connection.close()
            self._connection, self.cores = None, 0
            futures, self._futures = self._futures, {}
        for future in futures.values():
            future.set_exception(NoCluster(f"lost the Ray cluster: {reason}"))


def _start(descriptor: int, address: str, work_memory: int) -> "subprocess.Popen[bytes]":
    """Starts the process. It imports what this one does, and gets no signals from a terminal."""
    module = "secateur_server.ray_process"
    arguments = [str(descriptor), address, str(work_memory)]
    return subprocess.Popen(
        [sys.executable, "-P", "-m", module, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdin=subprocess.DEVNULL,
        pass_fds=[descriptor],
        start_new_session=True,
    )


def _check_address(address: str) -> None:
    """Raises NoCluster if nothing listens there."""
    if address in ("auto", "local"):
        return
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise NoCluster(f"no Ray cluster answers at {address!r}: {error}") from None
