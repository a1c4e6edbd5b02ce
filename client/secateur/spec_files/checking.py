"""Checks a spec with a model: what each rule matches, and what a prune would do."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from secateur.checks import nearest, shown
from secateur.client import Client
from secateur.errors import InvalidSpec
from secateur.literals import Prior
from secateur.model import Source
from secateur.names import resolver
from secateur.report import Report
from secateur.source import read_source
from secateur.spec import MASKS, Rule, Spec, spec_of
from secateur.tables import Table, listed

# Names of tensors in a line.
_SHOWN = 6


@dataclass(frozen=True)
class RuleCheck:
    """What a rule matches, and what it would do; counts are of units.

    Attributes:
        place: The rule's line in its file, as "FILE:LINE", or its place in the spec.
        tensors: The names of the tensors that each name or glob of the rule matches. Of a rule with
            groups, by the groups' names, the tensors of each.
        candidates: Units that are unpruned before; None if the spec does not fit the model.
        pruned: Units that the rule would prune; None as well.
    """

    place: str
    tensors: Mapping[str, tuple[str, ...]]
    candidates: int | None
    pruned: int | None


@dataclass(frozen=True)
class SpecCheck:
    """What a spec would do to a model.

    Attributes:
        rules: Each rule.
        unnamed: The names of floating tensors that no rule matches.
        problems: Why the spec does not fit the model, a line each; empty if it does.
        report: What a prune would report; None if the spec does not fit.
    """

    rules: tuple[RuleCheck, ...]
    unnamed: tuple[str, ...]
    problems: tuple[str, ...]
    report: Report | None

    def to_dict(self) -> dict[str, Any]:
        """Returns the check as plain data, for JSON."""
        return {
            "rules": [{**vars(rule), "tensors": dict(rule.tensors)} for rule in self.rules],
            "unnamed": self.unnamed,
            "problems": self.problems,
            "report": None if self.report is None else self.report.to_dict(),
        }

    def text(self) -> Table | str:
        """Returns lines on the rules, and the table of the report; without the problems."""
        lines = [line for rule in self.rules for line in _lines_of(rule)]
        if self.unnamed:
            names = listed(self.unnamed, _SHOWN)
            lines.append(f"no rule matches {_count(self.unnamed)}: {names}")
        if self.report is None:
            return "\n".join(lines)
        lines.append("nothing was pruned; a prune would give:")
        return replace(self.report.table(), above=tuple(lines))

    def __str__(self) -> str:
        return "\n".join([str(self.text()), *self.problems])


def _lines_of(rule: RuleCheck) -> Iterator[str]:
    named = [pattern for pattern, names in rule.tensors.items() if names == (pattern,)]
    if named:
        yield f"{rule.place}: names {_count(named)}: {listed(named, _SHOWN)}"
    for pattern, names in rule.tensors.items():
        if names and names != (pattern,):
            yield f"{rule.place}: {pattern} matches {_count(names)}: {listed(names, _SHOWN)}"
    if rule.pruned is not None:
        yield f"{rule.place}: would prune {rule.pruned:,} of {rule.candidates:,} units"


def _count(names: Sequence[str]) -> str:
    return f"{len(names):,} tensor{'' if len(names) == 1 else 's'}"


def check_spec(client: Client, source: Any, spec: Spec, prior: Prior = "masks") -> SpecCheck:
    """Says which tensors each rule of a spec matches, and what a prune would do. Prunes nothing.

    Args:
        client: Where a prune without output is computed, so that the numbers are exact.
        source: The model; see `Client`.
        spec: What to prune; of `read_spec`, problems name the lines of the file.
        prior: See `Client.prune`.

    Raises:
        SecateurError: The model cannot be read, or the server cannot be asked.
    """
    if not isinstance(client, Client):
        raise InvalidSpec(f"client: {type(client).__name__} is not a secateur.Client")
    model = read_source(source)
    names = model.prunable_names() if model.is_here else _names_there(client, model)
    matched = [_matched(rule, names, model) for rule in spec_of(spec).rules]
    report, problems = None, list(_unmatched(spec, matched, names))
    if not problems:
        try:
            report = client.prune(model, spec, "none", False, prior=prior).report
            report = report.without("NOT_SMALLER")  # nothing was pruned
        except InvalidSpec as error:
            problems = [str(error)]
    rules = tuple(_rule(spec, index, of, report) for index, of in enumerate(matched))
    found = {names.get(name, name) for of in matched for some in of.values() for name in some}
    unnamed = tuple(name for name in dict.fromkeys(names.values()) if name not in found)
    return SpecCheck(rules, unnamed, tuple(problems), report)


def _names_there(client: Client, model: Source) -> dict[str, str]:
    """Every name of the floating tensors of a model on the server, and their first name."""
    tensors = client.report(model, progress=False).tensors
    return {other: name for name, of in tensors.items() for other in (name, *of.aliases)}


def _matched(rule: Rule, names: Mapping[str, str], model: Source) -> dict[str, tuple[str, ...]]:
    """The tensors of each name or glob of a rule, or of each of its groups."""
    message = rule.message
    if groups := message.selection.groups:
        return {group.name: tuple(member.tensor for member in group.members) for group in groups}
    resolve = resolver(names)
    others = model.tensors.keys() | model.pairs().keys() if model.is_here else ()

    def found(pattern: str) -> Iterator[str]:
        # Names of integers, or on the server, are for the server to judge.
        if pattern in others or not (
            model.is_here or any(character in pattern for character in "*?[")
        ):
            yield pattern
            return
        for part in resolve(pattern):
            yield from [part] if part in names else (n for n in names if fnmatchcase(n, part))

    patterns = (*message.selection.tensors, *message.solver.tensors, *rule.arrays.get(MASKS, ()))
    return {pattern: tuple(found(pattern)) for pattern in patterns}


def _unmatched(
    spec: Spec, matched: Sequence[Mapping[str, Sequence[str]]], names: Mapping[str, str]
) -> Iterator[str]:
    """A line for each name or glob that matches no tensor."""
    for index, (rule, patterns) in enumerate(zip(spec.rules, matched, strict=True)):
        for at, (pattern, found) in enumerate(patterns.items()):
            if not found:
                field = "masks" if rule.arrays.get(MASKS) else f"tensors[{at}]"
                place = f"{rule.place(f'.{field}')}: " if rule.place else ""
                yield (
                    f"{place}rules[{index}].{field}: {shown(pattern)} matches no floating tensor"
                    f"{nearest(pattern, names) or '; integers need their exact name'}"
                )


def _rule(
    spec: Spec, index: int, tensors: Mapping[str, tuple[str, ...]], report: Report | None
) -> RuleCheck:
    rule = spec.rules[index]
    place = rule.place("") if rule.place else f"rules[{index}]"
    if report is None:
        return RuleCheck(place, tensors, None, None)
    choices = report.rules[index]
    candidates, pruned = sum(one.candidates for one in choices), sum(one.pruned for one in choices)
    return RuleCheck(place, tensors, candidates, pruned)
