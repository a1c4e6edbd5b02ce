"""A file of the safetensors library is read the same for any chunks."""

from collections.abc import Iterable
from itertools import pairwise

import pytest
import safetensors.torch
import torch
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from secateur_server.errors import InvalidStateDict, WrongLength
from secateur_server.runtime.context import RequestContext
from secateur_server.wire.reader import ByteStream, read_header, read_tensors
from secateur_server.wire.tensors import WireTensor
from tests.contract.raw import entry, file, unhurried

CPU = torch.device("cpu")
# Dtypes of the format that torch has; U16 and the like pass through the server as bytes.
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
COMPUTED = {"BOOL", "U8", "I8", "I16", "I32", "I64", "F16", "BF16", "F32", "F64"}
COMPUTED |= {"F8_E4M3", "F8_E5M2"}
NAMES = st.text(max_size=12).filter(lambda name: name != "__metadata__")

Read = tuple[dict[str, WireTensor], dict[str, str], str]


def read(chunks: Iterable[bytes], announced: int) -> Read:
    """The tensors, the metadata and the digest of a file that arrives in `chunks`."""
    stream = ByteStream(iter(chunks), announced)
    header = read_header(RequestContext(), stream)
    return read_tensors(stream, header, CPU), header.metadata, stream.digest()


def pieces(data: bytes, cuts: Iterable[int]) -> list[bytes]:
    """`data`, cut at each of `cuts`; where one stands twice, with an empty chunk there."""
    places = [0, *sorted(cuts), len(data)]
    return [data[begin:end] for begin, end in pairwise(places)]


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@st.composite
def models(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """Tensors of many dtypes and of 0 to 4 dimensions, some without elements, with any bits."""
    model = {}
    for name in draw(st.lists(NAMES, max_size=5, unique=True)):
        dtype = draw(st.sampled_from(list(DTYPES.values())))
        shape = draw(st.lists(st.integers(0, 4), max_size=4))
        empty = torch.empty(shape, dtype=dtype)
        bits = draw(st.binary(min_size=empty.nbytes, max_size=empty.nbytes))
        if dtype == torch.bool:
            bits = bytes(byte & 1 for byte in bits)
        if bits:
            empty = torch.frombuffer(bytearray(bits), dtype=dtype).reshape(shape)
        model[name] = empty
    return model


def check(found: Read, data: bytes, model: dict[str, torch.Tensor], texts: dict[str, str]) -> None:
    tensors, metadata, digest = found
    assert {
        name: (DTYPES[tensor.dtype], tensor.shape, raw(tensor.data))
        for name, tensor in tensors.items()
    } == {name: (tensor.dtype, tuple(tensor.shape), raw(tensor)) for name, tensor in model.items()}
    assert (metadata, digest) == (texts, blake3(data).hexdigest())


@unhurried
@given(models(), st.dictionaries(st.text(max_size=9), st.text(max_size=9), max_size=3), st.data())
def test_file_is_read_the_same_for_any_chunks(
    model: dict[str, torch.Tensor], texts: dict[str, str], draw: st.DataObject
) -> None:
    data = safetensors.torch.save(model, texts or None)  # {} spoils the header of no tensors
    cuts = draw.draw(st.lists(st.integers(0, len(data)), max_size=12))
    check(read(pieces(data, cuts), len(data)), data, model, texts)


@unhurried
@given(models())
def test_a_file_is_read_byte_by_byte_with_empty_chunks_between(
    model: dict[str, torch.Tensor],
) -> None:
    data = safetensors.torch.save(model)
    chunks = [chunk for byte in data for chunk in (b"", bytes([byte]))]
    check(read([*chunks, b"", b""], len(data)), data, model, {})


@unhurried
@given(models())
def test_values_have_the_dtype_and_the_bits_that_were_sent(model: dict[str, torch.Tensor]) -> None:
    data = safetensors.torch.save(model)
    for name, tensor in read([data], len(data))[0].items():
        values = tensor.values()
        assert (values is not None) == (tensor.dtype in COMPUTED)
        if values is not None:
            assert (values.dtype, values.shape) == (model[name].dtype, model[name].shape)
            assert raw(values) == raw(model[name])


def test_tensors_have_the_order_of_the_header_not_of_the_data() -> None:
    table = {
        "last": entry("U8", [2], 3, 5),
        "none": entry("U8", [0], 3, 3),
        "first": entry("U8", [3], 0, 3),
    }
    tensors, _, _ = read([file(table, bytes([1, 2, 3, 4, 5]))], len(file(table)) + 5)
    assert list(tensors) == ["last", "none", "first"]
    assert tensors["last"].data.tolist() == [4, 5]
    assert tensors["first"].data.tolist() == [1, 2, 3]


DATA = safetensors.torch.save({"w": torch.randn(3, 2), "n": torch.arange(4)}, {"k": "v"})


@unhurried
@given(st.integers(0, len(DATA) - 1), st.lists(st.integers(0, len(DATA)), max_size=5))
def test_fewer_bytes_than_announced_are_an_error_with_both_numbers(
    length: int, cuts: list[int]
) -> None:
    with pytest.raises(WrongLength, match=rf"data: {len(DATA)} .* announced, {length} arrived"):
        read(pieces(DATA[:length], (cut for cut in cuts if cut <= length)), len(DATA))


@unhurried
@given(st.binary(min_size=1, max_size=20), st.lists(st.integers(0, len(DATA)), max_size=5))
def test_more_bytes_than_announced_are_an_error(padding: bytes, cuts: list[int]) -> None:
    with pytest.raises(WrongLength, match=rf"data: {len(DATA)} bytes are announced"):
        read(pieces(DATA + padding, cuts), len(DATA))


@unhurried
@given(st.integers(10, len(DATA) + 20))
def test_a_header_that_covers_another_length_than_the_file_is_an_error(announced: int) -> None:
    data = (DATA + bytes(20))[:announced]
    if announced == len(DATA):
        assert read([data], announced)[0].keys() == {"w", "n"}
        return
    with pytest.raises(InvalidStateDict) as refused:
        read([data], announced)
    assert refused.value.field.startswith("data")
