"""The two forms of llama.cpp's importance matrices: GGUF, and one before it (.dat)."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from secateur.calibration.layer import Doubles
from secateur.errors import InvalidStatistics, SecateurError
from secateur.evaluation import brief
from secateur.file_kinds import is_gguf, open_reason

_DAMAGED = "the file is damaged or cut short, or is not an importance matrix; copy or make it again"


@dataclass(frozen=True)
class Entry:
    """What a file has of one tensor.

    Attributes:
        counts: How many inputs were summed, for each matrix of the tensor; one if it is a matrix.
        squares: The sums of squares of all matrices, flat.
        sums: The sums, likewise; None if the file has none.
        is_joined: Whether the tensor may have several matrices, though it has one count.
    """

    counts: Doubles
    squares: Doubles
    sums: Doubles | None = None
    is_joined: bool = False


def read_entries(path: Path) -> dict[str, Entry]:
    """Reads an importance matrix of either form.

    Raises:
        InvalidStatistics: It cannot be read, or is damaged.
        SecateurError: The file is GGUF, and the package gguf is not installed.
    """
    if reason := open_reason(path):
        raise InvalidStatistics(f"{path}: {reason}")
    try:
        entries = dict(_read_gguf(path) if is_gguf(path) else _read_old(path.read_bytes()))
        if not entries:
            raise InvalidStatistics("is not an importance matrix: it has no sums of squares")
        for name, entry in entries.items():
            _check(name, entry)
    except InvalidStatistics as error:
        raise InvalidStatistics(f"{path}: {error}") from None
    return entries


def _check(name: str, entry: Entry) -> None:
    """Refuses values that are no sums.  Raises: InvalidStatistics."""
    if not entry.counts.size or not entry.squares.size or entry.squares.size % entry.counts.size:
        raise InvalidStatistics(
            f"{name}: {entry.squares.size} sums of squares do not fit {entry.counts.size} counts"
        )
    if entry.sums is not None and entry.sums.size != entry.squares.size:
        raise InvalidStatistics(
            f"{name}: has {entry.sums.size} sums, and {entry.squares.size} sums of squares"
        )
    for what, values, low in (
        ("count", entry.counts, 0),
        ("sum of squares", entry.squares, 0),
        ("sum", entry.sums if entry.sums is not None else entry.squares, -np.inf),
    ):
        wrong = ~(np.isfinite(values) & (values >= low))
        if wrong.any():
            index = int(wrong.argmax())
            raise InvalidStatistics(f"{name}: {what} {index} is {values[index]}")


def _read_gguf(path: Path) -> Iterator[tuple[str, Entry]]:
    parts: dict[str, dict[str, Doubles]] = {}
    for full, values in _gguf_tensors(path):
        name, _, part = full.rpartition(".")
        if part in ("in_sum", "in_sum2", "counts"):
            parts.setdefault(name, {})[part] = values
    for name, found in parts.items():
        for part in ("in_sum2", "counts"):
            if part not in found:
                raise InvalidStatistics(f"{name}.{part}: is missing")
        counts = np.round(found["counts"])
        yield name, Entry(counts, found["in_sum2"], found.get("in_sum"))


def _gguf_tensors(path: Path) -> Iterator[tuple[str, Doubles]]:
    try:
        from gguf import GGMLQuantizationType, GGUFReader
    except ImportError:
        raise SecateurError(
            f"{path}: an importance matrix of GGUF needs gguf: pip install 'secateur[gguf]'"
        ) from None
    try:
        tensors = GGUFReader(path).tensors
    except Exception as error:  # gguf raises errors of any kind for a damaged file
        raise InvalidStatistics(f"{_DAMAGED} ({brief(error)})") from None
    for tensor in tensors:
        if tensor.name.endswith((".in_sum", ".in_sum2", ".counts")):
            if tensor.tensor_type != GGMLQuantizationType.F32:
                raise InvalidStatistics(f"{tensor.name}: is {tensor.tensor_type.name}, not F32")
            yield tensor.name, _doubles(tensor.data)


def _doubles(values: npt.NDArray[Any]) -> Doubles:
    return np.asarray(values, np.float64).reshape(-1)


def _read_old(data: bytes) -> Iterator[tuple[str, Entry]]:
    """Reads the form before GGUF.

    It has the number of entries; for each its name, the number of chunks of text, and the mean of
    the squares times this number, in float32. What follows is left out.
    """
    try:
        yield from _old_entries(data)
    except InvalidStatistics:  # it is a ValueError
        raise
    except (struct.error, ValueError):  # ValueError: a name that is not UTF-8 too
        raise InvalidStatistics(_DAMAGED) from None


def _old_entries(data: bytes) -> Iterator[tuple[str, Entry]]:
    (entries,), offset = struct.unpack_from("<i", data), 4
    seen = set()
    for _ in range(entries):
        (length,) = struct.unpack_from("<i", data, offset)
        (raw,) = struct.unpack_from(f"{_natural(length)}s", data, offset + 4)
        chunks, size = struct.unpack_from("<ii", data, offset + 4 + length)
        offset += 12 + length
        values = np.frombuffer(data, "<f4", _natural(size), offset)
        offset += values.nbytes
        name = raw.decode()
        if name in seen:
            raise InvalidStatistics(f"{name}: is in the file twice")
        seen.add(name)
        # Without chunks llama.cpp takes the values for means.
        yield name, Entry(np.array([float(chunks or 1)]), _doubles(values), is_joined=True)


def _natural(value: int) -> int:
    if value < 1:
        raise ValueError(value)
    return value
