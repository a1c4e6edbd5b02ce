"""The wire format of protobuf: fields as views of a message, and messages with fields replaced.

The protobuf library copies every field, and does not say where in a file one is.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from secateur.tensors import Bytes

_FIXED_BYTES = {1: 8, 5: 4}  # by wire type
_MOST_VARINT_BYTES = 10


class Damaged(ValueError):
    """Bytes that are not a message."""


class Field(NamedTuple):
    """A field of a message.

    Attributes:
        number: Its number in the .proto file.
        data: The bytes of its value: a message, a text, a number, or packed numbers.
        whole: All of its bytes.
    """

    number: int
    data: memoryview
    whole: memoryview


def fields(message: memoryview) -> Iterator[Field]:
    """Yields the fields of a message, in their order.

    Raises:
        Damaged: It is not a message.
    """
    at = 0
    while at < len(message):
        tag, begin = _varint(message, at)
        size, begin = _extent(message, begin, tag & 7)
        end = begin + size
        if tag < 8 or end > len(message):
            raise Damaged(f"field {tag >> 3} is cut short")
        yield Field(tag >> 3, message[begin:end], message[at:end])
        at = end


def _extent(message: memoryview, at: int, wire_type: int) -> tuple[int, int]:
    """The bytes of a value, and where they begin."""
    if wire_type == 0:
        return _varint(message, at)[1] - at, at
    if wire_type == 2:
        return _varint(message, at)
    if wire_type not in _FIXED_BYTES:
        raise Damaged(f"wire type {wire_type} is unknown")
    return _FIXED_BYTES[wire_type], at


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """A varint, and where it ends."""
    value = 0
    for place, byte in enumerate(message[at : at + _MOST_VARINT_BYTES]):
        value |= (byte & 127) << 7 * place
        if byte < 128:
            return value, at + place + 1
    raise Damaged("a number has no end")


def encode_varint(value: int) -> bytes:
    """Encodes an int that is not negative."""
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    return bytes([*encoded, value])


def decode_varints(data: Bytes) -> npt.NDArray[np.uint64]:
    """Decodes packed varints.

    Raises:
        Damaged: The last one has no end, or one is too long.
    """
    ends = np.flatnonzero(data < 128) + 1
    begins = np.concatenate([[0], ends])
    if begins[-1] != len(data):
        raise Damaged("a number has no end")
    sizes = np.diff(begins)
    if not len(sizes):
        return np.empty(0, np.uint64)
    if sizes.max() > _MOST_VARINT_BYTES:
        raise Damaged("a number is too long")
    shifts = (np.arange(len(data)) - np.repeat(begins[:-1], sizes)).astype(np.uint64) * np.uint64(7)
    return np.bitwise_or.reduceat((data & 127).astype(np.uint64) << shifts, begins[:-1])


class Later(NamedTuple):
    """Bytes that are made when they are written.

    Attributes:
        size: How many.
        read: Makes them.
    """

    size: int
    read: Callable[[], Bytes]


Part = memoryview | bytes | Later
Parts = list[Part]


def replaced(
    message: memoryview, number: int, change: Callable[[memoryview], Parts | None]
) -> Parts:
    """Returns a message in which some values are others.

    Args:
        message: A valid one.
        number: Of the fields to change; they hold messages, texts or bytes.
        change: Makes the new value of an old one; None keeps the field as it is.
    """
    parts: Parts = []
    for field in fields(message):
        made = change(field.data) if field.number == number else None
        parts += [field.whole] if made is None else with_head(number, made)
    return parts


def with_head(number: int, value: Parts) -> Parts:
    """Returns a field that holds a message, a text or bytes."""
    size = sum(part.size if isinstance(part, Later) else len(part) for part in value)
    return [encode_varint(number << 3 | 2) + encode_varint(size), *value]


def written(parts: Sequence[Part]) -> Iterator[bytes | memoryview]:
    """Yields the bytes of parts."""
    for part in parts:
        yield part.read().data if isinstance(part, Later) else part
