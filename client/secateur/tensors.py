"""Tensors as bytes: the common form of numpy's, torch's and files'. Nothing here needs torch."""

import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from secateur.errors import InvalidStateDict, SecateurError
from secateur.evaluation import brief
from secateur.places import Place, array_place, dtype_name, tensor_place
from secateur.unreadable import problem_of
from secateur_proto.dtypes import DTYPES

Bytes = npt.NDArray[np.uint8]

# From the names of torch, numpy and ml_dtypes to those of safetensors.
WIRE_DTYPES = {dtype.name: wire for wire, dtype in DTYPES.items() if dtype.name}


class LocalTensor(NamedTuple):
    """A tensor in this process.

    Attributes:
        dtype: As safetensors spells it.
        shape: As safetensors counts it.
        read: Returns its bytes, row-major, little-endian and flat. It is called when they are
            needed, so that tensors that are not contiguous are copied one at a time.
        place: Where a caller's tensor or array with elements is in memory.
    """

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], Bytes]
    place: Place | None = None

    @property
    def kind(self) -> str | None:
        """The kind of the dtype: see secateur_proto.dtypes.Dtype."""
        return DTYPES[self.dtype].kind


_SURROGATE = re.compile("[\ud800-\udfff]")


def is_text(name: Any) -> bool:
    """Returns whether a name can be sent: UTF-8 cannot spell Python's lone surrogates."""
    return isinstance(name, str) and (name.isascii() or not _SURROGATE.search(name))


def is_extra_state(name: str) -> bool:
    """Returns whether an entry of a state_dict is from Module.get_extra_state: any object."""
    return name.endswith("_extra_state") and f".{name}".endswith("._extra_state")


class NoWireDtype(InvalidStateDict):
    """The safetensors format has no dtype for a tensor."""


class NotATensor(InvalidStateDict):
    """A value is neither a tensor nor an array."""


def is_array(value: Any) -> bool:
    """Returns whether a value is an array of numbers or bools, and not of texts or objects."""
    if not hasattr(value, "__array__"):
        return False
    try:
        dtype = as_array("", value).dtype
    except InvalidStateDict:
        return False
    return dtype.kind in "biufc" or dtype.isbuiltin == 2  # 2: a dtype of ml_dtypes


def from_value(name: str, value: Any) -> LocalTensor:
    """Makes a LocalTensor of a torch tensor or an array.

    Raises:
        NoWireDtype: The safetensors format has no dtype for it.
        NotATensor: It is of another type.
        InvalidStateDict: It is not a tensor of numbers, or has no data.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        if problem := problem_of(torch, value):
            raise InvalidStateDict(f"{name}: {problem}")
        if value.layout != torch.strided or value.is_quantized:
            raise _no_dtype(name, dtype_of(value))
        read, dtype = partial(_read, name, _torch_bytes, value), dtype_name(value.dtype)
        return _described(name, dtype, value.shape, read, tensor_place(value))
    if not hasattr(value, "__array__"):
        raise NotATensor(f"{name}: {type(value).__name__} is not a tensor or an array")
    array = as_array(name, value)
    dtype = array.dtype.name  # numpy makes a new str for each access
    if not is_array(array):
        raise InvalidStateDict(f"{name}: dtype {dtype} is not a dtype of numbers")
    read, place = partial(_read, name, _array_bytes, array), array_place(array, dtype)
    return _described(name, dtype, array.shape, read, place)


def _described(
    name: str, dtype: str, shape: Sequence[int], read: Callable[[], Bytes], place: Place | None
) -> LocalTensor:
    """The tensor with its dtype and shape as the format counts them.  Raises: NoWireDtype."""
    wire, shape = WIRE_DTYPES.get(dtype), tuple(shape)
    packed = DTYPES[wire].packed if wire else 1
    if wire is None or (packed > 1 and not shape):
        raise _no_dtype(name, dtype)
    shape = shape if packed == 1 else (*shape[:-1], shape[-1] * packed)
    return LocalTensor(wire, shape, read, place)


def _no_dtype(name: str, dtype: str) -> NoWireDtype:
    return NoWireDtype(f"{name}: dtype {dtype} has no place in a safetensors file")


def dtype_of(value: Any) -> str:
    """Returns the dtype of a tensor, after the layout of a sparse one; else a value's type."""
    if not hasattr(value, "dtype"):
        return type(value).__name__
    layout = str(getattr(value, "layout", "torch.strided"))
    words = [layout, str(value.dtype)] if layout != "torch.strided" else [str(value.dtype)]
    return " ".join(word.removeprefix("torch.") for word in words)


