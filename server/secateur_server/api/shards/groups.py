"""Groups whose members may be in several files. What crosses has one value for each unit."""

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from secateur_proto.report_pb2 import SparsityReport
from secateur_server.api.shards.model import DividedModel, worked
from secateur_server.api.shards.work import FileWork, state_before
from secateur_server.api.smaller import add_shrinkage
from secateur_server.backends.masks import Mask, mask_of_flags
from secateur_server.backends.protocol import Backend
from secateur_server.cut.choice import Choice
from secateur_server.cut.choose import choose_each
from secateur_server.cut.prune import KeptUnits
from secateur_server.cut.score import Ranking, refuse_nan
from secateur_server.cut.scored import ScoredTensor, are_random, rank_groups, split_by_scope
from secateur_server.errors import quote
from secateur_server.granularity.group import Group, Member
from secateur_server.granularity.groups import candidate_units, member_scores
from secateur_server.granularity.kept_units import shrinking_by
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.rules import Selection
from secateur_server.state_dict.slices import Shrinking
from secateur_server.uris.references import Reference
from secateur_server.wire.tensors import WireTensor

CPU = torch.device("cpu")


class MemberUnits(NamedTuple):
    """The units of a member of a group.

    Attributes:
        flags: Which have an unpruned element: bool; None if the tensor has no mask.
        scores: Float64; None if they are not needed.
    """

    flags: Tensor | None
    scores: Tensor | None


@dataclass(frozen=True)
class MembersOfFile:
    """Members of groups that are in a file.

    Attributes:
        work: The file, with the rules before.
        members: The members.
        order: Of the norms by which they are scored; None: they are not scored.
    """

    work: FileWork
    members: tuple[Member, ...]
    order: float | None

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.work.size

    @property
    def place(self) -> Reference:
        """The file, so that its next task is on the same node."""
        return self.work.reference


def read_members(
    context: RequestContext, backend: Backend, asked: MembersOfFile
) -> list[MemberUnits]:
    """Reads the units of members, and scores those that count in the scores of groups."""
    state = state_before(context, asked.work)
    if asked.order is not None:
        for name in dict.fromkeys(m.tensor for m in asked.members if m.is_scored):
            weight, mask, scan = state[name]
            refuse_nan(context, weight, mask, f"data[{quote(name)}]", scan)
    found = []
    for member in context.each(asked.members):
        mask = candidate_units(context, Group("", (member,)), state)
        flags = None if mask is None else mask.flags(0, member.units)
        scores = None
        if member.is_scored and asked.order is not None:
            scores = member_scores(context, member, state[member.tensor], asked.order)
        found.append(MemberUnits(flags, scores))
    return found


@dataclass(frozen=True)
class FarGroups:
    """Groups, and the units of their members, in the members' order.

    Attributes:
        groups: Resolved.
        units: Of each member of each group.
    """

    groups: Sequence[Group]
    units: Sequence[Sequence[MemberUnits]]

    def candidates(self, context: RequestContext) -> list[Mask | None]:
        """Returns the units with an unpruned element in any tensor; None if all of a group are."""
        return [_any(context, [unit.flags for unit in of_group]) for of_group in self.units]

    def flags(self, group: Group) -> Tensor:
        """Returns which units have unpruned elements, as of find_uncut."""
        places = {each.name: place for place, each in enumerate(self.groups)}
        whole = torch.ones(group.units, dtype=torch.bool)
        units = self.units[places[group.name]]
        return torch.stack([whole if unit.flags is None else unit.flags for unit in units])

    @property
    def masked(self) -> set[str]:
        """The tensors of the groups that have masks."""
        return {
            member.tensor
            for group, units in zip(self.groups, self.units, strict=True)
            for member, unit in zip(group.members, units, strict=True)
            if unit.flags is not None
        }


def _any(context: RequestContext, flags: Sequence[Tensor | None]) -> Mask | None:
    present = [each for each in flags if each is not None]
    if len(present) < len(flags):
        return None
    return mask_of_flags(context, torch.stack(present).any(0))


def read_groups(
    context: RequestContext,
    model: DividedModel,
    works: Sequence[FileWork],
    groups: Sequence[Group],
    order: float | None = None,
) -> FarGroups:
    """Reads the units of groups.

    Args:
        context: The request.
        model: The model.
        works: Each file, with the rules before.
        groups: Resolved.
        order: Of the norms by which members are scored; None: they are not scored.
    """
    members = [member for group in groups for member in group.members]
    parts = [
        tuple(member for member in members if member.tensor in catalog.prunable)
        for catalog in model.catalogs
    ]
    pieces = [
        MembersOfFile(work, part, order) for work, part in zip(works, parts, strict=True) if part
    ]
    done = worked(context, model.cluster, "read", read_members, pieces)
    found = {
        id(member): units
        for piece, of_file in zip(pieces, done, strict=True)
        for member, units in zip(piece.members, of_file, strict=True)
    }
    return FarGroups(groups, [[found[id(m)] for m in group.members] for group in groups])


