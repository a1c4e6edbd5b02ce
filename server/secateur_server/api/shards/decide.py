"""Decides what is pruned of each file, where units of several files are compared."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from secateur_proto import pruner_pb2 as pb
from secateur_server.api.rules import reads_of
from secateur_server.api.shards.groups import decide_groups
from secateur_server.api.shards.model import DividedModel, worked
from secateur_server.api.shards.rules import Compared, DividedRule, Names, only
from secateur_server.api.shards.units import FarTensor, Units, as_one, far_tensors, summarize
from secateur_server.api.shards.work import FileWork
from secateur_server.cut.choice import Choice
from secateur_server.cut.decide import decide, is_plain, units_to_prune
from secateur_server.cut.outcomes import choices_of, cuts_of
from secateur_server.cut.prune import KeptUnits
from secateur_server.cut.score import score_dtype
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.amounts import Amount, Count, Counts
from secateur_server.spec.rules import GuardRails, Rule, Selection


def works_of(
    model: DividedModel, rules: Sequence[Rule], prior: int, is_whole: bool
) -> Sequence[FileWork]:
    """Returns each file before the first rule.

    Args:
        model: The model.
        rules: Resolved.
        prior: Of the call.
        is_whole: Whether all parameters are read, and not only those of the rules.
    """
    reads = reads_of(rules)
    named = {name for rule in rules for name in rule.names()}
    zeros = named if prior == pb.PRIOR_ZEROS else ()
    return [
        FileWork(
            reference,
            None if is_whole else tuple(name for name in catalog.prunable if name in reads),
            tuple(name for name in catalog.prunable if name in zeros),
        )
        for reference, catalog in zip(model.references, model.catalogs, strict=True)
    ]


class Applied(NamedTuple):
    """A rule that is divided among files.

    Attributes:
        lengths: How many rules of each file it became.
        choices: Those among tensors of several files.
    """

    lengths: Sequence[int]
    choices: Mapping[Names, Choice]


def after_rules(
    context: RequestContext,
    model: DividedModel,
    works: Sequence[FileWork],
    divided: Sequence[DividedRule],
) -> tuple[Sequence[FileWork], list[Applied]]:
    """Decides the amounts of rules for each file. Each rule sees the masks of those before it.

    Args:
        context: The request.
        model: The model.
        works: Each file before the rules.
        divided: The rules.

    Returns:
        Each file with the rules, and what became of each of them.
    """
    applied = []
    for one in divided:
        if one.rule.groups:
            kept, found = decide_groups(context, model, works, one.rule)
            works = _with_rules(works, [[of_file] for of_file in kept])
            applied.append(Applied([1] * len(works), found))
            continue
        rules: dict[Names, Sequence[Selection]] = {}
        choices: dict[Names, Choice] = {}
        for compared in one.across:
            rules[compared.names], choices[compared.names] = _decided(
                context, model, works, one.rule, compared
            )
        more = [one.of_file(index, rules) for index in range(len(works))]
        works = _with_rules(works, more)
        applied.append(Applied([len(of_file) for of_file in more], choices))
    return works, applied


def _with_rules(
    works: Sequence[FileWork], more: Sequence[Sequence[Selection | KeptUnits]]
) -> list[FileWork]:
    return [
        replace(work, rules=(*work.rules, *of_file))
        for work, of_file in zip(works, more, strict=True)
    ]


def _decided(
    context: RequestContext,
    model: DividedModel,
    works: Sequence[FileWork],
    rule: Selection,
    compared: Compared,
) -> tuple[list[Selection], Choice]:
    """The rule of each file for tensors that are compared across files, and the choice."""
    rule, files = scored(context, model, works, rule, compared)
    members = _files(rule, compared, files) if is_plain(rule) else by_tensor(compared, files)
    decisions, dtype = decide(context, rule, members, [rule.amount]), score_dtype(members)
    cuts = [()] if rule.amount.threshold is None else cuts_of(context, members, decisions, dtype)
    (choice,) = choices_of(context, rule, compared.names, members, decisions, cuts, dtype)
    divided = _counts_of_files if is_plain(rule) else _counts_of_tensors
    amounts = divided(compared, decisions[0].counts)
    # Bounds and shares are in the counts.
    own = replace(rule, allocation="rank", guard_rails=GuardRails(), of_all=False)
    rules = [
        replace(only(own, part), amount=amount)
        for part, amount in zip(compared.parts, amounts, strict=True)
    ]
    return rules, choice


def scored(
    context: RequestContext,
    model: DividedModel,
    works: Sequence[FileWork],
    rule: Selection,
    compared: Compared,
) -> tuple[Selection, list[list[FarTensor]]]:
    """Scores tensors that are compared across files.

    Args:
        context: The request.
        model: The model.
        works: Each file, with the rules before this one.
        rule: Resolved.
        compared: The tensors.

    Returns:
        The rule, with its floor; and the tensors of each file that has any.

    Raises:
        RequestError: As score_tensors raises it.
    """
    if rule.normalization is not None:
        # All tensors must be without NaN before any is normalized, and then have one floor.
        _summarized(context, model, works, replace(rule, normalization=None), compared)
        files = _summarized(context, model, works, rule, compared)
        floor = min(of.offset for of_file in files for of in of_file)
        if floor == 0:
            return rule, files
        rule = replace(rule, floor=floor)
    return rule, _summarized(context, model, works, rule, compared)


def _summarized(
    context: RequestContext,
    model: DividedModel,
    works: Sequence[FileWork],
    rule: Selection,
    compared: Compared,
) -> list[list[FarTensor]]:
    token = secrets.token_hex(8)
    units = [
        Units(work, replace(rule, tensors=part), token)
        for work, part in zip(works, compared.parts, strict=True)
        if part
    ]
    summaries = worked(context, model.cluster, "read", summarize, units)
    return far_tensors(model.cluster, units, summaries)


def _files(
    rule: Selection, compared: Compared, files: Sequence[Sequence[FarTensor]]
) -> list[FarTensor]:
    """Each file as a member. Refuses an amount that is too large, with the number of tensors."""
    members = [as_one(tensors) for tensors in files]
    units, candidates = sum(of.units for of in members), sum(of.candidates for of in members)
    units_to_prune(rule, compared.names, units, candidates)
    return members


def by_tensor(compared: Compared, files: Sequence[Sequence[FarTensor]]) -> list[FarTensor]:
    """Returns each tensor as a member, in their order, given those of each file."""
    by_name = {tensor.name: tensor for tensors in files for tensor in tensors}
    return [by_name[name] for name in compared.names]


def _counts_of_files(compared: Compared, counts: Sequence[int]) -> list[Amount]:
    """The amount of each file, given counts of those that have tensors."""
    left = iter(counts)
    return [Count(next(left) if part else 0) for part in compared.parts]


def _counts_of_tensors(compared: Compared, counts: Sequence[int]) -> list[Amount]:
    """The amount of each file, given counts of all tensors."""
    by_name = dict(zip(compared.names, counts, strict=True))
    return [Counts({name: by_name[name] for name in part}) for part in compared.parts]
