"""Turns errors into gRPC statuses with details for programs."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc.code_pb2 import Code
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RequestInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from secateur_server.errors import (
    Cancelled,
    DeadlineExceeded,
    InternalError,
    NoMessage,
    OutOfMemory,
    RequestError,
    ShuttingDown,
    TooShort,
)
from secateur_server.operate.calls import REQUEST_ID
from secateur_server.runtime.context import RequestContext, cancelled_by_caller
from secateur_server.runtime.memory import is_out_of_memory

log = logging.getLogger(__name__)


@contextmanager
def statuses(context: RequestContext, call: grpc.ServicerContext) -> Iterator[None]:
    """Ends a call whose block raises an error with the status of that error."""
    try:
        yield
    except RequestError as error:
        is_cut_off = isinstance(error, NoMessage | TooShort) and _is_cancelled(call)
        if is_cut_off or isinstance(error, Cancelled):
            error = _interruption(context, call)
        _end(context, call, error)
    except Exception as error:
        if not call.is_active():  # cancelled, or past its deadline: nobody gets the status
            raise
        if is_out_of_memory(error):
            log.warning("%s %s: no memory: %s", context.id, context.method, error)
            none_left = OutOfMemory("data", "the server is out of memory; retry later")
            _end(context, call, none_left)
        log.exception("%s %s failed", context.id, context.method)
        what = f"internal error; the server's log has the details (request id {context.id})"
        _end(context, call, InternalError("server", what))


def note_shutdown(context: RequestContext) -> None:
    """Records the shutdown as the reason of a call that gRPC ended before its handler returned."""
    error = context.interruption() if context.interruption else None
    if isinstance(error, ShuttingDown):
        context.reason, context.error = error.reason, str(error)


def _interruption(context: RequestContext, call: grpc.ServicerContext) -> RequestError:
    """The error of a call that its deadline, its caller or the shutdown ended."""
    if context.is_past_deadline:
        waited = f"; it waited {context.waited_for}" if context.waited_for else ""
        return DeadlineExceeded("call", f"deadline exceeded{waited}")
    return (context.interruption or cancelled_by_caller)()


def _end(context: RequestContext, call: grpc.ServicerContext, error: RequestError) -> NoReturn:
    context.reason = context.reason or error.reason
    context.error = str(error)
    status: Any = rpc_status.to_status(to_status(error, context.id))
    # The request's id too, as in the metadata of successful calls.
    metadata = (*status.trailing_metadata, (REQUEST_ID, context.id))
    call.abort_with_status(status._replace(trailing_metadata=metadata))


def to_status(error: RequestError, request_id: str) -> Status:
    """Converts an error to google.rpc.Status, with its reason and the path of its field."""
    details: list[Message] = [
        ErrorInfo(reason=error.reason, domain="secateur", metadata=error.metadata),
        RequestInfo(request_id=request_id),
    ]
    if error.status == "INVALID_ARGUMENT":
        violation = BadRequest.FieldViolation(field=error.field, description=error.description)
        details.append(BadRequest(field_violations=[violation]))
    if error.retry_after is not None:
        delay = Duration(nanos=int(error.retry_after % 1 * 1e9), seconds=int(error.retry_after))
        details.append(RetryInfo(retry_delay=delay))
    status = Status(code=Code.Value(error.status), message=str(error))
    for detail in details:
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def _is_cancelled(call: grpc.ServicerContext) -> bool:
    """Whether the messages of a call ended because it was cancelled.

    gRPC ends the messages of a complete and of a cancelled call in the same way, and reports the
    cancellation a moment later.
    """
    ended = threading.Event()
    return not call.add_callback(ended.set) or ended.wait(0.1)
