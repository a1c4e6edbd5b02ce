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

    def begin_stop(self, timeout: float) -> None:
        """Accepts no more connections and calls.

        Args:
            timeout: Seconds after which running calls are cancelled.
        """
        with suppress(RuntimeError):  # gRPC starts a thread here, which the system may refuse
            self._server.stop(timeout)

    def has_stopped(self, timeout: float) -> bool:
        """Whether all calls have ended, within so many seconds."""
        return not self._server.wait_for_termination(timeout)

    def end(self) -> None:
        """Cancels running calls, and returns when they have ended."""
        if self.is_alive:
            self._server.stop(None)

    @property
    def is_alive(self) -> bool:
        """Whether gRPC still takes events."""
        return self._loop.is_alive()

    def _watch(self) -> None:
        self._loop.join()
        if not self.has_stopped(0):
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
