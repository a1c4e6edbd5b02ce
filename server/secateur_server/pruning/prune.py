"""Applies a spec: rule after rule, each among what the ones before left."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur_server.devices import passes_of
from secateur_server.devices.watch import watch
from secateur_server.errors import AmountOutOfRange, InvalidMask, quote
from secateur_server.pruning.masks import Mask, mask_of
from secateur_server.pruning.score import Ranking, rank
from secateur_server.pruning.select import score_dtype, select, threshold
from secateur_server.pruning.spec import CustomMasks, Parameter, Random, Rule, Selection

Masks = dict[str, Mask]


@dataclass(frozen=True)
class Choice:
    """What one choice among `candidates` units came to. The fields are the report's."""

    tensors: tuple[str, ...]
    candidates: int
    requested: int
    pruned: int
    threshold: float | None = None
    ties: int = 0
    ties_pruned: int = 0


def prune(
    parameters: Mapping[str, Parameter],
    rules: Sequence[Rule],
    extras: Mapping[str, Tensor],
) -> tuple[dict[str, Parameter], list[list[Choice]]]:
    """Applies `rules` in order, with the semantics of torch.nn.utils.prune.PruningContainer.

    parameters: in the state_dict's order, never changed.  rules: resolved.
    extras: uploaded scores and masks, by the names of the tensors that hold them.
    Returns: the parameters that a rule named, with their new masks, in the same order; and for
        each rule its choices.
    Errors: InvalidSpec.
    """
    state = dict(parameters)
    outcomes = []
    touched: set[str] = set()
    for rule in rules:
        if isinstance(rule, CustomMasks):
            masks, choices = _apply_masks(rule, state, extras)
        else:
            masks, choices = _apply_selection(rule, state, extras)
        for name, mask in masks.items():
            state[name] = Parameter(state[name].weight, mask, state[name].seen)
        touched.update(masks)
        outcomes.append(choices)
    return {name: state[name] for name in parameters if name in touched}, outcomes


def _apply_masks(
    rule: CustomMasks, state: Mapping[str, Parameter], extras: Mapping[str, Tensor]
) -> tuple[Masks, list[Choice]]:
    masks: Masks = {}
    choices = []
    for name, holder in rule.masks.items():
        field = f"{rule.path}.masks[{quote(name)}]"
        asked = to_mask(extras[holder], InvalidMask, field)
        before = state[name].mask
        masks[name] = asked if before is None else asked & before
        candidates = asked.elements if before is None else before.kept
        requested = asked.elements - asked.kept
        choices.append(Choice((name,), candidates, requested, candidates - masks[name].kept))
    return masks, choices


def to_mask(values: Tensor, error: type[Exception], field: str) -> Mask:
    """A mask of 0 and 1.

    error: what to raise, with the field and a message, for any other value.
    """
    shape = values.shape
    values = values.reshape(-1)
    if values.dtype == torch.bool:  # torch takes any byte for one
        values = values.view(torch.uint8)

    def flags(begin: int, end: int) -> Tensor:
        part = values[begin:end]
        kept = part != 0
        other = kept & (part != 1)
        if bool(other.any()):
            at = begin + int(other.nonzero()[0])
            index = [int(place) for place in torch.unravel_index(torch.tensor(at), shape)]
            raise error(field, f"is {values[at].item()} at {index}; a mask is 0 or 1")
        return kept

    return mask_of(flags, len(values), values.device)


def _apply_selection(
    rule: Selection,
    state: Mapping[str, Parameter],
    extras: Mapping[str, Tensor],
) -> tuple[Masks, list[Choice]]:
    # Of a tensor without elements there is nothing to choose, however many slices it has.
    empty = dict.fromkeys(name for name in rule.tensors if state[name].weight.numel() == 0)
    some = tuple(name for name in rule.tensors if name not in empty)
    masks: Masks = {name: Mask(torch.empty(0, dtype=torch.uint8), 0) for name in empty}
    choices = [Choice((name,), 0, 0, 0) for name in empty]

    def choose(names: tuple[str, ...]) -> tuple[Masks, Choice]:
        return _choose(rule, {name: state[name] for name in names}, extras)

    groups = [some] if rule.is_global and some else [(name,) for name in some]
    # One core takes a small group whole; a large one, all cores one by one.
    passes = passes_of(state[rule.tensors[0]].weight.device)
    small = [g for g in groups if sum(state[n].weight.numel() for n in g) <= passes.piece]
    chosen = dict(zip(small, passes.each(choose, small), strict=True))
    for names in groups:
        found, choice = chosen.get(names) or choose(names)
        masks |= found
        choices.append(choice)
    return masks, choices


def _choose(
    rule: Selection,
    parameters: Mapping[str, Parameter],
    extras: Mapping[str, Tensor],
) -> tuple[Masks, Choice]:
    """Selects among the units of all `parameters`."""
    names = tuple(parameters)
    with watch().stage("score"):
        rankings = [_rank(rule, name, parameters[name], extras) for name in names]
    alive = sum(r.units if r.alive is None else r.alive.kept for r in rankings)
    count = units_to_prune(rule, names, alive)
    with watch().stage("select"):
        kept, cut = select(rankings, alive, count)
    masks = {}
    for name, units in zip(names, kept, strict=True):
        mask = rule.granularity.spread(units, parameters[name].weight.shape)
        before = parameters[name].mask
        masks[name] = mask if before is None else mask & before
    value = None if isinstance(rule.importance, Random) else threshold(cut, score_dtype(rankings))
    pruned = alive - sum(units.kept for units in kept)
    return masks, Choice(names, alive, count, pruned, value, cut.equal, cut.ties)


def _rank(
    rule: Selection,
    name: str,
    parameter: Parameter,
    extras: Mapping[str, Tensor],
) -> Ranking:
    holder = rule.scores.get(name)
    scores = None if holder is None else extras[holder]
    field = f"data[{quote(name if holder is None else holder)}]"
    return rank(name, parameter, scores, rule.importance, rule.granularity, field)


def units_to_prune(rule: Selection, names: Sequence[str], alive: int) -> int:
    """How many of `alive` units the amount means, rounded as torch does.

    Errors: AmountOutOfRange.
    """
    if isinstance(rule.amount, float):
        return round(rule.amount * alive)
    if rule.amount > alive:
        where = quote(names[0]) if len(names) == 1 else f"{len(names)} tensors"
        raise AmountOutOfRange(
            f"{rule.path}.count", f"{rule.amount} is more than the {alive} units left in {where}"
        )
    return rule.amount
