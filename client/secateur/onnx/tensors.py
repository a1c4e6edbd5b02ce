"""The initializers of an ONNX model, as views of its file."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath

import numpy as np

from secateur.onnx.wire import Damaged, decode_varints, fields
from secateur.tensors import Bytes, LocalTensor
from secateur_proto.dtypes import DTYPES

# Numbers of fields in onnx.proto.
GRAPH, INITIALIZER = 7, 5
_IR_VERSION = 1
_DIMS, _DATA_TYPE, _FLOATS, _INT32S, _INT64S, _NAME = 1, 2, 4, 5, 7, 8
RAW, _DOUBLES, _UINT64S, EXTERNAL, _DATA_LOCATION = 9, 10, 11, 13, 14
ENTRY_KEY, ENTRY_VALUE = 1, 2
# The fields that may hold the values of a tensor.
VALUES = (_FLOATS, _INT32S, _INT64S, RAW, _DOUBLES, _UINT64S)
_VARINTS = (_INT32S, _INT64S, _UINT64S)

# From TensorProto.DataType to the dtypes of safetensors. The others have no equal: texts,
# complex128, and those of less than a byte.
_DTYPES = {
    **{1: "F32", 2: "U8", 3: "I8", 4: "U16", 5: "I16", 6: "I32", 7: "I64", 9: "BOOL", 10: "F16"},
    **{11: "F64", 12: "U32", 13: "U64", 14: "C64", 16: "BF16", 17: "F8_E4M3"},
    **{18: "F8_E4M3FNUZ", 19: "F8_E5M2", 20: "F8_E5M2FNUZ", 24: "F8_E8M0"},
}
_VALUES_OF = {"F32": _FLOATS, "C64": _FLOATS, "F64": _DOUBLES, "I64": _INT64S}
_VALUES_OF |= {"U32": _UINT64S, "U64": _UINT64S}

Message = Mapping[int, Sequence[memoryview]]


@dataclass(frozen=True)
class Extent:
    """A part of a file with external data.

    Attributes:
        location: The file, relative to the folder of the model.
        offset: Where it begins.
        size: Its bytes; None is the rest of the file.
    """

    location: str
    offset: int
    size: int | None


@dataclass(frozen=True)
class Initializer:
    """An initializer.

    Attributes:
        tensor: Its values; None if safetensors has no dtype for them.
        extent: Where external data is.
    """

    tensor: LocalTensor | None
    extent: Extent | None


ReadExternal = Callable[[Extent], memoryview]


def initializers(
    model: memoryview, read_external: ReadExternal
) -> Iterator[tuple[str, Initializer]]:
    """Yields the names and the initializers of a model's main graph.

    Args:
        model: The file.
        read_external: Returns the bytes of an extent.

    Raises:
        Damaged: It is not an ONNX model.
    """
    found = _by_number(model)
    if GRAPH not in found or _IR_VERSION not in found:
        raise Damaged("it has no graph")
    for graph in found[GRAPH]:
        for message in _by_number(graph).get(INITIALIZER, ()):
            name = name_of(message)
            try:
                yield name, _initializer(_by_number(message), read_external)
            except Damaged as error:
                raise Damaged(f"{name}: {error}") from None


def _by_number(message: memoryview) -> Message:
    """The data of the fields of a message."""
    found: dict[int, list[memoryview]] = {}
    for field in fields(message):
        found.setdefault(field.number, []).append(field.data)
    return found


def name_of(message: memoryview) -> str:
    """Returns the name of an initializer.

    Raises:
        Damaged: It has none.
    """
    name = _text(_by_number(message), _NAME)
    if not name or name == "__metadata__":
        raise Damaged(f"an initializer has the name {name!r}")
    return name


def texts_of(entries: Sequence[memoryview]) -> Mapping[str, str]:
    """Returns the keys and values of `external_data`."""
    pairs = map(_by_number, entries)
    return {_text(pair, ENTRY_KEY): _text(pair, ENTRY_VALUE) for pair in pairs}


def _text(message: Message, number: int) -> str:
    try:
        return bytes(message.get(number, [memoryview(b"")])[-1]).decode()
    except UnicodeDecodeError:
        raise Damaged("a text is not UTF-8") from None


def _numbers(message: Message, number: int) -> list[int]:
    """The varints of a field, each of its own or packed."""
    return [int(value) for value in decode_varints(_joined(message.get(number, ())))]


def _joined(values: Sequence[memoryview]) -> Bytes:
    data = values[0] if len(values) == 1 else b"".join(values)
    return np.frombuffer(data, np.uint8)


def _initializer(message: Message, read_external: ReadExternal) -> Initializer:
    is_external = _numbers(message, _DATA_LOCATION)[-1:] == [1]
    extent = _extent(texts_of(message.get(EXTERNAL, ()))) if is_external else None
    dtype = _DTYPES.get((_numbers(message, _DATA_TYPE) or [0])[-1])
    if dtype is None:
        return Initializer(None, extent)
    shape = tuple(_numbers(message, _DIMS))
    if any(length >> 63 for length in shape):
        raise Damaged("a length in its shape is negative")
    if extent is not None:
        read, size = _as_it_is([read_external(extent)])
    elif raw := message.get(RAW, ())[-1:]:
        read, size = _as_it_is(raw)
    else:
        read, size = _typed(dtype, message)
    expected = math.prod(shape) * DTYPES[dtype].bits // 8
    if size != expected:
        raise Damaged(f"it has {size} bytes of values; its shape needs {expected}")
    return Initializer(LocalTensor(dtype, shape, read), extent)


def _extent(entries: Mapping[str, str]) -> Extent:
    location = PurePosixPath(entries.get("location", ""))
    if not location.name or location.is_absolute() or ".." in location.parts:
        raise Damaged(f"its external data is at {str(location)!r}, which is not beside the model")
    offset, size = entries.get("offset", "0"), entries.get("length")
    if not offset.isdecimal() or not (size is None or size.isdecimal()):
        raise Damaged("the offset and the length of its external data are not numbers")
    return Extent(str(location), int(offset), None if size is None else int(size))


def _as_it_is(values: Sequence[memoryview]) -> tuple[Callable[[], Bytes], int]:
    """What reads values that are stored as safetensors stores them, and their bytes."""
    data = _joined(values)
    return (lambda: data), len(data)


def _typed(dtype: str, message: Message) -> tuple[Callable[[], Bytes], int]:
    """What reads values of a field of numbers, and their bytes."""
    number = _VALUES_OF.get(dtype, _INT32S)
    values = message.get(number, ())
    if number not in _VARINTS:
        return _as_it_is(values)
    itemsize = DTYPES[dtype].bits // 8
    numbers = decode_varints(_joined(values)).astype(f"<u{itemsize}")
    return partial(numbers.view, np.uint8), numbers.nbytes
