"""Files that are not in the safetensors format, and messages in the wrong order."""

import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import grpc
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur_proto import pruner_pb2 as pb
from secateur_proto import spec_pb2
from tests.conftest import RunningServer, examples, inner_server
from tests.contract.raw import (
    RPCS,
    check_failed,
    check_invalid,
    check_serves,
    confined_server,
    entry,
    failure,
    file,
    header,
    is_served,
    kept_open,
    message,
    send,
    send_file,
    spec,
    unhurried,
)
from tests.processes import memory, reset_peak

MODEL = {
    "a.weight": torch.arange(1.0, 7).reshape(2, 3),
    "b": torch.ones(4, dtype=torch.float16),
    "steps": torch.arange(3),
}
GOOD = safetensors.torch.save(MODEL, {"made": "here"})
HEADER_BYTES = int.from_bytes(GOOD[:8], "little")
W = entry("F32", [2], 0, 8)
INVALID_STATE_DICT, INVALID_REQUEST = "INVALID_STATE_DICT", "INVALID_REQUEST"
rpcs = pytest.mark.parametrize("rpc", RPCS)


@pytest.fixture(autouse=True)
def _server_still_serves(server: RunningServer, channel: grpc.Channel) -> Iterator[None]:
    """After each test the next good request is served, and nothing of the bad ones is held."""
    yield
    check_serves(server, channel)


@pytest.fixture(scope="module")
def confined_process() -> Iterator[RunningServer]:
    no_limits = ("--max-model-bytes", str(1 << 61), "--memory-limit", str(1 << 61))
    with confined_server(*no_limits) as running:
        yield running


