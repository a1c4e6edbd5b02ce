"""Applies a spec: rule after rule, each among what the ones before left."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur_server.errors import AmountOutOfRange, InvalidMask, quote
from secateur_server.pruning.score import Ranking, rank
from secateur_server.pruning.select import NOTHING, decide, mark, score_dtype, threshold
from secateur_server.pruning.spec import CustomMasks, Parameter, Random, Rule, Selection

Masks = dict[str, Tensor]


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
    parameters: Mapping[str, Parameter], rules: Sequence[Rule], extras: Mapping[str, Tensor]
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
            state[name] = Parameter(state[name].weight, mask)
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
        candidates = asked.numel() if before is None else int(before.count_nonzero())
        requested = asked.numel() - int(asked.count_nonzero())
        choices.append(
            Choice((name,), candidates, requested, candidates - int(masks[name].count_nonzero()))
        )
    return masks, choices


def to_mask(values: Tensor, error: type[Exception], field: str) -> Tensor:
    """A mask of 0 and 1 as bool, True is kept.

    error: what to raise, with the field and a message, for any other value.
    """
    if values.dtype == torch.bool:  # torch takes any byte for one
        values = values.view(torch.uint8)
    other = (values != 0) & (values != 1)
    if bool(other.any()):
        first = other.nonzero()[0].tolist()
        raise error(field, f"is {values[tuple(first)].item()} at {first}; a mask is 0 or 1")
    return values != 0


def _apply_selection(
    rule: Selection, state: Mapping[str, Parameter], extras: Mapping[str, Tensor]
) -> tuple[Masks, list[Choice]]:
    # Of a tensor without elements there is nothing to choose, however many slices it has.
    empty = [name for name in rule.tensors if state[name].weight.numel() == 0]
    masks: Masks = {name: torch.empty_like(state[name].weight, dtype=torch.bool) for name in empty}
    choices = [Choice((name,), 0, 0, 0) for name in empty]
    some = tuple(name for name in rule.tensors if name not in masks)
    for names in [some] if rule.is_global and some else [(name,) for name in some]:
        rankings = [_rank(rule, name, state[name], extras) for name in names]
        kept, choice = _choose(rule, rankings)
        choices.append(choice)
        for name, units in zip(names, kept, strict=True):
            mask = rule.granularity.spread(units, state[name].weight.shape)
            before = state[name].mask
            masks[name] = mask.contiguous() if before is None else mask & before
    return masks, choices


def _rank(
    rule: Selection, name: str, parameter: Parameter, extras: Mapping[str, Tensor]
) -> Ranking:
    holder = rule.scores.get(name)
    scores = None if holder is None else extras[holder]
    field = f"data[{quote(name if holder is None else holder)}]"
    return rank(name, parameter, scores, rule.importance, rule.granularity, field)


def _choose(rule: Selection, rankings: Sequence[Ranking]) -> tuple[list[Tensor], Choice]:
    """Selects among the units of all `rankings`. Returns: for each, the units kept."""
    names = tuple(ranking.name for ranking in rankings)
    alive = [r.units if r.alive is None else int(r.alive.count_nonzero()) for r in rankings]
    count = units_to_prune(rule, names, sum(alive))
    dtype = score_dtype(rankings)
    cut = decide(rankings, dtype, count) if count else NOTHING
    kept, left = mark(rankings, dtype, cut)
    value = None if isinstance(rule.importance, Random) else threshold(cut, dtype)
    return kept, Choice(names, sum(alive), count, sum(alive) - left, value, cut.equal, cut.ties)


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
