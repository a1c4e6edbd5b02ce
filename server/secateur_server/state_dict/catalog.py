"""The tensors of a state_dict, known from headers, and those that names and globs mean."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property

import torch

from secateur_server.backends.dtypes import PRUNABLE
from secateur_server.errors import (
    InvalidPair,
    NotPrunable,
    UnknownTensor,
    quote,
)
from secateur_server.runtime.context import RequestContext
from secateur_server.state_dict.globs import is_glob, matches

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Stored:
    """A tensor of a file.

    Attributes:
        dtype_name: As the file has it.
        dtype: None if torch does not have it.
        shape: Of the tensor.
    """

    dtype_name: str
    dtype: torch.dtype | None
    shape: Shape


@dataclass(frozen=True)
class Catalog:
    """The tensors of a state_dict.

    Attributes:
        stored: All tensors, by their names in the files.
        extras: Uploaded scores and masks, which are not part of the state_dict.
        prunable: The shapes of the tensors that can be pruned, in the order of the files. A pair is
            one tensor.
        floating: The prunable tensors that globs may mean: those without integers.
        pairs: The names of the weight and the masks of each prunable tensor that came as a pair. A
            tied tensor may have a mask for each of its names; an element is kept if all keep it.
        other_names: From each other name of a tied tensor to its name here. A request may use any.
    """

    stored: Mapping[str, Stored]
    extras: Mapping[str, Stored]
    prunable: dict[str, Shape]
    floating: list[str]
    pairs: dict[str, tuple[str, ...]]
    other_names: Mapping[str, str] = field(default_factory=dict)

    def name_of(self, name: str) -> str:
        """Returns a tensor's name here for any of its names. An unknown name is unchanged."""
        return self.other_names.get(name, name)

    def shape_of(self, name: str) -> Shape:
        """Returns the shape of a tensor that can be pruned, or of another one of the files."""
        shape = self.prunable.get(name)
        return self.stored[name].shape if shape is None else shape

    def shape_of_other(self, name: str) -> Shape | None:
        """Returns the shape of a tensor that cannot be pruned; None if there is none.

        Masks of pairs, and tensors of dtypes that torch does not have, are no such tensors.
        """
        tensor = self.stored.get(name)
        if tensor is None or tensor.dtype is None or name in self._of_pairs:
            return None
        return tensor.shape

    def all_names(self, names: Sequence[str]) -> dict[str, str]:
        """Maps every name of some tensors to their names here."""
        known = {name: name for name in names}
        tied = {other: name for other, name in self.other_names.items() if name in known}
        return known | tied

    def in_order(self, names: Iterable[str]) -> list[str]:
        """Sorts prunable tensors in the order of the files."""
        return sorted(names, key=self._places.__getitem__)

    @cached_property
    def names_of_prunable(self) -> Mapping[str, str]:
        """From every name of a prunable tensor to its name here."""
        return self.all_names(list(self.prunable))

    @cached_property
    def names_of_floating(self) -> Mapping[str, str]:
        """From every name of a tensor that globs may mean to its name here."""
        return self.all_names(self.floating)

    @cached_property
    def _of_pairs(self) -> set[str]:
        return {stored for pair in self.pairs.values() for stored in pair}

    @cached_property
    def _places(self) -> Mapping[str, int]:
        return {name: place for place, name in enumerate(self.prunable)}


def read_catalog(
    stored: Mapping[str, Stored],
    extras: Mapping[str, Stored],
    other_names: Mapping[str, str] | None = None,
    other_masks: Mapping[str, Sequence[str]] | None = None,
) -> Catalog:
    """Finds pairs as torch.nn.utils.prune writes them, and the tensors that can be pruned.

    Args:
        stored: The tensors of the files.
        extras: Uploaded scores and masks.
        other_names: As Catalog.other_names.
        other_masks: Masks that are stored under other names of a tied tensor, by its name here.

    Returns:
        The catalog.

    Raises:
        InvalidPair: A mask does not fit its weight.
    """
    pairs = _pairs(stored, other_masks or {})
    whole = {pair[0]: base for base, pair in pairs.items()}
    pair_masks = {mask for _, *masks in pairs.values() for mask in masks}
    prunable = {
        whole.get(name, name): stored[name].shape
        for name in stored
        if stored[name].dtype in PRUNABLE and name not in pair_masks
    }
    origs = {name: pairs.get(name, (name,))[0] for name in prunable}
    floating = [name for name, orig in origs.items() if _is_floating(stored[orig])]
    return Catalog(stored, extras, prunable, floating, pairs, other_names or {})


