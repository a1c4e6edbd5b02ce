"""The head of a safetensors file, and everything that can be wrong with it."""

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
# Bytes of memory for a byte of a header while it is read, and for all that a request makes of a
# tensor beside its values.
MEMORY_PER_BYTE, MEMORY_PER_TENSOR = 9, 7000

_METADATA = "__metadata__"
_ADVICE = "the server reads only safetensors files, also from URIs"
# Each is an object or two, whatever its length.
_MAX_METADATA = 100_000

# An entry as safetensors itself writes it, with no escape in its name, and the comma behind it.
_SIZE = r"(?:0|[1-9]\d{0,17})"
_USUAL = re.compile(
    r'"(?!__metadata__")([^"\\\x00-\x1f]*)":\{"dtype":"(\w{1,16})",'
    rf'"shape":\[((?:{_SIZE}(?:,{_SIZE}){{0,63}})?)\],"data_offsets":\[({_SIZE}),({_SIZE})\]\}},',
    re.ASCII,
)
# Of these one in so many checks whether the request is to end.
_CHECKED = 256

_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell a lone one, which UTF-8 cannot


@dataclass(frozen=True)
class Header:
    """What a file announces: its tensors in the header's order, and the caller's own texts."""

    entries: "list[Entry]"
    metadata: dict[str, str]


class Entry(NamedTuple):
    """A tensor that the header announces; its data is at [begin, end) behind the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def header_length(context: RequestContext, prefix: bytes, file_bytes: int) -> int:
    """The length of the JSON text, from the first 8 bytes of a file of `file_bytes` bytes.

    Raises:
        MalformedFile: It cannot be the length of that file's header.
        RequestTooLarge: The tensors that it names take more memory than there is for it.
        QueueFull: As much, beside other requests.
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
            f"{length}, and at most {MAX_HEADER_BYTES} is read; {_ADVICE}"
        )
    return (
        f"is not a safetensors file, or is truncated: the header's length is {length}; "
        f"in {file_bytes} bytes it is from 2 to {file_bytes - 8}"
    )


def _is_torch(prefix: bytes) -> bool:
    """A zip archive, or a pickle of protocol 2 to 5, which torch wrote before 1.6."""
    return prefix.startswith(b"PK\3\4") or (prefix[:1] == b"\x80" and prefix[1:2] in b"\2\3\4\5")


def parse_header(context: RequestContext, text: bytes, data_bytes: int) -> Header:
    """What the header `text` of a file announces.

    data_bytes: what is left of the file behind the header.
    Errors: MalformedFile, unless the tensors cover the data from 0 to its end without gap or
    overlap, each with a known dtype, and as many bytes as its shape has.
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
    """Errors: MalformedFile, ValueError, RecursionError."""
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
    """Takes entries that are spelled as usual: in a quarter of the time of any others."""
    kinds: dict[tuple[str, str], Entry] = {}  # the first one of each dtype and shape
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
    """Errors: MalformedFile, ValueError, RecursionError."""
    if reader.next() != "{":
        raise MalformedFile(_field(_METADATA), f"{quote(reader.value())} is not a map")
    metadata: dict[str, str] = {}
    for key in reader.keys():  # noqa: SIM118
        value = reader.string() if reader.next() == '"' else reader.value()
        if not isinstance(value, str) or not (_is_text(key) and _is_text(value)):
            field = f"{_field(_METADATA)}[{quote(key)}]"
            raise MalformedFile(field, f"{quote(value)} is no text")
        if key in metadata:
            raise _twice(key)
        metadata[key] = value
        if len(metadata) > _MAX_METADATA:
            raise MalformedFile(_field(_METADATA), f"has more than {_MAX_METADATA} texts")
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
    return MalformedFile(_field(name), "the name stands twice in the header")


def _entry(context: RequestContext, name: str, fields: Any) -> Entry:
    context.check()  # of hundreds of thousands the header alone takes seconds
    if not _is_text(name):
        raise MalformedFile(_field(name), "the name is no text")
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
        raise MalformedFile(_field(name), f"shape {quote(shape)} is larger than any tensor's")
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
    """Whether `values` are integers in [0, 2^63), as many as a tensor has dimensions."""
    if not isinstance(values, list) or len(values) > 64:
        return False
    for value in values:  # noqa: SIM110 (several times as fast as all())
        if type(value) is not int or not 0 <= value < 1 << 63:
            return False
    return True
