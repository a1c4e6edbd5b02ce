"""Which tensors there are, and which of them a request means; known before their data is here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase

import torch

from secateur_server.devices.watch import watch
from secateur_server.errors import (
    DimOutOfRange,
    InvalidMask,
    InvalidPair,
    InvalidScores,
    NotPrunable,
    NotStructured,
    UnknownTensor,
    quote,
)
from secateur_server.pruning.spec import PRUNABLE, CustomMasks, Magnitude, Rule, Selection, Slice

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Stored:
    """A tensor of the file. dtype: None where torch has none for what the file `calls` it."""

    calls: str
    dtype: torch.dtype | None
    shape: Shape


@dataclass(frozen=True)
class Catalog:
    """The tensors of a state_dict.

    stored: what the model has.  extras: tensors with scores and masks, which are no part of it.
    prunable: the shapes of what can be pruned, a pair as one, in the
    file's order.  pairs: those of them that arrived as (X_orig, X_mask).
    """

    stored: Mapping[str, Stored]
    extras: Mapping[str, Stored]
    prunable: dict[str, Shape]
    pairs: dict[str, tuple[str, str]]


def read_catalog(stored: Mapping[str, Stored], extras: Mapping[str, Stored]) -> Catalog:
    """Finds the pairs that torch.nn.utils.prune writes, and what can be pruned.

    Errors: InvalidPair.
    """
    pairs: dict[str, tuple[str, str]] = {}
    for name in stored:
        base = name.removesuffix("_orig")
        mask = f"{base}_mask"
        if base != name and mask in stored and stored[name].dtype in PRUNABLE:
            _check_pair(base, stored)
            pairs[base] = (name, mask)
    whole = {orig: base for base, (orig, _) in pairs.items()}
    masks = {mask for _, mask in pairs.values()}
    prunable = {
        whole.get(name, name): stored[name].shape
        for name in stored
        if stored[name].dtype in PRUNABLE and name not in masks
    }
    return Catalog(stored, extras, prunable, pairs)


def _check_pair(base: str, stored: Mapping[str, Stored]) -> None:
    orig, mask = stored[f"{base}_orig"], stored[f"{base}_mask"]
    field = f"data[{quote(f'{base}_mask')}]"
    if base == "__metadata__":  # in a safetensors file that is no tensor
        raise InvalidPair(field, "is half of a pair whose name no tensor can have")
    if base in stored:
        raise InvalidPair(f"data[{quote(base)}]", "is there beside its pair of _orig and _mask")
    if mask.shape != orig.shape:
        raise InvalidPair(field, f"has shape {list(mask.shape)}, its _orig has {list(orig.shape)}")
    if mask.dtype is None:
        raise InvalidPair(field, f"has dtype {mask.calls}, which no mask has")


def match(field: str, patterns: Sequence[str], catalog: Catalog) -> list[str]:
    """The prunable tensors that any of `patterns` means, in their order.

    field: the path of the field with the patterns.  Errors: UnknownTensor, NotPrunable.
    """
    found: set[str] = set()
    tried: set[str] = set()
    for index, pattern in enumerate(patterns):
        if pattern in tried:
            continue
        watch().check()  # of many patterns, and many tensors, each takes its time
        tried.add(pattern)
        if pattern in catalog.prunable:  # a name first: it may have brackets in it
            found.add(pattern)
            continue
        # A longer one is no glob that a person wrote, and takes long to try.
        is_glob = len(pattern) <= 1000
        matched = [name for name in catalog.prunable if is_glob and fnmatchcase(name, pattern)]
        if not matched:
            raise _unmatched(f"{field}[{index}]", pattern, catalog)
        found.update(matched)
    return [name for name in catalog.prunable if name in found]


def _unmatched(field: str, name: str, catalog: Catalog) -> NotPrunable | UnknownTensor:
    if name in {**catalog.stored, **catalog.extras} and name not in catalog.pairs:
        return NotPrunable(field, f"{quote(name)} cannot be pruned: {_nature(name, catalog)}")
    names = list(catalog.prunable)
    some = [known for known in names[:1000] if len(known) <= 80]  # comparing takes long
    close = get_close_matches(name[:80], some, n=3, cutoff=0.4)
    shown = "nearest" if close else "there are" if names else "there is none"
    listed = ", ".join(quote(known) for known in close or names[:3])
    return UnknownTensor(field, f"{quote(name)} matches no floating tensor; {shown}: {listed}")


def _nature(name: str, catalog: Catalog) -> str:
    if any(name in pair for pair in catalog.pairs.values()):
        return f"it is half of the pair of {quote(name.rsplit('_', 1)[0])}"
    if name in catalog.extras:
        return "it holds scores or a mask"
    return f"its dtype is {catalog.stored[name].calls}"


def resolve(rules: Sequence[Rule], catalog: Catalog) -> list[Rule]:
    """The rules with their globs replaced by names, once they are found to fit the tensors.

    Errors: InvalidSpec.
    """
    return [
        _resolve_masks(rule, catalog)
        if isinstance(rule, CustomMasks)
        else _resolve_selection(rule, catalog)
        for rule in rules
    ]


def _resolve_selection(rule: Selection, catalog: Catalog) -> Selection:
    names = match(f"{rule.path}.tensors", rule.tensors, catalog)
    for name in names:
        if isinstance(rule.granularity, Slice):
            _check_slices(rule, rule.granularity.dim, name, catalog.prunable[name])
    for name, holder in rule.scores.items():
        field = f"{rule.path}.importance_scores[{quote(name)}]"
        if name not in names:
            raise UnknownTensor(field, "the rule prunes no such tensor")
        scores = _extra(field, holder, catalog)
        if scores.shape != catalog.prunable[name] or scores.dtype not in PRUNABLE:
            raise InvalidScores(field, _unlike(scores, catalog.prunable[name], "floating scores"))
    return replace(rule, tensors=tuple(names))


def _check_slices(rule: Selection, dim: int, name: str, shape: Shape) -> None:
    field = f"{rule.path}.dim"
    if len(shape) < 2:
        raise NotStructured(
            field, f"{quote(name)} has shape {list(shape)}; slices need 2 dimensions or more"
        )
    if not -len(shape) <= dim < len(shape):
        raise DimOutOfRange(
            field, f"{dim} is not in [{-len(shape)}, {len(shape)}) of {quote(name)} {list(shape)}"
        )
    if rule.importance == Magnitude("nuc") and len(shape) != 3:
        raise NotStructured(
            f"{rule.path}.magnitude.matrix_norm",
            f"the nuclear norm needs 3 dimensions, {quote(name)} has shape {list(shape)}",
        )


def _resolve_masks(rule: CustomMasks, catalog: Catalog) -> CustomMasks:
    for name, holder in rule.masks.items():
        field = f"{rule.path}.masks[{quote(name)}]"
        if name not in catalog.prunable:
            raise _unmatched(field, name, catalog)
        mask = _extra(field, holder, catalog)
        if mask.shape != catalog.prunable[name] or mask.dtype is None:
            raise InvalidMask(field, _unlike(mask, catalog.prunable[name], "a mask"))
    return rule


def _extra(field: str, holder: str, catalog: Catalog) -> Stored:
    if holder not in catalog.extras:
        raise UnknownTensor(field, f"the data has no tensor {quote(holder)}")
    return catalog.extras[holder]


def _unlike(extra: Stored, shape: Shape, what: str) -> str:
    return f"{what} of shape {list(shape)} needed, got {extra.calls} of shape {list(extra.shape)}"
