"""Tensors as bytes, so that numpy, torch and files are one; torch is imported by nobody here."""

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from secateur.errors import InvalidStateDict, SecateurError

Bytes = npt.NDArray[np.uint8]

# Dtypes as numpy, ml_dtypes and torch name them, and as safetensors does.
WIRE_DTYPES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "uint32": "U32",
    "int32": "I32",
    "uint64": "U64",
    "int64": "I64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}
# The dtypes that the server prunes where a glob matches them.
FLOATING = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_NAMES = {wire: name for name, wire in WIRE_DTYPES.items()}


class Place(NamedTuple):
    """Where a view lies in memory. Equal places are one tensor.

    device: Of torch; "" is this process's memory.
    pointer: Of the element at index 0; `begin` and `end` are around all elements.
    strides: In bytes.
    values: What the bytes are read as: dtype, and the flags that torch keeps beside them.
    """

    device: str
    begin: int
    end: int
    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int
    values: str


@dataclass(frozen=True)
class LocalTensor:
    """A tensor in this process.

    dtype: as safetensors spells it.  read: gives its bytes, row-major, little-endian, flat; called
        when they are needed, so that what is not contiguous is copied one tensor at a time.
    place: of a caller's tensor or array with elements.
    """

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], Bytes]
    place: Place | None = None

    @property
    def is_floating(self) -> bool:
        """Whether it is of a dtype that globs mean."""
        return self.dtype in FLOATING


def is_text(name: Any) -> bool:
    """Whether `name` can go over the wire: Python has lone surrogates, which UTF-8 cannot spell."""
    return isinstance(name, str) and not any("\ud800" <= letter <= "\udfff" for letter in name)


def from_value(name: str, value: Any) -> LocalTensor:
    """A LocalTensor of a torch tensor or an array.  Errors: InvalidStateDict."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        dtype, read = str(value.dtype).removeprefix("torch."), _torch_reader(torch, name, value)
        place = _torch_place(value)
    elif hasattr(value, "__array__"):
        value = np.asarray(value)
        dtype, read = value.dtype.name, lambda: _array_bytes(value)
        place = _place("", value.ctypes.data, value.shape, value.strides, value.itemsize, dtype)
    else:
        raise InvalidStateDict(f"{name}: {type(value).__name__} is no tensor and no array")
    if dtype not in WIRE_DTYPES:
        raise InvalidStateDict(f"{name}: dtype {dtype} has no place in a safetensors file")
    return LocalTensor(WIRE_DTYPES[dtype], tuple(value.shape), read, place)


def _torch_place(value: Any) -> Place | None:
    size = value.element_size()
    flags = f"{value.dtype} {value.is_conj()} {value.is_neg()}"
    strides = tuple(stride * size for stride in value.stride())
    device = "" if value.device.type == "cpu" else str(value.device)
    return _place(device, value.data_ptr(), tuple(value.shape), strides, size, flags)


def _place(
    device: str,
    pointer: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    itemsize: int,
    values: str,
) -> Place | None:
    if 0 in shape:
        return None
    reach = [(size - 1) * stride for size, stride in zip(shape, strides, strict=True)]
    begin = pointer + sum(step for step in reach if step < 0)
    end = pointer + sum(step for step in reach if step > 0) + itemsize
    # Where a dimension has one index its stride means nothing, and may be any number.
    strides = tuple(0 if size == 1 else s for size, s in zip(shape, strides, strict=True))
    return Place(device, begin, end, pointer, shape, strides, itemsize, values)


def _torch_reader(torch: Any, name: str, value: Any) -> Callable[[], Bytes]:
    if value.layout != torch.strided or value.is_quantized or value.device.type == "meta":
        raise InvalidStateDict(f"{name}: only dense tensors with data can be sent")
    # A detached, contiguous tensor on the CPU is no copy.
    return lambda: (
        value.detach()
        .cpu()
        .resolve_conj()
        .resolve_neg()
        .contiguous()
        .reshape(-1)
        .view(torch.uint8)
        .numpy()
    )


def _array_bytes(array: npt.NDArray[Any]) -> Bytes:
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def to_value(tensor: LocalTensor, as_torch: bool) -> Any:
    """The tensor as one of torch, or as an array. It may share the memory of its bytes.

    Errors: SecateurError, where numpy has no such dtype and ml_dtypes is not installed.
    """
    data = tensor.read()
    name = _NAMES.get(tensor.dtype)
    if name is None:
        raise SecateurError(f"dtype {tensor.dtype} has no equal in numpy or torch")
    if as_torch:
        import torch

        dtype = getattr(torch, name)
        if not data.size:  # torch has no view of it
            return torch.empty(tensor.shape, dtype=dtype)
        return torch.from_numpy(_aligned(data, dtype.itemsize)).view(dtype).reshape(tensor.shape)
    dtype = _numpy_dtype(name)
    return _aligned(data, dtype.itemsize).view(dtype).reshape(tensor.shape)


def _numpy_dtype(name: str) -> np.dtype[Any]:
    with suppress(TypeError):
        return np.dtype(name)
    if importlib.util.find_spec("ml_dtypes") is None:
        raise SecateurError(f"numpy has no {name}: install torch or ml_dtypes")
    dtype: np.dtype[Any] = np.dtype(getattr(importlib.import_module("ml_dtypes"), name))
    return dtype


def _aligned(data: Bytes, itemsize: int) -> Bytes:
    writable = data.flags.writeable and data.ctypes.data % itemsize == 0
    return data if writable else data.copy()


def parse_file(data: memoryview) -> tuple[dict[str, LocalTensor], dict[str, str]]:
    """The tensors of a valid safetensors file, as views of `data`, and its metadata."""
    begin = 8 + int.from_bytes(data[:8], "little")
    table = json.loads(bytes(data[8:begin]), object_pairs_hook=_distinct)
    metadata = table.pop("__metadata__", {})
    body = np.frombuffer(data, np.uint8)[begin:]
    return {name: _entry(body, fields) for name, fields in table.items()}, metadata


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise InvalidStateDict("a name stands twice in the header")
    return table


def _entry(body: Bytes, fields: Mapping[str, Any]) -> LocalTensor:
    if fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise InvalidStateDict(f"the header has {sorted(fields)} of a tensor")
    view = body[slice(*fields["data_offsets"])]
    return LocalTensor(fields["dtype"], tuple(fields["shape"]), lambda: view)


def prior_mask(tensor: LocalTensor) -> npt.NDArray[np.bool_]:
    """The X_mask of a pair as bool, flat; its values are 0 and 1 of any dtype."""
    data = tensor.read()
    itemsize = len(data) // max(1, int(np.prod(tensor.shape)))
    bits = data.view(f"u{max(1, itemsize)}")
    kept: npt.NDArray[np.bool_] = (bits << 1) != 0  # the shift drops the sign of -0.0
    return kept
