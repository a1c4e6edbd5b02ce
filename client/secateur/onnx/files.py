"""ONNX files: initializers are read as tensors, and a copy of the file gets other values in place.

This reads the file's bytes itself: the onnx package copies every tensor, and writes a file anew.
"""

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from secateur.atomic import filling, replacing
from secateur.errors import InvalidStateDict, SecateurError
from secateur.file_kinds import onnx_reason, open_reason
from secateur.onnx.tensors import (
    ENTRY_KEY,
    ENTRY_VALUE,
    EXTERNAL,
    GRAPH,
    INITIALIZER,
    RAW,
    VALUES,
    Extent,
    Initializer,
    initializers,
    name_of,
    texts_of,
)
from secateur.onnx.wire import Damaged, Later, Parts, fields, replaced, with_head, written
from secateur.paths import source_path
from secateur.tensors import LocalTensor
from secateur_proto.dtypes import DTYPES

ONNX_SUFFIX = ".onnx"
_ADVICE = "an .onnx file holds dense tensors of the model's own shapes; write .safetensors instead"

MapBytes = Callable[[Path], memoryview]
Tensors = Mapping[str, LocalTensor]


@dataclass(frozen=True)
class OnnxFile:
    """An ONNX model.

    Attributes:
        path: The file.
        data: Its bytes.
        initializers: Those of the main graph.
    """

    path: Path
    data: memoryview
    initializers: Mapping[str, Initializer]

    @cached_property
    def tensors(self) -> dict[str, LocalTensor]:
        """The initializers that can be sent, in the file's order."""
        found = {name: initializer.tensor for name, initializer in self.initializers.items()}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @property
    def rest(self) -> list[str]:
        """What the file holds beside its tensors."""
        return ["the graph", *(name for name in self.initializers if name not in self.tensors)]

    def _check(self, path: Path, entries: Mapping[str, Any]) -> None:
        """Refuses entries that are not the file's initializers with other values.

        Raises:
            InvalidStateDict: The message names the entry.
        """
        for name, entry in entries.items():
            known = self.tensors.get(name)
            if known is None:
                raise InvalidStateDict(f"{path}: {self.path} has no tensor {name}; {_ADVICE}")
            if (entry.dtype, entry.shape) != (known.dtype, known.shape):
                found, own = (f"{t.dtype} of shape {list(t.shape)}" for t in (entry, known))
                raise InvalidStateDict(f"{path}: {name} is {found}, not {own}; {_ADVICE}")

    def save(self, path: Path, tensors: Tensors) -> None:
        """Writes the model with other values; external data comes in files of its own.

        Args:
            path: The file to write.
            tensors: The values, by the names of initializers; others stay as they are.

        Raises:
            InvalidStateDict: They do not fit the initializers.
        """
        self._check(path, tensors)
        locations = self._new_locations(path.name)
        if not locations:
            with replacing(path) as file:
                file.writelines(written(self._parts(tensors, locations)))
            return
        with filling(path.parent) as made:
            for location, new in locations.items():
                self._save_external(made / new, location, tensors)
            with (made / path.name).open("wb") as file:
                file.writelines(written(self._parts(tensors, locations)))

    def _new_locations(self, name: str) -> dict[str, str]:
        """The names of the new files of external data: as the model's, so that none is replaced."""
        extents = (initializer.extent for initializer in self.initializers.values())
        old = {extent.location for extent in extents if extent is not None}
        if name == self.path.name:
            return {location: location for location in old}
        return {location: _renamed(location, self.path.name, name) for location in old}

    def _parts(self, tensors: Tensors, locations: Mapping[str, str]) -> Parts:
        """The new file; values are read when they are written."""

        def change(message: memoryview) -> Parts | None:
            name = name_of(message)
            if self.initializers[name].extent is not None:
                return replaced(message, EXTERNAL, lambda entry: _moved(entry, locations))
            if name not in tensors:
                return None
            return _with_values(message, self.tensors[name], tensors[name])

        return replaced(self.data, GRAPH, lambda graph: replaced(graph, INITIALIZER, change))

    def _save_external(self, path: Path, location: str, tensors: Tensors) -> None:
        """Writes a file of external data."""
        end = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.path.parent / location, path)
        with path.open("r+b") as file:
            for offset, name in self._stored_at(location):
                if offset < end:
                    raise InvalidStateDict(
                        f"{self.path}: {name} shares external data with another initializer; "
                        "save the model with data for each: onnx.save(onnx.load(...), ...)"
                    )
                if name in tensors:
                    file.seek(offset)
                    file.write(tensors[name].read().data)
                end = offset + _size(self.tensors[name])

    def _stored_at(self, location: str) -> list[tuple[int, str]]:
        """The offsets and names of the tensors in a file of external data, in the file's order."""
        extents = ((self.initializers[name].extent, name) for name in self.tensors)
        return sorted((e.offset, name) for e, name in extents if e and e.location == location)


