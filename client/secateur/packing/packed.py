"""Packed files: tensors without their zeros, compressed. zstandard is imported late."""

import importlib.util
import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import BinaryIO

from secateur.errors import InvalidStateDict, SecateurError
from secateur.tensors import Bytes, LocalTensor
from secateur_proto.framing import file_header
from secateur_proto.packed import METADATA

Tensors = Mapping[str, LocalTensor]


def check_zstandard(what: str) -> None:
    """Refuses early what needs zstandard.

    Raises:
        SecateurError: It is not installed.
    """
    if importlib.util.find_spec("zstandard") is None:
        raise SecateurError(f"{what} needs zstandard: pip install 'secateur[pack]'")


def is_packed(metadata: Mapping[str, str]) -> bool:
    """Returns whether a file has packed tensors, by its metadata."""
    return METADATA in metadata


def unpacked(
    tensors: Tensors, metadata: Mapping[str, str], place: str = ""
) -> tuple[dict[str, LocalTensor], dict[str, str]]:
    """Describes packed tensors as dense ones; each is unpacked when it is read.

    Args:
        tensors: Of a file.
        metadata: Of the file.
        place: Where a tensor is, for errors while it is read.

    Returns:
        The tensors, and the metadata without the description of the packed ones.

    Raises:
        InvalidStateDict: The description is damaged.
        SecateurError: zstandard is not installed.
    """
    if not is_packed(metadata):
        return dict(tensors), dict(metadata)
    check_zstandard("a packed file")
    from secateur.packing.unpacking import read_description

    try:
        described = read_description(metadata[METADATA])
    except ValueError as error:
        raise InvalidStateDict(str(error)) from None
    for name in described:
        if name not in tensors or (tensors[name].dtype, len(tensors[name].shape)) != ("U8", 1):
            raise InvalidStateDict(f"{name}: {METADATA} in the metadata does not fit the tensors")
    dense = {
        name: LocalTensor(
            dtype, shape, partial(_read, place + name, tensors[name].read, dtype, shape)
        )
        for name, (dtype, shape) in described.items()
    }
    rest = {key: value for key, value in metadata.items() if key != METADATA}
    return {name: dense.get(name, tensor) for name, tensor in tensors.items()}, rest


def _read(name: str, read: Callable[[], Bytes], dtype: str, shape: tuple[int, ...]) -> Bytes:
    from secateur.packing.unpacking import unpack

    try:
        return unpack(read(), dtype, shape)
    except ValueError as error:
        raise InvalidStateDict(f"{name}: {error}") from None


def write_packed(
    file: BinaryIO, folder: Path, tensors: Tensors, metadata: Mapping[str, str]
) -> None:
    """Writes a packed file, block by block.

    Args:
        file: To write.
        folder: For a temporary file of the data, which the header precedes.
        tensors: In their order.
        metadata: Of the file.

    Raises:
        SecateurError: zstandard is not installed.
    """
    check_zstandard("a packed file")
    from secateur.packing.unpacking import run
    from secateur_proto.packing import Dense, describe, pack_all

    dense = [
        Dense(name, tensor.dtype, tensor.shape, partial(_part, tensor))
        for name, tensor in tensors.items()
    ]
    with tempfile.TemporaryFile(dir=folder) as data:

        def write(offset: int, part: bytes | memoryview) -> None:
            data.seek(offset)
            data.write(part)

        placed = pack_all(dense, write, run)
        entries = (tensor.entry() for tensor in placed)
        file.write(file_header(entries, {**metadata, **describe(placed)}))
        data.truncate(sum(tensor.size for tensor in placed))
        data.seek(0)
        shutil.copyfileobj(data, file, 1 << 20)


def _part(tensor: LocalTensor) -> list[memoryview]:
    return [tensor.read().data]
