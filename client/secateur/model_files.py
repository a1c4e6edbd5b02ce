"""Reads a model, or masks, from a file, a folder, or an index of shards."""

import mmap
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from secateur.entries import from_mapping
from secateur.errors import InvalidStateDict
from secateur.file_kinds import open_reason, safetensors_reason
from secateur.folders import find_folder
from secateur.model import Source
from secateur.onnx.files import ONNX_SUFFIX, read_onnx
from secateur.packing.packed import is_packed, unpacked
from secateur.shards import Index, read_shards
from secateur.tensor_file import parse_file
from secateur.tensors import LocalTensor, dtype_of, has_torch
from secateur.ties import untie
from secateur.torch_files import KNOWN_SUFFIXES, TORCH_SUFFIXES, read_torch_file
from secateur_proto.index import SUFFIX
from secateur_proto.ties import FORMAT, write_ties

# In the metadata of a file of masks: JSON, from names to shapes.
MASK_SHAPES = "secateur.mask_shapes"


def read_path(path: Path, key: str | None = None) -> Source:
    """Reads a file, a folder, or an index of shards.

    Args:
        path: Where the model is, or is expected.
        key: The dotted path to the state_dict in a file of torch.save.

    Raises:
        InvalidStateDict: It cannot be read.
    """
    if path.is_dir():
        folder = find_folder(path)
        model = read_path(folder.model, key)
        return replace(model, folder=replace(folder, parameters=model.elements))
    if path.suffix in TORCH_SUFFIXES:
        file = read_torch_file(path, key)
        return replace(from_mapping(file.state_dict), torch_file=file)
    if key is not None:
        raise InvalidStateDict(f"key={key!r}: only a torch file has keys, not {path}")
    if path.name.endswith(SUFFIX):
        return _from_index(path)
    if path.suffix == ONNX_SUFFIX:
        onnx_file = read_onnx(path, map_bytes)
        return replace(_from_files(onnx_file.tensors, dict([FORMAT]), ()), onnx_file=onnx_file)
    if path.suffix != ".safetensors":
        hint = f"; of a checkpoint give what client.checkpoint({str(path)!r}) returns"
        known = f"unknown suffix {path.suffix!r}; known are {KNOWN_SUFFIXES}, {SUFFIX} and folders"
        reason = known if path.exists() else "No such file or directory"
        raise InvalidStateDict(
            f"{path}: {reason}{hint if str(path).startswith('checkpoints/') else ''}"
        )
    mapped = map_file(path)
    paths = () if mapped.is_packed else (path,)
    return _from_files(*_untied(mapped.tensors, mapped.metadata), paths)


def _from_files(
    tensors: Mapping[str, LocalTensor],
    metadata: Mapping[str, str],
    paths: tuple[Path, ...],
    index: Index | None = None,
) -> Source:
    order = tuple(tensors)
    return Source(tensors, frozenset(order), has_torch(), metadata, paths, index=index, order=order)


def _untied(
    tensors: dict[str, LocalTensor], metadata: dict[str, str]
) -> tuple[dict[str, LocalTensor], dict[str, str]]:
    """The tensors of a file, each under one name, and its metadata, with the other names."""
    tensors, ties = untie(tensors, {k: v for k, v in metadata.items() if k not in tensors})
    return tensors, write_ties(metadata, ties)


def _from_index(path: Path) -> Source:
    packed: list[Path] = []
    tensors, index = read_shards(path, partial(_shard, packed))
    names = dict.fromkeys(index.files.values())
    paths = (*(path.with_name(name) for name in names), path)
    is_as_stored = not packed and not index.is_torch
    return _from_files(*_untied(tensors, index.of_one_file()), paths if is_as_stored else (), index)


def _shard(packed: list[Path], path: Path) -> tuple[dict[str, LocalTensor], dict[str, str]]:
    """The tensors and the metadata of a shard, which is added to `packed` if it is."""
    if path.suffix not in TORCH_SUFFIXES:
        file = map_file(path)
        packed += [path] if file.is_packed else []
        return file.tensors, file.metadata
    source = from_mapping(read_torch_file(path).state_dict)
    for name, value in source.others.items():
        raise InvalidStateDict(
            f"{path}: {name} is {dtype_of(value)}, for which safetensors has no dtype; "
            "give the model as one file"
        )
    return dict(source.tensors), dict(source.metadata)


def map_bytes(path: Path) -> memoryview:
    """Maps a file into memory.

    Raises:
        InvalidStateDict: It cannot be mapped.
    """
    try:
        with path.open("rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as error:  # ValueError: an empty file
        reason = getattr(error, "strerror", None) or error
        raise InvalidStateDict(f"{path}: {reason}") from None


class MappedFile(NamedTuple):
    """A safetensors file in memory.

    Attributes:
        tensors: Packed ones are unpacked when they are read.
        metadata: Without the description of packed tensors.
        is_packed: Whether the file has packed tensors.
    """

    tensors: dict[str, LocalTensor]
    metadata: dict[str, str]
    is_packed: bool


def map_file(path: Path) -> MappedFile:
    """Maps the tensors of a safetensors file.

    Raises:
        InvalidStateDict: The safetensors library finds it invalid, or it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    if reason := open_reason(path):
        raise InvalidStateDict(f"{path}: {reason}")
    try:
        with safe_open(path, framework="numpy"):
            pass
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or safetensors_reason(path, error)
        raise InvalidStateDict(f"{path}: {reason}") from None
    try:
        tensors, metadata = parse_file(map_bytes(path))
        return MappedFile(*unpacked(tensors, metadata, f"{path}: "), is_packed(metadata))
    except InvalidStateDict as error:
        raise InvalidStateDict(f"{path}: {error}") from None
