"""The process that uses a Ray cluster for a server. Ray ends it if the cluster is lost.

It does what the server's cut.drivers.link.Link says. It imports no torch, to start fast.
"""

import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

# Seconds between messages with the cores of the cluster, which also say that it answers.
BEAT_SECONDS = 1.0


def _work_on_node(data: bytes) -> tuple[str, bytes]:
    """Does a task. Returns the id of the node, and what `work` returns."""
    try:
        import ray

        from secateur_server.cut.drivers.packets import work

        return ray.get_runtime_context().get_node_id(), work(data)
    except KeyboardInterrupt:  # cancelled, maybe amid an import: no later task may find half of it
        raise SystemExit from None


class _Member:
    """Submits tasks, and sends what becomes of them.

    Args:
        connection: To the server.
        ray: The package, connected to a cluster.
        work_memory: Bytes of memory for each task.
    """

    def __init__(self, connection: Connection, ray: Any, work_memory: int) -> None:
        self._connection, self._ray = connection, ray
        self._lock = threading.Lock()
        self._references: dict[int, Any] = {}
        self._task = ray.remote(num_cpus=1, memory=work_memory, max_retries=0)(_work_on_node)

    def _send(self, *message: Any) -> None:
        with self._lock, suppress(OSError):  # the server has ended, and this process will
            self._connection.send(message)

    def beat(self, ended: threading.Event) -> None:
        """Sends the cores of the cluster, again and again."""
        is_running = True
        while is_running:
            self._send("cores", int(self._ray.cluster_resources().get("CPU", 0)))
            is_running = not ended.wait(BEAT_SECONDS)

    def submit(self, number: int, data: bytes, node: str | None) -> None:
        """Submits a task. It prefers a node, if one is given."""
        strategy: Any = "SPREAD"
        if node is not None:
            kind = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
            strategy = kind(node, soft=True, _spill_on_unavailable=True)
        reference = self._task.options(scheduling_strategy=strategy).remote(data)
        self._references[number] = reference
        reference.future().add_done_callback(partial(self._ended, number))

    def _ended(self, number: int, future: Any) -> None:
        self._references.pop(number, None)
        error, known = future.exception(), self._ray.exceptions
        if error is None:
            self._send("found", number, future.result())
        elif isinstance(error, known.RayTaskError):
            self._send("failed", number, str(error))
        else:
            is_out_of_memory = isinstance(error, known.OutOfMemoryError)
            self._send("lost", number, str(error).strip().partition("\n")[0], is_out_of_memory)

    def cancel(self, numbers: Sequence[int], is_forced: bool) -> None:
        """Cancels tasks; by force: ends their processes."""
        for reference in [self._references.get(number) for number in numbers]:
            if reference is not None:
                with suppress(self._ray.exceptions.RayError, ValueError):
                    self._ray.cancel(reference, force=is_forced)


def main(descriptor: str, address: str, work_memory: str) -> None:
    """Joins a cluster, and does what the server says, until it ends or says nothing."""
    connection = Connection(int(descriptor))
    try:
        import ray
        from ray.util import scheduling_strategies  # noqa: F401 (ray does not import it itself)

        ray.init(address=address, log_to_driver=False, configure_logging=False)
    except (ImportError, ConnectionError, RuntimeError, ValueError, OSError) as error:
        connection.send(("refused", " ".join(str(error).split())))
        return
    member = _Member(connection, ray, int(work_memory))
    ended = threading.Event()
    beating = threading.Thread(target=member.beat, args=[ended], daemon=True)
    beating.start()
    with suppress(EOFError):
        while message := connection.recv():
            getattr(member, message[0])(*message[1:])
    ended.set()
    beating.join(BEAT_SECONDS)  # it may wait for a cluster that does not answer
    ray.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
