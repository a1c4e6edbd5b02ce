"""The order of messages in a call: first a header with data, then data."""

from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

from google.protobuf.message import Message

from secateur_proto.codec import Data
from secateur_server.errors import InvalidRequest, NoMessage
from secateur_server.wire.writer import Bytes


class HasHeader(Protocol):
    """The request of an RPC whose first message has a header."""

    data: bytes

    def HasField(self, name: Any) -> bool:  # noqa: N802 (protobuf's name)
        """Returns whether a field is set."""


Request = TypeVar("Request", bound=HasHeader)
Response = TypeVar("Response")
Count = Callable[[int], None]


def open_request(
    messages: Iterator[Request | Data], count: Count
) -> tuple[Request, Iterator[Bytes]]:
    """Reads the first message of a call, which has the header.

    Args:
        messages: Of the call.
        count: Called with the bytes of data in each message.

    Returns:
        The first message, and the data of all messages.

    Raises:
        InvalidRequest: The first message does not have a header.
    """
    first = next(messages, None)
    if first is None:
        raise NoMessage("header", "the call ended before its first message")
    if isinstance(first, Data) or not first.HasField("header"):
        raise InvalidRequest("header", "is not set; the first message must have it")
    return first, _counted(_data(first, messages), count)


def _data(first: Request, later: Iterator[Request | Data]) -> Iterator[Bytes]:
    yield first.data
    for message in later:
        if message.HasField("header"):
            raise InvalidRequest("header", "is set again; only the first message may have it")
        yield message.data


def responses(
    make: Callable[..., Response], result: Message, chunks: Iterator[Bytes], count: Count
) -> Iterator[Response | Data]:
    """Makes the messages of an answer. The first has the result, and the first chunk, if any.

    Args:
        make: Makes the first message.
        result: For the first message.
        chunks: The data.
        count: Called with the bytes of data in each message.
    """
    counted = _counted(chunks, count)
    first: Any = make(data=bytes(next(counted, b"")))
    first.result.CopyFrom(result)
    yield first
    for data in counted:
        yield Data(data)


def _counted(parts: Iterator[Bytes], count: Count) -> Iterator[Bytes]:
    for part in parts:
        count(len(part))
        yield part
