"""What happens around each call: who sends it, whether it may run, its messages, and its end."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from typing import Any

import grpc

from secateur_server.backends.threads import Pool
from secateur_server.errors import (
    IdleTimeout,
    NoMessage,
    QueueFull,
    ShuttingDown,
)
from secateur_server.operate.authentication import Authenticator
from secateur_server.operate.calls import begin_request
from secateur_server.operate.decode import Receive, decoded
from secateur_server.operate.logs import log_call
from secateur_server.operate.metrics import Metrics, go_code_name
from secateur_server.operate.send_timeout import SendTimeout
from secateur_server.operate.statuses import note_shutdown, statuses
from secateur_server.operate.traces import Traces
from secateur_server.runtime.context import Method, RequestContext, cancelled_by_caller
from secateur_server.runtime.memory import Trimmer
from secateur_server.runtime.scheduler import MIN_RETRY_SECONDS, Scheduler
from secateur_server.wire.prefetch import MinThroughput, prefetch

_KINDS = {
    (False, False): ("unary_unary", "unary"),
    (True, False): ("stream_unary", "client_stream"),
    (False, True): ("unary_stream", "server_stream"),
    (True, True): ("stream_stream", "bidi_stream"),
}
# A probe has no token, and learns nothing but whether the server serves.
_PROBE = ("grpc.health.v1.Health", "Check")
# Its methods take a RequestContext, those of gRPC's own services take gRPC's context.
_OURS = "secateur."

# How long a first message may be on its way while others wait for the memory that it may take.
SILENT_SECONDS = 5.0


class Interceptor(grpc.ServerInterceptor):
    """Serves each method as one that takes a stream of messages.

    gRPC itself would wait for the message of a unary call before any code of ours runs, without
    an end, and would receive it before the scheduler has counted its memory.

    Args:
        callers: Identifies tenants.
        scheduler: Decides which calls run.
        make_context: Makes the context of a new call.
        idle_timeout: Seconds in which a message has to come, or be taken.
        min_throughput: Bytes a second of the caller's messages, after that time.
    """

    def __init__(
        self,
        callers: Authenticator,
        metrics: Metrics,
        traces: Traces | None,
        scheduler: Scheduler,
        make_context: Callable[..., RequestContext],
        idle_timeout: float,
        min_throughput: int,
    ) -> None:
        self._callers, self._metrics, self._traces = callers, metrics, traces
        self._scheduler, self._make_context = scheduler, make_context
        self._idle_timeout, self._min_throughput = idle_timeout, min_throughput
        self._readers, self._trimmer = SendTimeout(idle_timeout), Trimmer()
        self._receivers = Pool(scheduler.threads, "ahead")
        self._running: set[RequestContext] = set()
        self._is_draining = False

    def drain(self) -> None:
        """Refuses further calls of the services of this server."""
        self._is_draining = True

    def cut_off(self, drain_timeout: float) -> None:
        """Ends the calls that still run, with a status that says so."""
        said = f"the server shut down after --drain-timeout, {drain_timeout:g} seconds"
        for context in list(self._running):
            context.cancel(partial(ShuttingDown, "call", f"{said}; send it again"))

    def close(self) -> None:
        """No calls come any more."""
        self._readers.close()
        self._trimmer.close()
        self._receivers.shutdown()

    def intercept_service(
        self, continuation: Callable[[Any], Any], handler_call_details: Any
    ) -> Any:
        """As grpc.ServerInterceptor.intercept_service."""
        handler = continuation(handler_call_details)
        if handler is None:  # no such method: grpc answers UNIMPLEMENTED
            return None
        shape, kind = _KINDS[handler.request_streaming, handler.response_streaming]
        _, service, name = handler_call_details.method.split("/")
        method, behavior = Method(service, name, kind), getattr(handler, shape)
        decode, is_ours = handler.request_deserializer, service.startswith(_OURS)
        request = iter if handler.request_streaming else _single
        count_sent = self._metrics.messages(method)[1]

        def single(messages: Iterator[bytes], call: grpc.ServicerContext) -> Any:
            with self._serve_call(method, call, messages, decode, is_unary=True) as (
                context,
                received,
            ):
                answer = behavior(request(received), context if is_ours else call)
                count_sent.inc()
                return answer

        def streamed(messages: Iterator[bytes], call: grpc.ServicerContext) -> Iterator[Any]:
            with self._serve_call(method, call, messages, decode) as (context, received):
                for message in behavior(request(received), context if is_ours else call):
                    count_sent.inc()
                    with self._readers.taking(context, call):
                        yield message

        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(
                streamed, None, handler.response_serializer
            )
        return grpc.stream_unary_rpc_method_handler(single, None, handler.response_serializer)

    @contextmanager
    def _serve_call(
        self,
        method: Method,
        call: grpc.ServicerContext,
        messages: Iterator[bytes],
        decode: Callable[[bytes], Any],
        is_unary: bool = False,
    ) -> Iterator[tuple[RequestContext, Iterator[Any]]]:
        """A call, from its first moment to its last. Yields its context and its messages.

        is_unary: The handler returns the one answer: what the request holds in memory counts until
            the caller has taken it.
        """
        has_failed = True
        context = begin_request(method, call, self._make_context)
        self._metrics.began(context)
        self._running.add(context)
        try:
            with statuses(context, call), ExitStack() as held:
                receive_first = held.enter_context(self._admit(context, call))
                with closing(self._prefetch(context, messages)) as received:
                    yield context, decoded(context, received, decode, receive_first)
                if is_unary:
                    self._readers.until_ended(context, call, held.pop_all().close)
            has_failed = False
        finally:
            self._running.discard(context)
            if has_failed and not context.reason:
                note_shutdown(context)
            context.code = code_of(context, call, has_failed)
            self._end(context)

    @contextmanager
    def _admit(self, context: RequestContext, call: grpc.ServicerContext) -> Iterator[Receive]:
        """Yields what is to be called with the bytes of the first message.

        Raises:
            Unauthenticated: The caller has no valid token.
            QueueFull: There are too many calls.
            Cancelled: The caller left while the call waited.
            ShuttingDown: The server drains.
        """
        if (context.method.service, context.method.name) == _PROBE:
            with self._scheduler.probe(call.cancel):
                yield lambda size: None
            return
        context.tenant = self._callers.caller(call.invocation_metadata() or ())
        if self._is_draining and context.method.service.startswith(_OURS):
            context.cancel(_refusal)
            context.check()
        scheduler = self._scheduler
        with scheduler.call(context), scheduler.first_message(context) as receive_first:
            yield receive_first

    def _prefetch(self, context: RequestContext, messages: Iterator[bytes]) -> Any:
        """The messages, received by another thread.

        Whoever still refers to them: they are closed with the call, for they have a thread.
        """
        pace = MinThroughput(self._min_throughput, self._idle_timeout)
        count_received = self._metrics.messages(context.method)[0]

        begun, has_come = time.monotonic(), False

        def count(waited: float, message: bytes) -> None:
            nonlocal has_come
            has_come = True
            count_received.inc()
            pace.count(waited, len(message))

        def check() -> None:
            context.check()
            if not has_come and time.monotonic() - begun >= SILENT_SECONDS:
                self._refuse_silent()

        return prefetch(_until_left(messages), self._receivers, self._idle_timeout, count, check)

    def _refuse_silent(self) -> None:
        """Ends a call whose first message has not come, if others wait for its place.

        Raises:
            QueueFull: Others wait.
        """
        if waiting := self._scheduler.messages.waiting:
            raise QueueFull(
                "call",
                f"its first message has not come for {SILENT_SECONDS:g} seconds, and the messages "
                f"of {waiting} other calls wait for memory",
                MIN_RETRY_SECONDS,
            )

    def _end(self, context: RequestContext) -> None:
        self._metrics.ended(context)
        self._trimmer.request_ended()
        log_call(context)
        if self._traces:
            self._traces.record_call(context)


def _refusal() -> ShuttingDown:
    return ShuttingDown("call", "the server is shutting down; send it again, or to another server")


def _until_left(messages: Iterator[bytes]) -> Iterator[bytes]:
    """The same messages.

    grpc keeps the error that it raises where the caller is gone, and the error would keep all
    frames that it goes through, with the model, until Python looks for cycles.

    Raises:
        Cancelled: The caller has left.
    """
    try:
        yield from messages
    except grpc.RpcError:
        pass
    else:
        return
    raise cancelled_by_caller()


def _single(received: Iterator[Any]) -> Any:
    """The one message of a unary call.

    Raises:
        NoMessage: The call ended before it.
    """
    for message in received:
        return message
    raise NoMessage("message", "the call ended before its message")


def code_of(context: RequestContext, call: grpc.ServicerContext, has_failed: bool) -> str:
    """The status of a call that has ended, as Go spells it."""
    code: grpc.StatusCode | None = call.code()  # type: ignore[attr-defined]
    if code is not None:
        name = code.name
    elif not has_failed:
        name = "OK"
    elif call.is_active():
        name = "UNKNOWN"
    elif context.reason == IdleTimeout.reason:  # an answer that was not taken
        name = "DEADLINE_EXCEEDED"
    elif context.reason == ShuttingDown.reason:
        name = ShuttingDown.status
    else:  # it ended from outside: by its deadline, or by its caller
        name = "DEADLINE_EXCEEDED" if context.is_past_deadline else "CANCELLED"
    return go_code_name(name)
