"""Fits a spec to the model that it is to prune, and encodes it."""

from collections.abc import Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from secateur.errors import InvalidSpec
from secateur.forms import FORMS, is_model
from secateur.model import Source
from secateur.others import check_names
from secateur.renaming import fitted_rules
from secateur.spec import GRAMS, INPUTS, OUTPUTS, Arrays, Rule, Spec, local_array, spec_of
from secateur.tables import listed
from secateur.tensors import LocalTensor
from secateur_proto import spec_pb2 as pb

# Names in an error.
_SHOWN = 3


def encode_spec(given: Any, model: Source) -> tuple[pb.PruningSpec, dict[str, LocalTensor]]:
    """Encodes a spec as Spec.encode does.

    Args:
        given: A caller's spec.
        model: What it is to prune.

    Raises:
        InvalidSpec: See `fitted_spec`; or it has an array that cannot be sent.
    """
    return fitted_spec(given, model).encode(model.tensors)


def fitted_spec(given: Any, model: Source) -> Spec:
    """Returns a spec with the names of a model.

    Args:
        given: A caller's spec.
        model: What it is to prune.

    Raises:
        InvalidSpec: It is not a spec, names an entry that is not sent, or has statistics of other
            weights.
    """
    spec = Spec(fitted_rules(spec_of(given).rules, model))
    for index, rule in enumerate(spec.rules):
        check_names(f"rules[{index}]", _names(rule), model.others)
        _check_calibrated(f"rules[{index}]", rule, model)
    if model.other_names:
        spec = Spec(tuple(_fitted(rule, model) for rule in spec.rules))
    return spec


def check_solvers(spec: Spec, output: str, keep: bool) -> None:
    """Refuses results without the weights that a spec updates.

    Raises:
        InvalidSpec: `output` is masks alone, or the server would keep masks.
    """
    if not (solvers := " and ".join(dict.fromkeys(spec.solvers))):
        return
    if output in FORMS and not is_model(output):
        models = ", ".join(name for name in FORMS if is_model(name))
        raise InvalidSpec(
            f"output: {output!r} has no weights, and {solvers} updates them; use one of {models}"
        )
    if keep:
        raise InvalidSpec(
            f"keep: cannot be used with {solvers}, which updates weights: a kept result is the "
            "uploaded weights and masks; use the output dense, and upload the result"
        )


def unmasked_members(spec: pb.PruningSpec) -> set[str]:
    """Returns the names of the tensors that groups cut, and do not mask."""
    groups = (group for rule in spec.rules for group in rule.selection.groups)
    return {member.tensor for group in groups for member in group.members if member.unmasked}


def _names(rule: Rule) -> set[str]:
    """The names and globs of the tensors that a rule prunes, or ranks by."""
    selection = rule.message.selection
    members = {member.tensor for group in selection.groups for member in group.members}
    scales = {*selection.scales, *selection.scales.values()}
    arrays = {name for arrays in rule.arrays.values() for name in arrays}
    return {*arrays, *selection.tensors, *rule.message.solver.tensors, *scales, *members}


def _check_calibrated(field: str, rule: Rule, model: Source) -> None:
    """Refuses statistics of weights that the model does not have, as those of another model."""
    given = {name for path in (INPUTS, OUTPUTS, GRAMS) for name in rule.arrays.get(path, ())}
    pruned = (*rule.message.selection.tensors, *rule.message.solver.tensors)
    calibrated = [name for name in pruned if name in given]
    if not calibrated or not model.is_here:
        return
    known = model.prunable_names()
    if missing := [name for name in calibrated if name not in known]:
        near = get_close_matches(missing[0], known, 1, 0)
        raise InvalidSpec(
            f"{field}: the statistics are of {listed(missing, _SHOWN)}, which the model does not "
            f"have{f'; the nearest is {near[0]}' if near else ''}; prune the module that was "
            "calibrated, or name the tensors, or rename the "
            "statistics: secateur.Statistics({name: layer, ...})"
        )


def _fitted(rule: Rule, model: Source) -> Rule:
    """The rule for a model with tied tensors: the server knows one by its first name alone."""
    message = pb.Rule()
    message.CopyFrom(rule.message)
    if message.selection.guard_rails.keep_first or message.selection.guard_rails.keep_last:
        _name_ends(message.selection, model.tied_names())
    names = model.other_names
    return Rule(message, {path: _shared(of, names) for path, of in rule.arrays.items()})


def _name_ends(selection: pb.Selection, names: Mapping[str, str]) -> None:
    """Replaces `keep_first` and `keep_last` by the names of the tensors that they keep."""
    # `names` has every name of a tensor, and the tensor's first name: the last layer of a model may
    # share the weight of the first layer.
    rails = selection.guard_rails
    matched = {known for pattern in selection.tensors for known in _known(pattern, names)}
    if ordered := [name for known, name in names.items() if known in matched]:
        rails.exclude.extend(ordered[:1] * rails.keep_first + ordered[-1:] * rails.keep_last)
        rails.keep_first = rails.keep_last = False


def _known(pattern: str, names: Mapping[str, str]) -> list[str]:
    """The names that a name or a glob matches."""
    return [pattern] if pattern in names else [n for n in names if fnmatchcase(n, pattern)]


def _shared(arrays: Arrays, other_names: Mapping[str, str]) -> Arrays:
    """Makes equal arrays under several names of a tied tensor one array."""
    # The server compares arrays by their names alone, and would refuse two for one tensor.
    first: dict[str, Any] = {}
    shared = {}
    for name, array in arrays.items():
        known = first.setdefault(other_names.get(name, name), array)
        shared[name] = known if known is array or _are_equal(name, known, array) else array
    return shared


def _are_equal(name: str, one: Any, other: Any) -> bool:
    a, b = local_array(name, one), local_array(name, other)
    return (a.dtype, a.shape) == (b.dtype, b.shape) and np.array_equal(a.read(), b.read())