@pytest.fixture(scope="module")
def confined(confined_process: RunningServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(confined_process.address) as channel:
        yield channel


def one(fields: Any, size: int = 8) -> bytes:
    """Makes a file whose header has the entry `fields` for one tensor, "w"."""
    return file({"w": fields}, bytes(size))


def two(first: tuple[int, int], second: tuple[int, int]) -> bytes:
    """Makes a file of 16 bytes whose header claims two tensors with these offsets."""
    return file(
        {"v": entry("U8", [first[1] - first[0]], *first), "w": entry("F32", [2], *second)},
        bytes(16),
    )


def shaped(shape: Any) -> bytes:
    return one(entry("F32", shape, 0, 8))


def placed(*offsets: Any) -> bytes:
    return one(entry("F32", [2], *offsets))


def with_header_length(length: int) -> bytes:
    """Makes a file that claims that its header has `length` bytes."""
    return length.to_bytes(8, "little") + GOOD[8:]


# The file, the field of the error, and other parts of its message.
BAD_FILES = [
    pytest.param(with_header_length(0), "data", ["length is 0"], id="header of 0 bytes"),
    pytest.param(with_header_length(1), "data", ["length is 1;"], id="header of 1 byte"),
    pytest.param(
        with_header_length(len(GOOD) - 7), "data", [str(len(GOOD))], id="header past the end"
    ),
    pytest.param(with_header_length(2**60), "data", [str(2**60)], id="header of 2^60 bytes"),
    pytest.param(
        with_header_length(2**64 - 1), "data", [str(2**64 - 1)], id="header of 2^64-1 bytes"
    ),
    pytest.param(with_header_length(HEADER_BYTES - 1), "data", [], id="header one byte short"),
    pytest.param(with_header_length(HEADER_BYTES + 1), "data", [], id="header one byte long"),
    pytest.param(file(b"[]"), "data", ["["], id="a list"),
    pytest.param(file(b"null"), "data", ["null"], id="null"),
    pytest.param(file(b"\xef\xbb\xbf{}"), "data", [], id="byte order mark"),
    pytest.param(file(b" {}"), "data", [], id="blank before"),
    pytest.param(file(b"{} {}"), "data", ["JSON"], id="more behind"),
    pytest.param(file(b"{'w': 1}"), "data", ["JSON"], id="single quotes"),
    pytest.param(file(b'{"w\xff": 1}'), "data", ["JSON"], id="not UTF-8"),
    pytest.param(file(b'{"w":' + b"[" * 100_000), "data", ["nested"], id="100,000 lists"),
    pytest.param(file(b'{"w":' * 100_000), "data", ["nested"], id="100,000 maps"),
    pytest.param(
        file(b'{"w":{"dtype":"U8","shape":[' + b"9" * 10_000 + b'],"data_offsets":[0,1]}}', b"0"),
        "data",
        ["digits"],
        id="10,000 digits",
    ),
    pytest.param(shaped([float("nan")]), "data['w']", ["shape [nan]"], id="shape NaN"),
    pytest.param(shaped([float("inf")]), "data['w']", ["shape [inf]"], id="shape Infinity"),
    pytest.param(placed(0, float("inf")), "data['w']", ["[0, inf]"], id="offset Infinity"),
    pytest.param(one([]), "data['w']", ["data_offsets", "[]"], id="entry is a list"),
    pytest.param(one({"dtype": "F32", "shape": [2]}), "data['w']", ["data_offsets"], id="no place"),
    pytest.param(one({**W, "more": 1}), "data['w']", ["more"], id="a key too many"),
    pytest.param(one({**W, "dtype": "F31"}), "data['w']", ["F31"], id="unknown dtype"),
    pytest.param(one({**W, "dtype": "f32"}), "data['w']", ["f32"], id="lower-case dtype"),
    pytest.param(one({**W, "dtype": 32}), "data['w']", ["32"], id="dtype is a number"),
    pytest.param(one({**W, "dtype": ["F32"]}), "data['w']", ["F32"], id="dtype is a list"),
    pytest.param(shaped([3]), "data['w']", ["[3]", "F32", "12", "8 bytes"], id="shape too large"),
    pytest.param(shaped([]), "data['w']", ["[]", "4", "8 bytes"], id="shape too small"),
    pytest.param(shaped([2**62, 4]), "data['w']", [str(2**62)], id="2^64 elements"),
    pytest.param(shaped([2**62] * 64), "data['w']", [], id="product of 3968 bits"),
    pytest.param(shaped([2**63]), "data['w']", [str(2**63)], id="size of 2^63"),
    pytest.param(shaped([-1, -2]), "data['w']", ["[-1, -2]"], id="negative sizes"),
    pytest.param(shaped([True, 2]), "data['w']", ["True"], id="size is a bool"),
    pytest.param(shaped([2.0]), "data['w']", ["2.0"], id="size is a float"),
    pytest.param(shaped(2), "data['w']", ["shape 2"], id="shape is a number"),
    pytest.param(shaped([1] * 99 + [2]), "data['w']", ["shape [1, 1"], id="100 dimensions"),
    pytest.param(placed(8, 0), "data['w']", ["[8, 0]"], id="offsets reversed"),
    pytest.param(placed(-8, 0), "data['w']", ["[-8, 0]"], id="negative offset"),
    pytest.param(placed(0.0, 8.0), "data['w']", ["[0.0, 8.0]"], id="offsets are floats"),
    pytest.param(placed(False, 8), "data['w']", ["[False, 8]"], id="offset is a bool"),
    pytest.param(placed("0", "8"), "data['w']", ["['0', '8']"], id="offsets are text"),
    pytest.param(placed(0, 2**64), "data['w']", [str(2**64)], id="offset of 2^64"),
    pytest.param(placed(0, 10**400), "data['w']", ["1000"], id="offset of 400 digits"),
    pytest.param(placed(0), "data['w']", ["[0]"], id="one offset"),
    pytest.param(placed(0, 4, 8), "data['w']", ["[0, 4, 8]"], id="three offsets"),
    pytest.param(placed(8, 16), "data['w']", ["8", "gap"], id="gap before"),
    pytest.param(two((0, 4), (8, 16)), "data['w']", ["8", "gap", "'v'", "4"], id="gap between"),
    pytest.param(two((0, 9), (8, 16)), "data['w']", ["8", "overlaps", "'v'", "9"], id="overlap"),
    pytest.param(two((0, 8), (0, 8)), "data['w']", ["0", "overlaps", "'v'", "8"], id="twice there"),
    pytest.param(two((0, 9), (9, 17)), "data", ["17", "16"], id="past the end"),
    pytest.param(two((0, 7), (7, 15)), "data", ["15", "16"], id="gap behind"),
    pytest.param(
        file(b'{"w":%b,"w":%b}' % ((json.dumps(W).encode(),) * 2), bytes(8)),
        "data['w']",
        ["twice"],
        id="a name twice",
    ),
    pytest.param(
        file(b'{"w":%b,"\\u0077":%b}' % ((json.dumps(W).encode(),) * 2), bytes(8)),
        "data['w']",
        ["twice"],
        id="a name twice, spelt otherwise",
    ),
    pytest.param(file({"\ud800": W}, bytes(8)), r"data['\ud800']", [], id="surrogate in a name"),
    pytest.param(file({"n" * 10**6: {}}), f"data['{'n' * 59}...{'n' * 59}']", [], id="1 MB name"),
    pytest.param(file({"😀" * 10**5: 1}), f"data['{'😀' * 14}...{'😀' * 14}']", [], id="wide name"),
    pytest.param(file({"__metadata__": ["v"]}), "data['__metadata__']", ["v"], id="metadata list"),
    pytest.param(
        file({"__metadata__": {"k": 1}}), "data['__metadata__']['k']", ["1"], id="metadata number"
    ),
    pytest.param(
        file({"__metadata__": {"k": "\udfff"}}), "data['__metadata__']['k']", [], id="surrogate"
    ),
]


@pytest.mark.parametrize(("data", "field", "parts"), BAD_FILES)
def test_a_bad_file_is_refused_by_every_rpc(
    channel: grpc.Channel, data: bytes, field: str, parts: list[str]
) -> None:
    for rpc in RPCS:
        check_invalid(send_file(channel, rpc, data), INVALID_STATE_DICT, field, parts)


@examples(40)
@given(st.sampled_from(RPCS), st.integers(0, len(GOOD) - 1))
def test_a_truncated_file_is_refused(channel: grpc.Channel, rpc: str, length: int) -> None:
    numbers = [str(len(GOOD)), str(length)]
    found = send_file(channel, rpc, GOOD[:length], announced=len(GOOD))
    check_invalid(found, INVALID_STATE_DICT, "data", numbers)
    found = send_file(channel, rpc, GOOD[:length])
    if length < 10:
        check_invalid(found, INVALID_REQUEST, "header.data_bytes", [str(length)])
    else:
        check_invalid(found, INVALID_STATE_DICT, "data", [])


@examples(40)
@given(st.sampled_from(RPCS), st.binary(min_size=1, max_size=40))
def test_a_padded_file_is_refused(channel: grpc.Channel, rpc: str, padding: bytes) -> None:
    for announced in (len(GOOD), len(GOOD + padding)):
        found = send_file(channel, rpc, GOOD + padding, announced)
        check_invalid(found, INVALID_STATE_DICT, "data", [])


CHANGES = st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255))


