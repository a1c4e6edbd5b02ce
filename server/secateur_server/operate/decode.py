"""Decodes the messages of a call, and refuses those that would block other threads for too long.

protobuf decodes a message in one call of C, which holds the GIL: health checks and all other calls
wait. Bytes are fast, about 10 ms a MB; many fields of few bytes each are slow.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError, Message

from secateur_proto.codec import beside_data
from secateur_server.errors import InvalidRequest
from secateur_server.operate.unknown_fields import check_known
from secateur_server.runtime.context import RequestContext

# Bytes of memory of protobuf's objects for each byte of a header, if its messages are the smallest.
_DECODED = 20
# Names, messages and map entries shorter than SHORT_BYTES in one message: they take 0.25 s.
MAX_SHORT_FIELDS = 1_350_000
SHORT_BYTES = 32
# Bytes that are counted at once.
_PIECE = 1 << 20

Receive = Callable[[int], None]


def decoded(
    context: RequestContext,
    received: Iterator[bytes],
    decode: Callable[[bytes], Any],
    receive_first: Receive,
) -> Iterator[Any]:
    """Decodes messages one at a time. Calls `receive_first` with the size of the first one.

    Raises:
        InvalidRequest: A message cannot be decoded, or has too many short fields.
        UnknownField: A message has a field that this server does not know.
        RequestTooLarge, QueueFull: Decoding a header would take too much memory.
    """
    for number, raw in enumerate(received):
        if not number:
            receive_first(len(raw))
        headers, rest = beside_data(raw)
        context.charge("header", _DECODED * sum(map(len, [*headers, rest])), "decoding it")
        check_short_fields(context, [*headers, rest])
        try:
            message = decode(raw)
        except DecodeError as error:
            raise InvalidRequest(
                "message", f"the bytes are not a message of this method: {error}"
            ) from None
        if isinstance(message, Message):
            check_known(message, has_other_fields=bool(rest))
        yield message


def check_short_fields(context: RequestContext, parts: Sequence[memoryview]) -> None:
    """Refuses a message that would take too long to decode. `parts` are its bytes without data.

    Raises:
        InvalidRequest: It may have more than MAX_SHORT_FIELDS short fields.
    """
    if sum(map(len, parts)) < 2 * MAX_SHORT_FIELDS:  # too short for so many
        return
    count, begins = 0, [(part, at) for part in parts for at in range(0, len(part), _PIECE)]
    for part, begin in context.each(begins):
        count += _short_fields(np.frombuffer(part[begin : begin + _PIECE + 2], np.uint8))
        if count > MAX_SHORT_FIELDS:
            raise InvalidRequest(
                "message",
                f"more than {MAX_SHORT_FIELDS} names, messages and map entries of less than "
                f"{SHORT_BYTES} bytes; send several requests, or fewer rules",
            )


def _short_fields(values: np.ndarray[Any, np.dtype[np.uint8]]) -> int:
    """An upper bound on the length-delimited fields shorter than SHORT_BYTES, at any depth.

    Fields that begin in the last two bytes are not counted.

    In protobuf's wire format such a field is a tag, whose lowest three bits are 2, and a length.
    Both are varints: 7 bits a byte, the lowest first, and the highest bit set in all but the last
    byte. A sender may pad a varint, whose last byte is then 0. Tags of known fields have one or two
    bytes.
    """
    first, second, third = values[:-2], values[1:-1], values[2:]
    kind = first & 0x87
    one_byte_tag = (kind == 0x02) & (second < SHORT_BYTES)
    two_byte_tag = (kind == 0x82) & (second < 0x80) & (third < SHORT_BYTES)
    padded = (first >= 0x80) & (second == 0)
    return int(np.count_nonzero(one_byte_tag | two_byte_tag | padded))
