"""Files of statistics: see docs/statistics.md."""

import json
import os
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from secateur.atomic import replacing
from secateur.calibration.layer import Doubles, LayerStatistics
from secateur.calibration.triangle import Floats, Triangle, triangle_length, triangle_size
from secateur.calibration.unit_files import BLOCKS, EXPERTS, UNIT_PARTS, read_units, unit_tensors
from secateur.calibration.unit_statistics import UnitStatistics
from secateur.checks import shown
from secateur.errors import InvalidStateDict, InvalidStatistics, SecateurError
from secateur.file_kinds import is_gguf
from secateur.model_files import map_file
from secateur.paths import path_of, source_path
from secateur.tensor_file import TensorFile
from secateur.tensors import LocalTensor, to_value

if TYPE_CHECKING:
    from secateur.calibration.statistics import Statistics

METADATA = "secateur.statistics"
VERSION = 1

_SUMS = ("sum_squares", "sum", "sum_abs")
_PARTS = {"count": "F64 or I64", **dict.fromkeys(_SUMS, "F64"), "gram": "F32"}

Tensors = Mapping[str, LocalTensor]


Parts = tuple[dict[str, LayerStatistics], dict[str, UnitStatistics], dict[str, UnitStatistics]]


def write_statistics(path: str | os.PathLike[str], statistics: "Statistics") -> None:
    """Writes statistics: see Statistics.save."""
    place = path_of(path)
    owners: dict[int, str] = {}
    sums: dict[str, LocalTensor] = {}
    grams: dict[str, LocalTensor] = {}  # behind all float64, so that these are aligned
    settings: dict[str, dict[str, Any]] = {}
    for name, layer in statistics.items():
        sums |= {f"{name}.{part}": tensor for part, tensor in _sums(layer)}
        owner = owners.setdefault(id(layer.triangle), name)
        if layer.triangle is not None and owner == name:
            grams[f"{name}.gram"] = _gram(layer.triangle)
        own = {"input_dim": layer.input_dim} if layer.input_dim != 1 else {}
        shared = {"gram": owner} if layer.triangle is not None and owner != name else {}
        settings |= {name: own | shared} if own or shared else {}
    sums |= unit_tensors(BLOCKS, statistics.blocks) | unit_tensors(EXPERTS, statistics.experts)
    described = {"version": VERSION, **({"layers": settings} if settings else {})}
    file = TensorFile(sums | grams, {METADATA: json.dumps(described, ensure_ascii=False)})
    try:
        with replacing(place) as out:
            for part in file.parts():
                out.write(part)
    except OSError as error:
        raise SecateurError(f"{path}: cannot write it: {error.strerror}") from None


def _sums(layer: LayerStatistics) -> Iterator[tuple[str, LocalTensor]]:
    is_whole = float(layer.count).is_integer()
    yield "count", _local("I64" if is_whole else "F64", np.array(layer.count))
    for part in _SUMS:
        if (values := getattr(layer, part)) is not None:
            yield part, _local("F64", values)


def _local(dtype: str, values: npt.NDArray[Any]) -> LocalTensor:
    data = np.ascontiguousarray(values, "<i8" if dtype == "I64" else "<f8")
    return LocalTensor(dtype, values.shape, lambda: data.reshape(-1).view(np.uint8))


def _gram(triangle: Triangle) -> LocalTensor:
    def read() -> npt.NDArray[np.uint8]:
        return np.ascontiguousarray(triangle.values(), "<f4").view(np.uint8)

    return LocalTensor("F32", (triangle_length(triangle.size),), read)


def read_statistics(path: str | os.PathLike[str]) -> Parts:
    """Reads the layers, the stacks and the experts of statistics: see Statistics.load."""
    place = source_path(path, InvalidStatistics)
    if is_gguf(place):
        raise InvalidStatistics(
            f"{path}: is a GGUF file; read it with Statistics.from_imatrix, and save that as a "
            "file of statistics for the commands"
        )
    try:
        file = map_file(place)
    except InvalidStateDict as error:
        raise InvalidStatistics(str(error)) from None
    try:
        settings = _settings(file.metadata)
        names = _layer_names(file.tensors)
        for name in settings:
            if name not in names:
                raise InvalidStatistics(f"metadata {METADATA}: layers: {name} has no tensors")
        triangles = _triangles(f"{path}: ", file.tensors, names)
        layers = {
            name: _layer(name, file.tensors, settings.get(name, {}), triangles) for name in names
        }
        return layers, read_units(BLOCKS, file.tensors), read_units(EXPERTS, file.tensors)
    except SecateurError as error:
        raise InvalidStatistics(f"{path}: {error}") from None


def _layer_names(tensors: Tensors) -> list[str]:
    names: dict[str, None] = {}
    for tensor in tensors:
        name, _, part = tensor.rpartition(".")
        if not name or part not in (*_PARTS, *UNIT_PARTS):
            known = ", NAME.".join((*_PARTS, *UNIT_PARTS))
            raise InvalidStatistics(f"{tensor}: is not NAME.{known}")
        if part in _PARTS:
            names[name] = None
    return list(names)