@unhurried
@given(
    st.sampled_from(RPCS),
    st.lists(CHANGES, min_size=1, max_size=5),
    st.lists(st.integers(0, len(GOOD)), max_size=4),
)
def test_a_file_with_changed_bytes_is_refused_or_served(
    channel: grpc.Channel, rpc: str, changes: list[tuple[int, int]], cuts: list[int]
) -> None:
    data = bytearray(GOOD)
    for place, byte in changes:
        data[place] = byte
    places = [0, *sorted(cuts), len(data)]
    pieces = [bytes(data[a:b]) for a, b in pairwise(places)]
    messages = [message(rpc, header=header(rpc, len(data)), data=pieces[0])]
    messages += [message(rpc, data=piece) for piece in pieces[1:]]
    assert is_served(failure(send, channel, rpc, messages))


PAIR = {"__metadata___orig": entry("F32", [1], 0, 4), "__metadata___mask": entry("F32", [1], 4, 8)}


@pytest.mark.parametrize(
    "data",
    [
        *(
            pytest.param(file({"w": entry("F32", shape, 0, 0)}), id=str(shape))
            for shape in ([0], [0, 5], [5, 0], [0, 0], [3, 0, 2], [0, 2, 2], [2, 2, 0])
        ),
        pytest.param(file({"w": entry("F32", [2**62, 0], 0, 0)}), id="2^62 rows of nothing"),
        pytest.param(file({"w": entry("F32", [0, 2**62, 2**62], 0, 0)}), id="strides of 2^124"),
        pytest.param(file({"w": entry("F32", [1] * 64, 0, 4)}, bytes(4)), id="64 dimensions"),
        pytest.param(file({"": entry("F32", [1], 0, 4)}, bytes(4)), id="no name"),
        pytest.param(file(PAIR, b"\0\0\x80\x3f" * 2), id="pair of __metadata__"),
        pytest.param(file({}), id="no tensors"),
    ],
)
def test_an_odd_file_is_refused_or_answered_with_a_file(
    confined_process: RunningServer, confined: grpc.Channel, data: bytes
) -> None:
    for rpc, fields in calls_of_all_kinds():
        result = answered(confined, rpc, data, fields)
        assert not result or safetensors.torch.load(result) is not None
    check_serves(confined_process, confined)


