"""Every call goes through here, whatever its kind."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message

from secateur_proto.codec import Data
from secateur_server.devices.threads import started_pool
from secateur_server.errors import InvalidRequest, NoMessage, Stopped
from secateur_server.operate.idle import Readers
from secateur_server.operate.metrics import Metrics
from secateur_server.operate.unknown import check_known
from secateur_server.runtime.context import Method
from secateur_server.wire.ahead import Pace, ahead

Around = Callable[[Method, grpc.ServicerContext], AbstractContextManager[Any]]

_KINDS = {
    (False, False): ("unary_unary", "unary"),
    (True, False): ("stream_unary", "client_stream"),
    (False, True): ("unary_stream", "server_stream"),
    (True, True): ("stream_stream", "bidi_stream"),
}


class Door(grpc.ServerInterceptor):
    """An interceptor that enters `around(method, context)` for the whole of each call.

    Calls are cut off of which no message comes, or is taken, for `idle_timeout` seconds, or whose
    messages bring less than `min_throughput` bytes a second for that long. So each
    method is served as one that takes a stream: else grpc waits for its message before anything
    of ours runs, without an end.
    """

    def __init__(
        self,
        around: Around,
        metrics: Metrics,
        idle_timeout: float,
        min_throughput: int,
        calls: int,
    ) -> None:
        self._around, self._metrics, self._idle_timeout = around, metrics, idle_timeout
        self._min_throughput = min_throughput
        self._readers = Readers(idle_timeout)
        self._receivers = started_pool(calls, "ahead")

    def close(self) -> None:
        """No calls come any more."""
        self._readers.close()
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
        request = _stream if handler.request_streaming else _single
        count_received, count_sent = self._metrics.messages(method)

        def count(message: Any) -> Any:
            count_received.inc()
            return message

        def single(messages: Iterator[Any], context: grpc.ServicerContext) -> Any:
            counted = map(count, messages)
            with self._around(method, context), self._received(counted) as received:
                answer = behavior(request(received), context)
                count_sent.inc()
                return answer

        def streamed(messages: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
            counted = map(count, messages)
            with self._around(method, context), self._received(counted) as received:
                for message in behavior(request(received), context):
                    count_sent.inc()
                    with self._readers.taking(context):
                        yield message

        decode, encode = _decoder(handler.request_deserializer), handler.response_serializer
        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(streamed, decode, encode)
        return grpc.stream_unary_rpc_method_handler(single, decode, encode)

    def _received(self, messages: Iterator[Any]) -> AbstractContextManager[Iterator[Any]]:
        """Closed with the call, whoever still refers to it: it has a thread."""
        pace = Pace(self._min_throughput, self._idle_timeout)

        def count(waited: float, message: Any) -> None:
            pace.count(waited, _size(message))

        return closing(ahead(_until_left(messages), self._receivers, self._idle_timeout, count))


def _until_left(messages: Iterator[Any]) -> Iterator[Any]:
    """The same messages.

    grpc keeps the error that it raises where the caller is gone, and the error would keep all
    frames that it goes through, with the model, until Python looks for cycles.  Errors: Stopped.
    """
    try:
        yield from messages
    except grpc.RpcError:
        pass
    else:
        return
    raise Stopped("call", "the caller has left")


def _stream(received: Iterator[Any]) -> Iterator[Any]:
    return map(_message, received)


def _single(received: Iterator[Any]) -> Any:
    """The one message of a call that has one.  Errors: NoMessage, InvalidRequest, UnknownField."""
    for message in received:
        return _message(message)
    raise NoMessage("message", "the call ended before its message")


def _decoder(decode: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """Gives an error in place of a message: grpc itself answers INTERNAL, as of a defect here."""

    def checked(data: bytes) -> Any:
        try:
            return decode(data)
        except DecodeError as error:
            return error

    return checked


def _size(decoded: Any) -> int:
    """Bytes of a message."""
    if isinstance(decoded, DecodeError):
        return 0
    size: int = len(decoded.data) if isinstance(decoded, Data) else decoded.ByteSize()
    return size


def _message(decoded: Any) -> Any:
    if isinstance(decoded, DecodeError):
        raise InvalidRequest("message", f"its bytes are no message of this call: {decoded}")
    if isinstance(decoded, Message):
        check_known(decoded)
    return decoded
