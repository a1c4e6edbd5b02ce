"""Every failure that a caller can cause, each with its own gRPC status.

RequestError
    InvalidRequest          INVALID_ARGUMENT    the messages of the call are out of order
        NoMessage                               there is none
        UnknownField                            from a client that is newer than the server
    InvalidSpec             INVALID_ARGUMENT    the spec is wrong, or does not fit the tensors
        UnknownTensor                           a rule names a tensor that is not there
        NotPrunable                             a rule names a tensor of a dtype that has no pruning
        AmountOutOfRange
        DimOutOfRange
        NotStructured                           a slice of a tensor that has no slices
        InvalidMask                             not 0 and 1, or of another shape
        InvalidScores                           of another shape or dtype
        NanScores                               NaN has no rank
    InvalidStateDict        INVALID_ARGUMENT    the data is not what it says
        MalformedFile                           not the safetensors format
        WrongLength                             more bytes than announced
            TooShort                            fewer bytes than announced
        InvalidPair                             X_orig and X_mask do not make a pruned X
    ModelTooLarge           RESOURCE_EXHAUSTED  above --max-model-bytes
    RequestTooLarge         RESOURCE_EXHAUSTED  a header, spec or plan takes too much memory
    OutOfMemory             RESOURCE_EXHAUSTED  no memory for it now
    StoreFull               RESOURCE_EXHAUSTED  no room on the store's disk
    StoreFailed             UNAVAILABLE         the store's disk failed; nothing has changed there
    CheckpointNotFound      NOT_FOUND           the caller has none of that name
    DataLoss                DATA_LOSS           a checkpoint is not what was stored
    TakenOver               ABORTED             the same upload began anew
    UriNotAllowed           PERMISSION_DENIED   the operator has not listed it
    UriNotFound             NOT_FOUND           there is nothing
    UriFailed               FAILED_PRECONDITION cannot be read, or written
    UriChanged              ABORTED             while it was read
    QueueFull               RESOURCE_EXHAUSTED  too many wait; RetryInfo says when to come again
    QuotaExceeded           RESOURCE_EXHAUSTED  above what the tenant may have
    Unauthenticated         UNAUTHENTICATED     no token, or an unknown one
    IdleTimeout             DEADLINE_EXCEEDED   nothing, or too little, came or was taken
    Cancelled                 CANCELLED           the caller has left
        ShuttingDown        UNAVAILABLE         the server shuts down
    Late                    DEADLINE_EXCEEDED   its time is up
    Defect                  INTERNAL            a defect of the server
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar


def quote(value: object) -> str:
    """`value` as Python writes it, short enough to stand in a message."""
    if isinstance(value, str) and len(value) > 1000:  # what is left out need not be written first
        value = f"{value[:500]}{value[-500:]}"
    return shorten(repr(value), 120)


def shorten(text: str, limit: int) -> str:
    """`text`, without its middle where it has more than `limit` bytes as UTF-8."""
    encoded = text.encode()
    if len(encoded) <= limit:
        return text
    half = limit // 2
    return f"{encoded[:half].decode(errors='ignore')}...{encoded[-half:].decode(errors='ignore')}"


class RequestError(Exception):
    """A request that cannot be served.

    field: the path of the request's field at fault, as google.rpc.BadRequest has it.
    retry_after: seconds after which the same call may be served; None where it never is.
    metadata: more for programs to read, as google.rpc.ErrorInfo has it.
    """

    status: ClassVar[str] = "INVALID_ARGUMENT"
    reason: ClassVar[str]
    retry_after: float | None = None
    metadata: Mapping[str, str] = MappingProxyType({})

    def __init__(self, field: str, message: str) -> None:
        # HTTP/2 peers take 8 KiB of trailers, where all this stands three times, once in hex.
        self.field = shorten(field, 250)
        self.description = shorten(message, 900)
        super().__init__(f"{self.field}: {self.description}")


class InvalidRequest(RequestError):
    """The messages of the call are out of order."""

    reason = "INVALID_REQUEST"


class NoMessage(InvalidRequest):
    """The call ended before its first message."""


class UnknownField(InvalidRequest):
    """A message has a field that this server does not know: its client is newer."""

    def __init__(self, field: str, message: str, unknown: str, version: str) -> None:
        """message: its type.  unknown: the field.  version: of this server."""
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
    """A rule names a tensor that the state_dict does not have."""


class NotPrunable(InvalidSpec):
    """A rule names a tensor of a dtype that has no pruning."""


class AmountOutOfRange(InvalidSpec):
    """A fraction outside [0, 1], or a count above what is left."""


class DimOutOfRange(InvalidSpec):
    """The tensor does not have that dimension."""


class NotStructured(InvalidSpec):
    """A structured rule on a tensor of fewer than 2 dimensions, or of no matrices."""


class InvalidMask(InvalidSpec):
    """A custom mask of another shape, or with values other than 0 and 1."""


class InvalidScores(InvalidSpec):
    """Importance scores of another shape, or of a dtype that is not floating."""


class NanScores(InvalidSpec):
    """An importance that is NaN has no rank."""


class InvalidStateDict(RequestError):
    """The data is not what it says."""

    reason = "INVALID_STATE_DICT"


class MalformedFile(InvalidStateDict):
    """The data is not a file in the safetensors format."""


class WrongLength(InvalidStateDict):
    """More bytes than announced, or fewer."""


class TooShort(WrongLength):
    """The data ended before all that was announced had arrived."""


class InvalidPair(InvalidStateDict):
    """X_orig and X_mask do not make a pruned X."""


class ModelTooLarge(RequestError):
    """The model is above the server's limit."""

    status = "RESOURCE_EXHAUSTED"
    reason = "MODEL_TOO_LARGE"