def decide_groups(
    context: RequestContext, model: DividedModel, works: Sequence[FileWork], rule: Selection
) -> tuple[list[KeptUnits], Mapping[tuple[str, ...], Choice]]:
    """Decides which units of groups are kept.

    Args:
        context: The request.
        model: The model.
        works: Each file, with the rules before this one.
        rule: Resolved, with groups.

    Returns:
        What is kept, for the members in each file; and the choices.

    Raises:
        RequestError: As score_groups and choose raise it.
    """
    ranked = split_by_scope(context, rule, [group.name for group in rule.groups])
    groups = [rule.groups_by_name[name] for names in ranked for name in names]
    order = None if are_random(rule) else rule.importance.order
    far = read_groups(context, model, works, groups, order)
    rankings = _rankings(context, rule, ranked, far)
    sets = [[_scored(context, next(rankings)) for _ in names] for names in ranked]
    chosen = choose_each(context, rule, sets)
    kept = [units for of_set, _ in chosen for units in of_set]
    choices = {choice.tensors: choice for _, choice in chosen}
    return [_in_file(groups, kept, set(catalog.prunable)) for catalog in model.catalogs], choices


def _rankings(
    context: RequestContext, rule: Selection, ranked: Sequence[Sequence[str]], far: FarGroups
) -> Iterator[Ranking]:
    members = [[u.scores for u in units if u.scores is not None] for units in far.units]
    devices = [CPU] * len(far.groups)
    yield from rank_groups(context, rule, ranked, far.candidates(context), members, devices)


def _scored(context: RequestContext, ranking: Ranking) -> ScoredTensor:
    def expand(context: RequestContext, kept: Mask) -> dict[str, Mask]:
        raise AssertionError("the masks are made where the files are")

    return ScoredTensor(ranking.name, ranking, ranking.count_candidates(context), expand)


def _in_file(groups: Sequence[Group], kept: Sequence[Mask], names: set[str]) -> KeptUnits:
    """The groups with those members that are in a file."""
    here = [
        (replace(group, members=members, unmasked=()), units)
        for group, units in zip(groups, kept, strict=True)
        if (members := tuple(member for member in group.members if member.tensor in names))
    ]
    return KeptUnits(tuple(group for group, _ in here), tuple(units for _, units in here))


@dataclass(frozen=True)
class Shrunk:
    """What a shrunk model keeps.

    Attributes:
        far: The groups, after all rules.
        shrinking: What is kept of the whole model.
        files: The same, of each file.
    """

    far: FarGroups
    shrinking: Shrinking
    files: Sequence[Shrinking]

    def add_to(self, context: RequestContext, report: SparsityReport, model: DividedModel) -> None:
        """Adds to a report what was removed."""
        state_dict = copy(model.state_dict)
        masks = {mask for _, *of_pair in state_dict.catalog.pairs.values() for mask in of_pair}
        state_dict.tensors = {
            entry.name: WireTensor(entry.dtype, entry.shape, _bytes(entry.end - entry.begin))
            for shard in state_dict.shards
            for entry in shard.entries
            if entry.name not in masks
        }
        state_dict.shrinking, groups = self.shrinking, self.far.groups
        masked = self.far.masked | state_dict.catalog.pairs.keys()
        masked |= {tensor.name for tensor in report.tensors if tensor.is_pruned}
        add_shrinkage(context, report, state_dict, groups, masked, self.far.flags)


_bytes = partial(torch.empty, dtype=torch.uint8, device="meta")


def shrink(
    context: RequestContext,
    model: DividedModel,
    works: Sequence[FileWork],
    groups: Sequence[Group],
) -> Shrunk:
    """Finds what a shrunk model keeps.

    Args:
        context: The request.
        model: The model.
        works: Each file, with all rules.
        groups: As distinct_groups returns them.
    """
    far = read_groups(context, model, works, groups)
    whole = shrinking_by(context, groups, far.candidates(context), model.catalog)
    files = []
    for catalog in model.catalogs:
        names = catalog.prunable.keys() | set(catalog.stored)
        slices = {name: kept for name, kept in whole.slices.items() if name in names}
        files.append(Shrinking([], slices, [name for name in whole.unmasked if name in names]))
    return Shrunk(far, whole, files)
