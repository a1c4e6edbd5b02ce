"""Plan: the rules before the last are divided as in a Prune, and each file is planned by a task."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from secateur_proto import pruner_pb2 as pb
from secateur_server.api.convert.plan import Unplanned, decode_amounts
from secateur_server.api.plan import charge_plan, encoded, path_of, sizes_of
from secateur_server.api.rules import reads_of
from secateur_server.api.shards.decide import after_rules, by_tensor, scored, works_of
from secateur_server.api.shards.model import (
    DividedModel,
    NotDivisible,
    divided_model,
    worked,
)
from secateur_server.api.shards.plan_work import CutTensors, PlannedFile, PlanWork, plan_file
from secateur_server.api.shards.rules import Compared, DividedRule, Names, divided_rules, only
from secateur_server.api.shards.work import FileWork
from secateur_server.cut.choice import Choice
from secateur_server.cut.decide import decide
from secateur_server.cut.drivers import Cluster
from secateur_server.cut.outcomes import choices_of, cuts_of
from secateur_server.cut.removed import Removed
from secateur_server.cut.score import score_dtype
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.amounts import Amount
from secateur_server.spec.resolve import resolve
from secateur_server.spec.rules import Rule
from secateur_server.state_dict.sources import Call, Sources


def plan_files(
    sources: Sources, cluster: Cluster, call: Call[pb.PlanHeader], asked: Sequence[Rule]
) -> bytes:
    """Makes the answer of a call of Plan, as plan_call does.

    Raises:
        NotDivisible: The server must do the work.
    """
    context, header = call.context, call.header
    with divided_model(sources, cluster, call) as model:
        rules = resolve(context, asked, model.catalog)
        planned, amounts = decode_amounts(context, header, rules)
        *others, last = divided_rules(context, rules, model)
        if last.rule.groups:
            raise NotDivisible
        charge_plan(context, planned, amounts)
        works = works_of(model, rules, header.prior, is_whole=False)
        works, _ = after_rules(context, model, works, others)
        planning = _Planning(context, model, works, last, amounts, path_of(header))
        outcomes, before = planning.planned()
        read = [name for name in model.catalog.prunable if name in reads_of(rules)]
        sizes = sizes_of(model.state_dict, rules, read, "")
        answer = encoded(context, outcomes, {n: before[n] for n in planned.tensors}, sizes)
        model.check_unchanged()
        return answer


@dataclass(frozen=True)
class _Planning:
    """A plan of a rule.

    Attributes:
        context: The request.
        model: The model.
        works: Each file, with the rules before this one.
        divided: The rule.
        amounts: Each takes the place of the rule's amount.
        at: The path of `amounts` in the request; empty if they are the rule's own.
    """

    context: RequestContext
    model: DividedModel
    works: Sequence[FileWork]
    divided: DividedRule
    amounts: Sequence[Amount]
    at: str

    def planned(self) -> tuple[list["_Outcome"], dict[str, Unplanned]]:
        """Returns the outcome of each amount, and the tensors as they are before."""
        across: list[list[CutTensors]] = [[] for _ in self.works]
        decided: dict[Names, list[Choice]] = {}
        for compared in self.divided.across:
            parts, decided[compared.names] = self._decided(compared)
            for of_file, part in zip(across, parts, strict=True):
                of_file += [part] if part.rule.tensors else []
        pieces = [
            PlanWork(work, self.divided.of_file(index, {}), self.amounts, self.at, across[index])
            for index, work in enumerate(self.works)
        ]
        files = worked(self.context, self.model.cluster, "read", plan_file, pieces)
        outcomes = [
            _Outcome(self.context, self.divided, index, decided, files)
            for index in range(len(self.amounts))
        ]
        return outcomes, {name: of for file in files for name, of in file.before.items()}

    def _decided(self, compared: Compared) -> tuple[list[CutTensors], list[Choice]]:
        """The cuts of each file of tensors that are compared across files, and the choices."""
        context, names = self.context, compared.names
        # Scores are needed if any amount prunes less than all units.
        first = next((a for a in self.amounts if not a.is_everything), self.amounts[0])
        rule = replace(self.divided.rule, amount=first)
        rule, files = scored(context, self.model, self.works, rule, compared)
        # Tensors, and not files, as sums of squares are rounded in the order of a tensor's cuts.
        tensors = by_tensor(compared, files)
        dtype = score_dtype(tensors)
        decisions = decide(context, rule, tensors, self.amounts, self.at)
        cuts = cuts_of(context, tensors, decisions, dtype)
        choices = choices_of(context, rule, names, tensors, decisions, cuts, dtype)
        counts = zip(*(decision.counts for decision in decisions), strict=True)
        by_name = dict(zip(names, zip(counts, zip(*cuts, strict=True), strict=True), strict=True))
        parts = [
            CutTensors(only(rule, part), [by_name[name] for name in part], dtype)
            for part in compared.parts
        ]
        return parts, choices


@dataclass(frozen=True)
class _Outcome:
    """The outcome of an amount for all files. It is put together on request, as there may be many.

    Attributes:
        context: The request.
        divided: The planned rule.
        index: Of the amount.
        decided: For tensors that are compared across files the choices of all amounts.
        files: What the tasks have planned.
    """

    context: RequestContext
    divided: DividedRule
    index: int
    decided: Mapping[Names, Sequence[Choice]]
    files: Sequence[PlannedFile]

    @property
    def choices(self) -> Sequence[Choice]:
        """The choices of the rule."""
        found = (of.choices for file in self.files for of in file.of_amount(self.index))
        decided = {names: choices[self.index] for names, choices in self.decided.items()}
        return self.divided.choices(self.context, chain.from_iterable(found), decided)

    @property
    def removed(self) -> Mapping[str, Removed]:
        """What is pruned of each tensor."""
        found: dict[str, Removed] = {}
        for file in self.files:
            for of in file.of_amount(self.index):
                found.update(of.removed)
            found |= {name: removed[self.index] for name, removed in file.removed.items()}
        return found
