"""Tied weights: one tensor under several names, of which a file stores one.

safetensors.torch.save_model writes the other names into the file's metadata, from each to the name
that is stored: {"head.weight": "embed.weight"}. Both ends read and write them with these functions.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

_ORIG, _MASK = "_orig", "_mask"

# transformers refuses files without this metadata. It is not a tie, even of a tensor `pt`.
FORMAT = ("format", "pt")


@dataclass(frozen=True)
class Ties:
    """The other names of a model's tensors. A pair X_orig, X_mask is the tensor X.

    names: From each other name to the tensor's.
    masks: Masks that are stored under another name of a tensor, by the tensor's name. A file has
        them where a module was pruned under several names of one weight: they hold together.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    masks: Mapping[str, list[str]] = field(default_factory=dict)


def read_ties(metadata: Mapping[str, str], stored: Collection[str]) -> Ties:
    """Finds the other names in a file's metadata.

    Args:
        metadata: Of the file. An entry that names no tensor of the file is not a tie.
        stored: The names of the file's tensors.

    Returns:
        Ties. A name that a tensor of the file has is not another name of a second one.
    """
    names: dict[str, str] = {}
    masks: dict[str, list[str]] = {}
    for key, value in metadata.items():
        if (key, value) == FORMAT:
            continue
        tensor = _tensor(value, stored)
        if tensor is None:
            continue
        base = key.removesuffix(_ORIG)
        has_mask = base != key and base + _MASK in stored
        other = base if has_mask or value == tensor + _ORIG else key
        is_pair = other + _ORIG in stored and other + _MASK in stored
        if key in stored or other in stored or is_pair:
            continue
        names[other] = tensor
        if has_mask:
            masks.setdefault(tensor, []).append(base + _MASK)
    return Ties(names, masks)


def _tensor(value: str, stored: Collection[str]) -> str | None:
    """The tensor that a stored name, or the name of a pair, stands for; None for the mask."""
    base = value.removesuffix(_ORIG)
    if base != value and value in stored and base + _MASK in stored:
        return base
    if value.endswith(_MASK) and value.removesuffix(_MASK) + _ORIG in stored:
        return None
    return value if value in stored or value + _ORIG in stored else None


def write_ties(metadata: Mapping[str, str], ties: Ties) -> dict[str, str]:
    """The metadata with each other name once, as that of the tensor X, whether X is a pair or not.

    Args:
        metadata: What `ties` were read from.
        ties: The ties.
    """
    old = {*ties.names, *(name + _ORIG for name in ties.names), *(n + _MASK for n in ties.names)}
    return {key: value for key, value in metadata.items() if key not in old} | dict(ties.names)
