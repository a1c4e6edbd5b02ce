"""Plans for many small tensors whose units are their elements, as arrays."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from secateur_server.backends.batches import batched
from secateur_server.backends.keys import BITS, score_at
from secateur_server.cut.allocation.lamp_windows import lamp_scores
from secateur_server.cut.choice import Choice, ChoiceTable, Floats, Ints
from secateur_server.cut.decide import units_to_prune
from secateur_server.cut.elements import score_tensor
from secateur_server.cut.removed import Removed, RemovedTable
from secateur_server.cut.runs import Runs, energies, runs_of
from secateur_server.cut.score import Ranking, score_dtype
from secateur_server.cut.small import batch_of, values_of
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.amounts import Amount
from secateur_server.spec.rules import Selection
from secateur_server.state_dict.parameter import Parameter


def is_planned_by_runs(rule: Selection, amounts: Sequence[Amount]) -> bool:
    """Whether the rule prunes fractions or counts of elements by the magnitude of weights alone."""
    is_of_weights = rule.importance.is_value and not (rule.scores or rule.scales)
    is_plain = rule.allocation in ("rank", "lamp") and not rule.guard_rails.rails
    return (
        rule.has_element_units
        and rule.scope != "row"
        and is_of_weights
        and is_plain
        and rule.normalization is None
        and all(amount.is_share for amount in amounts)
    )


@dataclass(frozen=True)
class Planned:
    """Predicted outcomes for tensors.

    Attributes:
        names: Of the tensors.
        counts: Units of each tensor that each amount prunes, (amounts, tensors).
        energy: As in RemovedTable, (amounts, tensors).
        whole: As in RemovedTable.
    """

    names: Sequence[str]
    counts: Ints
    energy: Floats
    whole: Floats


@dataclass(frozen=True)
class PlannedEach(Planned):
    """Predicted outcomes for tensors that are pruned separately.

    Attributes:
        candidates: Units of each tensor that are unpruned before.
        thresholds, equal, ties: Of each cut, (amounts, tensors): the score, NaN if nothing is
            pruned; the units that have it; and how many of them are pruned.
    """

    candidates: Ints
    thresholds: Floats
    equal: Ints
    ties: Ints


def plan_each(
    context: RequestContext,
    rules: Sequence[Selection],
    names: Sequence[str],
    parameters: Mapping[str, Parameter],
) -> list[PlannedEach]:
    """Predicts what several amounts prune of small tensors, each separately.

    Args:
        context: The request.
        rules: The same rule with each amount.
        names: Of the tensors.
        parameters: By name.

    Returns:
        The outcomes of all amounts, for batches of tensors.

    Raises:
        NanScores: A score is NaN.
        AmountOutOfRange: A tensor has too few units.
    """
    kinds: dict[torch.dtype, list[Ranking]] = defaultdict(list)
    shares = [rule.amount.share("") for rule in rules]
    counts = [
        rule for rule, share in zip(rules, shares, strict=True) if share and share.fraction is None
    ]
    for name in context.each(names):
        ranking = score_tensor(context, rules[0], name, parameters, {})
        candidates = ranking.count_candidates(context)
        for rule in context.each(counts):  # refuses counts that are too large
            units_to_prune(rule, (name,), ranking.units, candidates)
        kinds[ranking.dtype].append(ranking)
    return [
        _plan_each(context, rules, alike[part], dtype)
        for dtype, alike in kinds.items()
        for part in batched([ranking.units for ranking in alike])
    ]


def _plan_each(
    context: RequestContext,
    rules: Sequence[Selection],
    rankings: Sequence[Ranking],
    dtype: torch.dtype,
) -> PlannedEach:
    runs = runs_of(batch_of(rankings, dtype))
    candidates, units = runs.sizes, np.array([ranking.units for ranking in rankings])
    shape = len(rules), len(rankings)
    counts, below, equal = (np.empty(shape, np.int32) for _ in range(3))
    thresholds = np.empty(shape)
    for index, rule in enumerate(context.each(rules)):
        bases, pruned = (
            (units, units - candidates) if rule.of_all else (candidates, np.zeros_like(candidates))
        )
        share = rule.amount.share("")
        assert share is not None, "plans by runs have fractions and counts"
        counts[index] = np.maximum(0, share.units_of_each(bases) - pruned)
        below[index], equal[index] = runs.cut_at(counts[index])
        last = runs.starts[:-1] + np.maximum(counts[index] - 1, 0)
        keys = np.append(runs.keys, 0)[np.minimum(last, len(runs.keys))]
        thresholds[index] = values_of(np.where(counts[index] > 0, keys, -1).astype(np.int64), dtype)
    energy, whole = energies(context, runs, counts, below, equal)
    names = [ranking.name for ranking in rankings]
    cut = candidates, thresholds, equal, counts - below
    return PlannedEach(names, counts, energy, whole, *cut)


def plan_jointly(
    context: RequestContext,
    rules: Sequence[Selection],
    names: Sequence[str],
    parameters: Mapping[str, Parameter],
) -> tuple[Planned, list[Choice]]:
    """Predicts what several amounts prune of small tensors whose units are compared.

    Args:
        context: The request.
        rules: The same rule with each amount.
        names: Of the tensors.
        parameters: By name.

    Returns:
        The outcomes of all amounts, and the choice of each.

    Raises:
        NanScores: A score is NaN.
        AmountOutOfRange: The tensors have too few units.
    """
    rankings = [
        score_tensor(context, rules[0], name, parameters, {}) for name in context.each(names)
    ]
    runs = runs_of(batch_of(rankings, score_dtype(rankings)))
    found, choices = cut_jointly(context, rules, rankings, runs)
    energy, whole = energies(context, runs, *found)
    return Planned(names, found[0], energy, whole), choices


def cut_jointly(
    context: RequestContext, rules: Sequence[Selection], rankings: Sequence[Ranking], runs: Runs
) -> tuple[tuple[Ints, Ints, Ints], list[Choice]]:
    """Cuts small tensors whose units are compared, by several amounts.

    Args:
        context: The request.
        rules: The same rule with each amount.
        rankings: Of the tensors.
        runs: Of the same tensors.

    Returns:
        The units pruned of each tensor, and those below and at its cut, each (amounts, tensors);
        and the choice of each amount.

    Raises:
        AmountOutOfRange: The tensors have too few units.
    """
    names, dtype = tuple(ranking.name for ranking in rankings), score_dtype(rankings)
    units = sum(ranking.units for ranking in rankings)
    is_lamp = rules[0].allocation == "lamp"
    order = _Order(runs.starts, _lamp_keys(runs, dtype) if is_lamp else runs.keys)
    shape = len(rules), len(rankings)
    counts, below, equal = (np.zeros(shape, np.int32) for _ in range(3))
    choices = []
    for index, rule in enumerate(context.each(rules)):
        count = units_to_prune(rule, names, units, len(runs.keys))
        value, ties, ties_pruned = None, 0, 0
        if count:
            key, before, at = order.cut(count)
            value = score_at(key, torch.float64 if is_lamp else dtype)
            ties, ties_pruned = int(at.sum()), count - int(before.sum())
            counts[index] = before + np.clip(ties_pruned - (np.cumsum(at) - at), 0, at)
            below[index], equal[index] = runs.cut_at(counts[index]) if is_lamp else (before, at)
        choices.append(Choice(names, len(runs.keys), count, count, value, ties, ties_pruned))
    return (counts, below, equal), choices


def _lamp_keys(runs: Runs, dtype: torch.dtype) -> Ints:
    """The keys of the LAMP scores of all units, in the order of their magnitudes."""
    scores = torch.from_numpy(runs.keys).view(dtype).to(torch.float64)
    found = torch.empty_like(scores)
    sizes = runs.sizes
    for size in np.unique(sizes):
        at = runs.starts[:-1][sizes == size, np.newaxis] + np.arange(size)
        falling = scores[torch.from_numpy(at)].flip(1)
        found[torch.from_numpy(at)] = lamp_scores(falling, 0.0).flip(1)
    keys: Ints = found.view(BITS[torch.float64]).numpy()
    return keys


class _Order:
    """The units of all tensors in one order.

    Args:
        starts: As in Runs.
        keys: Ascending for each tensor.
    """

    def __init__(self, starts: Ints, keys: npt.NDArray[Any]) -> None:
        self._starts, self._keys = starts, np.sort(keys)
        # One ascending list for all tensors: each has its own range of numbers for its keys.
        self._first = np.arange(len(starts) - 1) * (len(keys) + 1)
        places = np.searchsorted(self._keys, keys)
        self._places = np.repeat(self._first, np.diff(starts)) + places

    def cut(self, count: int) -> tuple[int, Ints, Ints]:
        """The key of the `count`-th unit, from 1, and the units of each tensor below and at it."""
        key = self._keys[count - 1]
        wanted = self._first + np.searchsorted(self._keys, key)
        begins = np.searchsorted(self._places, wanted)
        ends = np.searchsorted(self._places, wanted, "right")
        return int(key), begins - self._starts[:-1], ends - begins


@dataclass(frozen=True)
class EachOutcome:
    """The outcome of an amount for tensors that are pruned separately. Tables are made on request.

    Attributes:
        index: Of the amount.
        tensors: The names of all tensors; one list for all amounts.
        places: The index of each name.
        planned: Outcomes for small tensors.
        others: For each other tensor the choice, and what it prunes.
    """

    index: int
    tensors: Sequence[str]
    places: Mapping[str, int]
    planned: Sequence[PlannedEach]
    others: Mapping[str, tuple[Choice, Removed]]

    @property
    def choices(self) -> ChoiceTable:
        """The choices of all tensors."""
        table = ChoiceTable.empty(self.tensors)
        for planned, rows in self._rows():
            table.candidates[rows], table.thresholds[rows] = (
                planned.candidates,
                planned.thresholds[self.index],
            )
            table.requested[rows] = table.pruned[rows] = planned.counts[self.index]
            table.ties[rows], table.ties_pruned[rows] = (
                planned.equal[self.index],
                planned.ties[self.index],
            )
        for choice, _ in self.others.values():
            table.set(choice)
        return table

    @property
    def removed(self) -> RemovedTable:
        """What is pruned of each tensor."""
        elements = np.zeros(len(self.places), np.int64)
        energy, whole = np.zeros((2, len(self.places)))
        for planned, rows in self._rows():
            elements[rows], energy[rows] = planned.counts[self.index], planned.energy[self.index]
            whole[rows] = planned.whole
        for name, (_, removed) in self.others.items():
            row = self.places[name]
            elements[row], energy[row], whole[row] = removed.elements, removed.energy, removed.whole
        return RemovedTable(self.places, elements, energy, whole)

    def _rows(self) -> Iterator[tuple[PlannedEach, list[int]]]:
        for planned in self.planned:
            yield planned, [self.places[name] for name in planned.names]
