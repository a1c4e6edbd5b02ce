"""Cancels calls whose callers do not take their answers."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc

from secateur_server.errors import IdleTimeout
from secateur_server.runtime.context import RequestContext

# The interval between checks of the waiting calls.
CHECK_SECONDS = 1.0


class SendTimeout:
    """Cancels calls whose caller does not take each message within `timeout` seconds.

    gRPC itself waits for a slow reader without a limit.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._waiting: dict[RequestContext, tuple[float, grpc.ServicerContext]] = {}
        self._is_closed = threading.Event()
        self._checking = threading.Thread(target=self._check, name="idle", daemon=True)
        self._checking.start()

    def close(self) -> None:
        """Stops the thread."""
        self._is_closed.set()
        self._checking.join()

    @contextmanager
    def sending(self, context: RequestContext, call: grpc.ServicerContext) -> Iterator[None]:
        """Cancels the call if the block, in which gRPC sends a message, takes too long."""
        self._waiting[context] = time.monotonic(), call
        try:
            with context.stage("send"):
                yield
        finally:
            del self._waiting[context]

    def sending_answer(
        self, context: RequestContext, call: grpc.ServicerContext, then: Callable[[], object]
    ) -> None:
        """Cancels the call if its one answer, sent after the handler returns, takes too long.

        gRPC's serving thread calls `then` when the call has ended.
        """
        self._waiting[context] = time.monotonic(), call

        def ended() -> None:
            self._waiting.pop(context, None)
            then()

        if not call.add_callback(ended):
            ended()

    def _check(self) -> None:
        while not self._is_closed.wait(min(CHECK_SECONDS, self._timeout / 2)):
            now = time.monotonic()
            for context, (since, call) in list(self._waiting.items()):
                if now - since > self._timeout:
                    context.reason = IdleTimeout.reason
                    call.cancel()
