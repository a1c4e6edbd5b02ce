"""Divides rules among the files of a model."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from secateur_server.api.shards.model import DividedModel, NotDivisible
from secateur_server.cut.allocation import TABLES
from secateur_server.cut.choice import Choice
from secateur_server.cut.scored import split_by_scope
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.rules import Rule, Selection

# Names of tensors whose units are compared.
Names = tuple[str, ...]


@dataclass(frozen=True)
class Compared:
    """Tensors whose units are compared.

    Attributes:
        names: Of all these tensors.
        parts: Those of each file; empty for a file that has none of them.
    """

    names: Names
    parts: Sequence[Names]

    @property
    def is_across(self) -> bool:
        """Whether they are in several files."""
        return sum(map(bool, self.parts)) > 1


@dataclass(frozen=True)
class DividedRule:
    """A rule for the tensors of several files.

    Attributes:
        rule: Resolved.
        empty: Tensors without elements, of each file.
        compared: All other tensors. Those that are compared with no other are one entry, if the
            rule compares none.
    """

    rule: Selection
    empty: Sequence[Names]
    compared: Sequence[Compared]

    @property
    def across(self) -> list[Compared]:
        """The tensors that are compared across files."""
        return [one for one in self.compared if self._is_across(one)]

    def _is_across(self, compared: Compared) -> bool:
        return is_comparing(self.rule) and compared.is_across

    def of_file(self, index: int, across: Mapping[Names, Sequence[Selection]]) -> list[Selection]:
        """Returns rules that together do to the tensors of a file what the rule does to them.

        Args:
            index: Of the file.
            across: For tensors that are compared across files the rule of each file. Other such
                tensors are left out.
        """
        rules = []
        if self.empty[index]:
            rules.append(replace(self.rule, tensors=self.empty[index]))
        for compared in self.compared:
            if not (part := compared.parts[index]):
                continue
            if compared.names in across:
                rules.append(across[compared.names][index])
            elif not self._is_across(compared):
                rules.append(only(self.rule, part))
        return rules

    def choices(
        self, context: RequestContext, found: Iterable[Choice], decided: Mapping[Names, Choice]
    ) -> list[Choice]:
        """Puts the choices of all files in the order of those of one server.

        Args:
            context: The request.
            found: Of all files.
            decided: Of the tensors that are compared across files.
        """
        empty = [(name,) for names in self.empty for name in names]
        names = [name for compared in self.compared for name in compared.names]
        by_names = {choice.tensors: choice for choice in found} | dict(decided)
        in_order = [*empty, *split_by_scope(context, self.rule, names)]
        return [by_names[those] for those in in_order]


def only(rule: Selection, names: Names) -> Selection:
    """Returns the rule for some tensors, all of which it compares if it compares any."""
    scope = "global" if is_comparing(rule) else rule.scope
    return replace(rule, tensors=names, scope=scope)


def is_comparing(rule: Selection) -> bool:
    """Whether a rule compares units of several tensors."""
    return rule.scope in ("global", "isomorphic")


def divided_rules(
    context: RequestContext, rules: Sequence[Rule], model: DividedModel
) -> list[DividedRule]:
    """Divides resolved rules among the files of a model.

    Raises:
        NotDivisible: What a rule prunes of one file depends on more of others than summaries.
    """
    return [_divided(context, rule, model) for rule in rules]


def _divided(context: RequestContext, rule: Rule, model: DividedModel) -> DividedRule:
    if not isinstance(rule, Selection) or rule.extras():
        raise NotDivisible
    if rule.allocation in TABLES or not _are_scales_beside(rule, model):
        raise NotDivisible
    if rule.groups:
        nothing: list[Names] = [()] * len(model.references)
        names = [group.name for group in rule.groups]
        return DividedRule(rule, nothing, [Compared(tuple(names), nothing)])
    shapes = model.catalog.prunable
    empty = [name for name in rule.tensors if 0 in shapes[name]]
    names = [name for name in rule.tensors if 0 not in shapes[name]]
    sets = split_by_scope(context, rule, names) if is_comparing(rule) else [tuple(names)]
    compared = [Compared(those, model.divide(those)) for those in sets if those]
    return DividedRule(rule, model.divide(empty), compared)


def _are_scales_beside(rule: Selection, model: DividedModel) -> bool:
    """Whether the scales of each tensor are in its file."""
    pairs = rule.scales.items()
    return all(
        any(name in of.prunable and scales in of.prunable for of in model.catalogs)
        for name, scales in pairs
    )
