"""Amounts from the wire, and a plan to it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from secateur_proto import plan_pb2 as pb
from secateur_proto.pruner_pb2 import PlanHeader
from secateur_server.api.convert.columns import (
    Array,
    Column,
    doubles,
    field_head,
    nested,
    numbers,
    texts,
)
from secateur_server.api.convert.tables import encode_choices
from secateur_server.backends.norms import total
from secateur_server.cut.choice import ChoiceTable
from secateur_server.cut.plan_small import is_planned_by_runs
from secateur_server.cut.removed import Outcome, Removed, RemovedTable
from secateur_server.errors import InvalidRequest, InvalidSpec
from secateur_server.fields import fraction_of
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.rules import Amount, Rule, Selection
from secateur_server.state_dict.parameter import Parameter

MOST_AMOUNTS = 1000


def decode_amounts(header: PlanHeader, rules: Sequence[Rule]) -> tuple[Selection, list[Amount]]:
    """The rule that is planned, and by what amounts.  Errors: InvalidRequest, InvalidSpec."""
    planned = rules[-1]
    if not isinstance(planned, Selection):
        raise InvalidSpec(f"spec.rules[{len(rules) - 1}]", "the last one must be a selection")
    if len(header.amounts) > MOST_AMOUNTS:
        raise InvalidRequest(
            "header.amounts", f"{len(header.amounts)} are more than {MOST_AMOUNTS}"
        )
    amounts = [_amount(a, f"header.amounts[{i}]") for i, a in enumerate(header.amounts)]
    return planned, amounts or [planned.amount]


def _amount(amount: pb.Amount, path: str) -> Amount:
    chosen = amount.WhichOneof("amount")
    if chosen is None:
        raise InvalidRequest(f"{path}.amount", "fraction or count is needed")
    if chosen == "fraction":
        return fraction_of(amount.fraction, f"{path}.fraction")
    return int(amount.count)


def charge_plan(context: RequestContext, rule: Selection, amounts: Sequence[Amount]) -> None:
    """Counts the memory of a plan of `rule`, which is resolved, by so many amounts.

    Raises:
        RequestTooLarge: The server never has so much.
        QueueFull: Other requests hold too much of it.
    """
    names = rule.names()
    of_tensor = _IN_ARRAYS if is_planned_by_runs(rule, amounts) else _IN_OBJECTS
    parts = len(names) + len(rule.groups)
    size = len(amounts) * (_NAMED * sum(map(len, names)) + of_tensor * parts)
    what = f"a plan of {len(amounts)} amounts of {len(names)} tensors"
    context.charge("header.amounts", size, what)


# Bytes for a name's character, for a tensor and an amount: each name is in the answer twice, as a
# planned tensor and in a choice, and so is each number; the answer is in memory in parts, and as a
# whole. What is planned without arrays has an object of Python for each number.
_NAMED, _IN_ARRAYS, _IN_OBJECTS = 4, 250, 700


def encode_plan(
    context: RequestContext,
    outcomes: Sequence[Outcome],
    parameters: Mapping[str, Parameter],
    names: Sequence[str],
) -> Iterator[bytes]:
    """The bytes of the amounts of a PruningPlan for the tensors `names`, in their order.

    They are made amount by amount: there may be millions of tensors in all of them.
    """
    weights = [parameters[name].weight for name in names]
    planned = PlannedTensors(
        texts(1, names),
        np.array([weight.numel() for weight in weights], np.int64),
        np.array([_pruned(context, parameters[name]) for name in context.each(names)], np.int64),
        np.array([weight.element_size() for weight in weights], np.int64),
    )
    of_choices = _Names()
    for outcome in context.each(outcomes):
        choices = outcome.choices
        of_table = of_choices.encoded(choices.tensors) if isinstance(choices, ChoiceTable) else None
        encoded = [encode_choices(context, choices, of_table), *_planned(outcome, planned, names)]
        yield from (field_head(1, sum(map(len, encoded))), *encoded)


class _Names:
    """The names of the tables of a plan, which are mostly one list: they are encoded once."""

    def __init__(self) -> None:
        self._names: Sequence[str] | None = None

    def encoded(self, names: Sequence[str]) -> Column:
        """The names as the field 1 of messages."""
        if names is not self._names:
            self._names, self._column = names, texts(1, names)
        return self._column


@dataclass(frozen=True)
class PlannedTensors:
    """What all amounts have in common.

    Attributes:
        names: As the field 1 of messages.
        totals: Elements of each tensor.
        before: Elements that are pruned before.
        itemsizes: Bytes of an element.
    """

    names: Column
    totals: Array
    before: Array
    itemsizes: Array


def _planned(outcome: Outcome, planned: PlannedTensors, names: Sequence[str]) -> list[bytes]:
    """The bytes of a PlannedAmount without its choices, in parts."""
    removed = _table(outcome.removed, names)
    elements, energy, whole = removed.elements, removed.energy, removed.whole
    pruned, totals = planned.before + elements, planned.totals
    tensors = nested(
        2,
        planned.names,
        numbers(2, pruned),
        numbers(3, totals),
        doubles(4, pruned / np.maximum(totals, 1)),
        doubles(5, _norm_shares(energy, whole)),
    )
    all_pruned, total_elements = int(pruned.sum()), int(totals.sum())
    said = pb.PlannedAmount(
        pruned=all_pruned,
        total=total_elements,
        sparsity=all_pruned / total_elements if total_elements else 0.0,
        norm_removed=float(_norm_shares(np.array([total(energy)]), np.array([total(whole)]))[0]),
        kept_bytes=int(((totals - pruned) * planned.itemsizes).sum()),
    )
    return [tensors.data.tobytes(), said.SerializeToString()]


def _table(removed: Mapping[str, Removed], names: Sequence[str]) -> RemovedTable:
    """The same in the order of `names`."""
    if isinstance(removed, RemovedTable):
        at = np.array([removed.places[name] for name in names], np.int64)
        return RemovedTable({}, removed.elements[at], removed.energy[at], removed.whole[at])
    found = [removed[name] for name in names]
    elements = np.array([of.elements for of in found], np.int64)
    energy = np.array([of.energy for of in found], np.float64)
    whole = np.array([of.whole for of in found], np.float64)
    return RemovedTable({}, elements, energy, whole)


def _pruned(context: RequestContext, parameter: Parameter) -> int:
    mask = parameter.mask
    return 0 if mask is None else parameter.weight.numel() - mask.kept(context)


def _norm_shares(energy: Array, whole: Array) -> Array:
    """The share of the norm that is removed; 1 where that is not a finite number."""
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(whole != 0, energy / np.where(whole != 0, whole, 1.0), 0.0)
    is_finite = np.isfinite(share)
    return np.where(is_finite, np.minimum(1.0, np.sqrt(np.where(is_finite, share, 0.0))), 1.0)
