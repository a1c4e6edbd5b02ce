"""Decodes the amounts of a plan, and encodes the plan."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

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
from secateur_server.cut.removed import Outcome, Removed, RemovedTable
from secateur_server.errors import InvalidRequest, InvalidSpec
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.amounts import AMOUNTS, Amount
from secateur_server.spec.rules import Rule, Selection
from secateur_server.state_dict.parameter import Parameter

MOST_AMOUNTS = 1000


def decode_amounts(
    context: RequestContext, header: PlanHeader, rules: Sequence[Rule]
) -> tuple[Selection, list[Amount]]:
    """Decodes the amounts of a plan.

    Args:
        context: The request.
        header: Of the call.
        rules: Resolved. The last one is planned.

    Returns:
        The planned rule, and its amounts.

    Raises:
        InvalidRequest: An amount is wrong, or there are too many.
        InvalidSpec: The last rule is not a selection.
    """
    planned = rules[-1]
    if not isinstance(planned, Selection):
        raise InvalidSpec(
            f"spec.rules[{len(rules) - 1}]", "the last rule of a plan must be a selection"
        )
    if len(header.amounts) > MOST_AMOUNTS:
        raise InvalidRequest(
            "header.amounts", f"{len(header.amounts)} are more than {MOST_AMOUNTS}; send fewer"
        )
    amounts: list[Amount] = []
    for index, amount in enumerate(header.amounts):
        path, kind = f"header.amounts[{index}]", amount.WhichOneof("amount")
        if kind is None:
            raise InvalidRequest(f"{path}.amount", "is not set; set fraction or count")
        if planned.allocation == "owl" and kind != "fraction":
            raise InvalidRequest(f"{path}.{kind}", "OWL needs a fraction")
        amounts.append(AMOUNTS[kind](context, amount, path))
    return planned, amounts or [planned.amount]


class Unplanned(NamedTuple):
    """A tensor before the planned rule."""

    elements: int
    element_bytes: int
    pruned: int


def unplanned(context: RequestContext, parameter: Parameter) -> Unplanned:
    """Describes a parameter before the planned rule."""
    weight = parameter.weight
    return Unplanned(weight.numel(), weight.element_size(), parameter.count_pruned(context))


def encode_plan(
    context: RequestContext, outcomes: Sequence[Outcome], before: Mapping[str, Unplanned]
) -> Iterator[bytes]:
    """Encodes the amounts of a PruningPlan, one by one: they may hold millions of tensors.

    Args:
        context: The request.
        outcomes: One for each amount.
        before: The tensors that are planned, by their names.

    Yields:
        Parts of the field `amounts`.
    """
    names = list(before)
    elements, sizes, pruned = np.array(list(before.values()), np.int64).reshape(-1, 3).T
    planned = PlannedTensors(texts(1, names), elements, pruned, sizes)
    of_choices = _Names()
    for outcome in context.each(outcomes):
        choices = outcome.choices
        of_table = of_choices.encoded(choices.tensors) if isinstance(choices, ChoiceTable) else None
        encoded = [encode_choices(context, choices, of_table), *_planned(outcome, planned, names)]
        yield from (field_head(1, sum(map(len, encoded))), *encoded)


class _Names:
    """Encodes the names of a plan's tables once, as most tables have the same list."""

    def __init__(self) -> None:
        self._names: Sequence[str] | None = None

    def encoded(self, names: Sequence[str]) -> Column:
        """Returns the names as the field 1 of messages."""
        if names is not self._names:
            self._names, self._column = names, texts(1, names)
        return self._column


@dataclass(frozen=True)
class PlannedTensors:
    """The values that are the same for all amounts.

    Attributes:
        names: As the field 1 of messages.
        totals: Elements of each tensor.
        before: Elements of each tensor that are pruned already.
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
    """The same values in the order of `names`."""
    if isinstance(removed, RemovedTable):
        at = np.array([removed.places[name] for name in names], np.int64)
        return RemovedTable({}, removed.elements[at], removed.energy[at], removed.whole[at])
    found = [removed[name] for name in names]
    elements = np.array([of.elements for of in found], np.int64)
    energy = np.array([of.energy for of in found], np.float64)
    whole = np.array([of.whole for of in found], np.float64)
    return RemovedTable({}, elements, energy, whole)


def _norm_shares(energy: Array, whole: Array) -> Array:
    """The share of the norm that is removed; 1 if it is not finite."""
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(whole != 0, energy / np.where(whole != 0, whole, 1.0), 0.0)
    is_finite = np.isfinite(share)
    return np.where(is_finite, np.minimum(1.0, np.sqrt(np.where(is_finite, share, 0.0))), 1.0)