def _settings(metadata: Mapping[str, str]) -> Mapping[str, Mapping[str, Any]]:
    """The settings of layers that are not the default.  Raises: InvalidStatistics."""
    if METADATA not in metadata:
        raise InvalidStatistics(f"is not a file of statistics: its metadata has no {METADATA}")
    try:
        described = json.loads(metadata[METADATA])
    except (ValueError, RecursionError):
        raise InvalidStatistics(
            f"metadata {METADATA}: {shown(metadata[METADATA])} is not JSON"
        ) from None
    version = described.get("version") if isinstance(described, dict) else None
    if version != VERSION or isinstance(version, bool):
        raise InvalidStatistics(
            f"metadata {METADATA}: version {shown(version)} is unknown, only {VERSION} is known; "
            "update secateur"
        )
    layers = described.get("layers", {})
    if not isinstance(layers, dict):
        raise InvalidStatistics(f"metadata {METADATA}: layers: {shown(layers)} is not an object")
    for name, settings in layers.items():
        _check_settings(f"metadata {METADATA}: layers: {name}", settings)
    return layers


def _check_settings(where: str, settings: Any) -> None:
    if not isinstance(settings, dict):
        raise InvalidStatistics(f"{where}: {shown(settings)} is not an object")
    for key, value in settings.items():
        if key not in ("input_dim", "gram"):
            raise InvalidStatistics(f"{where}: {shown(key)} is neither input_dim nor gram")
        if key == "gram" and not isinstance(value, str):
            raise InvalidStatistics(f"{where}.gram: {shown(value)} is not the name of a layer")
        if key == "input_dim" and (type(value) is not int or value not in (0, 1)):
            raise InvalidStatistics(f"{where}.input_dim: {shown(value)} is neither 0 nor 1")


def _layer(
    name: str, tensors: Tensors, settings: Mapping[str, Any], triangles: Mapping[str, Triangle]
) -> LayerStatistics:
    count, squares = _count(name, tensors), _sum(name, "sum_squares", tensors)
    if squares is None:
        raise InvalidStatistics(f"{name}.sum_squares: is missing")
    total, absolute = (_sum(name, part, tensors, len(squares)) for part in ("sum", "sum_abs"))
    owner = settings.get("gram", name)
    if owner != name and name in triangles:
        raise InvalidStatistics(f"{name}.gram: exists, but the metadata refers to that of {owner}")
    if "gram" in settings and owner not in triangles:
        raise InvalidStatistics(f"{name}: its gram is that of {owner}, which has no own gram")
    triangle = triangles.get(owner)
    if triangle is not None and triangle.size % len(squares):
        raise InvalidStatistics(
            f"{owner}.gram: is of a matrix of {triangle.size} rows, which is not a multiple of the "
            f"{len(squares)} inputs of {name}"
        )
    return LayerStatistics(count, squares, total, absolute, settings.get("input_dim", 1), triangle)


def _count(name: str, tensors: Tensors) -> float:
    tensor = _tensor(name, "count", tensors, 0)
    if tensor is None:
        raise InvalidStatistics(f"{name}.count: is missing")
    count = to_value(name, tensor, as_torch=False).item()
    if not 0 < count < float("inf"):
        raise InvalidStatistics(f"{name}.count: {count} is not a number above 0")
    return int(count) if float(count).is_integer() else float(count)


def _sum(name: str, part: str, tensors: Tensors, inputs: int | None = None) -> Doubles | None:
    """One of the sums of a layer, checked; None if the file does not have it."""
    tensor = _tensor(name, part, tensors, 1)
    if tensor is None:
        return None
    if tensor.shape[0] == 0 or inputs not in (None, tensor.shape[0]):
        raise InvalidStatistics(
            f"{name}.{part}: has {tensor.shape[0]} elements, not {inputs or '1 or more'}"
        )
    values: Doubles = to_value(name, tensor, as_torch=False)
    _check_values(f"{name}.{part}", values, 0 if part != "sum" else -np.inf)
    return values


def _check_values(name: str, values: npt.NDArray[Any], low: float) -> None:
    with np.errstate(invalid="ignore"):
        wrong = ~(np.isfinite(values) & (values >= low))
    if wrong.any():
        index = int(wrong.argmax())
        needed = "finite" if low < 0 else "a finite number from 0"
        raise InvalidStatistics(f"{name}[{index}]: {values[index]} is not {needed}")


def _tensor(name: str, part: str, tensors: Tensors, dims: int) -> LocalTensor | None:
    tensor = tensors.get(f"{name}.{part}")
    if tensor is None:
        return None
    if tensor.dtype not in _PARTS[part].split(" or ") or len(tensor.shape) != dims:
        raise InvalidStatistics(
            f"{name}.{part}: is {tensor.dtype} of shape {list(tensor.shape)}, not {_PARTS[part]} "
            f"with {dims} dimensions"
        )
    return tensor


def _triangles(place: str, tensors: Tensors, names: list[str]) -> dict[str, Triangle]:
    """The grams, which are read when they are used."""
    triangles = {}
    for name in names:
        tensor = _tensor(name, "gram", tensors, 1)
        if tensor is None:
            continue
        size = triangle_size(tensor.shape[0])
        if size is None:
            raise InvalidStatistics(
                f"{name}.gram: has {tensor.shape[0]} elements, which is not n * (n + 1) / 2"
            )
        triangles[name] = Triangle(size, partial(_read_gram, f"{place}{name}.gram", tensor, size))
    return triangles


def _read_gram(name: str, tensor: LocalTensor, size: int) -> Floats:
    values: Floats = to_value(name, tensor, as_torch=False)
    _check_values(name, values, -np.inf)
    diagonal = np.cumsum([0, *range(size, 1, -1)])
    negative = values[diagonal] < 0
    if negative.any():
        index = int(diagonal[negative.argmax()])
        raise InvalidStatistics(f"{name}[{index}]: {values[index]} is on the diagonal, below 0")
    return values