def _pairs(
    stored: Mapping[str, Stored], other_masks: Mapping[str, Sequence[str]]
) -> dict[str, tuple[str, ...]]:
    """Finds the pairs, as Catalog.pairs. Raises InvalidPair."""
    pairs: dict[str, tuple[str, ...]] = {}
    for name in stored:
        base, dtype = name.removesuffix("_orig"), stored[name].dtype
        mask = f"{base}_mask"
        if base != name and mask in stored and dtype in PRUNABLE:
            try:
                _check_pair(base, stored)
            except InvalidPair:
                if dtype.is_floating_point:  # integers may have such names for other reasons
                    raise
            else:
                pairs[base] = (name, mask)
    for name, masks in other_masks.items():
        pair = (*pairs.get(name, (name,)), *masks)
        if pair[0] in stored and stored[pair[0]].dtype in PRUNABLE:
            for mask in masks:
                _check_mask(mask, pair[0], stored)
            pairs[name] = pair
    return pairs


def _is_floating(tensor: Stored) -> bool:
    return tensor.dtype is not None and tensor.dtype.is_floating_point


def _check_pair(base: str, stored: Mapping[str, Stored]) -> None:
    """Raises InvalidPair if X_orig and X_mask are not a pair."""
    mask = f"{base}_mask"
    if base == "__metadata__":  # a reserved key of safetensors headers
        raise InvalidPair(f"data[{quote(mask)}]", "its tensor would be '__metadata__'; rename it")
    if base in stored:
        raise InvalidPair(
            f"data[{quote(base)}]", "the data also has its pair of _orig and _mask; send only one"
        )
    _check_mask(mask, f"{base}_orig", stored)


def _check_mask(name: str, orig: str, stored: Mapping[str, Stored]) -> None:
    """Raises InvalidPair if a mask does not fit its weight."""
    mask, shape, field = stored[name], stored[orig].shape, f"data[{quote(name)}]"
    if mask.shape != shape:
        raise InvalidPair(field, f"has shape {list(mask.shape)}, its _orig has {list(shape)}")
    if mask.dtype is None:
        raise InvalidPair(field, f"has dtype {mask.dtype_name}, which is not one of a mask")


def match(
    context: RequestContext, field: str, patterns: Sequence[str], catalog: Catalog
) -> list[str]:
    """Finds the prunable tensors that names and globs mean.

    A name means a tensor of any dtype that can be pruned. A glob means floating tensors only.

    Args:
        context: The request.
        field: The path of `patterns` in the request.
        patterns: Names and globs.
        catalog: Of the state_dict.

    Returns:
        Names in the order of the files.

    Raises:
        UnknownTensor: A pattern matches no tensor.
        NotPrunable: A name is of a tensor that cannot be pruned.
    """
    found = matches(context, field, patterns, catalog.names_of_prunable, catalog.names_of_floating)
    if found.unmatched is not None:
        index = found.unmatched
        raise unmatched(context, f"{field}[{index}]", patterns[index], catalog)
    return catalog.in_order(found.first)


def unmatched(
    context: RequestContext, field: str, name: str, catalog: Catalog
) -> NotPrunable | UnknownTensor:
    """Makes the error that says why a name matches no tensor that can be pruned.

    Args:
        context: The request.
        field: The path of the name.
        name: A name or a glob.
        catalog: Of the state_dict.

    Returns:
        The error, with advice.
    """
    if name in {**catalog.stored, **catalog.extras} and name not in catalog.pairs:
        return NotPrunable(
            field, f"{quote(name)} cannot be pruned: {_why_not_prunable(name, catalog)}"
        )
    candidates = catalog.floating if is_glob(name) else list(catalog.prunable)
    advice = _integer_advice(context, field, name, catalog) or _nearest(name, candidates)
    return UnknownTensor(field, f"{quote(name)} matches no floating tensor; {advice}")


def _nearest(name: str, names: Sequence[str]) -> str:
    """Advice: the names that are most like `name`, or else the first ones."""
    if not names:
        return "the data has no floating tensor"
    some = [known for known in names[:1000] if len(known) <= 80]  # long names take long to compare
    if close := get_close_matches(name[:80], some, n=3, cutoff=0.4):
        return f"nearest: {', '.join(map(quote, close))}"
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    return f"the tensors are: {', '.join(map(quote, names[:3]))}{more}"


def _integer_advice(context: RequestContext, field: str, glob: str, catalog: Catalog) -> str | None:
    """Advice for a glob that matches integers; None if it matches none."""
    found = catalog.in_order(matches(context, field, [glob], catalog.names_of_prunable).first)
    if not found:
        return None
    orig = catalog.pairs.get(found[0], found)[0]
    more = f" (and {len(found) - 1:,} more)" if len(found) > 1 else ""
    return (
        f"{quote(found[0])}{more} is {catalog.stored[orig].dtype_name}: "
        "a tensor of integers must be named exactly"
    )


def _why_not_prunable(name: str, catalog: Catalog) -> str:
    if any(name in pair for pair in catalog.pairs.values()):
        return f"it is half of the pair of {quote(name.rsplit('_', 1)[0])}"
    if name in catalog.extras:
        return "it holds scores or a mask"
    return f"its dtype is {catalog.stored[name].dtype_name}"