def answered(channel: grpc.Channel, rpc: str, data: bytes, fields: dict[str, Any]) -> bytes:
    """Returns the file in an answer; empty for a Report, and if the request was refused."""
    answer: list[Any] = []
    request = message(rpc, header=header(rpc, len(data), **fields), data=data)
    found = failure(lambda: answer.extend(send(channel, rpc, [request])))
    assert is_served(found), (rpc, fields, found)
    return b"" if rpc == "Report" else b"".join(response.data for response in answer)


def calls_of_all_kinds() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields an rpc and fields of its header."""
    yield from (("Report", {}), ("Finalize", {}))
    nuclear = spec_pb2.Magnitude(matrix_norm=spec_pb2.MATRIX_NORM_NUCLEAR)
    for output in pb.Output.values():
        yield "Prune", {"output": output}
        yield "Prune", {"output": output, "spec": sliced()}
        yield "Prune", {"output": output, "spec": sliced(magnitude=nuclear)}
        yield "Prune", {"output": output, "spec": sliced(random=spec_pb2.Random(), dim=-1)}


def sliced(**fields: Any) -> spec_pb2.PruningSpec:
    return spec("*", granularity=spec_pb2.GRANULARITY_SLICE, **fields)


@rpcs
def test_an_empty_stream_is_refused(channel: grpc.Channel, rpc: str) -> None:
    found = failure(send, channel, rpc, [])
    check_invalid(found, INVALID_REQUEST, "header", [])


@rpcs
def test_a_first_message_without_a_header_is_refused(channel: grpc.Channel, rpc: str) -> None:
    for first in (message(rpc), message(rpc, data=GOOD)):
        found = failure(send, channel, rpc, [first, message(rpc, data=GOOD)])
        check_invalid(found, INVALID_REQUEST, "header", ["first message"])


@rpcs
@pytest.mark.parametrize("before", [b"", GOOD[:30], GOOD], ids=len)
def test_a_second_header_is_refused(channel: grpc.Channel, rpc: str, before: bytes) -> None:
    first = message(rpc, header=header(rpc, len(GOOD)), data=before)
    second = message(rpc, header=header(rpc, len(GOOD)), data=GOOD[len(before) :])
    found = failure(send, channel, rpc, [first, second])
    check_invalid(found, INVALID_REQUEST, "header", ["first message"])


@rpcs
@pytest.mark.parametrize("size", [0, 1, 9])
def test_a_file_that_is_too_short_is_refused(channel: grpc.Channel, rpc: str, size: int) -> None:
    found = send_file(channel, rpc, GOOD, announced=size)
    check_invalid(found, INVALID_REQUEST, "header.data_bytes", [f"{size} "])


def test_a_model_above_all_limits_is_told_the_smallest() -> None:
    options = "--max-model-bytes", "1GiB", "--memory-limit", "64MiB"
    with inner_server(*options) as running, grpc.insecure_channel(running.address) as channel:
        found = failure(send, channel, "Prune", [message("Prune", header=header("Prune", 2**31))])
    found = check_failed(found, grpc.StatusCode.RESOURCE_EXHAUSTED, "MODEL_TOO_LARGE")
    assert f"takes into memory, {64 << 20};" in found.message


@rpcs
@pytest.mark.parametrize("size", [2**30 + 1, 2**63, 2**64 - 1])
def test_a_model_above_the_limit_is_refused_before_its_data(
    channel: grpc.Channel, rpc: str, size: int
) -> None:
    with kept_open([message(rpc, header=header(rpc, size))]) as messages:
        found = failure(send, channel, rpc, messages)
    found = check_failed(found, grpc.StatusCode.RESOURCE_EXHAUSTED, "MODEL_TOO_LARGE")
    assert "header.data_bytes" in found.message
    assert str(size) in found.message
    assert str(2**30) in found.message


@rpcs
def test_a_model_at_the_limit_is_accepted(channel: grpc.Channel, rpc: str) -> None:
    found = send_file(channel, rpc, GOOD, announced=2**30)
    check_invalid(found, INVALID_STATE_DICT, "data", [])


def test_a_caller_that_continues_sending_gets_the_first_error(
    channel: grpc.Channel,
) -> None:
    first = message("Prune", header=header("Prune", 100 << 20), data=with_header_length(0))
    rest = (message("Prune", data=bytes(1 << 20)) for _ in range(99))
    found = failure(send, channel, "Prune", [first, *rest])
    check_invalid(found, INVALID_STATE_DICT, "data", ["length is 0"])


@pytest.mark.parametrize(
    ("data", "announced"),
    [
        pytest.param(file({"w": entry("U8", [900 << 20], 0, 900 << 20)}), 900 << 20, id="tensor"),
        pytest.param(with_header_length(90 << 20), 900 << 20, id="header"),
        pytest.param(file({"w": entry("F32", [1 << 28, 0], 0, 0)}), 0, id="rows of nothing"),
        pytest.param(file({"w": entry("F32", [0, 1 << 28], 0, 0)}), 0, id="nothing of columns"),
    ],
)
@rpcs
def test_no_memory_is_allocated_before_data_arrives(
    confined_process: RunningServer, confined: grpc.Channel, rpc: str, data: bytes, announced: int
) -> None:
    check_serves(confined_process, confined)
    pid = confined_process.process.pid
    reset_peak(pid)
    before = memory(pid, "VmHWM")
    fields = {"spec": sliced(random=spec_pb2.Random())} if rpc == "Prune" else {}
    found = send_file(confined, rpc, data, len(data) + announced, **fields)
    assert is_served(found), found
    assert found is not None or not announced
    assert memory(pid, "VmHWM") < before + (64 << 20)


def test_a_model_larger_than_any_memory_is_refused(confined: grpc.Channel) -> None:
    data = file({"w": entry("U8", [2**60], 0, 2**60)})
    found = send_file(confined, "Report", data, len(data) + 2**60)
    check_failed(found, grpc.StatusCode.RESOURCE_EXHAUSTED, "OUT_OF_MEMORY")


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"\xff\xff\xff", id="no protobuf"),
        pytest.param(b"\x0a\x05\x12\x03a\xffb", id="text that is not UTF-8"),
        pytest.param(b"\x12\x7fdata", id="cut"),
    ],
)
@rpcs
def test_bytes_that_are_not_a_message_are_refused(
    confined: grpc.Channel, rpc: str, content: bytes
) -> None:
    call: Any = confined.stream_unary(f"/secateur.v1.Pruner/{rpc}")
    found = failure(call, iter([content]), timeout=300)
    assert found is not None
    assert (found.code, found.domain) == (grpc.StatusCode.INVALID_ARGUMENT, "secateur"), found