def _read(name: str, bytes_of: Callable[[Any], Bytes], value: Any) -> Bytes:
    """The bytes of a value; every error is an InvalidStateDict that names the tensor."""
    try:
        return bytes_of(value)
    except Exception as error:  # torch raises errors of any kind
        raise InvalidStateDict(f"{name}: cannot read its values: {brief(error)}") from error


def as_array(name: str, value: Any) -> npt.NDArray[Any]:
    """Returns the array that a value's __array__ makes.

    Raises:
        InvalidStateDict: The value's __array__ fails.
    """
    try:
        return np.asarray(value)
    except Exception as error:  # of the caller's own __array__
        raise InvalidStateDict(f"{name}: cannot make an array of it: {brief(error)}") from error


def _torch_bytes(value: Any) -> Bytes:
    """The bytes of a tensor of torch; a view if it is contiguous and on the CPU."""
    torch = sys.modules["torch"]
    value = value.detach() if value.requires_grad else value
    if type(value) is not torch.Tensor or not value.is_cpu or value.is_conj() or value.is_neg():
        value = value.detach().cpu().resolve_conj().resolve_neg()
    value = value.contiguous()
    if dtype_name(value.dtype) in _NUMPY_DTYPES:  # a view of numpy is faster to make than torch's
        array: npt.NDArray[Any] = value.numpy()
        return array.reshape(-1).view(np.uint8)
    read: Bytes = value.view(-1).view(torch.uint8).numpy()
    return read


# Names of dtypes that torch and numpy have in common. ml_dtypes adds its own to those of numpy.
_NUMPY_DTYPES = {
    name for name in WIRE_DTYPES if name in np.sctypeDict and np.dtype(name).isbuiltin == 1
}


def _array_bytes(array: npt.NDArray[Any]) -> Bytes:
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def has_torch() -> bool:
    """Returns whether torch is installed."""
    return importlib.util.find_spec("torch") is not None


def torch_for(what: str) -> Any:
    """Imports torch.

    Raises:
        SecateurError: It is not installed.
    """
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise SecateurError(f"{what} needs torch: {error}") from None


def to_value(name: str, tensor: LocalTensor, as_torch: bool) -> Any:
    """Makes a tensor of torch, or an array; it may share the memory of the tensor's bytes.

    Raises:
        SecateurError: The installed torch, or numpy, has no such dtype.
    """
    return _to_torch(name, tensor) if as_torch else _to_array(name, tensor)


def _to_torch(name: str, tensor: LocalTensor) -> Any:
    import torch

    known, shape = DTYPES[tensor.dtype], tensor.shape
    dtype = getattr(torch, known.name or "", None)
    if known.packed > 1 and shape and shape[-1] % known.packed == 0:
        shape = (*shape[:-1], shape[-1] // known.packed)
    elif known.packed > 1:
        dtype = None
    if dtype is None:
        raise _without_equal(name, tensor, f"torch {torch.__version__}")
    data = tensor.read()
    if not data.size:  # torch cannot view it
        return torch.empty(shape, dtype=dtype)
    return torch.from_numpy(_aligned(data, dtype.itemsize)).view(dtype).reshape(shape)


def _to_array(name: str, tensor: LocalTensor) -> Any:
    known, data = DTYPES[tensor.dtype], tensor.read()
    if known.name is None or known.packed > 1:  # ml_dtypes uses a byte for each element
        raise _without_equal(name, tensor, "numpy")
    dtype = _numpy_dtype(name, known.name)
    return _aligned(data, dtype.itemsize).view(dtype).reshape(tensor.shape)


def _without_equal(name: str, tensor: LocalTensor, library: str) -> SecateurError:
    described = f"{tensor.dtype} of shape {list(tensor.shape)}"
    return SecateurError(f"{name}: {library} has no {described}; save it as .safetensors")


def _numpy_dtype(name: str, dtype: str) -> np.dtype[Any]:
    with suppress(TypeError):
        return np.dtype(dtype)
    try:
        found: np.dtype[Any] = np.dtype(getattr(importlib.import_module("ml_dtypes"), dtype))
    except (ImportError, AttributeError):
        raise SecateurError(f"{name}: numpy has no {dtype}: install torch or ml_dtypes") from None
    return found


def _aligned(data: Bytes, itemsize: int) -> Bytes:
    writable = data.flags.writeable and data.ctypes.data % itemsize == 0
    return data if writable else data.copy()


def prior_mask(tensor: LocalTensor) -> npt.NDArray[np.bool_]:
    """Returns the X_mask of a pair as bool, flat; its values are 0 and 1 of any dtype."""
    data = tensor.read()
    itemsize = len(data) // max(1, int(np.prod(tensor.shape)))
    bits = data.view(f"u{max(1, itemsize)}")
    kept: npt.NDArray[np.bool_] = (bits << 1) != 0  # the shift drops the sign of -0.0
    return kept
