"""Every error of the client.

SecateurError
    InvalidSpec             also a ValueError: the spec is wrong, or does not fit the tensors
    InvalidStateDict        also a ValueError: the source is no state_dict, or a broken one
    InvalidRequest          also a ValueError: server and client do not understand each other
    ModelTooLarge           the model, or what it takes to serve it, is above the server's limit
    ServerBusy              the server has no room for the request now; worth a retry
    QuotaExceeded           the request needs more than the token's owner may have
    Unavailable             no server, one that shuts down, or whose disk failed; worth a retry
    DeadlineExceeded        also a TimeoutError: not done within `timeout`
    Cancelled               the call was cancelled
    Unauthenticated         no token, or a wrong one
    PermissionDenied        the token's owner may not do that
    CheckpointNotFound      the server has no such checkpoint
    StoreFull               the server has no room for another checkpoint
    DataLoss                a checkpoint is not what was stored, or data did not arrive as sent
    Aborted                 somebody else was at it; worth a retry
    UriError                the server cannot open, read or write a URI
    ServerError             a defect of the server; its log has the details

NotSaved is a warning: what was written lacks something that the source has.
"""

import re
from typing import cast

import grpc
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RequestInfo, RetryInfo
from grpc_status import rpc_status

from secateur.versions import VERSION


class SecateurError(Exception):
    """Root of every error.

    field: the path of the request's field at fault, where there is one.
    reason: why the server failed the call, such as "QUEUE_FULL"; None where it does not say.
    request_id: of the call, as the server's log has it; None where no server answered.
    """

    field: str | None = None
    reason: str | None = None
    request_id: str | None = None

    def __str__(self) -> str:
        """One line, whatever a value in it looks like."""
        return re.sub(r"\s*\n\s*", " ", super().__str__())


class InvalidSpec(SecateurError, ValueError):
    """The spec is wrong, or does not fit the tensors."""


class InvalidStateDict(SecateurError, ValueError):
    """The source is no state_dict, or a broken one."""


class InvalidRequest(SecateurError, ValueError):
    """The server does not understand the request."""


class ModelTooLarge(SecateurError):
    """The model, or the memory that the request takes beside it, is above the server's limit."""


class ServerBusy(SecateurError):
    """The server has no room for the request now.

    retry_after: seconds after which it asks to be called again; None where it does not.
    """

    retry_after: float | None = None


class QuotaExceeded(SecateurError):
    """The request needs more than the token's owner may have."""


class Unavailable(SecateurError):
    """There is no server at the address, it shuts down, or its store's disk failed."""


class DeadlineExceeded(SecateurError, TimeoutError):
    """The call was not done within `timeout`."""


class Cancelled(SecateurError):
    """The call was cancelled."""


class Unauthenticated(SecateurError):
    """The token is missing, or wrong."""


class PermissionDenied(SecateurError):
    """The token's owner may not do that."""


class CheckpointNotFound(SecateurError):
    """The server has no such checkpoint."""


class StoreFull(SecateurError):
    """The server has no room for another checkpoint."""


class DataLoss(SecateurError):
    """A checkpoint is not what was stored, or data did not arrive as it was sent."""


class Aborted(SecateurError):
    """Somebody else was at the same thing: the same upload, or the file while it was read."""


class UriError(SecateurError):
    """The server cannot open, read or write a URI."""


class ServerError(SecateurError):
    """A defect of the server; its log has the details."""


class NotSaved(UserWarning):
    """What was written lacks something that the source has; the message names it."""


_BY_REASON = {
    "INVALID_SPEC": InvalidSpec,
    "INVALID_STATE_DICT": InvalidStateDict,
    "MODEL_TOO_LARGE": ModelTooLarge,
    "REQUEST_TOO_LARGE": ModelTooLarge,
    "STORE_FULL": StoreFull,
    "QUOTA_EXCEEDED": QuotaExceeded,
    "URI_NOT_FOUND": UriError,
    "URI_FAILED": UriError,
}
_BY_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.UNIMPLEMENTED: InvalidRequest,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ServerBusy,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.NOT_FOUND: CheckpointNotFound,
    grpc.StatusCode.DATA_LOSS: DataLoss,
    grpc.StatusCode.ABORTED: Aborted,
}


def from_rpc(error: grpc.RpcError) -> SecateurError:
    """The error that a failed call means."""
    call = cast(grpc.Call, error)
    info, bad_request, request, retry = ErrorInfo(), BadRequest(), RequestInfo(), RetryInfo()
    try:
        status = rpc_status.from_call(call)
    except ValueError:  # details of another status: not this server's
        status = None
    for detail in status.details if status else ():
        for kind_of in (info, bad_request, request, retry):
            detail.Unpack(kind_of)
    kind = _BY_REASON.get(info.reason) or _BY_STATUS.get(call.code(), ServerError)
    made = kind(_words(call, info))
    made.reason = info.reason or None
    made.request_id = request.request_id or None
    if bad_request.field_violations:
        made.field = bad_request.field_violations[0].field
    if isinstance(made, ServerBusy) and retry.HasField("retry_delay"):
        made.retry_after = retry.retry_delay.ToTimedelta().total_seconds()
    return made


def _words(call: grpc.Call, info: ErrorInfo) -> str:
    """What the server says, with this client's version where the server is older."""
    if "server_version" in info.metadata:
        return f"{call.details()} (this client is secateur {VERSION})"
    if call.code() == grpc.StatusCode.UNIMPLEMENTED:
        return (
            "the server has no such method: it is older than this client (secateur "
            f"{VERSION}), or is not a secateur server ({call.details()})"
        )
    return call.details() or ""
