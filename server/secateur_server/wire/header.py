"""Parses the header of a safetensors file, and checks everything in it."""

import json
import math
import re
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple

from secateur_proto.dtypes import DTYPES
from secateur_proto.framing import tensor_bytes
from secateur_proto.text import Text
from secateur_server.errors import MalformedFile, quote
from secateur_server.runtime.context import RequestContext

# The format's own limit.
MAX_HEADER_BYTES = 100_000_000

# The length in 8 bytes, and {}.
MIN_FILE_BYTES = 10
# Bytes of memory for each byte of a header while it is parsed, and for the objects that a request
# creates for each tensor.
MEMORY_PER_BYTE, MEMORY_PER_TENSOR = 9, 7000

_METADATA = "__metadata__"
_ADVICE = "the server reads only safetensors files, also from URIs"
# Each entry takes memory for one or two objects, whatever its length.
_MAX_METADATA = 100_000

# An entry as safetensors itself writes it, without escapes in its name, and the comma behind it.
_SIZE = r"(?:0|[1-9]\d{0,17})"
_USUAL = re.compile(
    r'"(?!__metadata__")([^"\\\x00-\x1f]*)":\{"dtype":"(\w{1,16})",'
    rf'"shape":\[((?:{_SIZE}(?:,{_SIZE}){{0,63}})?)\],"data_offsets":\[({_SIZE}),({_SIZE})\]\}},',
    re.ASCII,
)
# The request is checked for cancellation once for so many entries.
_CHECKED = 256

_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell a lone one, which UTF-8 cannot


@dataclass(frozen=True)
class Header:
    """A parsed header.

    Attributes:
        entries: The tensors, in the header's order.
        metadata: The caller's own strings, `__metadata__`.
    """

    entries: "list[Entry]"
    metadata: dict[str, str]


