"""The targets of fuzzing: functions that give bytes to the server's readers as a call does.

A target returns whether the bytes were accepted, or else were refused with an error of the server.
Other exceptions are defects, and so are differences from the libraries with which other programs
read the same bytes.
"""

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import safetensors
import torch
from google.protobuf.message import DecodeError

from secateur_proto import checkpoints_pb2, pruner_pb2
from secateur_proto.codec import Data, Decoder
from secateur_proto.framing import file_header
from secateur_proto.index import parse_index
from secateur_server.api.convert.files import decode_files
from secateur_server.api.convert.report import encode_report
from secateur_server.api.stream import open_request
from secateur_server.cut.plan import plan
from secateur_server.cut.prune import prune
from secateur_server.errors import MalformedFile, RequestError
from secateur_server.report.tensors import measure_tensors
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.decode import decode_spec
from secateur_server.spec.resolve import resolve
from secateur_server.spec.rules import Selection
from secateur_server.state_dict.state_dict import values_of, without_extras
from secateur_server.wire.header import Header
from secateur_server.wire.index import read_index
from secateur_server.wire.mapped import MappedFile, map_header, map_tensors
from secateur_server.wire.reader import ByteStream, read_header, read_tensors
from secateur_server.wire.tensors import WireTensor
from secateur_server.wire.writer import Outgoing

CPU = torch.device("cpu")
Tensors = dict[str, WireTensor]
# A tensor's dtype, shape and bytes.
Plain = dict[str, tuple[str, list[int], bytes]]


# A safetensors file -----------------------------------------------------------------------------

# Differences between the announced and the actual length of a file.
_OFF = (0, 0, 0, 0, 0, 1, -1, 5 << 20)

# Errors of the server for files that the library accepts.
STRICTER = re.compile(
    "the header begins with"  # the format demands {; the library accepts blanks before it
    "|needs dtype, shape and data_offsets"  # and nothing else
    "|is not a list of sizes"  # more than 64 dimensions, or a size of 2^63 and more
    "|has 2\\^62 elements or more"  # where each size 0 counts as 1
    "|None is not a map"  # metadata that is null
    "|has more than|is too long"  # 100,000 entries of metadata; 16 KiB for one tensor
)


def safetensors_file(data: bytes) -> bool:
    """Reads a file from a stream and from memory, and compares with the library.

    The first byte of `data` is the size of chunks, and the second selects a wrong announced length.
    The third one tells whether the rest is a file, or a header without its length, a NUL, and the
    tensors.
    """
    (size, off, is_parted), file = data[:3].ljust(3, b"\0"), data[3:]
    off = _OFF[off % len(_OFF)]
    if is_parted:
        text, _, body = file.partition(b"\0")
        file = len(text).to_bytes(8, "little") + text + body
    size = size or len(file) or 1
    chunks = (file[begin : begin + size] for begin in range(0, len(file), size))
    try:
        header, tensors = _streamed(chunks, len(file) + off)
    except RequestError as error:
        if not off and isinstance(error, MalformedFile):
            _check_refused(file, error)
        return False
    assert not off, "a file with a wrong announced length was read"
    if not re.search(rb"-0\b", file):  # the server reads -0 as 0, and the library refuses it
        assert plain(tensors) == in_library(file)
    assert plain(_mapped(file)) == plain(tensors)
    try:
        _check_written(header, tensors)
    except RequestError:  # a wrong pair
        return False
    return True


def _streamed(chunks: Iterator[bytes], announced: int) -> tuple[Header, Tensors]:
    stream = ByteStream(chunks, announced)
    header = read_header(RequestContext(), stream)
    return header, read_tensors(stream, header, CPU)


def _mapped(data: bytes) -> Tensors:
    file = MappedFile("", memoryview(bytearray(data)))  # torch warns about read-only memory
    header, base = map_header(RequestContext(), file)
    return map_tensors(RequestContext(), file, header.entries, base)


