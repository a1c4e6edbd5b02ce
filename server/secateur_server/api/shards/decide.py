"""Decides how many units are pruned of each file, where tensors of several files are compared."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch

from secateur_server.api.shards.model import DividedModel, worked
from secateur_server.api.shards.rules import Compared
from secateur_server.api.shards.work import FileWork, Summary, Units, summarize
from secateur_server.backends.pieces import Cut
from secateur_server.cut.choice import Choice
from secateur_server.cut.choose import choice_of
from secateur_server.cut.decide import units_to_prune
from secateur_server.cut.decision import Decision
from secateur_server.cut.search import Division, Query, Search, narrow
from secateur_server.cut.select import NO_CUT, threshold
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.rules import Selection


@dataclass(frozen=True)
class _Counted:
    """The units of some files that are compared."""

    units: Sequence[Units]
    summaries: Sequence[Summary]

    @property
    def dtype(self) -> torch.dtype:
        """In which all scores compare without loss."""
        return reduce(torch.promote_types, (summary.dtype for summary in self.summaries))

    @property
    def candidates(self) -> int:
        """Units that are still unpruned."""
        return sum(summary.candidates for summary in self.summaries)

    def observed(self) -> list[Units]:
        """The units of each file, to be compared as one dtype."""
        return [
            replace(units, units=summary.units, dtype=self.dtype)
            for units, summary in zip(self.units, self.summaries, strict=True)
        ]


def decide_across(
    context: RequestContext,
    model: DividedModel,
    rule: Selection,
    compared: Compared,
    works: Sequence[FileWork],
) -> tuple[list[int], Choice]:
    """Decides how many units of each file are pruned, of tensors that are compared across files.

    Args:
        context: The request.
        model: The model.
        rule: Resolved. It prunes a number of units by score alone.
        compared: The tensors.
        works: Each file, with the rules before this one.

    Returns:
        The units to prune in each file, and the choice.

    Raises:
        RequestError: NanScores or AmountOutOfRange.
    """
    counted = _counted(context, model, rule, compared, works)
    total = sum(summary.units for summary in counted.summaries)
    count = units_to_prune(rule, compared.names, total, counted.candidates)
    division = _search(context, model, counted, count)
    found = iter(division.counts)
    counts = [next(found) if part else 0 for part in compared.parts]
    cut = _cut(division)
    value = threshold(cut, counted.dtype)
    decision = Decision((), count, (), value, cut.equal, cut.ties)
    return counts, choice_of(rule, compared.names, counted.candidates, count, decision)


def _counted(
    context: RequestContext,
    model: DividedModel,
    rule: Selection,
    compared: Compared,
    works: Sequence[FileWork],
) -> _Counted:
    token = secrets.token_hex(8)
    units = [
        Units(work, replace(rule, tensors=part), token)
        for work, part in zip(works, compared.parts, strict=True)
        if part
    ]
    return _Counted(units, worked(context, model.cluster, "read", summarize, units))


def _search(
    context: RequestContext, model: DividedModel, counted: _Counted, count: int
) -> Division:
    """Divides `count` units among the files: those with the lowest scores, ties file by file."""
    highest = tuple(summary.candidates for summary in counted.summaries)
    members = tuple(range(len(highest)))
    search = Search(Query(members, (0,) * len(highest), highest, count), counted.dtype)
    files = [[units] for units in counted.observed()]
    narrow(context, model.cluster, files, [search], counted.dtype)
    return search.division()


def _cut(division: Division) -> Cut:
    if division.key < 0:
        return NO_CUT
    ties = sum(division.counts) - sum(division.below)
    return Cut(division.key, ties, sum(division.equal))
