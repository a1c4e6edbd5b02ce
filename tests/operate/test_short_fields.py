"""Messages with so many short fields that decoding would block other threads."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.unknown_fields import UnknownFieldSet
from hypothesis import given
from hypothesis import strategies as st

from secateur_proto import checkpoints_pb2, spec_pb2
from secateur_proto.checkpoints_pb2_grpc import CheckpointsStub
from secateur_proto.pruner_pb2 import PruneRequest
from secateur_server.errors import Cancelled, InvalidRequest, UnknownField
from secateur_server.operate import decode, unknown_fields
from secateur_server.operate.decode import MAX_SHORT_FIELDS, SHORT_BYTES, decoded
from secateur_server.runtime.context import RequestContext
from secateur_server.runtime.scheduler import MAX_MESSAGE_BYTES
from secateur_server.spec.amounts import MOST_ENTRIES
from secateur_server.spec.decode import MOST_GROUPS
from tests.conftest import RunningServer
from tests.contract.raw import TIMEOUT, check_failed, check_serves, failure

ROOT = Path(__file__).parents[2]


def varint(value: int, padding: int = 0) -> bytes:
    """Encodes a varint with `padding` more bytes than it needs."""
    groups = [value & 0x7F]
    while value := value >> 7:
        groups.append(value & 0x7F)
    groups += padding * [0]
    return bytes((*(group | 0x80 for group in groups[:-1]), groups[-1]))


def field(number: int, value: bytes, padding: tuple[int, int] = (0, 0)) -> bytes:
    """Encodes a length-delimited field, with padding of its tag and its length."""
    return b"".join((varint(number << 3 | 2, padding[0]), varint(len(value), padding[1]), value))


@st.composite
def messages(draw: st.DrawFn, depth: int = 3) -> tuple[bytes, int]:
    """Draws an encoded message, and counts its fields below SHORT_BYTES at all depths."""
    parts, count = [], 0
    for _ in range(draw(st.integers(0, 4))):
        number = draw(st.integers(1, 2047))
        if draw(st.booleans()):
            parts.append(varint(number << 3) + varint(draw(st.integers(0, 1 << 30))))
            continue
        names = st.binary(max_size=40).map(lambda name: (name, 0))
        value, within = draw(messages(depth - 1) if depth else names)
        padding = draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
        parts.append(field(number, value, padding))
        count += within + (len(value) < SHORT_BYTES)
    return b"".join(parts), count


@given(messages())
def test_no_short_field_is_missed(made: tuple[bytes, int]) -> None:
    encoded, count = made
    padded = np.frombuffer(encoded + b"\xff\xff", np.uint8)
    assert decode._short_fields(padded) >= count


def taken(raw: bytes, context: RequestContext | None = None) -> Any:
    """Decodes the first message of a request as the server does."""
    received = iter([raw])
    found = decoded(
        context or RequestContext(), received, PruneRequest.FromString, lambda size: None
    )
    return next(found)


NAMES = [f"w{number}" for number in range(300_000)]


def masks(rule: spec_pb2.Rule) -> None:
    rule.custom_masks.masks.update({name: f"m{name}" for name in NAMES})


def scores(rule: spec_pb2.Rule) -> None:
    rule.selection.tensors.extend(NAMES)
    rule.selection.importance_scores.update({name: f"s{name}" for name in NAMES})


def table(rule: spec_pb2.Rule) -> None:
    for name in NAMES[:MOST_ENTRIES]:
        rule.selection.table.entries.add(tensors=name, fraction=0.3)


def groups(rule: spec_pb2.Rule) -> None:
    for group in range(MOST_GROUPS):
        members = [spec_pb2.Member(tensor=f"w{index}", dim=1, units=64) for index in range(5)]
        rule.selection.groups.add(name=f"g{group}", members=members)


def indices(rule: spec_pb2.Rule) -> None:
    for _ in range(5):
        rule.selection.groups.add().members.add(tensor="w", indices=range(1_000_000))


def request_of(fill: Callable[[spec_pb2.Rule], None], data: bytes = b"") -> PruneRequest:
    request = PruneRequest(data=data)
    fill(request.header.spec.rules.add())
    return request


@pytest.mark.parametrize("fill", [masks, scores, table, groups, indices])
def test_specs_at_the_limits_are_accepted(fill: Callable[[spec_pb2.Rule], None]) -> None:
    request = request_of(fill)
    raw = request.SerializeToString()
    assert len(raw) < MAX_MESSAGE_BYTES
    assert taken(raw) == request


def test_data_beside_a_long_spec_is_not_counted() -> None:
    """Bytes with the value 2 look like short fields."""
    request = request_of(groups, b"\x02" * (12 << 20))
    request.header.spec.rules.extend(2 * [request.header.spec.rules[0]])
    assert request.header.ByteSize() > 2 * MAX_SHORT_FIELDS
    assert taken(request.SerializeToString()) == request


# The decoder does not count the last field of each part of a message.
TOO_MANY = MAX_SHORT_FIELDS + 10
SMALLEST = {
    "rules": field(1, field(2, field(1, b"") * TOO_MANY)),
    "padded lengths": field(1, field(2, b"\x0a\x80\x00" * TOO_MANY)),
    "padded tags": field(1, field(2, b"\x8a\x80\x00\x00" * TOO_MANY)),
    "headers": field(1, b"") * TOO_MANY,
}


@pytest.mark.parametrize("name", SMALLEST)
def test_too_many_short_fields_are_refused_before_decoding(name: str) -> None:
    def not_called(raw: bytes) -> None:
        raise AssertionError("decoded")

    received = iter([SMALLEST[name]])
    with pytest.raises(InvalidRequest, match=f"more than {MAX_SHORT_FIELDS} names"):
        next(decoded(RequestContext(), received, not_called, lambda size: None))


def test_cancellation_ends_the_count() -> None:
    context = RequestContext()
    context.cancel()
    with pytest.raises(Cancelled):
        taken(SMALLEST["rules"], context)


def test_server_refuses_short_fields_and_keeps_serving(
    server: RunningServer, channel: grpc.Channel
) -> None:
    call: Any = channel.stream_stream("/secateur.v1.Pruner/Prune")
    found = failure(lambda: list(call(iter([SMALLEST["rules"]]), timeout=TIMEOUT)))
    found = check_failed(found, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
    assert found.message.startswith("message: ")
    check_serves(server, channel)


def test_the_limit_is_documented() -> None:
    assert f"{MAX_SHORT_FIELDS:,}" in (ROOT / "docs/operations.md").read_text()


# Unknown fields ------------------------------------------------------------------------------


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of all lists of unknown fields that the server makes."""
    sizes: list[int] = []

    def counted(message: Any) -> Any:
        made = UnknownFieldSet(message)
        sizes.append(len(made))
        return made

    monkeypatch.setattr(unknown_fields, "UnknownFieldSet", counted)
    return sizes


