"""Encodes many messages of one type from columns.

A protobuf object for each of tens of thousands of tensors, or of millions in a plan, takes longer
than everything else. The bytes are those of protobuf: fields in the order of their numbers, without
fields that have their default.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_VARINT, _DOUBLE, _BYTES = 0, 1, 2
# A varint has 7 bits in each byte, so 64 bits take up to 10 bytes.
_MOST_BYTES = 10


@dataclass(frozen=True)
class Column:
    """Some bytes of each of many messages.

    Attributes:
        data: uint8, all messages one after another.
        lengths: int64, the bytes of each message.
    """

    data: Array
    lengths: Array


def numbers(field: int, values: Array) -> Column:
    """Encodes a field of an integer type."""
    return _only(values != 0, *_tagged(field, _VARINT, *_varints(values)))


def doubles(field: int, values: Array, is_set: Array | None = None) -> Column:
    """Encodes a field of type double. `is_set` says which messages have an optional one."""
    little = np.ascontiguousarray(values, "<f8")
    is_set = little.view(np.int64) != 0 if is_set is None else is_set
    parts = little.view(np.uint8).reshape(-1, 8)
    return _only(is_set, *_tagged(field, _DOUBLE, parts, np.full(len(values), 8)))


def texts(field: int, values: Sequence[str]) -> Column:
    """Encodes a field of type string. A repeated field gets one value."""
    encoded = [value.encode() for value in values]
    return nested(field, joined(encoded))


def joined(parts: Sequence[bytes]) -> Column:
    """Makes a column of encoded bytes."""
    lengths = np.fromiter(map(len, parts), np.int64, len(parts))
    return Column(np.frombuffer(b"".join(parts), np.uint8), lengths)


def nested(field: int, *columns: Column) -> Column:
    """Encodes a field whose value is columns: a message, a text, or packed numbers."""
    head = _dense(*_tagged(field, _BYTES, *_varints(_lengths(columns))))
    return concatenated(head, *columns)


def packed(field: int, values: Array, counts: Array) -> Column:
    """Encodes a repeated field of an integer type. Each message has the next `counts` values."""
    every = _dense(*_varints(values))
    ends = np.cumsum(counts)
    up_to = np.concatenate([[0], np.cumsum(every.lengths)])
    lengths = up_to[ends] - up_to[ends - counts]
    return picked(nested(field, Column(every.data, lengths)), counts > 0)


def concatenated(*columns: Column) -> Column:
    """Joins the bytes of all columns, message by message."""
    lengths = _lengths(columns)
    starts = np.cumsum(lengths) - lengths
    data = np.empty(int(lengths.sum()), np.uint8)
    for column in columns:
        before = np.cumsum(column.lengths) - column.lengths
        places = np.repeat(starts - before, column.lengths)
        places += np.arange(len(places))
        data[places] = column.data
        starts = starts + column.lengths
    return Column(data, lengths)


def _lengths(columns: Sequence[Column]) -> Array:
    """The bytes of each message in all columns."""
    lengths: Array = np.sum([column.lengths for column in columns], 0)
    return lengths


def parted(column: Column) -> list[bytes]:
    """Returns the bytes of each message."""
    data, ends = column.data.tobytes(), np.cumsum(column.lengths).tolist()
    return [data[begin:end] for begin, end in pairwise([0, *ends])]


def field_head(field: int, length: int) -> bytes:
    """Returns the bytes before a field of `length` bytes: a message or a text."""
    rows, _ = _tagged(field, _BYTES, *_varints(np.array([length])))
    return rows.tobytes()


def picked(column: Column, is_set: Array) -> Column:
    """Keeps the bytes of the messages that `is_set` selects."""
    data = column.data[np.repeat(is_set, column.lengths)]
    return Column(data, np.where(is_set, column.lengths, 0))


def _varints(values: Array) -> tuple[Array, Array]:
    """Varints in rows as long as the longest, and the bytes of each."""
    left = np.asarray(values).astype(np.uint64)
    lengths = np.ones(len(left), np.int64)
    columns = []
    for _ in range(_MOST_BYTES):
        low, left = (left & np.uint64(0x7F)).astype(np.uint8), left >> np.uint64(7)
        has_more = left != 0
        columns.append(low | (has_more.astype(np.uint8) << 7))
        lengths += has_more
        if not has_more.any():
            break
    return np.stack(columns, 1), lengths


def _tagged(field: int, kind: int, rows: Array, lengths: Array) -> tuple[Array, Array]:
    """Rows of bytes after the tag of a field."""
    tag = _varints(np.array([field << 3 | kind]))[0]
    return np.hstack([np.repeat(tag, len(rows), 0), rows]), lengths + tag.shape[1]


def _only(is_set: Array, rows: Array, lengths: Array) -> Column:
    return _dense(rows, np.where(is_set, lengths, 0))


def _dense(rows: Array, lengths: Array) -> Column:
    """A column of the first `lengths` bytes of each row."""
    return Column(rows[np.arange(rows.shape[1]) < lengths[:, np.newaxis]], lengths)
