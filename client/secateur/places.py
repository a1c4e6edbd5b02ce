"""The places of tensors and arrays in memory, to find tied ones."""

import math
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt


class Place(NamedTuple):
    """A view of memory. Equal places are one tensor.

    Attributes:
        device: As torch names it; "" is this process's memory.
        begin: Address of the first byte of any element.
        end: Address after the last byte of any element.
        pointer: Address of the element at index 0.
        shape: The view's shape.
        strides: In bytes.
        itemsize: Bytes of an element.
        values: The dtype, as numpy and torch both name it, and torch's flags beside it.
    """

    device: str
    begin: int
    end: int
    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int
    values: str


@cache
def dtype_name(dtype: Any) -> str:
    """Returns the name of a dtype of torch; torch makes a new str for each call."""
    return str(dtype).removeprefix("torch.")


def tensor_place(value: Any) -> Place | None:
    """Returns the place of a dense tensor of torch; None for one without elements."""
    size, shape = value.element_size(), tuple(value.shape)
    device = "" if value.is_cpu else str(value.device)
    values = dtype_name(value.dtype)
    if value.is_conj() or value.is_neg():
        values = f"{values} {value.is_conj()} {value.is_neg()}"
    is_contiguous = value.is_contiguous()
    strides = None if is_contiguous else tuple(stride * size for stride in value.stride())
    return _place(device, value.data_ptr(), shape, strides, size, values)


def array_place(array: npt.NDArray[Any], dtype: str) -> Place | None:
    """Returns the place of an array with a dtype of this name; None for one without elements."""
    values = dtype if array.dtype.isnative else f"{array.dtype.byteorder}{dtype}"
    pointer = array.__array_interface__["data"][0]  # array.ctypes makes an object
    strides = None if array.flags.c_contiguous else array.strides
    return _place("", pointer, array.shape, strides, array.itemsize, values)


@lru_cache(1024)
def _contiguous_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """The strides of a row-major view, as `_place` has them."""
    behind = (math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
    return tuple(
        0 if size == 1 else count * itemsize for size, count in zip(shape, behind, strict=True)
    )


def _place(
    device: str,
    pointer: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...] | None,
    itemsize: int,
    values: str,
) -> Place | None:
    """The place of a view; `strides` is None for a contiguous one."""
    if 0 in shape:
        return None
    if strides is None:
        end, strides = pointer + itemsize * math.prod(shape), _contiguous_strides(shape, itemsize)
        return Place(device, pointer, end, pointer, shape, strides, itemsize, values)
    reach = [(size - 1) * stride for size, stride in zip(shape, strides, strict=True)]
    begin = pointer + sum(step for step in reach if step < 0)
    end = pointer + sum(step for step in reach if step > 0) + itemsize
    # A dimension with one index may have any stride.
    strides = tuple(0 if size == 1 else s for size, s in zip(shape, strides, strict=True))
    return Place(device, begin, end, pointer, shape, strides, itemsize, values)


class _View:
    """An array whose place numpy compares; it reads no element."""

    def __init__(self, place: Place) -> None:
        self.__array_interface__ = {
            "version": 3,
            "data": (place.pointer, True),
            "shape": place.shape,
            "strides": place.strides,
            "typestr": f"|V{place.itemsize}",
        }


# A limit on numpy's search for a shared element of two views with overlapping bounds.
_MAX_WORK = 10_000


def overlap(one: Place, other: Place) -> bool:
    """Returns whether two views on one device share an element; True if the search is too long."""
    views = np.asarray(_View(one)), np.asarray(_View(other))
    try:
        return np.shares_memory(*views, max_work=_MAX_WORK)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True
