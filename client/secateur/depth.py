"""Removes whole layers of a stack from a model: the others are numbered anew."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from secateur.checks import integers, shown, text
from secateur.errors import InvalidSpec
from secateur.model import Source
from secateur.shards import Index
from secateur.source import read_source
from secateur.tensors import LocalTensor, to_value
from secateur.ties import each_once, tied, untie
from secateur_proto.ties import write_ties

# The first component that is a number, with another one after it.
_NUMBERED = re.compile(r"((?:[^.]+\.)*?)(\d+)\.")


def depth(
    source: Any, layers: Iterable[int], stack: str | None = None, key: str | None = None
) -> dict[str, Any]:
    """Removes whole layers of a stack, and numbers the others anew.

    The result fits a model with fewer layers, as a smaller `num_hidden_layers` of its config makes
    it. Nothing is copied.

    Args:
        source: See `Client`; not a model on the server.
        layers: The layers to remove, by number; the first one is 0.
        stack: The list of layers, as the names of tensors begin: "model.layers". None if the model
            has one such list only.
        key: See `Client`.

    Returns:
        The state_dict of the smaller model.

    Raises:
        InvalidSpec: The stack or a layer does not exist.
    """
    model = read_source(source, key)
    if not model.is_here:
        raise InvalidSpec("source: the model is on the server; download it first")
    smaller = without_layers(model, layers, stack)
    entries = tied({**smaller.tensors, **smaller.others}, smaller.other_names)
    places = smaller.places()
    ordered = {n: entries[n] for n in sorted(entries, key=lambda n: places.get(n, len(places)))}

    def value(name: str, entry: Any) -> Any:
        is_sent = isinstance(entry, LocalTensor)
        return to_value(name, entry, smaller.as_torch) if is_sent else entry

    return each_once(value, ordered)


def without_layers(model: Source, layers: Iterable[int], stack: str | None = None) -> Source:
    """Returns a model without some layers of a stack; see `depth`."""
    entries = tied(model.tensors, model.other_names)
    numbering = _numbering([*entries, *model.others], layers, stack)
    first: dict[int, str] = {}  # by the identity of a tensor, its first name
    tensors, shared = {}, {}
    for name, tensor in numbering.applied(entries).items():
        tensors[name] = tensor
        kept = first.setdefault(id(tensor), name)
        if kept != name:
            shared[name] = kept
    tensors, ties = untie(tensors, shared)
    known = {*entries, *model.other_names}
    return replace(
        model,
        tensors=tensors,
        parameters=frozenset(numbering.applied(dict.fromkeys(model.parameters))),
        metadata=write_ties({k: v for k, v in model.metadata.items() if k not in known}, ties),
        paths=(),
        index=None if model.index is None else _renamed(model.index, numbering, known),
        others=numbering.applied(model.others),
        order=tuple(numbering.applied(dict.fromkeys(model.order))),
    )


def renumbered(entries: Mapping[str, Any], kept: Sequence[int], stack: str) -> dict[str, Any]:
    """Returns entries of some layers of a stack, numbered anew, and all that are not in it.

    Args:
        entries: By the names of tensors.
        kept: The layers to keep.
        stack: What the names of their tensors begin with, without a dot at the end.
    """
    return _Numbering(f"{stack}.", {old: new for new, old in enumerate(kept)}).applied(entries)


def _renamed(index: Index, numbering: "_Numbering", known: set[str]) -> Index:
    """The index with the new names, and without the ties that its files note."""
    metadata = {
        file: {key: value for key, value in of_file.items() if key not in known}
        for file, of_file in index.metadata.items()
    }
    return replace(index, files=numbering.applied(index.files), metadata=metadata)


@dataclass(frozen=True)
class _Numbering:
    """New numbers of the layers of a stack.

    Attributes:
        stack: What the names of its tensors begin with, with a dot at the end if it is not empty.
        numbers: The new number of each layer that is kept, by its old one.
    """

    stack: str
    numbers: Mapping[int, int]

    def applied(self, entries: Mapping[str, Any]) -> dict[str, Any]:
        """Renames entries, and leaves out those of the removed layers."""
        named = ((self._new(name), value) for name, value in entries.items())
        return {name: value for name, value in named if name is not None}

    def _new(self, name: str) -> str | None:
        number = layer_of(name, self.stack)
        if number is None:
            return name
        if number not in self.numbers:
            return None
        rest = name[len(self.stack) :].partition(".")[2]
        return f"{self.stack}{self.numbers[number]}.{rest}"


def layer_of(name: str, stack: str) -> int | None:
    """Returns the number of the layer that a tensor belongs to; None if it is not in the stack."""
    if not name.startswith(stack):
        return None
    number, dot, _ = name[len(stack) :].partition(".")
    return int(number) if dot and number.isdecimal() else None


def _numbering(names: list[str], layers: Iterable[int], stack: str | None) -> _Numbering:
    at = _only_stack(names) if stack is None else f"{text('stack', stack)}."
    found = {number for number in (layer_of(name, at) for name in names) if number is not None}
    if not found:
        raise InvalidSpec(f"stack: no tensor has a name such as {shown(at + '0.weight')}")
    count, removed = max(found) + 1, set(integers("layers", layers))
    if removed and max(removed) >= count:
        raise InvalidSpec(
            f"layers: {max(removed)} is outside [0, {count}), the layers of {at[:-1]}"
        )
    if len(removed) == count:
        raise InvalidSpec(f"layers: all {count} layers of {at[:-1]} are named; keep one")
    kept = [number for number in range(count) if number not in removed]
    return _Numbering(at, {old: new for new, old in enumerate(kept)})


def _only_stack(names: list[str]) -> str:
    matches = (_NUMBERED.match(name) for name in names)
    stacks = {match[1] for match in matches if match}
    if len(stacks) != 1:
        listed = ", ".join(sorted(stack.rstrip(".") or "''" for stack in stacks)) or "none"
        raise InvalidSpec(f"stack: the model has these lists of layers: {listed}; name one")
    return stacks.pop()
