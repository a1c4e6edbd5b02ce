"""Tied weights of a state_dict: the same memory under several names."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from secateur.errors import InvalidStateDict
from secateur.places import Place, overlap
from secateur.tensors import Bytes, LocalTensor, prior_mask, to_value
from secateur_proto.ties import Ties, read_ties

Made = TypeVar("Made")
Value = TypeVar("Value")

_ORIG, _MASK = "_orig", "_mask"


def shared_names(tensors: Mapping[str, LocalTensor]) -> dict[str, str]:
    """Finds tensors that are the same memory with the same shape and strides.

    Args:
        tensors: In the state_dict's order.

    Returns:
        From each other name to the first one.

    Raises:
        InvalidStateDict: A floating tensor shares some elements with another tensor, but not all:
            pruning one would prune a part of the other.
    """
    first: dict[Place, str] = {}
    shared = {}
    for name, tensor in tensors.items():
        if tensor.place is not None:
            kept = first.setdefault(tensor.place, name)
            if kept != name:
                shared[name] = kept
    _refuse_overlaps(first, tensors)
    return shared


def _refuse_overlaps(first: Mapping[Place, str], tensors: Mapping[str, LocalTensor]) -> None:
    before: list[Place] = []
    for place in sorted(first, key=lambda place: (place.device, place.begin)):
        before = [p for p in before if p.device == place.device and p.end > place.begin]
        for other in before:
            names = first[other], first[place]
            if any(tensors[name].kind == "floating" for name in names) and overlap(other, place):
                raise InvalidStateDict(
                    f"{names[0]} and {names[1]} are views that overlap in memory, and not the same "
                    f"view; give {names[1]} memory of its own: its clone(), or copy() of an array"
                )
        before.append(place)


def untie(
    tensors: Mapping[str, LocalTensor], shared: Mapping[str, str]
) -> tuple[dict[str, LocalTensor], Ties]:
    """Keeps each tensor with several names once, under the first of them.

    A weight that is pruned under several names has several masks; they are merged.

    Args:
        tensors: In the state_dict's order.
        shared: From each other name, as the state_dict has it, to the name to keep.

    Returns:
        The tensors in their order, and the other names; a pair X_orig, X_mask is X.

    Raises:
        InvalidStateDict: Masks of one weight have several shapes, or another tensor has the name
            that the weight's mask needs.
    """
    shared = {
        other: name for other, name in shared.items() if not _is_lone_mask(other, shared, tensors)
    }
    kept, ties = _kept(tensors, shared)
    merged = {mask for masks in ties.masks.values() for mask in masks}
    untied: dict[str, LocalTensor] = {}
    for name, tensor in kept.items():
        if name in ties.masks:  # pruned under another name alone
            _check_free(name, kept)
            untied[name + _ORIG] = tensor
            untied[name + _MASK] = _merged([kept[mask] for mask in ties.masks[name]], name)
        elif name.removesuffix(_MASK) in ties.masks:
            base = name.removesuffix(_MASK)
            masks = [tensor, *(kept[mask] for mask in ties.masks[base])]
            untied[name] = _merged(masks, base)
        elif name not in merged:
            untied[name] = tensor
    return untied, Ties(ties.names)


def _is_lone_mask(name: str, shared: Mapping[str, str], tensors: Mapping[str, LocalTensor]) -> bool:
    """Whether a mask shares memory with another mask, but their weights do not."""
    orig = name.removesuffix(_MASK) + _ORIG
    if not name.endswith(_MASK) or orig not in tensors:
        return False
    return shared.get(orig) != shared[name].removesuffix(_MASK) + _ORIG


def _kept(
    tensors: Mapping[str, LocalTensor], shared: Mapping[str, str]
) -> tuple[dict[str, LocalTensor], Ties]:
    """The tensors without the other names, and the ties; no tensor is lost between them."""
    while True:
        kept = {name: tensor for name, tensor in tensors.items() if name not in shared}
        ties = read_ties(shared, kept)
        found = {name: first for name, first in shared.items() if _is_tie(name, ties, shared)}
        if len(found) == len(shared):
            return kept, ties
        shared = found


def _is_tie(name: str, ties: Ties, shared: Mapping[str, str]) -> bool:
    """Whether the ties have a name: itself, or the X of which it is X_orig or X_mask."""
    if name in ties.names:
        return True
    base = name.removesuffix(_ORIG if name.endswith(_ORIG) else _MASK)
    return base in ties.names and base not in shared and base + _ORIG in shared


def _check_free(name: str, kept: Collection[str]) -> None:
    for half in (name + _ORIG, name + _MASK):
        if half in kept:
            raise InvalidStateDict(
                f"{half}: {name} is pruned under another name, and its pair needs this name; "
                "rename the tensor"
            )


def _merged(masks: Sequence[LocalTensor], name: str) -> LocalTensor:
    """One mask that keeps the elements that all masks of a weight keep."""
    shapes = {mask.shape for mask in masks}
    if len(shapes) > 1:
        raise InvalidStateDict(f"{name}: its masks have the shapes {sorted(map(list, shapes))}")

    def read() -> Bytes:
        kept = prior_mask(masks[0])
        for mask in masks[1:]:
            kept &= prior_mask(mask)
        return kept.view(np.uint8)

    return masks[0] if len(masks) == 1 else LocalTensor("BOOL", masks[0].shape, read)


def tied(tensors: Mapping[str, Value], other_names: Mapping[str, str]) -> dict[str, Value]:
    """Returns tensors under all their names, the other names last; also both halves of a pair."""
    found = dict(tensors)
    for other, name in other_names.items():
        for part in ("",) if name in tensors else (_ORIG, _MASK):
            if name + part in tensors:
                found[other + part] = tensors[name + part]
    return found


def once(entries: Mapping[str, Value]) -> dict[str, Value]:
    """Returns each entry under the first of its names: without those that `tied` added."""
    return {name: entry for entry, name in _first_names(entries)}


def each_once(make: Callable[[str, Value], Made], entries: Mapping[str, Value]) -> dict[str, Made]:
    """Calls `make` for each entry; for a tied one once, and the result is one object."""
    made = {id(entry): make(name, entry) for entry, name in _first_names(entries)}
    return {name: made[id(entry)] for name, entry in entries.items()}


def values_of(entries: Mapping[str, Any], as_torch: bool) -> dict[str, Any]:
    """Returns tensors of torch, or arrays; other entries as they are, and tied ones as one object.

    Raises:
        SecateurError: The installed torch, or numpy, has no such dtype.
    """

    def value(name: str, entry: Any) -> Any:
        return to_value(name, entry, as_torch) if isinstance(entry, LocalTensor) else entry

    return each_once(value, entries)


def _first_names(entries: Mapping[str, Value]) -> list[tuple[Value, str]]:
    first: dict[int, tuple[Value, str]] = {}
    for name, entry in entries.items():
        first.setdefault(id(entry), (entry, name))
    return list(first.values())
