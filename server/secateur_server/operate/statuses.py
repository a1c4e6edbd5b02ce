"""What went wrong, as a gRPC status with details that a program can read."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import torch
from google.protobuf.any_pb2 import Any
from google.protobuf.message import Message
from google.rpc.code_pb2 import Code
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from secateur_server.durable import NO_MORE
from secateur_server.errors import NoMessage, OutOfMemory, RequestError, Stopped, TooShort
from secateur_server.operate.around import Method

log = logging.getLogger(__name__)

# How torch says that an allocation on the CPU failed; it has no exception of its own for it.
_NO_MEMORY = ("can't allocate memory", "not enough memory")


@contextmanager
def statuses(method: Method, context: grpc.ServicerContext) -> Iterator[None]:
    """Ends a call that raises with the status that the exception carries."""
    try:
        yield
    except Stopped:
        left = context.time_remaining()
        is_late = left is not None and left <= 0
        code = grpc.StatusCode.DEADLINE_EXCEEDED if is_late else grpc.StatusCode.CANCELLED
        context.abort(code, "the caller has left, or its time is up")
    except RequestError as error:
        if isinstance(error, NoMessage | TooShort) and _has_left(context):
            context.abort(grpc.StatusCode.CANCELLED, "the caller has left")
        context.abort_with_status(rpc_status.to_status(to_status(error)))
    except Exception as error:
        if not context.is_active():  # cancelled, or past its deadline: nobody is there to tell
            raise
        if _is_out_of_memory(error):
            log.warning("%s/%s: no memory: %s", method.service, method.name, error)
            none_left = OutOfMemory("data", "the server has no memory for this model now")
            context.abort_with_status(rpc_status.to_status(to_status(none_left)))
        log.exception("%s/%s failed", method.service, method.name)
        context.abort(grpc.StatusCode.INTERNAL, "a defect of the server; its log has the details")


def to_status(error: RequestError) -> Status:
    """google.rpc.Status of an error: its reason, and the path of the field at fault."""
    details: list[Message] = [ErrorInfo(reason=error.reason, domain="secateur")]
    if error.status == "INVALID_ARGUMENT":
        violation = BadRequest.FieldViolation(field=error.field, description=error.description)
        details.append(BadRequest(field_violations=[violation]))
    status = Status(code=Code.Value(error.status), message=str(error))
    for detail in details:
        packed = Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def _has_left(context: grpc.ServicerContext) -> bool:
    """Whether the messages of a call ended because its caller is gone.

    gRPC ends them alike where a caller has sent all and where it is lost, and tells which a moment
    later.
    """
    ended = threading.Event()
    return not context.add_callback(ended.set) or ended.wait(0.1)


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError) and error.errno in NO_MORE:
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)
