"""Runs something around every call, whatever its kind."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from secateur_server.errors import InvalidRequest


@dataclass(frozen=True)
class Method:
    """A method as metrics name it. kind: unary, client_stream, server_stream or bidi_stream."""

    service: str
    name: str
    kind: str


Around = Callable[[Method, grpc.ServicerContext], AbstractContextManager[None]]

_KINDS = {
    (False, False): ("unary_unary", "unary"),
    (True, False): ("stream_unary", "client_stream"),
    (False, True): ("unary_stream", "server_stream"),
    (True, True): ("stream_stream", "bidi_stream"),
}


class AroundCalls(grpc.ServerInterceptor):
    """An interceptor that enters `around(method, context)` for the whole of each call."""

    def __init__(self, around: Around) -> None:
        self._around = around

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

        def single(request: Any, context: grpc.ServicerContext) -> Any:
            with self._around(method, context):
                return behavior(request, context)

        def streamed(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            with self._around(method, context):
                yield from behavior(request, context)

        return rebuilt(handler, streamed if handler.response_streaming else single)


def rebuilt(handler: Any, behavior: Callable[..., Any], decode: Any = None) -> Any:
    """A handler of the same kind.  decode: in place of its deserializer."""
    shape, _ = _KINDS[handler.request_streaming, handler.response_streaming]
    make = getattr(grpc, f"{shape}_rpc_method_handler")
    return make(behavior, decode or handler.request_deserializer, handler.response_serializer)


class CheckMessages(grpc.ServerInterceptor):
    """An interceptor that raises InvalidRequest where bytes are no message.

    grpc itself answers INTERNAL, as if it were the server's defect.
    """

    def intercept_service(
        self, continuation: Callable[[Any], Any], handler_call_details: Any
    ) -> Any:
        """As grpc.ServerInterceptor.intercept_service."""
        handler = continuation(handler_call_details)
        if handler is None:
            return None
        shape, _ = _KINDS[handler.request_streaming, handler.response_streaming]
        behavior = getattr(handler, shape)

        def decode(data: bytes) -> Any:
            try:
                return handler.request_deserializer(data)
            except DecodeError as error:
                return error

        def checked(request: Any, context: grpc.ServicerContext) -> Any:
            parts = map(_message, request) if handler.request_streaming else _message(request)
            return behavior(parts, context)

        return rebuilt(handler, checked, decode)


def _message(decoded: Any) -> Any:
    if isinstance(decoded, DecodeError):
        raise InvalidRequest("message", f"its bytes are no message of this call: {decoded}")
    return decoded