def _check_written(header: Header, tensors: Tensors) -> None:
    """Checks that the library can read what the server writes."""
    model = without_extras(header, ())
    model.fill(RequestContext(), dict(tensors), {}, {})
    (file,) = model.files(RequestContext(), ())
    written = b"".join(file.parts())
    assert len(in_library(written)) == len(tensors)


def _check_refused(file: bytes, error: MalformedFile) -> None:
    """Checks that the library also refuses a file, except for the reasons in STRICTER."""
    try:
        in_library(file)
    except safetensors.SafetensorError:
        return
    is_known = STRICTER.search(str(error)) or _has_duplicate_keys(file)
    assert is_known, f"the library accepts it: {error}"


def _has_duplicate_keys(file: bytes) -> bool:
    """Whether the header has a key twice. The library reads only the last one."""
    found: list[bool] = []

    def look(pairs: list[tuple[str, Any]]) -> None:
        found.append(len({key for key, _ in pairs}) < len(pairs))

    json.loads(file[8 : 8 + int.from_bytes(file[:8], "little")], object_pairs_hook=look)
    return any(found)


def plain(tensors: Mapping[str, WireTensor]) -> Plain:
    """Converts tensors to the form that `in_library` returns."""
    return {
        name: (
            tensor.dtype,
            list(tensor.shape),
            tensor.data.reshape(-1).view(torch.uint8).numpy().tobytes(),
        )
        for name, tensor in tensors.items()
    }


def in_library(file: bytes) -> Plain:
    """Reads tensors with the safetensors library, which may raise SafetensorError."""
    found: Any = safetensors.deserialize(file)  # type: ignore[no-untyped-call]
    return {name: (t["dtype"], t["shape"], bytes(t["data"])) for name, t in found}


# The messages of a call ---------------------------------------------------------------------------

KINDS: tuple[Any, ...] = (
    pruner_pb2.PruneRequest,
    checkpoints_pb2.UploadRequest,
    pruner_pb2.ReportRequest,
    pruner_pb2.FinalizeRequest,
)


def messages(data: bytes) -> bool:
    """Opens a request, and compares with protobuf.

    The first byte of `data` selects the call. Messages follow, each after its length in 2 bytes.
    """
    kind = KINDS[(data[0] if data else 0) % len(KINDS)]
    raws = list(_split(data[1:]))
    counted: list[int] = []
    try:
        first, parts = open_request(map(_decoder(kind), raws), counted.append)
        joined = b"".join(parts)
        expected = [kind.FromString(raw) for raw in raws]
        if kind is checkpoints_pb2.UploadRequest:
            _check_names(first)
    except (RequestError, DecodeError):
        return False
    assert first == expected[0]
    assert joined == b"".join(message.data for message in expected)
    assert sum(counted) == len(joined)
    assert not any(message.HasField("header") for message in expected[1:])
    return True


def _split(data: bytes) -> Iterator[bytes]:
    while len(data) >= 2:
        end = 2 + int.from_bytes(data[:2], "little")
        yield data[2:end]
        data = data[end:]


def _decoder(kind: Any) -> Callable[[bytes], Any]:
    """Makes a decoder that compares the server's with protobuf."""
    decode = Decoder(kind.FromString)

    def decoded(raw: bytes) -> Any:
        expected: Any = None
        with suppress(DecodeError):
            expected = kind.FromString(raw)
        try:
            found = decode(raw)
        except DecodeError:
            assert expected is None
            raise
        assert expected is not None
        assert bytes(found.data) == expected.data
        assert isinstance(found, Data) or found == expected
        return found

    return decoded


def _check_names(first: Any) -> None:
    """Checks that accepted names of files cannot be paths."""
    for file, offset in decode_files(first.header.files):
        assert file.filename not in ("", ".", "..")
        assert not set("/\0") & set(file.filename)
        assert 0 <= offset <= file.size


# The index of a model in shards -------------------------------------------------------------------

_SHARDS = {"a.safetensors": {"w", "v"}, "b.safetensors": {"u"}}
_TIED = {"t": "w"}


