"""Reads what a caller gives as a model: a Module, a mapping of tensors, a path, and so on."""

import os
import sys
from collections.abc import Mapping
from typing import Any

from secateur.checkpoint import place_of
from secateur.checks import shown
from secateur.entries import from_mapping, from_module
from secateur.errors import InvalidStateDict
from secateur.model import Source
from secateur.model_files import MASK_SHAPES, read_path
from secateur.paths import source_path
from secateur.tensors import has_torch
from secateur.ties import tied, values_of


def read_source(source: Any, key: str | None = None) -> Source:
    """Reads what a caller gives as a model.

    Args:
        source: See `Client`; a Source is returned as it is.
        key: The dotted path to the state_dict in a file of torch.save.

    Raises:
        InvalidStateDict: It is not a model, or cannot be read.
    """
    place = place_of(source)
    is_path = isinstance(source, str | os.PathLike) and not place
    if not isinstance(key, str | None):
        raise InvalidStateDict(f"key={shown(key)}: a dotted path is text, not {type(key).__name__}")
    if key is not None and not is_path:
        kind = "a model on the server" if place else type(source).__name__
        raise InvalidStateDict(f"key={key!r}: only a local torch file has keys, not {kind}")
    if isinstance(source, Source):
        return source
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(source, torch.nn.Module):
        return from_module(source)
    if isinstance(source, Mapping):
        return from_mapping(source)
    if place:
        return Source({}, frozenset(), has_torch(), place=place)
    if is_path:
        return _read_model(source, key)
    raise InvalidStateDict(
        "a source is a Module, a mapping of tensors, a path, a URI or a Checkpoint, "
        f"not {type(source).__name__}"
    )


def _read_model(path: Any, key: str | None) -> Source:
    read = read_path(source_path(path, InvalidStateDict), key)
    if MASK_SHAPES in read.metadata:
        raise InvalidStateDict(
            f"{path}: this file holds masks, not a model; prune a model by them: "
            "secateur.custom_from_mask, or method: custom_from_mask in a spec file"
        )
    return read


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads the state_dict of a local model: dense, pairs X_orig and X_mask, or packed.

    Args:
        path: A .safetensors or torch file, a folder, or an index of shards.

    Returns:
        Tensors of torch if it is installed, else arrays; tied ones are one object.

    Raises:
        InvalidStateDict: It cannot be read, or is damaged.
    """
    if place_of(path):
        raise InvalidStateDict(f"{path}: load reads local paths; client.download gets checkpoints")
    source = _read_model(path, None)
    entries = tied({**source.tensors, **source.others}, source.other_names)
    return values_of(source.ordered(entries), source.as_torch)


def is_pruned(source: Any, key: str | None = None) -> bool:
    """Returns whether a source has a pruned tensor: as torch.nn.utils.prune.is_pruned.

    Args:
        source: See `Client`.
        key: See `Client`.
    """
    return bool(read_source(source, key).pairs())
