"""The codec against protobuf itself, which other clients use."""

import pytest
from google.protobuf.message import DecodeError, Message
from hypothesis import example, given
from hypothesis import strategies as st

from secateur_proto import pruner_pb2 as pb
from secateur_proto.codec import Data, Decoder, encode

REQUESTS: list[type[Message]] = [pb.PruneRequest, pb.ReportRequest, pb.FinalizeRequest]
ANSWERS: list[type[Message]] = [pb.PruneResponse, pb.FinalizeResponse]
TYPES = st.sampled_from(REQUESTS + ANSWERS)
LENGTHS = [1, 127, 128, 16_383, 16_384, 1 << 20, (1 << 21) - 1, 1 << 21]


@given(TYPES, st.binary(max_size=400))
def test_data_is_written_as_protobuf_writes_it(kind: type[Message], data: bytes) -> None:
    if data:  # protobuf leaves an empty field out; both read the same
        assert encode(Data(data)) == kind(data=data).SerializeToString()
    assert kind.FromString(encode(Data(memoryview(data)))).data == data  # type: ignore[attr-defined]


@pytest.mark.parametrize("length", LENGTHS)
def test_lengths_of_every_size_are_written_and_read(length: int) -> None:
    raw = pb.PruneRequest(data=bytes(length)).SerializeToString()
    assert encode(Data(bytes(length))) == raw
    found = Decoder(pb.PruneRequest.FromString)(raw)
    assert isinstance(found, Data)
    assert len(found.data) == length


@given(TYPES, st.binary(max_size=40) | st.binary(max_size=40).map(lambda rest: b"\x12" + rest))
@example(pb.PruneRequest, b"")
@example(pb.PruneRequest, b"\x12")
@example(pb.PruneRequest, b"\x12\x80")
@example(pb.PruneRequest, b"\x12\x80\x00")
@example(pb.PruneRequest, b"\x12\x81\x80\x80\x80\x00x")
@example(pb.PruneRequest, b"\x12\x81\x80\x80\x80\x80\x00x")
@example(pb.PruneRequest, b"\x12\x01x\x12\x01y")
@example(pb.PruneRequest, b"\x12\x02x\x0a\x00")
def test_any_bytes_are_read_as_protobuf_reads_them(kind: type[Message], raw: bytes) -> None:
    try:
        expected = kind.FromString(raw)
    except DecodeError:
        with pytest.raises(DecodeError):
            Decoder(kind.FromString)(raw)
        return
    found = Decoder(kind.FromString)(raw)
    assert bytes(found.data) == expected.data  # type: ignore[attr-defined, union-attr]
    field = "header" if kind in REQUESTS else "result"
    assert found.HasField(field) == expected.HasField(field)
    assert isinstance(found, Data) or found == expected


def test_reading_data_copies_nothing() -> None:
    raw = encode(Data(b"x" * 1000))
    found = Decoder(pb.PruneRequest.FromString)(raw)
    assert isinstance(found.data, memoryview)
    assert found.data.obj is raw
