"""Damaged headers: the safetensors library accepts every header that the reader accepts."""

import json
from typing import Any

import pytest
import safetensors
from hypothesis import example, given
from hypothesis import strategies as st

from secateur_server.errors import Cancelled, MalformedFile
from secateur_server.runtime.context import RequestContext
from secateur_server.wire.header import Header, header_length, parse_header
from tests.contract.raw import entry, file, unhurried

TABLE = {
    "__metadata__": {"k": "v"},
    "a": entry("F32", [2, 0], 0, 0),
    "b": entry("F32", [10], 0, 40),
    "c": entry("U8", [3], 40, 43),
    "d": entry("BOOL", [], 43, 44),
}
GOOD = file(TABLE, bytes(44))
HEADER_BYTES = int.from_bytes(GOOD[:8], "little")


def parse(data: bytes, context: RequestContext | None = None) -> Header:
    length = header_length(RequestContext(), data[:8], len(data))
    return parse_header(context or RequestContext(), data[8 : 8 + length], len(data) - 8 - length)


def check(data: bytes) -> None:
    """Either the reader refuses the file, or the library finds in it what the reader finds."""
    refused, header = None, None
    try:
        header = parse(data)
    except MalformedFile as error:
        refused = error
    if refused is not None:
        assert refused.field.startswith("data")
        assert len(str(refused).encode()) < 2000  # a status is in HTTP/2's headers: 8 KiB in all
    elif b"-0" not in data:  # which is 0 to the reader, and a float to the library
        assert header is not None
        found = {e.name: (e.dtype, list(e.shape), e.end - e.begin) for e in header.entries}
        assert found == in_library(data)


def test_parsing_of_a_header_ends_with_its_call() -> None:
    """A header of hundreds of thousands of tensors takes seconds."""
    context = RequestContext()
    context.cancel()
    with pytest.raises(Cancelled):
        parse(GOOD, context)


def in_library(data: bytes) -> dict[str, tuple[str, list[int], int]]:
    read = safetensors.deserialize(data)  # type: ignore[no-untyped-call]
    return {name: (t["dtype"], t["shape"], len(t["data"])) for name, t in read}


# Whatever JSON may stand where a number, a list or a name belongs.
ODD = st.recursive(
    st.none()
    | st.booleans()
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["F32", "f32", "F31", "BOOL", "F4", "U64", "\ud800", "n" * 9000])
    | st.integers(-2, 48)
    | st.sampled_from([2**31, 2**62, 2**63 - 1, 2**63, 2**64, 10**400, -(2**63)]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
SIZES = st.lists(st.integers(-1, 12) | st.sampled_from([2**31, 2**62, 2**63, 2**64]), max_size=5)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "F4", "F6_E2M3", "I64"]) | ODD,
        "shape": SIZES | ODD,
        "data_offsets": st.lists(st.integers(-1, 48), min_size=2, max_size=2) | ODD,
    }
)


def test_library_accepts_the_file_that_these_tests_damage() -> None:
    check(GOOD)
    assert parse(GOOD).metadata == {"k": "v"}


@unhurried
@given(
    st.lists(
        st.tuples(
            st.integers(0, HEADER_BYTES - 1),
            st.integers(0, 255) | st.sampled_from(list(b'0123456789-.eE"[]{},: ')),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_changed_bytes_are_refused_or_harmless(changes: list[tuple[int, int]]) -> None:
    data = bytearray(GOOD)
    for place, byte in changes:
        data[8 + place] = byte
    check(bytes(data))


@unhurried
@given(
    st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), ENTRIES | ODD, max_size=3),
    st.integers(0, 48),
)
def test_entries_of_any_json_are_refused_or_harmless(table: dict[str, Any], size: int) -> None:
    check(file(table, bytes(size)))


def spelled(table: dict[str, Any], **options: Any) -> bytes:
    text = json.dumps(table, ensure_ascii=False, **options).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + bytes(48)


def outcome(data: bytes) -> Header | str:
    """What a header is read as, or the path of what is wrong."""
    try:
        return parse(data)
    except MalformedFile as error:
        return error.field


@unhurried
@given(
    st.dictionaries(
        st.sampled_from(["a", "b\\", "\x1f", "\x7f", "é", 'c"', "", "__metadata__"]),
        ENTRIES
        | st.builds(entry, st.sampled_from(["F32", "U8"]), SIZES, *[st.integers(0, 48)] * 2)
        | ODD,
        max_size=5,
    )
)
def test_the_spelling_of_a_header_does_not_matter(table: dict[str, Any]) -> None:
    """Entries as the library spells them are parsed by a faster way than others."""
    usual = spelled({**table, "last": entry("U8", [48], 0, 48)}, separators=(",", ":"))
    assert outcome(usual) == outcome(spelled({**table, "last": entry("U8", [48], 0, 48)}))


def test_duplicate_name_is_refused_in_any_spelling() -> None:
    for blank in ("", " "):
        empty = f'{{"dtype":"U8","shape":[0],"data_offsets":[0,{blank}0]}}'
        text = f'{{"a":{empty},"b":{empty},"a":{empty},"c":{empty}}}'.encode()
        with pytest.raises(MalformedFile, match=r"data\['a'\]: the name occurs twice"):
            parse(len(text).to_bytes(8, "little") + text)


@pytest.mark.parametrize(
    ("dtype", "shape", "size"),
    [("F4", [3], 2), ("F4", [1], 1), ("F6_E2M3", [3], 3), ("F6_E3M2", [1, 1], 1)],
)
def test_a_tensor_of_broken_bytes_is_refused(dtype: str, shape: list[int], size: int) -> None:
    """The format has no half bytes: the library would refuse a result with such a tensor."""
    data = file({"w": entry(dtype, shape, 0, size)}, bytes(size))
    with pytest.raises(safetensors.SafetensorError):
        in_library(data)
    with pytest.raises(MalformedFile, match=rf"data\['w'\].*{dtype}"):
        parse(data)


@unhurried
@given(st.binary(max_size=60))
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(MalformedFile):
        parse(data.ljust(10, b"\xff"))


@unhurried
@given(st.integers(0, 2**64 - 1))
@example(int.from_bytes(b"PK\3\4\0\0\x08\x08", "little"))
@example(int.from_bytes(b"\x80\2\x8a\nl\xfc\x9cF", "little"))
def test_no_header_is_read_past_the_file(length: int) -> None:
    data = length.to_bytes(8, "little") + b"{}"
    if length == 2:
        assert parse(data).entries == []
        return
    is_torch = data.startswith(b"PK\3\4") or (data[0] == 0x80 and 2 <= data[1] <= 5)
    said = r"like a file of torch\.save" if is_torch else rf"length is {length}[;,]"
    with pytest.raises(MalformedFile, match=said):
        parse(data)


@pytest.mark.parametrize(("opening", "closing"), [(b"[", b"]"), (b'{"a":', b"}")])
@pytest.mark.parametrize("depth", [*range(880, 1010, 5), 100_000])
def test_no_depth_of_nesting_overruns_the_stack(opening: bytes, closing: bytes, depth: int) -> None:
    for text in (opening * depth, opening * depth + b"0" + closing * depth):
        with pytest.raises(MalformedFile):
            parse(file(b'{"w":' + text + b"}"))
