"""Every failure that a caller can cause, each with its own gRPC status.

RequestError
    InvalidRequest          INVALID_ARGUMENT    the messages of the call are out of order
        NoMessage                               there is none
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
    OutOfMemory             RESOURCE_EXHAUSTED  no memory for it now
"""

from typing import ClassVar


def quote(value: object) -> str:
    """`value` as Python writes it, short enough to stand in a message."""
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
    """

    status: ClassVar[str] = "INVALID_ARGUMENT"
    reason: ClassVar[str]

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


class OutOfMemory(RequestError):
    """There is no memory for the request now."""

    status = "RESOURCE_EXHAUSTED"
    reason = "OUT_OF_MEMORY"
