"""Makes specs for a plain model fit a wrapped one, and the reverse: see secateur.names."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from secateur.model import Source
from secateur.names import has_wrapper_part, resolver
from secateur.spec import Rule
from secateur_proto import spec_pb2 as pb

Resolve = Callable[[str], list[str]]


def fitted_patterns(patterns: Iterable[str], model: Source) -> list[str]:
    """Returns names and globs of tensors as a model has them."""
    given = list(patterns)
    if not _has_wrappers(model) and not any(map(has_wrapper_part, given)):
        return given
    return _resolved(given, _names_in(model))


def fitted_rules(rules: Iterable[Rule], model: Source) -> tuple[Rule, ...]:
    """Returns rules with each name and glob of tensors as a model has them."""
    given = tuple(rules)
    if not _has_wrappers(model) and not any(map(_mentions_wrapper, given)):
        return given
    resolve = _names_in(model)
    return tuple(_renamed(rule, resolve) for rule in given)


def fitted_groups(groups: Iterable[pb.Group], model: Source) -> Sequence[pb.Group]:
    """Returns groups with the names of their members as a model has them."""
    rule = Rule(pb.Rule(selection=pb.Selection(groups=groups)))
    return fitted_rules([rule], model)[0].message.selection.groups


def _has_wrappers(model: Source) -> bool:
    return any(map(has_wrapper_part, model.order))


def _mentions_wrapper(rule: Rule) -> bool:
    arrays = (name for given in rule.arrays.values() for name in given)
    message = rule.message.SerializeToString().decode("latin-1")  # much faster than its text
    return has_wrapper_part(message) or any(map(has_wrapper_part, arrays))


def _names_in(model: Source) -> Resolve:
    """Finds names in a model; one on the server is not looked into."""
    if not model.is_here:
        return lambda pattern: [pattern]
    pairs = model.pairs()
    halves = {f"{base}_orig" for base in pairs}.union(pairs.values())
    return resolver([*model.prunable_names(), *(model.tensors.keys() - halves), *model.others])


def _renamed(rule: Rule, resolve: Resolve) -> Rule:
    message = pb.Rule()
    message.CopyFrom(rule.message)
    selection = message.selection
    for names in (selection.tensors, message.solver.tensors):
        _rename_all(names, resolve)
    for member in (member for group in selection.groups for member in group.members):
        member.tensor = _one(member.tensor, resolve)
    _rename_keys(selection.scales, resolve)
    for key, name in selection.scales.items():
        selection.scales[key] = _one(name, resolve)
    _rename_parts(selection, _selected(selection, resolve))
    arrays = {path: _renamed_arrays(given, resolve) for path, given in rule.arrays.items()}
    return Rule(message, arrays, rule.example_inputs)


def _rename_parts(selection: pb.Selection, resolve: Resolve) -> None:
    """Renames in the fields that say more of the tensors, or groups, that a rule selects."""
    rails = selection.guard_rails
    for names in (rails.exclude, *(rail.tensors for rail in rails.rails)):
        _rename_all(names, resolve)
    for lines in (selection.row_dims, selection.table.entries):
        _rename_lines(lines, resolve)
    _rename_keys(selection.macs.per_unit, resolve)


def _selected(selection: pb.Selection, resolve: Resolve) -> Resolve:
    """Finds tensors that a selection prunes; its groups have names of their own."""
    groups = [group.name for group in selection.groups]
    members = [member.tensor for group in selection.groups for member in group.members]
    selected = [*selection.tensors, *members]

    def matches(name: str, patterns: Iterable[str]) -> bool:
        return any(name == pattern or fnmatchcase(name, pattern) for pattern in patterns)

    def resolve_selected(pattern: str) -> list[str]:
        if any(matches(group, [pattern]) for group in groups):
            return [pattern]
        return [name for name in resolve(pattern) if matches(name, selected)] or [pattern]

    return resolve_selected


def _rename_all(names: Any, resolve: Resolve) -> None:
    if names:
        names[:] = _resolved(names, resolve)


def _resolved(patterns: Iterable[str], resolve: Resolve) -> list[str]:
    return list(dict.fromkeys(name for pattern in patterns for name in resolve(pattern)))


def _one(name: str, resolve: Resolve) -> str:
    """The name in the model of a single tensor."""
    found = resolve(name)
    return found[0] if len(found) == 1 else name


def _rename_lines(lines: Any, resolve: Resolve) -> None:
    """Replaces each line for a glob by one for each name, if names differ."""
    if not lines:
        return
    given = list(lines)
    del lines[:]
    for line in given:
        for name in resolve(line.tensors):
            copy = lines.add()
            copy.CopyFrom(line)
            copy.tensors = name


def _rename_keys(table: Any, resolve: Resolve) -> None:
    given = dict(table)
    for name, value in given.items():
        del table[name]
        table[_one(name, resolve)] = value


def _renamed_arrays(arrays: Mapping[str, Any], resolve: Resolve) -> dict[str, Any]:
    return {_one(name, resolve): array for name, array in arrays.items()}
