"""Messages to bytes and back, without protobuf's copies of their data.

Of all messages of a call but the first, the wire format is a tag, a length and the data: field 2,
length-delimited, in every request and answer. protobuf copies the data once to build such a message
and once to serialize it; here it is copied once in all, and not at all in reading.
"""

from collections.abc import Callable
from typing import Generic, TypeVar

from google.protobuf.message import Message

M = TypeVar("M", bound=Message)

HEADER_TAG, DATA_TAG = 1 << 3 | 2, 2 << 3 | 2
# A length takes up to 5 bytes: gRPC's messages are shorter than 2^32.
_MOST_LENGTH_BYTES = 5
# An honest request has one header and one data.
_MOST_FIELDS = 4


# Metadata of a Prune that is one message each way: grpc serves it in fewer steps.
SINGLE = ("secateur-single", "1")


class Data:
    """A message with `data` alone: what a caller of it sees of a PruneRequest, and so on."""

    __slots__ = ("data",)

    def __init__(self, data: bytes | memoryview) -> None:
        self.data = data

    def HasField(self, name: str) -> bool:  # noqa: N802 (protobuf's name)
        """Whether the message has the header or the result."""
        return False


def encode(message: Message | Data | bytes) -> bytes:
    """The bytes of a message, as protobuf writes them; of what is encoded already, itself."""
    if isinstance(message, bytes):
        return message
    if isinstance(message, Data):
        return b"".join((_prefix(len(message.data)), message.data))
    return message.SerializeToString()


def _prefix(length: int) -> bytes:
    """The tag, and the length as a varint: 7 bits a byte, lowest first."""
    prefix = bytearray((DATA_TAG,))
    while length > 0x7F:
        prefix.append(length & 0x7F | 0x80)
        length >>= 7
    prefix.append(length)
    return bytes(prefix)


def beside_data(raw: bytes) -> tuple[list[memoryview], memoryview]:
    """What an encoded request has beside its data.

    Returns:
        Its fields `header`, and the rest from the first other field on: empty in what clients send.
    """
    view, headers, begin = memoryview(raw), list[memoryview](), 0
    for _ in range(_MOST_FIELDS):
        tag = raw[begin : begin + 1]
        if tag not in (bytes((HEADER_TAG,)), bytes((DATA_TAG,))):
            break
        length, at = _length(raw, begin)
        if not at or at + length > len(raw):
            break
        if tag[0] == HEADER_TAG:
            headers.append(view[begin : at + length])
        begin = at + length
    return headers, view[begin:]


def _length(raw: bytes, at: int = 0) -> tuple[int, int]:
    """The length behind a tag of one byte, and where its value begins; 0: malformed."""
    length = 0
    for index, byte in enumerate(raw[at + 1 : at + 1 + _MOST_LENGTH_BYTES]):
        length |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return length, at + 2 + index
    return 0, 0


class Decoder(Generic[M]):
    """Reads messages of one type; those with data alone as Data, on the bytes' own memory."""

    def __init__(self, from_string: Callable[[bytes], M]) -> None:
        self._from_string = from_string

    def __call__(self, raw: bytes) -> M | Data:
        """Errors: google.protobuf.message.DecodeError."""
        if raw[:1] == bytes((DATA_TAG,)):
            length, begin = _length(raw)
            if begin and len(raw) == begin + length:  # else it has more than data
                return Data(memoryview(raw)[begin:])
        return self._from_string(raw)