UNKNOWN = varint(1000 << 3) + b"\0"


@pytest.mark.parametrize(
    ("wrap", "path"),
    [
        (lambda fields: fields, "message"),
        (lambda fields: field(1, fields), "header"),
        (lambda fields: field(1, field(2, fields)), "header"),
        (lambda fields: field(1, b"") * 5 + fields, "message"),
    ],
    ids=["message", "header", "spec", "headers"],
)
def test_many_unknown_fields_are_refused_and_not_listed(
    listed: list[int], wrap: Any, path: str
) -> None:
    with pytest.raises(UnknownField, match="has a field that this server") as caught:
        taken(wrap(UNKNOWN * 100_000))
    assert caught.value.field == path
    assert sum(listed) <= unknown_fields._MAX_UNKNOWN_BYTES


def test_a_long_message_with_an_unknown_field_is_not_decoded_again(listed: list[int]) -> None:
    raw = request_of(masks).SerializeToString()
    with pytest.raises(UnknownField, match="has a field that this server") as caught:
        taken(raw + field(1, UNKNOWN))
    assert (caught.value.field, listed) == ("header", [])


def test_many_unknown_fields_of_a_unary_call_are_refused(channel: grpc.Channel) -> None:
    request = checkpoints_pb2.QueryUploadRequest()
    request.MergeFromString(UNKNOWN * 100_000)
    found = failure(CheckpointsStub(channel).QueryUpload, request, timeout=TIMEOUT)
    found = check_failed(found, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
    assert "has a field that this server" in found.message
