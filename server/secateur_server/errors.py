"""Every failure that a caller can cause: its gRPC status, and its reason for programs.

docs/operations.md says what to do about each reason.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar


def quote(value: object) -> str:
    """The repr of a value, shortened for a message."""
    if isinstance(value, str) and len(value) > 1000:  # so that no long repr is built first
        value = f"{value[:500]}{value[-500:]}"
    return shorten(repr(value), 120)


def shorten(text: str, limit: int) -> str:
    """Cuts out the middle of a text of more than `limit` bytes in UTF-8."""
    encoded = text.encode()
    if len(encoded) <= limit:
        return text
    half = limit // 2
    return f"{encoded[:half].decode(errors='ignore')}...{encoded[-half:].decode(errors='ignore')}"


class RequestError(Exception):
    """A request that cannot be served.

    Args:
        field: The path of the request's field at fault, as in google.rpc.BadRequest.
        message: The fact with the value, and the advice.

    Attributes:
        status: The gRPC status.
        reason: As in google.rpc.ErrorInfo.
        retry_after: Seconds after which the same call may succeed; None: retrying does not help.
        metadata: More for programs, as in google.rpc.ErrorInfo.
    """

    status: ClassVar[str] = "INVALID_ARGUMENT"
    reason: ClassVar[str]
    retry_after: float | None = None
    metadata: Mapping[str, str] = MappingProxyType({})

    def __init__(self, field: str, message: str) -> None:
        # HTTP/2 peers accept 8 KiB of trailers, which contain this three times, once in hex.
        self.field = shorten(field, 250)
        self.description = shorten(message, 900)
        super().__init__(f"{self.field}: {self.description}")

    def __reduce__(self) -> "tuple[object, ...]":
        """Pickles the error of another process. Its classes take arguments of their own."""
        return _unpickled, (type(self), self.args, dict(vars(self)))


def _unpickled(
    kind: type[RequestError], args: tuple[object, ...], attributes: dict[str, object]
) -> RequestError:
    error = kind.__new__(kind)
    error.args = args
    vars(error).update(attributes)
    return error


class InvalidRequest(RequestError):
    """The messages of the call are wrong or misordered."""

    reason = "INVALID_REQUEST"


class NoMessage(InvalidRequest):
    """The call ended before its first message."""


class UnknownField(InvalidRequest):
    """A message has a field that this server does not know, since the client is newer.

    Args:
        field: The path of the message in the request.
        message: The type of the message.
        unknown: The field.
        version: The server's version.
    """

    def __init__(self, field: str, message: str, unknown: str, version: str) -> None:
        super().__init__(
            field,
            f"{message} has {unknown} that this server does not know: the server (secateur "
            f"{version}) is older than the client; update the server, or leave the choice out",
        )
        self.metadata = {"unknown_field": f"{message}: {unknown}", "server_version": version}


class InvalidSpec(RequestError):
    """The spec is wrong, or does not fit the tensors."""

    reason = "INVALID_SPEC"


class UnknownTensor(InvalidSpec):
    """A rule names a tensor that does not exist in the state_dict."""


class NotPrunable(InvalidSpec):
    """A rule names a tensor of a dtype that cannot be pruned."""


class AmountOutOfRange(InvalidSpec):
    """A fraction is outside [0, 1], or a count is above the number of candidates."""


class DimOutOfRange(InvalidSpec):
    """The tensor does not have the dimension."""


class NotStructured(InvalidSpec):
    """A structured rule does not apply to a tensor of this shape."""


class InvalidMask(InvalidSpec):
    """A custom mask has another shape, or values other than 0 and 1."""


class InvalidScores(InvalidSpec):
    """Importance scores have another shape, or a dtype that is not floating."""


class NanScores(InvalidSpec):
    """An importance is NaN."""


class InvalidGram(InvalidSpec):
    """A Gram matrix is not finite, or not positive semidefinite."""


class InvalidStateDict(RequestError):
    """The data differs from its header or its announcement."""

    reason = "INVALID_STATE_DICT"


class MalformedFile(InvalidStateDict):
    """The data is not a file in the safetensors format."""


class WrongLength(InvalidStateDict):
    """The data has more or fewer bytes than announced."""


class TooShort(WrongLength):
    """The data ended before all announced bytes arrived."""


class InvalidPair(InvalidStateDict):
    """X_orig and X_mask do not fit together."""


class ModelTooLarge(RequestError):
    """The model is above the server's limit."""

    status = "RESOURCE_EXHAUSTED"
    reason = "MODEL_TOO_LARGE"


