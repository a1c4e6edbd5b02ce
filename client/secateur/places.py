"""Where the tensors and arrays of a caller lie in memory."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt


class Place(NamedTuple):
    """A view of memory. Equal places are one tensor.

    Attributes:
        device: Of torch; "" is this process's memory.
        begin: Address of the first byte of any element; `end` is behind the last one.
        pointer: Address of the element at index 0.
        strides: In bytes.
        values: What the bytes are read as: the dtype, as numpy and torch both name it, and the
            flags that torch keeps beside them.
    """

    device: str
    begin: int
    end: int
    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int
    values: str


def tensor_place(value: Any) -> Place | None:
    """The place of a dense tensor of torch; None for one without elements."""
    size = value.element_size()
    strides = tuple(stride * size for stride in value.stride())
    device = "" if value.device.type == "cpu" else str(value.device)
    values = str(value.dtype).removeprefix("torch.")
    if value.is_conj() or value.is_neg():
        values = f"{values} {value.is_conj()} {value.is_neg()}"
    return _place(device, value.data_ptr(), tuple(value.shape), strides, size, values)


def array_place(array: npt.NDArray[Any], dtype: str) -> Place | None:
    """The place of an array, whose dtype has this name; None for one without elements."""
    values = dtype if array.dtype.isnative else f"{array.dtype.byteorder}{dtype}"
    return _place("", array.ctypes.data, array.shape, array.strides, array.itemsize, values)


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
    # The stride of a dimension with one index means nothing, and may be any number.
    strides = tuple(0 if size == 1 else s for size, s in zip(shape, strides, strict=True))
    return Place(device, begin, end, pointer, shape, strides, itemsize, values)


class _View:
    """An array for numpy to compare, of which it reads no element."""

    def __init__(self, place: Place) -> None:
        self.__array_interface__ = {
            "version": 3,
            "data": (place.pointer, True),
            "shape": place.shape,
            "strides": place.strides,
            "typestr": f"|V{place.itemsize}",
        }


# How hard numpy tries to prove that two views with overlapping bounds share no element.
_MAX_WORK = 10_000


def overlap(one: Place, other: Place) -> bool:
    """Whether two views of one device share an element; True where that takes too long to tell."""
    views = np.asarray(_View(one)), np.asarray(_View(other))
    try:
        return np.shares_memory(*views, max_work=_MAX_WORK)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True
