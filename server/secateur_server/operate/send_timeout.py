"""Callers who do not take their answers."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc

from secateur_server.errors import IdleTimeout
from secateur_server.runtime.context import RequestContext

# How often it is looked at who waits.
LOOK_SECONDS = 1.0


class SendTimeout:
    """Cuts off calls whose message is not taken in `timeout` seconds.

    grpc waits for a slow reader without an end, inside of its own code.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._waiting: dict[RequestContext, tuple[float, grpc.ServicerContext]] = {}
        self._is_closed = threading.Event()
        self._looking = threading.Thread(target=self._look, name="idle", daemon=True)
        self._looking.start()

    def close(self) -> None:
        """No calls come any more."""
        self._is_closed.set()
        self._looking.join()

    @contextmanager
    def taking(self, context: RequestContext, call: grpc.ServicerContext) -> Iterator[None]:
        """The caller has to take a message in the block."""
        self._waiting[context] = time.monotonic(), call
        try:
            with context.stage("send"):
                yield
        finally:
            del self._waiting[context]

    def until_ended(
        self, context: RequestContext, call: grpc.ServicerContext, then: Callable[[], object]
    ) -> None:
        """The caller has to take the one answer, which gRPC sends when the handler has returned.

        Args:
            context: The request.
            call: Its call.
            then: Is called when the call has ended, in gRPC's serving thread.
        """
        self._waiting[context] = time.monotonic(), call

        def ended() -> None:
            self._waiting.pop(context, None)
            then()

        if not call.add_callback(ended):
            ended()

    def _look(self) -> None:
        while not self._is_closed.wait(min(LOOK_SECONDS, self._timeout / 2)):
            now = time.monotonic()
            for context, (since, call) in list(self._waiting.items()):
                if now - since > self._timeout:
                    context.reason = IdleTimeout.reason
                    call.cancel()
