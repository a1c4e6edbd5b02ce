"""Files of masks: a bit for each element, as the server sends them, and the shapes."""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from secateur.errors import InvalidStateDict
from secateur.file_kinds import npz_reason
from secateur.model import Mask
from secateur.model_files import MASK_SHAPES, read_path
from secateur.tensors import Bytes, LocalTensor, from_value
from secateur.torch_files import TORCH_SUFFIXES
from secateur_proto.framing import mask_bytes
from secateur_proto.ties import FORMAT

# Bytes of bits that are unpacked at once.
UNPACKED_AT_ONCE = 1 << 16

Tensors = Mapping[str, LocalTensor]
Shapes = Mapping[str, Sequence[int]]


def pack(mask: Mask) -> LocalTensor:
    """Packs a mask into bits, the lowest first."""
    bits = np.packbits(mask, bitorder="little")
    return LocalTensor("U8", bits.shape, lambda: bits)


def unpack(packed: LocalTensor, count: int) -> Mask:
    """Unpacks a mask of `count` elements; it is flat."""
    return np.unpackbits(packed.read(), count=count, bitorder="little").view(np.bool_)


def unpack_all(packed: Tensors, counts: Mapping[str, int]) -> dict[str, Mask]:
    """Unpacks each mask; consecutive small masks are parts of one array.

    Args:
        packed: The bits of each mask.
        counts: The elements of each mask, by the same names.
    """
    found: dict[str, Mask] = {}
    names: list[str] = []
    parts: list[Bytes] = []
    size = 0
    for name, tensor in packed.items():
        if size + len(bits := tensor.read()) > UNPACKED_AT_ONCE:
            found |= _unpack_parts(names, parts, counts)
            names, parts, size = [], [], 0
        names.append(name)
        parts.append(bits)
        size += len(bits)
    return found | _unpack_parts(names, parts, counts)


def _unpack_parts(
    names: Sequence[str], parts: Sequence[Bytes], counts: Mapping[str, int]
) -> dict[str, Mask]:
    whole = np.concatenate([np.empty(0, np.uint8), *parts])
    flags = np.unpackbits(whole, bitorder="little").view(np.bool_)
    begins = itertools.accumulate(map(len, parts), initial=0)
    return {
        name: flags[8 * begin : 8 * begin + counts[name]]
        for name, begin in zip(names, begins, strict=False)
    }


def entries_of(path: Path, packed: Tensors, shapes: Shapes) -> tuple[Tensors, dict[str, str]]:
    """Returns the tensors and the metadata of a file of masks.

    Args:
        path: A .safetensors file, which gets bits, or a torch file, which gets bools.
        packed: The bits of each mask.
        shapes: The shapes of the masks, by the same names.
    """
    if path.suffix in TORCH_SUFFIXES:
        return {name: _whole(mask, shapes[name]) for name, mask in packed.items()}, {}
    table = {name: list(shapes[name]) for name in packed}
    return packed, dict([FORMAT, (MASK_SHAPES, json.dumps(table, separators=(",", ":")))])


def read_arrays(path: Path) -> dict[str, LocalTensor]:
    """Reads the arrays of a file: masks that `entries_of` packed, or a tensor for each array.

    Args:
        path: .safetensors, a torch file, or .npz.

    Raises:
        InvalidStateDict: It cannot be read, or holds no arrays.
    """
    if path.suffix == ".npz":
        return _read_npz(path)
    source = read_path(path)
    tensors = {name: source.tensors[stored] for name, stored in source.other_names.items()}
    tensors = {**source.tensors, **tensors}
    if text := source.metadata.get(MASK_SHAPES):
        shapes = _parse_shapes(path, text, tensors)
        tensors = {name: _whole(tensor, shapes[name]) for name, tensor in tensors.items()}
    if not tensors:
        raise InvalidStateDict(f"{path}: holds no arrays")
    return tensors


def _whole(packed: LocalTensor, shape: Sequence[int]) -> LocalTensor:
    """A mask with a bool for each element."""
    count = math.prod(shape)
    return LocalTensor("BOOL", tuple(shape), lambda: unpack(packed, count).view(np.uint8))


def _parse_shapes(path: Path, text: str, tensors: Tensors) -> dict[str, list[int]]:
    """The shapes in a file's metadata; they must fit its tensors."""
    try:
        shapes: dict[str, list[int]] = json.loads(text)
        for name, tensor in tensors.items():
            shape = shapes[name]
            is_shape = all(isinstance(length, int) and length >= 0 for length in shape)
            if not is_shape or tensor.dtype != "U8":
                raise ValueError(name)
            if tensor.shape != (mask_bytes(math.prod(shape)),):
                raise ValueError(name)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InvalidStateDict(
            f"{path}: {MASK_SHAPES} in its metadata is damaged: {error}"
        ) from None
    return shapes


def _read_npz(path: Path) -> dict[str, LocalTensor]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            read: dict[str, Any] = {name: arrays[name] for name in arrays.files}
    except Exception as error:  # numpy and zipfile raise errors of any kind for a broken file
        reason = getattr(error, "strerror", None) or npz_reason(path, error)
        raise InvalidStateDict(f"{path}: {reason}") from None
    return {name: from_value(name, array) for name, array in read.items()}
