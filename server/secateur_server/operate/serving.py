"""Starts and stops a gRPC server, and detects the death of its serving loop."""

import logging
import threading
from collections.abc import Callable
from contextlib import suppress

import grpc

log = logging.getLogger(__name__)

_starting = threading.Lock()  # so that each of two servers finds its own loop


class Serving:
    """Starts a server, and watches the thread in which gRPC handles all its events.

    If an exception ends that thread, gRPC keeps every connection open and answers nothing. `died`
    is called if the thread ends before the server has stopped.
    """

    def __init__(self, server: grpc.Server, died: Callable[[], None]) -> None:
        self._server, self._died = server, died
        self._loop = _start(server)
        threading.Thread(target=self._watch, name="serving", daemon=True).start()

    def begin_stop(self) -> None:
        """Accepts no more connections and calls. Running calls go on until `end`."""
        with suppress(RuntimeError):  # gRPC starts a thread here, which may fail
            self._server.stop(threading.TIMEOUT_MAX)

    def has_stopped(self, timeout: float) -> bool:
        """Waits `timeout` seconds for all calls to end. Returns whether they have ended."""
        return not self._server.wait_for_termination(timeout)

    def end(self) -> None:
        """Cancels running calls, and waits for their end."""
        if self.is_alive:
            self._server.stop(None)

    @property
    def is_alive(self) -> bool:
        """Whether gRPC still handles events."""
        return self._loop.is_alive()

    def _watch(self) -> None:
        self._loop.join()
        if not self.has_stopped(0):
            log.critical("gRPC's serving loop has ended: the server cannot answer calls any more")
            self._died()


def _start(server: grpc.Server) -> threading.Thread:
    """Starts the server. Returns the thread of its serving loop, which gRPC does not expose."""
    with _starting:
        before = set(threading.enumerate())
        server.start()
        (loop,) = (
            thread
            for thread in threading.enumerate()
            if thread not in before and thread.name.endswith("(_serve)")
        )
    return loop
