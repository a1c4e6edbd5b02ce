"""One call, as metrics, logs and traces tell of it."""

import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from urllib.parse import unquote

import grpc

from secateur_server.devices.watch import Watch, watched
from secateur_server.operate.callers import ANYBODY, Tenant

# Metadata both ways: a caller may name a call, and is told how it is called.
REQUEST_ID = "x-request-id"
_MAY_BE_ID = re.compile(r"[\w.:/@+=-]{1,128}", re.ASCII)


@dataclass(frozen=True)
class Method:
    """A method as metrics name it. kind: unary, client_stream, server_stream or bidi_stream."""

    service: str
    name: str
    kind: str

    def __str__(self) -> str:
        return f"{self.service}/{self.name}"


@dataclass(eq=False)
class Call:
    """One call.

    id: the caller's, or one made here.  peer: its address.  received, sent: bytes of data.
    elements: of the tensors that were reported; pruned: of them those that became so.
    queued: seconds that it waited for memory.  time_to_report: seconds.  None: it did not.
    reason: of its failure, as google.rpc.ErrorInfo has it.  error: what the caller was told.
    """

    method: Method
    id: str
    peer: str
    watch: Watch
    tenant: Tenant = ANYBODY
    received: int = 0
    sent: int = 0
    elements: int = 0
    pruned: int = 0
    sparsity: float | None = None
    queued: float | None = None
    time_to_report: float | None = None
    reason: str = ""
    error: str = ""
    code: str = ""
    begun: int = field(default_factory=time.time_ns)
    _started: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """How long it takes so far."""
        return time.perf_counter() - self._started


_current: ContextVar[Call] = ContextVar("call")


def this_call() -> Call:
    """The call that this thread works for."""
    return _current.get()


@contextmanager
def serving(method: Method, context: grpc.ServicerContext, watch: Watch) -> Iterator[Call]:
    """A new call: in the block it is `this_call`, and its watch stops where the caller leaves."""
    peer = unquote(context.peer())  # gRPC encodes the brackets of IPv6
    call = Call(method, _id_of(context), peer, watch)
    context.set_trailing_metadata(((REQUEST_ID, call.id),))
    if not context.add_callback(watch.stop):
        watch.stop()
    _current.set(call)  # until the thread's next call
    with watched(watch):
        yield call


@contextmanager
def own_call(watch: Watch) -> Iterator[None]:
    """A call that the server makes to itself: in the block it is `this_call`."""
    _current.set(Call(Method("", "", ""), "", "", watch))
    with watched(watch):
        yield


def _id_of(context: grpc.ServicerContext) -> str:
    for key, value in context.invocation_metadata() or ():
        if key == REQUEST_ID and isinstance(value, str) and _MAY_BE_ID.fullmatch(value):
            return value
    return secrets.token_hex(8)
