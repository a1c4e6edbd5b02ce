"""Creates the context of a request from the call of gRPC."""

import re
import secrets
import time
from collections.abc import Callable
from urllib.parse import unquote

import grpc

from secateur_server.runtime.context import Method, RequestContext

# Metadata of request and answer: the caller may choose the id of a request.
REQUEST_ID = "x-request-id"
# Seconds. A client cancels its call at the deadline, which may reach the server slightly before the
# server's own deadline. A cancellation so close to the deadline counts as DEADLINE_EXCEEDED.
DEADLINE_SLACK = 0.25
_MAY_BE_ID = re.compile(r"[\w.:/@+=-]{1,128}", re.ASCII)


def begin_request(
    method: Method, call: grpc.ServicerContext, make: Callable[..., RequestContext]
) -> RequestContext:
    """Makes the context of a request, which is cancelled with its call of gRPC."""
    peer = unquote(call.peer())  # gRPC percent-encodes the brackets of IPv6
    left = call.time_remaining()
    deadline = None if left is None else time.monotonic() + left
    context = make(method, _id_of(call), peer, deadline=deadline)
    call.set_trailing_metadata(((REQUEST_ID, context.id),))

    def ended() -> None:
        if context.deadline is not None and context.deadline - time.monotonic() < DEADLINE_SLACK:
            context.deadline = time.monotonic()
        context.cancel()

    if not call.add_callback(ended):
        ended()
    return context


def _id_of(call: grpc.ServicerContext) -> str:
    for key, value in call.invocation_metadata() or ():
        if key == REQUEST_ID and isinstance(value, str) and _MAY_BE_ID.fullmatch(value):
            return value
    return secrets.token_hex(8)
