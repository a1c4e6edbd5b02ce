"""`file_header` and `cut` write a safetensors file in messages of 1 MiB."""

from functools import partial

import grpc
import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from blake3 import blake3
from hypothesis import assume, given
from hypothesis import strategies as st

from secateur.calls.transfer import Upload
from secateur.tensors import from_value
from secateur_proto import pruner_pb2 as pb
from secateur_proto.dtypes import DTYPES
from secateur_proto.framing import CHUNK_BYTES, cut, file_header, tensor_bytes
from secateur_server.runtime.context import RequestContext
from secateur_server.wire.writer import Outgoing, chunks, state_dict_file
from tests.contract.raw import entry, file, header, message, send, unhurried

MIB = 1 << 20

# JSON has to escape some of these, and must not escape others.
NAMES = st.text(max_size=20).filter(lambda name: name != "__metadata__") | st.sampled_from(
    ["", '"', "\\", "\n", "\0", "\x7f", "conv.1.weight", "é", "😀", "\u2028"]
)
SHAPES = st.lists(st.integers(0, 4), max_size=4)


@st.composite
def described(draw: st.DrawFn) -> list[tuple[str, str, list[int], bytes]]:
    """Tensors of any dtype: name, dtype, shape and bytes."""
    tensors = []
    for name in draw(st.lists(NAMES, max_size=5, unique=True)):
        dtype, shape = draw(st.sampled_from(sorted(DTYPES))), draw(SHAPES)
        if DTYPES[dtype].bits < 8:  # the format has whole bytes only
            shape = [8, *shape]
        size = int(np.prod(shape, dtype=int)) * DTYPES[dtype].bits // 8
        tensors.append((name, dtype, shape, draw(st.binary(min_size=size, max_size=size))))
    return tensors


def test_a_tiny_file_has_these_bytes() -> None:
    head = file_header([("w", "F32", [2]), ("é", "U8", [])], {"k": "v"})
    values = np.array([1.0, -2.0], "<f4").tobytes()
    assert b"".join(cut([head, memoryview(values), b"\x05"])) == (
        b"\x88\x00\x00\x00\x00\x00\x00\x00"
        b'{"__metadata__":{"k":"v"},'
        b'"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"\xc3\xa9":{"dtype":"U8","shape":[],"data_offsets":[8,9]}}'
        b"     "
        b"\x00\x00\x80\x3f\x00\x00\x00\xc0\x05"
    )


def test_the_file_of_no_tensors_has_these_bytes() -> None:
    assert file_header([]) == b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "


@unhurried
@given(described(), st.dictionaries(NAMES, st.text(max_size=9), max_size=3))
def test_the_library_reads_what_was_written(
    tensors: list[tuple[str, str, list[int], bytes]], metadata: dict[str, str]
) -> None:
    head = file_header(((name, dtype, shape) for name, dtype, shape, _ in tensors), metadata)
    whole = b"".join(cut([head, *(data for *_, data in tensors)]))
    read = safetensors.deserialize(whole)  # type: ignore[no-untyped-call]
    assert {
        name: (found["dtype"], found["shape"], bytes(found["data"])) for name, found in read
    } == {name: (dtype, shape, data) for name, dtype, shape, data in tensors}
    assert len(head) % 8 == 0


def test_every_dtype_of_the_library_is_known() -> None:
    """safetensors lists them in its error for an unknown dtype."""
    unknown = file({"w": entry("F31", [0], 0, 0)})
    with pytest.raises(safetensors.SafetensorError) as refused:
        safetensors.deserialize(unknown)  # type: ignore[no-untyped-call]
    names = str(refused.value).partition("expected one of")[2].split("`")[1::2]
    assert set(names) <= set(DTYPES)
    assert len(names) > 15


@unhurried
@given(st.lists(st.binary(max_size=40), max_size=8), st.integers(1, 30))
def test_only_the_last_piece_is_shorter(parts: list[bytes], size: int) -> None:
    pieces = list(cut(parts, size))
    assert b"".join(pieces) == b"".join(parts)
    assert all(len(piece) == size for piece in pieces[:-1])
    assert all(1 <= len(piece) <= size for piece in pieces[-1:])


@pytest.mark.parametrize("size", [0, 1, MIB - 1, MIB, MIB + 1, 3 * MIB, 5 * MIB + 7])
def test_pieces_have_a_mebibyte(size: int) -> None:
    assert CHUNK_BYTES == MIB
    sizes = [len(piece) for piece in cut([b"head", memoryview(bytes(size))])]
    whole, rest = divmod(size + 4, MIB)
    assert sizes == [MIB] * whole + ([rest] if rest else [])


@unhurried
@given(st.sampled_from(sorted(DTYPES)), SHAPES)
def test_a_tensor_has_the_bytes_of_its_elements(dtype: str, shape: list[int]) -> None:
    bits = int(np.prod(shape, dtype=int)) * DTYPES[dtype].bits
    assume(bits % 8 == 0)  # the format has whole bytes only
    assert tensor_bytes(dtype, shape) * 8 == bits


def test_writer_announces_the_size_and_digest_of_its_bytes() -> None:
    model = {"a": torch.randn(700, 900), "b": torch.zeros(0, 3), "c": torch.tensor(2.5)}
    outgoing = {
        name: Outgoing("F32", tuple(tensor.shape), partial(torch.split, tensor.view(-1), 100_000))
        for name, tensor in model.items()
    }
    made = state_dict_file(RequestContext(), "m", outgoing, {"made": "here"})
    sent = list(chunks(RequestContext(), [made]))
    written = b"".join(sent)
    assert [len(chunk) for chunk in sent[:-1]] == [MIB, MIB]
    assert (made.size, made.blake3) == (len(written), blake3(written).hexdigest())
    read = safetensors.torch.load(written)
    assert read.keys() == model.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in model.items())


def test_the_client_sends_messages_of_a_mebibyte() -> None:
    array = np.arange(700_000, dtype=np.float32)
    upload = Upload({"w": from_value("w", array)}, {})
    cut = list(upload.messages(pb.ReportRequest, pb.ReportHeader(data_bytes=7)))
    messages, sent = [message for message, _ in cut], [count for _, count in cut]
    assert [len(request.data) for request in messages[:-1]] == [MIB, MIB]
    assert [request.HasField("header") for request in messages] == [True, False, False]
    assert sent == [len(request.data) for request in messages]
    assert sum(sent) == upload.file_bytes


@pytest.mark.parametrize(("elements", "chunks"), [(100, 1), (200_000, 1), (1_000_000, 4)])
def test_a_server_answers_in_messages_of_a_mebibyte(
    channel: grpc.Channel, elements: int, chunks: int
) -> None:
    sent = safetensors.torch.save({"w": torch.randn(elements)}, {"k": "v"})
    pieces = [bytes(piece) for piece in cut([sent])]
    messages = [message("Finalize", header=header("Finalize", len(sent)), data=pieces[0])]
    messages += [message("Finalize", data=piece) for piece in pieces[1:]]
    answer = send(channel, "Finalize", messages)
    assert [len(response.data) for response in answer[:-1]] == [MIB] * (chunks - 1)
    assert [response.HasField("result") for response in answer] == [True] + [False] * (chunks - 1)
    received = b"".join(response.data for response in answer)
    result = answer[0].result
    assert result.data_bytes == len(received)
    assert result.report.input_blake3 == blake3(sent).hexdigest()
    assert result.report.output_blake3 == blake3(received).hexdigest()
    assert torch.equal(safetensors.torch.load(received)["w"], safetensors.torch.load(sent)["w"])
