"""A gRPC server from its start to its end, and what happens if its serving loop ends by itself."""

import logging
import threading
from collections.abc import Callable
from contextlib import suppress

import grpc

log = logging.getLogger(__name__)

_starting = threading.Lock()  # so that two servers of one process find their own loops


class Serving:
    """Starts a server, and watches the thread in which gRPC takes all its events.

    If an exception ends that thread, gRPC keeps every connection open and answers nothing.

    Args:
        server: Has not been started yet.
        died: Is called if the loop ends before the server has stopped.
    """

    def __init__(self, server: grpc.Server, died: Callable[[], None]) -> None:
        self._server, self._died = server, died
        self._loop = _start(server)
        threading.Thread(target=self._watch, name="serving", daemon=True).start()

    def stop(self, timeout: float) -> None:
        """Refuses new calls, and returns when all calls have ended.

        Args:
            timeout: Seconds after which running calls are cancelled.
        """
        with suppress(RuntimeError):  # gRPC starts a thread here, which the system may refuse
            self._server.stop(timeout)
        self._server.wait_for_termination(timeout)
        if self._loop.is_alive():
            self._server.stop(None)

    def _watch(self) -> None:
        self._loop.join()
        has_not_stopped = self._server.wait_for_termination(timeout=0)
        if has_not_stopped:
            log.critical("gRPC's serving loop has ended: the server answers no calls any more")
            self._died()


def _start(server: grpc.Server) -> threading.Thread:
    """Starts the server. Returns the thread of its serving loop, which gRPC has no name for."""
    with _starting:
        before = set(threading.enumerate())
        server.start()
        (loop,) = (
            thread
            for thread in threading.enumerate()
            if thread not in before and thread.name.endswith("(_serve)")
        )
    return loop
