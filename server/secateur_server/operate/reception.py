"""What is done around every call: who it is, how it ends, and what is told of it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc

from secateur_server.devices.watch import Watch
from secateur_server.errors import IdleTimeout
from secateur_server.operate.callers import Callers
from secateur_server.operate.calls import Call, Method, serving
from secateur_server.operate.logs import log_call
from secateur_server.operate.metrics import Metrics
from secateur_server.operate.statuses import statuses
from secateur_server.operate.traces import Traces

# A probe has no token, and hears nothing but whether the server serves.
_OPEN = ("grpc.health.v1.Health", "Check")


class Reception:
    """Goes around each call.  make_watch: gives a new call's."""

    def __init__(
        self,
        callers: Callers,
        metrics: Metrics,
        traces: Traces | None,
        make_watch: Callable[[], Watch],
    ) -> None:
        self._callers, self._metrics, self._traces = callers, metrics, traces
        self._make_watch = make_watch

    @contextmanager
    def around(self, method: Method, context: grpc.ServicerContext) -> Iterator[None]:
        """A call, from its first moment to its last."""
        has_failed = True
        with serving(method, context, self._make_watch()) as call:
            self._metrics.began(call)
            try:
                with statuses(call, context):
                    if (method.service, method.name) != _OPEN:
                        metadata = dict(context.invocation_metadata() or ())
                        call.tenant = self._callers.caller(metadata)
                    yield
                has_failed = False
            finally:
                call.code = code_of(call, context, has_failed)
                self._ended(call)

    def _ended(self, call: Call) -> None:
        self._metrics.ended(call)
        log_call(call)
        if self._traces:
            self._traces.of_call(call)


def code_of(call: Call, context: grpc.ServicerContext, has_failed: bool) -> str:
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
    return {"OK": "OK", "CANCELLED": "Canceled"}.get(name, name.title().replace("_", ""))