def read_onnx(path: Path, map_bytes: MapBytes) -> OnnxFile:
    """Reads an ONNX model.

    Args:
        path: The file.
        map_bytes: Maps a file into memory.

    Raises:
        InvalidStateDict: It cannot be read.
    """
    data = _mapped(path, map_bytes)
    files: dict[str, memoryview] = {}

    def read_external(extent: Extent) -> memoryview:
        if extent.location not in files:
            place = source_path(path.parent / extent.location, InvalidStateDict)
            files[extent.location] = _mapped(place, map_bytes)
        return _part(files[extent.location], extent)

    found: dict[str, Initializer] = {}
    try:
        for name, initializer in initializers(data, read_external):
            if name in found:
                raise Damaged(f"it has two initializers {name}")
            found[name] = initializer
    except Damaged as error:
        raise InvalidStateDict(f"{path}: {onnx_reason(path, error)}") from None
    return OnnxFile(path, data, found)


def check_onnx(path: Path, model: Path, output: str) -> None:
    """Refuses early to write an .onnx file that `OnnxFile.save` would refuse.

    Args:
        path: The .onnx file.
        model: The source.
        output: What is written.

    Raises:
        SecateurError: The source is not an ONNX model, or the output not its own tensors.
    """
    if model.suffix != ONNX_SUFFIX:
        raise SecateurError(f"{path}: {no_graph(model)}")
    if output != "dense":
        raise SecateurError(f"{path}: cannot hold the output {output}; {_ADVICE}")


def no_graph(source: object) -> str:
    """Returns why an .onnx file cannot be written."""
    return (
        f"{source} has no ONNX graph; only a model that is read from .onnx is written to it; "
        "write .safetensors instead, or export a module: secateur export"
    )


def _mapped(path: Path, map_bytes: MapBytes) -> memoryview:
    """The bytes of a file, which may be empty."""
    if reason := open_reason(path):
        raise InvalidStateDict(f"{path}: {reason}")
    return map_bytes(path) if path.stat().st_size else memoryview(b"")


def _part(file: memoryview, extent: Extent) -> memoryview:
    """The bytes of an extent."""
    end = len(file) if extent.size is None else extent.offset + extent.size
    if not extent.offset <= end <= len(file):
        raise Damaged(f"its external data ends at byte {end} of {len(file)} in {extent.location}")
    return file[extent.offset : end]


def _renamed(location: str, old: str, new: str) -> str:
    """`model.onnx.data` of `model.onnx` is `out.onnx.data` of `out.onnx`."""
    place = PurePosixPath(location)
    rest = place.name.removeprefix(old) if place.name.startswith(old) else f".{place.name}"
    return str(place.with_name(new + rest))


def _moved(entry: memoryview, locations: Mapping[str, str]) -> Parts | None:
    """An entry of `external_data` with the new location."""
    [(key, value)] = texts_of([entry]).items()
    if key != "location":
        return None
    location = locations[str(PurePosixPath(value))].encode()
    return [*with_head(ENTRY_KEY, [key.encode()]), *with_head(ENTRY_VALUE, [location])]


def _with_values(message: memoryview, old: LocalTensor, new: LocalTensor) -> Parts | None:
    """A TensorProto with other values, as raw data; the bytes of all other fields are kept."""
    numbers = [field.number for field in fields(message)]
    if RAW not in numbers and np.array_equal(old.read(), new.read()):
        return None
    parts: Parts = []
    values = with_head(RAW, [Later(_size(new), new.read)])
    for field, number in zip(fields(message), numbers, strict=True):
        if number not in VALUES:
            parts.append(field.whole)
        else:
            parts += values
            values = []
    return parts


def _size(tensor: LocalTensor) -> int:
    return math.prod(tensor.shape) * DTYPES[tensor.dtype].bits // 8
