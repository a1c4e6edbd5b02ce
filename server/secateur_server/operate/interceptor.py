"""The gRPC interceptor: admission, messages, status, metrics and log of each call."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from typing import Any

import grpc

from secateur_server.backends.threads import Pool
from secateur_server.errors import IdleTimeout, NoMessage, QueueFull, ShuttingDown
from secateur_server.operate.authentication import Authenticator
from secateur_server.operate.calls import begin_request
from secateur_server.operate.decode import Receive, decoded
from secateur_server.operate.logs import log_call
from secateur_server.operate.metrics import KINDS, Metrics, go_code_name
from secateur_server.operate.send_timeout import SendTimeout
from secateur_server.operate.statuses import note_shutdown, statuses
from secateur_server.operate.traces import Traces
from secateur_server.runtime.context import Method, RequestContext, cancelled_by_caller
from secateur_server.runtime.memory import Trimmer
from secateur_server.runtime.scheduler import MIN_RETRY_SECONDS, Scheduler
from secateur_server.wire.prefetch import MinThroughput, prefetch

# Health probes need no token.
_PROBE = ("grpc.health.v1.Health", "Check")
# Methods of these services take a RequestContext; those of gRPC's own services take its context.
_OURS = "secateur."

# Seconds that a first message may take to arrive while other calls wait for its memory.
SILENT_SECONDS = 5.0


class Interceptor(grpc.ServerInterceptor):
    """Serves each method as one that takes a stream of messages.

    gRPC itself would receive the message of a unary call before any code of this server runs:
    without a time limit, and before the scheduler has counted its memory.

    Args:
        authenticator: Identifies tenants.
        metrics: Counts calls and messages.
        traces: Creates spans; None: no traces.
        scheduler: Decides which calls run.
        make_context: Creates the context of a call.
        idle_timeout: Seconds within which the caller must send, or take, each message.
        min_throughput: Bytes a second that the caller must send after that time.
    """

    def __init__(
        self,
        authenticator: Authenticator,
        metrics: Metrics,
        traces: Traces | None,
        scheduler: Scheduler,
        make_context: Callable[..., RequestContext],
        idle_timeout: float,
        min_throughput: int,
    ) -> None:
        self._authenticator, self._metrics, self._traces = authenticator, metrics, traces
        self._scheduler, self._make_context = scheduler, make_context
        self._idle_timeout, self._min_throughput = idle_timeout, min_throughput
        self._send_timeout, self._trimmer = SendTimeout(idle_timeout), Trimmer()
        self._receivers = Pool(scheduler.threads, "ahead")
        self._running: set[RequestContext] = set()
        self._is_draining = False

    def drain(self) -> None:
        """Refuses new calls, except health checks and reflection."""
        self._is_draining = True

    def cut_off(self, drain_timeout: float) -> None:
        """Ends the calls that still run after `drain_timeout` seconds with ShuttingDown."""
        said = f"the server shut down after --drain-timeout, {drain_timeout:g} seconds"
        for context in list(self._running):
            context.cancel(partial(ShuttingDown, "call", f"{said}; send it again"))

    def close(self) -> None:
        """Stops the threads. The server must have stopped."""
        self._send_timeout.close()
        self._trimmer.close()
        self._receivers.shutdown()

    def intercept_service(
        self, continuation: Callable[[Any], Any], handler_call_details: Any
    ) -> Any:
        """Wraps the handler of a method, as gRPC asks for it at each call."""
        handler = continuation(handler_call_details)
        if handler is None:  # an unknown method, which gRPC answers with UNIMPLEMENTED
            return None
        _, service, name = handler_call_details.method.split("/")
        method = Method(service, name, KINDS[handler.request_streaming, handler.response_streaming])
        behaviors = handler.unary_unary, handler.unary_stream, handler.stream_unary
        behavior = next(filter(None, behaviors), handler.stream_stream)
        decode, is_ours = handler.request_deserializer, service.startswith(_OURS)
        request = iter if handler.request_streaming else _single
        count_sent = self._metrics.messages(method)[1]

        def single(messages: Iterator[bytes], call: grpc.ServicerContext) -> Any:
            served = self._serve_call(method, call, messages, decode, is_unary=True)
            with served as (context, received):
                answer = behavior(request(received), context if is_ours else call)
                count_sent.inc()
                return answer

        def streamed(messages: Iterator[bytes], call: grpc.ServicerContext) -> Iterator[Any]:
            with self._serve_call(method, call, messages, decode) as (context, received):
                for message in behavior(request(received), context if is_ours else call):
                    count_sent.inc()
                    with self._send_timeout.sending(context, call):
                        yield message

        encode = handler.response_serializer
        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(streamed, None, encode)
        return grpc.stream_unary_rpc_method_handler(single, None, encode)

    @contextmanager
    def _serve_call(
        self,
        method: Method,
        call: grpc.ServicerContext,
        messages: Iterator[bytes],
        decode: Callable[[bytes], Any],
        is_unary: bool = False,
    ) -> Iterator[tuple[RequestContext, Iterator[Any]]]:
        """Surrounds a call. Yields its context and its decoded messages.

        If `is_unary`, the handler returns the one answer, and the memory of the request counts
        until the caller has taken the answer.
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
                    self._send_timeout.sending_answer(context, call, held.pop_all().close)
            has_failed = False
        finally:
            self._running.discard(context)
            if has_failed and not context.reason:
                note_shutdown(context)
            context.code = code_of(context, call, has_failed)
            self._end(context)

    @contextmanager
    def _admit(self, context: RequestContext, call: grpc.ServicerContext) -> Iterator[Receive]:
        """Admits a call. Yields a function to call with the size of the first message."""
        if (context.method.service, context.method.name) == _PROBE:
            with self._scheduler.probe(call.cancel):
                yield lambda size: None
            return
        context.tenant = self._authenticator.authenticate(call.invocation_metadata() or ())
        if self._is_draining and context.method.service.startswith(_OURS):
            context.cancel(_refusal)
            context.check()
        scheduler = self._scheduler
        with scheduler.call(context), scheduler.first_message(context) as receive_first:
            yield receive_first

    def _prefetch(self, context: RequestContext, messages: Iterator[bytes]) -> Any:
        """The messages, received by another thread, which is free once they are closed."""
        pace = MinThroughput(self._min_throughput, self._idle_timeout)
        count_received = self._metrics.messages(context.method)[0]
        begun, has_arrived = time.monotonic(), False

        def count(waited: float, message: bytes) -> None:
            nonlocal has_arrived
            has_arrived = True
            count_received.inc()
            pace.count(waited, len(message))

        def check() -> None:
            context.check()
            if not has_arrived and time.monotonic() - begun >= SILENT_SECONDS:
                self._refuse_silent()

        return prefetch(
            _until_cancelled(messages), self._receivers, self._idle_timeout, count, check
        )

    def _refuse_silent(self) -> None:
        """Ends a call whose first message has not arrived, if other calls wait for its memory."""
        if waiting := self._scheduler.messages.waiting:
            raise QueueFull(
                "call",
                f"no first message for {SILENT_SECONDS:g} seconds, and {waiting} other calls wait "
                "to send theirs; retry, and send it at once",
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


def _until_cancelled(messages: Iterator[bytes]) -> Iterator[bytes]:
    """Yields the same messages. Raises Cancelled if the caller has cancelled the call, or is lost.

    gRPC keeps the error that it raises for a lost caller. The error would keep all frames that it
    passes through, and the model, until the garbage collector runs; so it ends here.
    """
    with suppress(grpc.RpcError):
        yield from messages
        return
    raise cancelled_by_caller()


def _single(received: Iterator[Any]) -> Any:
    """The one message of a unary call. Raises NoMessage if the call ended before it."""
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
    elif context.reason == IdleTimeout.reason:  # the caller did not take the answer
        name = "DEADLINE_EXCEEDED"
    elif context.reason == ShuttingDown.reason:
        name = ShuttingDown.status
    else:  # ended by its deadline or its caller
        name = "DEADLINE_EXCEEDED" if context.is_past_deadline else "CANCELLED"
    return go_code_name(name)
