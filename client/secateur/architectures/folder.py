"""The files beside the weights of a shrunk transformer: its config and its model card."""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from secateur.architectures.layout import Config
from secateur.architectures.sizes import fitted_config
from secateur.architectures.transformer import (
    CONFIG,
    Shapes,
    Transformer,
    parse_config,
    transformer_of,
)
from secateur.checks import shown
from secateur.errors import InvalidSpec, InvalidStateDict
from secateur.folders import Folder
from secateur.model import Source
from secateur.resizing.removal import Removed, removed_slices
from secateur.shrinkage import Shrinkage
from secateur.tensors import LocalTensor
from secateur.ties import once
from secateur.versions import VERSION
from secateur_proto import spec_pb2 as pb

CARD = "README.md"

Entries = Mapping[str, Any]


def fitted_folder(
    folder: Folder,
    entries: Entries,
    groups: Sequence[pb.Group] = (),
    shrinkage: Shrinkage | None = None,
) -> Folder:
    """Returns a folder with the config and the model card of a shrunk model.

    Args:
        folder: The folder of the model; without a config.json it is returned as it is.
        entries: The tensors of the shrunk model.
        groups: Those that were cut.
        shrinkage: What was removed of them; None if no group was cut.

    Raises:
        InvalidStateDict: The config cannot express the sizes of the tensors.
    """
    config = _config_of(folder)
    if config is None:
        return folder
    shapes = _shapes(entries)
    dims = {name: len(shape) for name, shape in shapes.items()}
    removed = {} if shrinkage is None else removed_slices(groups, shrinkage.groups, dims)
    fitted = _expressed(folder, config, shapes, removed)
    now = sum(map(math.prod, _shapes(once(entries)).values()))
    size = f"parameters: {folder.parameters:,} -> {now:,}"
    notes = (*folder.notes, *_changes(config, fitted), size)
    changed = {CONFIG: _text(fitted), CARD: _card(folder.text(CARD), notes)}
    return replace(folder, changed={**folder.changed, **changed}, notes=notes)


def transformer_in(folder: Folder, model: Source) -> tuple[dict[str, Any], Transformer]:
    """Returns the config of a folder, and the transformer that it describes.

    Raises:
        InvalidSpec: The folder has no config, or that of an unknown architecture.
    """
    config = _config_of(folder)
    if config is None:
        raise InvalidSpec(f"{folder.path}: holds no {CONFIG}")
    return config, transformer_of(config, model.shapes())


def check_config(folder: Folder, source: Source) -> None:
    """Refuses a folder whose config has other sizes than its tensors.

    Raises:
        InvalidSpec: The folder has no config, or that of an unknown architecture.
        InvalidStateDict: The config is that of another model.
    """
    config, model = transformer_in(folder, source)
    layers = model.stored_layers()
    fitted = _expressed(folder, config, source.shapes(), {}) if layers == model.layers else config
    wrong = [line for line in _changes(config, fitted) if ": None -> " not in line]
    if layers != model.layers:
        wrong.append(f"{model.architecture.keys.layers}: {model.layers} -> {layers}")
    if wrong:
        raise InvalidStateDict(
            f"{folder.path / CONFIG}: is not the config of these tensors: {wrong[0]} would be"
        )


def with_inner(
    folder: Folder, config: Config, model: Transformer, changed: Config, note: str
) -> Folder:
    """Returns a folder with another config.

    Args:
        folder: The folder.
        config: Its config.
        model: The transformer that the config describes.
        changed: New values in the config of the transformer itself.
        note: What was done to the model, for its card.
    """
    inside = model.architecture.inside
    inner = {**model.config, **changed}
    text = _text({**config, inside: inner} if inside else inner)
    return replace(folder, changed={**folder.changed, CONFIG: text}, notes=(*folder.notes, note))


def folder_without_layers(
    folder: Folder, config: Config, model: Transformer, removed: Collection[int]
) -> Folder:
    """Returns the folder of a model without some layers.

    Raises:
        InvalidStateDict: What a layer computes depends on its number.
    """
    architecture, inner = model.architecture, model.config
    if inner.get("scale_attn_by_inverse_layer_idx"):
        raise InvalidStateDict(
            f"{CONFIG}: scale_attn_by_inverse_layer_idx: what a layer computes depends on its "
            "number, so none can be removed"
        )
    kept = [layer for layer in range(model.layers) if layer not in removed]
    changed: dict[str, Any] = {architecture.keys.layers: len(kept)}
    if architecture.layer_types is not None:
        types = inner.get("layer_types") or architecture.layer_types(inner, model.layers)
        if not isinstance(types, list) or len(types) != model.layers:
            raise InvalidStateDict(
                f"{CONFIG}: layer_types: {shown(types)} is not a list of {model.layers} types"
            )
        changed["layer_types"] = [types[layer] for layer in kept]
    if model.layout.experts is not None and model.layout.mlp is not None:
        dense = [new for new, layer in enumerate(kept) if not model.has_experts(layer)]
        changed |= {"mlp_only_layers": dense, "decoder_sparse_step": 1}
    listed = ", ".join(map(str, sorted(removed)))
    note = f"{len(removed)} of {model.layers} layers removed: {listed}"
    return with_inner(folder, config, model, changed, note)


def _shapes(entries: Entries) -> Shapes:
    """The shapes of tensors; a pair is its X."""
    found = {name: entry.shape for name, entry in entries.items() if isinstance(entry, LocalTensor)}
    bases = {name.removesuffix("_mask") for name in found if name.endswith("_mask")}
    pairs = {base for base in bases if f"{base}_orig" in found}
    shapes = {name: shape for name, shape in found.items() if _base(name) not in pairs}
    return shapes | {base: found[f"{base}_orig"] for base in pairs}


def _base(name: str) -> str:
    return name.removesuffix("_orig").removesuffix("_mask")


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Returns a line for each size that differs between two configs."""
    lines = []
    for key, value in after.items():
        if isinstance(value, Mapping):
            lines += _changes(before.get(key) or {}, value)
        elif before.get(key) != value:
            lines.append(f"{key}: {before.get(key)} -> {value}")
    return lines


def _config_of(folder: Folder) -> dict[str, Any] | None:
    text = folder.text(CONFIG)
    try:
        return None if text is None else parse_config(text)
    except ValueError as error:
        raise InvalidStateDict(f"{folder.path / CONFIG}: {error}") from None


def _expressed(folder: Folder, config: Config, shapes: Shapes, removed: Removed) -> dict[str, Any]:
    try:
        return fitted_config(config, shapes, removed)
    except InvalidSpec as error:
        raise InvalidStateDict(
            f"{folder.path}: {error}; no {CONFIG} can be written for the new sizes: save a "
            ".safetensors file"
        ) from None


def _text(config: Mapping[str, Any]) -> str:
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def _card(before: str | None, notes: Collection[str]) -> str:
    """A model card with a section that says what was done."""
    lines = "\n".join(f"- {note}" for note in notes)
    section = f"## Shrunk with secateur {VERSION}\n\nRemoved from the model:\n\n{lines}\n"
    return section if not before else f"{before.rstrip()}\n\n{section}"
