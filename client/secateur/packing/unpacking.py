"""Unpacks tensors: see docs/packed.md. It needs zstandard, and is imported late."""

import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import zstandard

from secateur.tensors import Bytes
from secateur_proto.dtypes import DTYPES
from secateur_proto.framing import mask_bytes, tensor_bytes
from secateur_proto.packed import BLOCK, METADATA, TABLE, VERSION, block_count, element_bytes

Item = TypeVar("Item")
Made = TypeVar("Made")


def read_description(text: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Parses what `describe` wrote: the dtype and the shape of each packed tensor.

    Raises:
        ValueError: It is damaged, or of a newer version.
    """
    try:
        table = json.loads(text)
        version = table["version"]
        if version == VERSION:
            return {name: _described(name, fields) for name, fields in table["tensors"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{METADATA} in its metadata is damaged: {error!r}") from None
    raise ValueError(f"{METADATA} has the version {version!r}, not {VERSION}; update secateur")


def _described(name: str, fields: Any) -> tuple[str, tuple[int, ...]]:
    dtype, shape = fields
    if dtype not in DTYPES or not all(type(n) is int and n >= 0 for n in shape):
        raise TypeError(f"{name}: {fields}")
    if math.prod(max(1, n) for n in shape) >= 1 << 62:
        raise TypeError(f"{name}: {fields}")
    return dtype, tuple(shape)


def unpack(blob: Bytes, dtype: str, shape: Sequence[int]) -> Bytes:
    """Returns the dense bytes of a packed tensor.

    The sizes of all blocks are checked before the tensor is allocated.

    Args:
        blob: The packed bytes.
        dtype: As safetensors spells it.
        shape: Of the tensor.

    Raises:
        ValueError: The blob is damaged.
    """
    size, width = tensor_bytes(dtype, shape), element_bytes(dtype)
    frames = list(_frames_of(blob, size, width))
    try:
        dense = np.empty(size, np.uint8)
    except (MemoryError, ValueError):
        raise ValueError(f"it takes {size} bytes, which cannot be allocated") from None

    def fill(number: int) -> None:
        begin = number * BLOCK * width
        unpack_block(frames[number], dense[begin : begin + BLOCK * width].view(f"<u{width}"))

    run(fill, range(len(frames)))
    return dense


def run(function: Callable[[Item], Made], items: Iterable[Item]) -> list[Made]:
    """Maps a function over items, on all cores."""
    items = list(items)
    if len(items) < 2:
        return list(map(function, items))
    with ThreadPoolExecutor(min(len(items), os.cpu_count() or 1)) as pool:
        return list(pool.map(function, items))


def _frames_of(blob: Bytes, size: int, width: int) -> Iterator[memoryview]:
    """The frames of a tensor of `size` bytes, each with a size that fits its block."""
    count = block_count(size, width)
    begin = count * TABLE.itemsize
    lengths = [] if len(blob) < begin else blob[:begin].view(TABLE).tolist()
    if len(lengths) != count or begin + sum(lengths) != len(blob):
        raise ValueError(f"{len(blob)} bytes do not hold {count} blocks; the file is damaged")
    for number, length in enumerate(lengths):
        frame = blob[begin : begin + length].data
        _check_size(frame, min(BLOCK, size // width - number * BLOCK), width)
        yield frame
        begin += length


def _check_size(frame: memoryview, elements: int, width: int) -> None:
    """Refuses a frame that is larger than a block of `elements` can be."""
    try:
        size = zstandard.get_frame_parameters(frame).content_size
    except zstandard.ZstdError as error:
        raise ValueError(f"a block is damaged: {error}") from None
    least = mask_bytes(elements)
    if not least <= size <= 2 * least + elements * width:
        raise ValueError(f"a block of {elements} elements has {size} bytes; the file is damaged")


class _OfThread(threading.local):
    def __init__(self) -> None:
        self.decompressor = zstandard.ZstdDecompressor()


_OF_THREAD = _OfThread()


def unpack_block(frame: memoryview, into: npt.NDArray[Any]) -> None:
    """Unpacks a frame of pack_block.

    Args:
        frame: With a size that fits.
        into: Unsigned integers of the width of an element, flat.

    Raises:
        ValueError: The frame is damaged.
    """
    try:
        data = np.frombuffer(
            _OF_THREAD.decompressor.decompress(frame, allow_extra_data=False), np.uint8
        )
    except zstandard.ZstdError as error:
        raise ValueError(f"a block is damaged: {error}") from None
    mask, rest = np.split(data, [mask_bytes(len(into))])
    kept = np.unpackbits(mask, count=len(into), bitorder="little").view(np.bool_)
    width, count = into.itemsize, int(kept.sum())
    signs, planes = np.split(rest, [max(0, len(rest) - count * width)])
    if len(planes) != count * width or len(signs) not in (0, mask_bytes(len(into) - count)):
        raise ValueError(f"a block of {len(into)} elements has {len(data)} bytes: it is damaged")
    into[...] = 0
    into[kept] = np.ascontiguousarray(planes.reshape(width, count).T).view(into.dtype).reshape(-1)
    if len(signs):
        flags = np.unpackbits(signs, count=len(into) - count, bitorder="little")
        into[~kept] = flags.astype(into.dtype) << (8 * width - 1)
