"""What is done around every call: who it is, how it ends, and what is told of it."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import grpc

from secateur_server.errors import IdleTimeout, QueueFull
from secateur_server.operate.callers import Callers
from secateur_server.operate.calls import serving
from secateur_server.operate.logs import log_call
from secateur_server.operate.metrics import Metrics, as_go_spells
from secateur_server.operate.statuses import statuses
from secateur_server.operate.traces import Traces
from secateur_server.runtime.context import Method, RequestContext, Tenant

# A probe has no token, and hears nothing but whether the server serves.
_OPEN = ("grpc.health.v1.Health", "Check")
# At once; one more takes the place of the oldest. A probe is served in a moment: what is longer
# there is silent, and to hold all workers it would need no token.
MOST_OPEN = 16
# Callers that are turned away, since so many are here, come again after so many seconds.
RETRY_SECONDS = 1.0


class Reception:
    """Goes around each call.

    make_watch: gives a new call's.  most_calls: at once, beside probes.
    """

    def __init__(
        self,
        callers: Callers,
        metrics: Metrics,
        traces: Traces | None,
        make_watch: Callable[..., RequestContext],
        most_calls: int,
    ) -> None:
        self._callers, self._metrics, self._traces = callers, metrics, traces
        self._make_watch = make_watch
        self._open = _Open()
        self._seats = _Seats(most_calls)

    @contextmanager
    def around(self, method: Method, context: grpc.ServicerContext) -> Iterator[None]:
        """A call, from its first moment to its last."""
        has_failed = True
        with serving(method, context, self._make_watch) as call:
            self._metrics.began(call)
            try:
                with statuses(call, context), self._let_in(call, context):
                    yield
                has_failed = False
            finally:
                call.code = code_of(call, context, has_failed)
                self._ended(call)

    def _let_in(
        self, call: RequestContext, context: grpc.ServicerContext
    ) -> AbstractContextManager[None]:
        """Errors: Unauthenticated, QueueFull."""
        if (call.method.service, call.method.name) == _OPEN:
            return self._open.one(context)
        call.tenant = self._callers.caller(context.invocation_metadata() or ())
        return self._seats.one(call.tenant)

    def _ended(self, call: RequestContext) -> None:
        self._metrics.ended(call)
        log_call(call)
        if self._traces:
            self._traces.of_call(call)


class _Seats:
    """The calls that are here, whatever they do: each holds threads.

    A tenant has at most half of the seats, so that its silent calls keep nobody out.
    """

    def __init__(self, most: int) -> None:
        self._lock, self._most = threading.Lock(), most
        self._taken: Counter[str] = Counter()

    @contextmanager
    def one(self, tenant: Tenant) -> Iterator[None]:
        """In the block the tenant has one more.  Errors: QueueFull."""
        most = self._most // 2 if tenant.name else self._most
        with self._lock:
            mine, all_of_them = self._taken[tenant.owner], self._taken.total()
            if mine >= most or all_of_them >= self._most:
                raise QueueFull(
                    "call", f"{all_of_them} calls are here, {mine} yours", RETRY_SECONDS
                )
            self._taken[tenant.owner] += 1
        try:
            yield
        finally:
            with self._lock:
                self._taken[tenant.owner] -= 1
                if not self._taken[tenant.owner]:
                    del self._taken[tenant.owner]


class _Open:
    """The calls of those who have no token."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._contexts: list[grpc.ServicerContext] = []

    @contextmanager
    def one(self, context: grpc.ServicerContext) -> Iterator[None]:
        """In the block the call is one of them."""
        with self._lock:
            self._contexts.append(context)
            oldest = self._contexts.pop(0) if len(self._contexts) > MOST_OPEN else None
        if oldest is not None:
            oldest.cancel()
        try:
            yield
        finally:
            with self._lock:
                if context in self._contexts:
                    self._contexts.remove(context)


def code_of(call: RequestContext, context: grpc.ServicerContext, has_failed: bool) -> str:
    """The status of a call that has ended, as Go spells it."""
    code: grpc.StatusCode | None = context.code()  # type: ignore[attr-defined]
    if code is not None:
        name = code.name
    elif not has_failed:
        name = "OK"
    elif context.is_active():
        name = "UNKNOWN"
    elif call.reason == IdleTimeout.reason:  # an answer that was not taken
        name = "DEADLINE_EXCEEDED"
    else:  # it ended from outside: by its deadline, or by its caller
        left = context.time_remaining()
        name = "DEADLINE_EXCEEDED" if left is not None and left <= 0 else "CANCELLED"
    return as_go_spells(name)