def index(data: bytes) -> bool:
    """Reads an index of two files with three tensors and one tied name, and writes it again."""
    try:
        found = read_index("model.index.json", memoryview(data), _SHARDS, _TIED)
        nothing = Outgoing("U8", (), lambda: ())
        written = {file: dict.fromkeys(names, nothing) for file, names in _SHARDS.items()}
        weight_map, rest = parse_index(found.rewritten(written))
    except RequestError:
        return False
    named = {name: file for file, names in _SHARDS.items() for name in names}
    assert weight_map == named | dict(found.tied)
    assert found.tied.keys() <= _TIED.keys()
    metadata = {**found.rest.get("metadata", {}), "total_size": 3}
    assert json.dumps(rest) == json.dumps({**found.rest, "metadata": metadata})  # NaN is not NaN
    return True


# A spec -------------------------------------------------------------------------------------------

_MODEL = (
    ("conv.weight", "F32", (2, 2, 2)),
    ("fc_orig", "F64", (2, 3)),
    ("fc_mask", "F64", (2, 3)),
    ("half", "BF16", (4,)),
    ("empty", "F16", (0, 5)),
    ("steps", "I64", (1,)),
    ("packed", "F4", (2,)),
    ("scores", "F32", (2, 2, 2)),
    ("mask", "BOOL", (2, 2, 2)),
    ("fc scores", "F32", (2, 3)),
)
_BODY = (
    torch.arange(-3.0, 5),
    torch.tensor([0.5, -2, 0, 1, 1, 4], dtype=torch.float64),
    torch.tensor([1, 1, 0, 1, 1, 1], dtype=torch.float64),
    torch.tensor([1.5, -1, 1, 1]).bfloat16(),
    torch.tensor([7]),
    torch.tensor([8], dtype=torch.uint8),
    torch.arange(8.0),
    torch.tensor([1, 1, 0, 1, 0, 1, 0, 1], dtype=torch.bool),
    torch.arange(6.0),
)
_FILE = b"".join(
    (file_header(_MODEL), *(part.view(torch.uint8).numpy().tobytes() for part in _BODY))
)


def spec(data: bytes) -> bool:
    """Applies the spec in the header of a Prune to a small model."""
    try:
        rules = decode_spec(RequestContext(), pruner_pb2.PruneHeader.FromString(data).spec)
        extras = {name for rule in rules for name in rule.extras()}
        stream = ByteStream(iter([_FILE]), len(_FILE))
        header = read_header(RequestContext(), stream)
        model = without_extras(header, extras)
        resolved = resolve(RequestContext(), rules, model.catalog)
        tensors = read_tensors(stream, header, CPU)
        beside = {name: values_of(tensors.pop(name)) for name in model.catalog.extras}
        model.fill(RequestContext(), tensors, beside, {})
        pruned, outcomes = prune(RequestContext(), dict(model.parameters), resolved, model.extras)
        _check_counts(
            encode_report(
                RequestContext(),
                measure_tensors(RequestContext(), pruned),
                model.catalog,
                "",
                "",
                outcomes,
            )
        )
        if isinstance(last := resolved[-1], Selection):
            before, _ = prune(RequestContext(), dict(model.parameters), resolved[:-1], model.extras)
            state = {**model.parameters, **before}
            (planned,) = plan(RequestContext(), last, [last.amount], state, model.extras)
            assert planned.choices == outcomes[-1], "a plan differs from the prune"
    except (RequestError, DecodeError):
        return False
    return True


def _check_counts(report: Any) -> None:
    """Checks that no count in a report exceeds what it is a part of."""
    for choice in itertools.chain.from_iterable(rule.choices for rule in report.rules):
        assert choice.pruned <= choice.candidates
        assert 0 <= choice.ties_pruned <= choice.ties
    assert all(tensor.pruned <= tensor.zeros <= tensor.total for tensor in report.tensors)


TARGETS: dict[str, Callable[[bytes], bool]] = {
    target.__name__: target for target in (safetensors_file, messages, index, spec)
}
