"""Importance matrices of llama.cpp: sums of squares of the inputs of a model's layers."""

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from secateur.calibration.gguf_names import EXPERT, hugging_face_name
from secateur.calibration.imatrix_files import Entry, read_entries
from secateur.calibration.layer import Doubles, LayerStatistics
from secateur.checks import shown
from secateur.errors import InvalidSpec, InvalidStatistics, NotCalibrated
from secateur.paths import source_path
from secateur.tables import listed

Names = Mapping[str, str | None] | Callable[[str], str | None] | None

_MOST_SHOWN = 5


def read_imatrix(path: str | os.PathLike[str], names: Names) -> dict[str, LayerStatistics]:
    """Reads an importance matrix: see Statistics.from_imatrix."""
    if not (names is None or isinstance(names, Mapping) or callable(names)):
        raise InvalidSpec(f"names: {shown(names)} is not a mapping, a function or None")
    place = source_path(path, InvalidStatistics)
    entries = read_entries(place)
    layers: dict[str, LayerStatistics] = {}
    without: list[str] = []
    for name, target in _targets(place, entries, names).items():
        for index, row in enumerate(_rows(place, name, entries)):
            full = target.replace(EXPERT, str(index))
            if full in layers:
                raise InvalidStatistics(f"{path}: {name}: another tensor is named {full} too")
            if row is None:
                without.append(full)
            else:
                layers[full] = row
    if without:
        text = f"{path}: no input reached {listed(without, _MOST_SHOWN)}: not in the statistics"
        warnings.warn(text, NotCalibrated, stacklevel=3)
    return layers


def _targets(path: Path, entries: Mapping[str, Entry], names: Names) -> dict[str, str]:
    """The names of the weights, by the names of tensors."""
    targets, unknown = {}, []
    for name in entries:
        if callable(names):
            target = names(name)
        elif names is not None and name in names:
            target = names[name]
        else:
            target = hugging_face_name(name, entries)
            unknown += [name] if target is None else []
        if not isinstance(target, str | None):
            raise InvalidSpec(f"names: {name!r} is mapped to {shown(target)}, which is not a name")
        if target is not None:
            targets[name] = target
    if unknown:
        raise InvalidStatistics(
            f"{path}: the names {listed(unknown, _MOST_SHOWN)} are unknown; give names=, a mapping "
            "or a function from such names to those of your model; None leaves a tensor out"
        )
    return targets


def _rows(path: Path, name: str, entries: Mapping[str, Entry]) -> list[LayerStatistics | None]:
    """The statistics of a tensor, or of each expert; None for an expert without inputs."""
    entry = entries[name]
    matrices = _matrices(path, name, entries) if entry.is_joined else len(entry.counts)
    squares = entry.squares.reshape(matrices, -1)
    sums = None if entry.sums is None else entry.sums.reshape(matrices, -1)
    counts = np.broadcast_to(entry.counts, matrices).tolist()
    return [
        _layer(count, squares[index], None if sums is None else sums[index])
        for index, count in enumerate(counts)
    ]


def _layer(count: float, squares: Doubles, sums: Doubles | None) -> LayerStatistics | None:
    if not count:
        return None
    return LayerStatistics(int(count), squares.copy(), None if sums is None else sums.copy())


# Tensors of a layer that have the model's hidden states as inputs.
_HIDDEN = ("ffn_gate_inp", "attn_q", "attn_qkv")


def _matrices(path: Path, name: str, entries: Mapping[str, Entry]) -> int:
    """How many experts a tensor of an old file has, which does not say it."""
    block, _, part = name.removesuffix(".weight").rpartition(".")
    if not part.endswith("_exps"):
        return 1
    hidden = [entries.get(f"{block}.{known}.weight") for known in _HIDDEN]
    outer = [entries.get(f"{block}.{known}.weight") for known in ("ffn_up_exps", "ffn_gate_exps")]
    inputs = next((entry.squares.size for entry in hidden if entry is not None), 0)
    total = next((entry.squares.size for entry in outer if entry is not None), 0)
    experts = total // inputs if inputs else 0
    size = entries[name].squares.size
    if not experts or total % inputs or size % experts:
        raise InvalidStatistics(
            f"{path}: {name}: cannot tell how many experts its {size} values are of; make the "
            "file again with a newer llama-imatrix, as GGUF"
        )
    return experts