class RequestTooLarge(RequestError):
    """The request needs more memory than the server's limit for it."""

    status = "RESOURCE_EXHAUSTED"
    reason = "REQUEST_TOO_LARGE"


class OutOfMemory(RequestError):
    """An allocation failed."""

    status = "RESOURCE_EXHAUSTED"
    reason = "OUT_OF_MEMORY"
    retry_after = 5.0


class StoreFull(RequestError):
    """The store's disk is full, or its limit is reached."""

    status = "RESOURCE_EXHAUSTED"
    reason = "STORE_FULL"


class StoreFailed(RequestError):
    """The store's disk failed. Nothing that the call sent is kept, and nothing is deleted."""

    status = "UNAVAILABLE"
    reason = "STORE_FAILED"


class CheckpointNotFound(RequestError):
    """The caller has no checkpoint of that name."""

    status = "NOT_FOUND"
    reason = "CHECKPOINT_NOT_FOUND"


class DataLoss(RequestError):
    """A checkpoint differs from what was stored. The field is its name."""

    status = "DATA_LOSS"
    reason = "DATA_LOSS"


class TakenOver(RequestError):
    """A newer call of the same caller has taken over the upload."""

    status = "ABORTED"
    reason = "UPLOAD_TAKEN_OVER"


class UriNotAllowed(RequestError):
    """The operator has not allowed the URI."""

    status = "PERMISSION_DENIED"
    reason = "URI_NOT_ALLOWED"


class UriNotFound(RequestError):
    """The URI does not exist."""

    status = "NOT_FOUND"
    reason = "URI_NOT_FOUND"


class UriFailed(RequestError):
    """The URI cannot be read or written."""

    status = "FAILED_PRECONDITION"
    reason = "URI_FAILED"


class UriChanged(RequestError):
    """The file changed while it was read."""

    status = "ABORTED"
    reason = "URI_CHANGED"


class QueueFull(RequestError):
    """Too many calls run or wait."""

    status = "RESOURCE_EXHAUSTED"
    reason = "QUEUE_FULL"

    def __init__(self, field: str, message: str, retry_after: float) -> None:
        super().__init__(field, message)
        self.retry_after = retry_after


class QuotaExceeded(RequestError):
    """The call needs more than the tenant's quota."""

    status = "RESOURCE_EXHAUSTED"
    reason = "QUOTA_EXCEEDED"


class Unauthenticated(RequestError):
    """The call has no token, or an unknown one."""

    status = "UNAUTHENTICATED"
    reason = "UNAUTHENTICATED"


class IdleTimeout(RequestError):
    """The caller sent nothing, sent too little, or took nothing for too long."""

    status = "DEADLINE_EXCEEDED"
    reason = "IDLE_TIMEOUT"


class Cancelled(RequestError):
    """The caller has cancelled the call, or its connection is lost."""

    status = "CANCELLED"
    reason = "CANCELLED"


class ShuttingDown(Cancelled):
    """The server shuts down: it refuses the call, or ends it after --drain-timeout."""

    status = "UNAVAILABLE"
    reason = "SHUTTING_DOWN"
    retry_after = 1.0


class DeadlineExceeded(RequestError):
    """The caller's deadline has passed."""

    status = "DEADLINE_EXCEEDED"
    reason = "DEADLINE_EXCEEDED"


class ClusterFailed(RequestError):
    """The Ray cluster lost the work, and gave up on repeating it."""

    status = "UNAVAILABLE"
    reason = "CLUSTER_FAILED"
    retry_after = 5.0


class InternalError(RequestError):
    """An internal error of the server."""

    status = "INTERNAL"
    reason = "INTERNAL"
