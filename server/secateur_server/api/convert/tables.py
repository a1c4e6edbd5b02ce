"""Encodes reports and choices of many small tensors."""

from collections.abc import Sequence

import numpy as np

from secateur_proto.report_pb2 import Bound, RuleReport, TensorReport
from secateur_proto.report_pb2 import Choice as ChoiceMessage
from secateur_server.api.convert.columns import (
    Array,
    Column,
    doubles,
    joined,
    nested,
    numbers,
    packed,
    parted,
    picked,
    texts,
)
from secateur_server.backends.batches import are_many
from secateur_server.backends.dtypes import WIRE_DTYPES
from secateur_server.cut.choice import Choice, ChoiceTable
from secateur_server.report.measure_small import Measured
from secateur_server.report.structure import GROUPS, SIDES
from secateur_server.runtime.context import RequestContext
from secateur_server.state_dict.parameter import Parameter


def encode_choices(
    context: RequestContext, choices: Sequence[Choice], names: Column | None = None
) -> bytes:
    """Encodes choices as the field 1 of RuleReport and PlannedAmount.

    Args:
        context: The request.
        choices: Of one rule.
        names: The field `tensors` of a table, if it is encoded already.

    Returns:
        The bytes.
    """
    if isinstance(choices, ChoiceTable) and are_many(choices):
        return _encode_table(choices, names or texts(1, choices.tensors))
    return RuleReport(choices=map(encode_choice, context.each(choices))).SerializeToString()


def encode_choice(choice: Choice) -> ChoiceMessage:
    """Makes the message of a choice."""
    return ChoiceMessage(
        tensors=choice.tensors,
        candidates=choice.candidates,
        requested=choice.requested,
        pruned=choice.pruned,
        threshold=choice.threshold,
        ties=choice.ties,
        ties_pruned=choice.ties_pruned,
        bounds=[
            Bound(tensor=bound.tensor, rail=bound.rail, pruned=bound.pruned)
            for bound in choice.bounds
        ],
    )


def _encode_table(table: ChoiceTable, names: Column) -> bytes:
    choices = nested(
        1,
        names,
        numbers(2, table.candidates),
        numbers(3, table.requested),
        numbers(4, table.pruned),
        doubles(5, table.thresholds, ~np.isnan(table.thresholds)),
        numbers(6, table.ties),
        numbers(7, table.ties_pruned),
    )
    return choices.data.tobytes()


def tensor_reports(
    names: Sequence[str], parameters: Sequence[Parameter], measured: Measured, is_folded: bool
) -> list[bytes]:
    """Encodes the reports of small tensors.

    Args:
        names: Of the tensors.
        parameters: Of each name.
        measured: The counts of all of them.
        is_folded: Whether they are sent with their masks applied, and without masks.

    Returns:
        For each tensor the bytes of the field `tensors` of a SparsityReport.
    """
    has_mask = np.array([p.mask is not None and not is_folded for p in parameters])
    reports = nested(
        1,
        texts(1, names),
        _kinds(parameters),
        numbers(5, measured.zeros),
        numbers(6, measured.totals),
        doubles(7, measured.zeros / measured.totals),
        numbers(8, np.where(has_mask, measured.pruned, 0)),
        numbers(9, has_mask),
        _zero_slices(measured),
        *_patterns(measured),
        *_zero_blocks(measured),
    )
    return parted(reports)


def _kinds(parameters: Sequence[Parameter]) -> Column:
    """The fields that are the same for tensors of one shape and dtype."""
    kinds: dict[object, bytes] = {}
    parts = []
    for parameter in parameters:
        weight = parameter.weight
        kind = weight.shape, weight.dtype
        if kind not in kinds:
            dtype, size = WIRE_DTYPES[weight.dtype], weight.nbytes
            said = TensorReport(shape=weight.shape, dtype=dtype, bytes=size)
            kinds[kind] = said.SerializeToString()
        parts.append(kinds[kind])
    return joined(parts)


def _zero_slices(measured: Measured) -> Column:
    zero = measured.sizes - measured.layouts.nonzero_slices
    has_slices = np.repeat(measured.dims > 1, measured.dims)
    return packed(10, zero[has_slices], np.where(measured.dims > 1, measured.dims, 0))


def _patterns(measured: Measured) -> list[Column]:
    """For each m, the patterns of the tensors that have one."""
    found = []
    for m, most in zip(GROUPS, measured.layouts.most_ones.T, strict=True):
        pattern = nested(11, numbers(1, most), numbers(2, np.full(len(most), m)))
        found.append(picked(pattern, most < m))
    return found


def _zero_blocks(measured: Measured) -> list[Column]:
    """Blocks for each side, up to the last side that a tensor has any of."""
    found = []
    is_set = measured.dims > 1
    for side, nonzero in zip(SIDES, measured.layouts.nonzero_blocks.T, strict=True):
        totals: Array = -(-measured.rows // side) * -(-measured.columns // side)
        is_set = is_set & (nonzero < totals)
        sides = numbers(1, np.full(len(totals), side))
        blocks = nested(12, sides, numbers(2, totals - nonzero), numbers(3, totals))
        found.append(picked(blocks, is_set))
    return found
