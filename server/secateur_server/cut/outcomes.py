"""What decisions make of the tensors that are compared: their choices, and their cuts."""

from collections.abc import Sequence

import torch

from secateur_server.backends.keys import score_at
from secateur_server.backends.pieces import Cut
from secateur_server.cut.choice import Choice
from secateur_server.cut.choose import choice_of, with_cut
from secateur_server.cut.decision import Decision
from secateur_server.cut.scored import RankedTensor
from secateur_server.cut.search import Query, search
from secateur_server.cut.select import NO_CUT
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.rules import Selection


def choices_of(
    context: RequestContext,
    rule: Selection,
    names: tuple[str, ...],
    tensors: Sequence[RankedTensor],
    decisions: Sequence[Decision],
    cuts: Sequence[Sequence[Cut]],
    dtype: torch.dtype,
) -> list[Choice]:
    """Makes the choice of each decision.

    Args:
        context: The request.
        rule: Resolved.
        names: Of all tensors that are compared.
        tensors: The same tensors.
        decisions: For some amounts.
        cuts: As of cuts_of.
        dtype: As of cuts_of.
    """
    candidates, choices = sum(tensor.candidates for tensor in tensors), []
    for decision, row in zip(context.each(decisions), cuts, strict=True):
        if rule.amount.threshold is not None:
            scores = [None if c == NO_CUT else score_at(c.key, dtype) for c in row]
            decision = with_cut(context, decision, [tensor.ranking for tensor in tensors], scores)
        choices.append(choice_of(rule, names, candidates, sum(decision.counts), decision))
    return choices


def cuts_of(
    context: RequestContext,
    tensors: Sequence[RankedTensor],
    decisions: Sequence[Decision],
    dtype: torch.dtype,
) -> list[list[Cut]]:
    """Finds for each decision the cut of each tensor, in the dtype in which all compare."""
    cuts: list[list[Cut | None]] = [
        [
            NO_CUT if count == 0 else known
            for count, known in zip(
                decision.counts, decision.cuts or [None] * len(tensors), strict=True
            )
        ]
        for decision in context.each(decisions)
    ]
    # Tensors that guard rails or shares cut elsewhere than at the common threshold.
    missing = [(d, s) for d, row in enumerate(cuts) for s, cut in enumerate(row) if cut is None]
    queries = [
        Query((s,), (0,), (tensors[s].candidates,), decisions[d].counts[s]) for d, s in missing
    ]
    rankings = [tensor.ranking for tensor in tensors]
    driver = rankings[0].driver(context)
    result = search(context, driver, rankings, queries, dtype) if queries else []
    for (d, s), division in zip(context.each(missing), result, strict=True):
        ties = division.counts[0] - division.below[0]
        cuts[d][s] = Cut(division.key, ties, division.equal[0])
    return [[cut for cut in row if cut is not None] for row in cuts]
