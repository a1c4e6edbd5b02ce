"""A model in shards, as Hugging Face writes one, of real weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

INDEX = "model.safetensors.index.json"
SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]

# A name of the same tensor: torch.nn ties them, and save_model stores one.
TIED = {"decoder.weight": "classifier.weight"}


def write_shards(folder: Path, tensors: Mapping[str, Tensor], index: str = INDEX) -> Path:
    """Three shards of about one size, and their index. Returns its path."""
    folder.mkdir(exist_ok=True)
    total = sum(tensor.nbytes for tensor in tensors.values())
    parts: list[dict[str, Tensor]] = [{}, {}, {}]
    seen = 0
    for name, tensor in tensors.items():
        parts[3 * seen // total][name] = tensor
        seen += tensor.nbytes
    weight_map = {n: file for file, part in zip(SHARDS, parts, strict=True) for n in part}
    for file, part in zip(SHARDS, parts, strict=True):
        tied = {alias: name for alias, name in TIED.items() if name in part}
        weight_map |= dict.fromkeys(tied, file)
        save_file(part, folder / file, metadata={"format": "pt", **tied})
    table = {"metadata": {"total_size": total, "made_by": "a test"}, "weight_map": weight_map}
    (folder / index).write_text(json.dumps(table, indent=2))
    return folder / index


def read_shards(folder: Path, index: str = INDEX) -> dict[str, Tensor]:
    """The tensors of a model in shards, once everything that its index says is found true."""
    table = json.loads((folder / index).read_text())
    weight_map: dict[str, str] = table["weight_map"]
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    for file in SHARDS:
        of_file, metadata = load_file(folder / file), metadata_of(folder / file)
        assert metadata.pop("format") == "pt"
        assert {weight_map[name] for name in [*of_file, *metadata]} <= {file}
        assert not of_file.keys() & tensors.keys()
        tensors |= of_file
        tied |= metadata
    assert tied == TIED
    assert weight_map.keys() == tensors.keys() | tied.keys()
    size = sum(tensor.nbytes for tensor in tensors.values())
    assert table == {
        "metadata": {"total_size": size, "made_by": "a test"},
        "weight_map": weight_map,
    }
    return tensors


def with_ties(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of a result: the tied tensor under both of its names, as itself or as a pair."""
    found = dict(tensors)
    for other, name in TIED.items():
        for end in ("", "_orig", "_mask"):
            found |= {other + end: tensors[name + end]} if name + end in tensors else {}
    return found


def metadata_of(path: Path) -> dict[str, str]:
    with safetensors.safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def change_index(path: Path, **weight_map: Any) -> None:
    """Changes the files that the index names for tensors; None removes the entry."""
    table = json.loads(path.read_text())
    given = {name.replace("__", "."): file for name, file in weight_map.items()}
    table["weight_map"] = {n: f for n, f in (table["weight_map"] | given).items() if f is not None}
    path.write_text(json.dumps(table))


def real_weights(path: Path) -> dict[str, Tensor]:
    loaded: dict[str, Tensor] = torch.load(path, weights_only=True)
    return loaded