class RequestTooLarge(RequestError):
    """What the request asks for takes more memory than the server ever has for it."""

    status = "RESOURCE_EXHAUSTED"
    reason = "REQUEST_TOO_LARGE"


class OutOfMemory(RequestError):
    """There is no memory for the request now."""

    status = "RESOURCE_EXHAUSTED"
    reason = "OUT_OF_MEMORY"
    retry_after = 5.0


class StoreFull(RequestError):
    """The store's disk, or its limit, has no room for it."""

    status = "RESOURCE_EXHAUSTED"
    reason = "STORE_FULL"


class StoreFailed(RequestError):
    """The store's disk failed. Nothing of what the call sent is kept, and nothing is deleted."""

    status = "UNAVAILABLE"
    reason = "STORE_FAILED"


class CheckpointNotFound(RequestError):
    """The caller has no checkpoint of that name."""

    status = "NOT_FOUND"
    reason = "CHECKPOINT_NOT_FOUND"


class DataLoss(RequestError):
    """A checkpoint is not what was stored. field: its name."""

    status = "DATA_LOSS"
    reason = "DATA_LOSS"


class TakenOver(RequestError):
    """The same caller began the same upload anew."""

    status = "ABORTED"
    reason = "UPLOAD_TAKEN_OVER"


class UriNotAllowed(RequestError):
    """The operator has not listed that URI."""

    status = "PERMISSION_DENIED"
    reason = "URI_NOT_ALLOWED"


class UriNotFound(RequestError):
    """There is nothing at that URI."""

    status = "NOT_FOUND"
    reason = "URI_NOT_FOUND"


class UriFailed(RequestError):
    """What a URI names cannot be read, or written."""

    status = "FAILED_PRECONDITION"
    reason = "URI_FAILED"


class UriChanged(RequestError):
    """What a URI names changed while it was read."""

    status = "ABORTED"
    reason = "URI_CHANGED"


class QueueFull(RequestError):
    """Too many calls wait already."""

    status = "RESOURCE_EXHAUSTED"
    reason = "QUEUE_FULL"

    def __init__(self, field: str, message: str, retry_after: float) -> None:
        super().__init__(field, message)
        self.retry_after = retry_after


class QuotaExceeded(RequestError):
    """The call needs more than its tenant may ever have."""

    status = "RESOURCE_EXHAUSTED"
    reason = "QUOTA_EXCEEDED"


class Unauthenticated(RequestError):
    """The call has no token, or one that is not known."""

    status = "UNAUTHENTICATED"
    reason = "UNAUTHENTICATED"


class IdleTimeout(RequestError):
    """For too long the caller sent nothing, sent too little, or took nothing."""

    status = "DEADLINE_EXCEEDED"
    reason = "IDLE_TIMEOUT"


class Cancelled(RequestError):
    """The caller has left."""

    status = "CANCELLED"
    reason = "CANCELLED"


class ShuttingDown(Cancelled):
    """The server shuts down: it refuses the call, or ends it after --drain-timeout."""

    status = "UNAVAILABLE"
    reason = "SHUTTING_DOWN"
    retry_after = 1.0


class DeadlineExceeded(RequestError):
    """The caller's time is up."""

    status = "DEADLINE_EXCEEDED"
    reason = "DEADLINE_EXCEEDED"


class InternalError(RequestError):
    """The server has a defect."""

    status = "INTERNAL"
    reason = "INTERNAL"
