"""Every error of the client. SecateurError is the root of all."""

import re
from typing import cast

import grpc
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RequestInfo, RetryInfo
from grpc_status import rpc_status

from secateur.versions import VERSION


class SecateurError(Exception):
    """Root of every error.

    Attributes:
        field: The path of the request's field at fault; None if the error has no field.
        reason: Why the server failed the call, such as "QUEUE_FULL"; None if it did not say.
        request_id: The call's id, as in the server's log; None if no server answered.
    """

    field: str | None = None
    reason: str | None = None
    request_id: str | None = None

    def __str__(self) -> str:
        """Returns one line, also if a value in the message has several."""
        return re.sub(r"\s*\n\s*", " ", super().__str__())


class InvalidSpec(SecateurError, ValueError):
    """The spec is wrong, or does not fit the tensors. Also a ValueError."""


class InvalidStateDict(SecateurError, ValueError):
    """The source is not a state_dict, or is broken. Also a ValueError."""


class InvalidStatistics(SecateurError, ValueError):
    """A file of statistics is damaged, or an input of a layer is not finite. Also a ValueError."""


class InvalidRequest(SecateurError, ValueError):
    """The server does not understand the request. Also a ValueError."""


class ModelTooLarge(SecateurError):
    """The model, or the memory that the request takes beside it, is above the server's limit."""


class ServerBusy(SecateurError):
    """The server has too many requests, or too little memory, for the call now. Worth a retry.

    Attributes:
        retry_after: Seconds after which the server asks for a retry; None if it does not.
    """

    retry_after: float | None = None


class QuotaExceeded(SecateurError):
    """The request needs more than the token's tenant may have."""


class Unavailable(SecateurError):
    """No server listens at the address, it shuts down, or its disk failed. Worth a retry."""


class DeadlineExceeded(SecateurError, TimeoutError):
    """The call was not done within `timeout`. Also a TimeoutError."""


class Cancelled(SecateurError):
    """The call was cancelled."""


class Unauthenticated(SecateurError):
    """The token is missing, or wrong."""


class PermissionDenied(SecateurError):
    """The token's tenant may not do that."""


class CheckpointNotFound(SecateurError):
    """The server has no such checkpoint."""


class StoreFull(SecateurError):
    """The server has no disk space for another checkpoint."""


class DataLoss(SecateurError):
    """A checkpoint is damaged, or data did not arrive as it was sent."""


class Aborted(SecateurError):
    """Another call changed the same upload, or the file while it was read. Worth a retry."""


class UriError(SecateurError):
    """The server cannot open, read or write a URI."""


class ServerError(SecateurError):
    """An internal error of the server; its log has the details."""


class NotCalibrated(UserWarning):
    """Layers of a module had no input during a calibration; the message names them."""


class FewInputs(UserWarning):
    """A Gram matrix is of fewer inputs than the layer has channels; the message names the layer."""


class NotSaved(UserWarning):
    """The written file lacks something that the source has; the message names it."""


class NotPruned(UserWarning):
    """A model in training is less sparse than its schedule asks; the message says why."""


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
    """Returns a failed call's error as a SecateurError."""
    call = cast(grpc.Call, error)
    info, bad_request, request, retry = ErrorInfo(), BadRequest(), RequestInfo(), RetryInfo()
    try:
        status = rpc_status.from_call(call)
    except ValueError:  # the details are of another status, so not from this server
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
    """The server's message, with this client's version if the server is older."""
    if "server_version" in info.metadata:
        return f"{call.details()} (this client is secateur {VERSION})"
    if call.code() == grpc.StatusCode.UNIMPLEMENTED:
        return (
            "the server has no such method: it is older than this client (secateur "
            f"{VERSION}), or is not a secateur server ({call.details()})"
        )
    return call.details() or ""
