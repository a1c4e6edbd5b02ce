"""The context of a request, made from what gRPC says about its call."""

import re
import secrets
import time
from collections.abc import Callable
from urllib.parse import unquote

import grpc

from secateur_server.runtime.context import Method, RequestContext

# Metadata both ways: a caller may name a request, and is told its name.
REQUEST_ID = "x-request-id"
# A caller whose deadline passes cancels its call, which may be seen before the server's own one.
DEADLINE_SLACK = 0.25
_MAY_BE_ID = re.compile(r"[\w.:/@+=-]{1,128}", re.ASCII)


def begin_request(
    method: Method, call: grpc.ServicerContext, make: Callable[..., RequestContext]
) -> RequestContext:
    """A new request, which is cancelled when its caller leaves."""
    peer = unquote(call.peer())  # gRPC encodes the brackets of IPv6
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