class Entry(NamedTuple):
    """A tensor in the header. Its data is at [begin, end), counted from the end of the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def header_length(context: RequestContext, prefix: bytes, file_bytes: int) -> int:
    """The length of the header's JSON text.

    Args:
        context: The request.
        prefix: The first 8 bytes of the file.
        file_bytes: The size of the file.

    Raises:
        MalformedFile: The length does not fit the file.
        RequestTooLarge: Parsing the header would take more memory than its limit.
        QueueFull: Parsing the header would take more memory than other requests leave.
    """
    length = int.from_bytes(prefix, "little")
    limit = min(MAX_HEADER_BYTES, file_bytes - 8)
    if not 2 <= length <= limit:
        raise MalformedFile("data", _not_safetensors(prefix, length, file_bytes))
    context.charge("data", MEMORY_PER_BYTE * length, f"reading a header of {length} bytes")
    return length


def _not_safetensors(prefix: bytes, length: int, file_bytes: int) -> str:
    """Why the first 8 bytes are not the length of a header, and what to do."""
    if _is_torch(prefix):
        return (
            "is not a safetensors file: it begins like a file of torch.save; "
            f"{_ADVICE}; give the client the local path of a torch file"
        )
    if length > MAX_HEADER_BYTES:
        return (
            f"is not a safetensors file: it begins with {quote(prefix)}, so the header's length is "
            f"{length}, more than the limit of {MAX_HEADER_BYTES}; {_ADVICE}"
        )
    return (
        f"is not a safetensors file, or is truncated: the header's length is {length}; "
        f"in a file of {file_bytes} bytes it must be from 2 to {file_bytes - 8}"
    )


def _is_torch(prefix: bytes) -> bool:
    """Whether a file begins as a zip or a pickle of protocol 2 to 5, which torch.save writes."""
    return prefix.startswith(b"PK\3\4") or (prefix[:1] == b"\x80" and prefix[1:2] in b"\2\3\4\5")


def parse_header(context: RequestContext, text: bytes, data_bytes: int) -> Header:
    """Parses the header of a file.

    Args:
        context: The request.
        text: The JSON text.
        data_bytes: The bytes of the file behind the header.

    Raises:
        MalformedFile: The text is not a header; or the tensors do not cover the data without gaps
            and overlaps, each with a known dtype and the bytes of its shape.
        RequestTooLarge, QueueFull: The tensors would take too much memory.
    """
    if not text.startswith(b"{"):
        raise MalformedFile(
            "data",
            f"is not a safetensors file: the header begins with {quote(text[:8])}, not with {{; "
            f"{_ADVICE}",
        )
    try:
        entries, metadata = _tables(context, Text(text.decode(), _DECODER))
    except RecursionError:
        raise MalformedFile("data", "the header is nested too deeply") from None
    except ValueError as error:
        raise MalformedFile("data", f"the header is not JSON: {quote(str(error))}") from None
    context.charge("data", MEMORY_PER_TENSOR * len(entries), f"serving {len(entries)} tensors")
    position = 0
    before: str | None = None
    for entry in sorted(entries, key=attrgetter("begin", "end")):
        if entry.begin != position:
            what = "overlaps" if entry.begin < position else "leaves a gap behind"
            after = "the header" if before is None else quote(before)
            raise MalformedFile(
                _field(entry.name),
                f"data_offsets begin at {entry.begin}, which {what} {after}, ending at {position}",
            )
        position, before = entry.end, entry.name
    if position != data_bytes:
        raise MalformedFile(
            "data", f"the header describes {position} bytes of tensors, the file has {data_bytes}"
        )
    return Header(entries, metadata)


def _field(name: str) -> str:
    return f"data[{quote(name)}]"


def _tables(context: RequestContext, reader: Text) -> tuple[list[Entry], dict[str, str]]:
    """Entries and metadata. Raises MalformedFile, ValueError and RecursionError."""
    entries: dict[str, Entry] = {}
    metadata: dict[str, str] | None = None

    def take_usual() -> None:
        _take_usual(context, reader, entries)

    for name in reader.keys(take_usual):
        if name in entries or (name == _METADATA and metadata is not None):
            raise _twice(name)
        if name == _METADATA:
            metadata = _metadata(reader)
        else:
            entries[name] = _entry(context, name, reader.value())
    reader.end()
    return list(entries.values()), metadata or {}


def _take_usual(context: RequestContext, reader: Text, entries: dict[str, Entry]) -> None:
    """Parses entries that are spelled as safetensors writes them, four times as fast as others."""
    kinds: dict[tuple[str, str], Entry] = {}  # the first entry of each dtype and shape
    for number, found in enumerate(reader.take_all(_USUAL)):
        if number % _CHECKED == 0:
            context.check()
        name, dtype, shape, first, last = found.groups()
        begin, end = int(first), int(last)
        if name in entries:
            raise _twice(name)
        alike = kinds.get((dtype, shape))
        if alike is not None and end - begin == alike.end - alike.begin:
            entries[name] = Entry(name, alike.dtype, alike.shape, begin, end)
        else:
            sizes = list(map(int, shape.split(","))) if shape else []
            fields = {"dtype": dtype, "shape": sizes, "data_offsets": [begin, end]}
            entries[name] = kinds[dtype, shape] = _entry(context, name, fields)


def _metadata(reader: Text) -> dict[str, str]:
    """The metadata. Raises MalformedFile, ValueError and RecursionError."""
    if reader.next() != "{":
        raise MalformedFile(_field(_METADATA), f"{quote(reader.value())} is not a map")
    metadata: dict[str, str] = {}
    for key in reader.keys():  # noqa: SIM118
        value = reader.string() if reader.next() == '"' else reader.value()
        if not isinstance(value, str) or not (_is_text(key) and _is_text(value)):
            field = f"{_field(_METADATA)}[{quote(key)}]"
            raise MalformedFile(field, f"{quote(value)} is not a string")
        if key in metadata:
            raise _twice(key)
        metadata[key] = value
        if len(metadata) > _MAX_METADATA:
            raise MalformedFile(_field(_METADATA), f"has more than {_MAX_METADATA} entries")
    return metadata


def _is_text(text: str) -> bool:
    return not _SURROGATE.search(text)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        raise _twice(next(key for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]
    return table


_DECODER = json.JSONDecoder(object_pairs_hook=_distinct)


def _twice(name: str) -> MalformedFile:
    return MalformedFile(_field(name), "the name occurs twice in the header")


def _entry(context: RequestContext, name: str, fields: Any) -> Entry:
    context.check()  # a header of hundreds of thousands of tensors takes seconds
    if not _is_text(name):
        raise MalformedFile(_field(name), "the name is not valid Unicode")
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise MalformedFile(
            _field(name), f"needs dtype, shape and data_offsets, has {quote(fields)}"
        )
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise MalformedFile(_field(name), f"dtype {quote(dtype)} is unknown")
    if not _sizes(shape):
        raise MalformedFile(_field(name), f"shape {quote(shape)} is not a list of sizes")
    if math.prod(max(1, size) for size in shape) >= 1 << 62:
        raise MalformedFile(_field(name), f"shape {quote(shape)} has 2^62 elements or more")
    if math.prod(shape) * DTYPES[dtype].bits % 8:
        raise MalformedFile(_field(name), f"shape {quote(shape)} of {dtype} ends within a byte")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise MalformedFile(_field(name), f"data_offsets {quote(offsets)} are not [begin, end]")
    expected = tensor_bytes(dtype, shape)
    if offsets[1] - offsets[0] != expected:
        raise MalformedFile(
            _field(name),
            f"data_offsets {offsets} hold {offsets[1] - offsets[0]} bytes, "
            f"{dtype} of shape {quote(shape)} has {quote(expected)}",
        )
    return Entry(name, dtype, tuple(shape), offsets[0], offsets[1])


def _sizes(values: Any) -> bool:
    """Whether `values` are up to 64 integers in [0, 2^63)."""
    if not isinstance(values, list) or len(values) > 64:
        return False
    for value in values:  # noqa: SIM110 (several times as fast as all())
        if type(value) is not int or not 0 <= value < 1 << 63:
            return False
    return True
