"""Turns rules into plain data, from which Spec.from_dict makes equal rules."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from secateur.choices import MATRIX_NORMS
from secateur.errors import InvalidSpec
from secateur.spec import GRAMS, INPUTS, MASKS, OUTPUTS, SCORES, Rule
from secateur_proto import spec_pb2 as pb
from secateur_proto.enums import plain_name

Plain = dict[str, Any]

# The arguments that arrays come from.
_ARGUMENTS = {
    **{MASKS: "masks", SCORES: "importance_scores"},
    **dict.fromkeys((INPUTS, OUTPUTS, GRAMS), "statistics"),
}


def plain_spec(rules: Sequence[Rule]) -> Plain:
    """Returns rules as `Spec.from_dict` takes them.

    Raises:
        InvalidSpec: A rule has arrays that are in memory only.
    """
    return {"rules": [_rule(f"rules[{index}]", rule) for index, rule in enumerate(rules)]}


def _rule(path: str, rule: Rule) -> Plain:
    for field, arrays in rule.arrays.items():
        if arrays and _ARGUMENTS[field] not in rule.files:
            raise InvalidSpec(
                f"{path}.{_ARGUMENTS[field]}: {len(arrays)} arrays are in memory only; save them, "
                "and make the rule with the path of their file"
            )
    return _METHODS[str(rule.message.WhichOneof("method"))](rule)


def _masks(rule: Rule) -> Plain:
    return {"method": "custom_from_mask", "masks": rule.files["masks"]}


def _solver(rule: Rule) -> Plain:
    solver = rule.message.solver
    name = str(solver.WhichOneof("method"))
    method = getattr(solver, name)
    plain = {"method": name, "tensors": list(solver.tensors)}
    if amount := solver.WhichOneof("amount"):
        value = getattr(solver, amount)
        plain |= {"n_m": [value.n, value.m]} if amount == "pattern" else {"amount": value}
    plain["statistics"] = rule.files["statistics"]
    plain |= {of.name: value for of, value in method.ListFields()}
    return plain | ({"scope": _scope(solver.scope)} if solver.scope else {})


def _selection(rule: Rule) -> Plain:
    selection, files = rule.message.selection, rule.files
    scores = {k: v for k, v in files.items() if k == "importance_scores"}
    if selection.granularity == pb.GRANULARITY_GROUP:
        plain = {"method": "grouped", "groups": [*map(_group, selection.groups)]}
        combination = plain_name(pb.Combination.DESCRIPTOR, selection.combination)
        plain |= {"amount": _amount(selection), **_unless("combination", combination, "mean")}
        plain |= _importance(selection, files, is_grouped=True) | _ranking(selection, "global")
        return plain | scores | _given("align", selection.align)
    plain = {"tensors": list(selection.tensors), "amount": _amount(selection)}
    by_norm = selection.WhichOneof("importance") == "magnitude"
    if by_norm and not selection.magnitude.WhichOneof("norm"):
        only = pb.Selection(tensors=selection.tensors, magnitude=selection.magnitude)
        _copy_amount(selection, only)
        only.granularity, only.scope = pb.GRANULARITY_ELEMENT, pb.SCOPE_PER_TENSOR
        if selection == only:
            return {"method": "l1_unstructured", **plain, **scores}
    plain = {"method": "select", **plain, **_importance(selection, files, is_grouped=False)}
    plain |= _unless("granularity", _GRANULARITIES[selection.granularity](selection), "element")
    plain |= _ranking(selection, "tensor") | scores | _given("scales", dict(selection.scales))
    if selection.allocation:
        plain["allocation"] = plain_name(pb.Allocation.DESCRIPTOR, selection.allocation)
    return plain | _given("row_dims", {of.tensors: of.dim for of in selection.row_dims})


_METHODS: dict[str, Callable[[Rule], Plain]] = {
    "selection": _selection,
    "custom_masks": _masks,
    "solver": _solver,
}


def _copy_amount(one: pb.Selection, other: pb.Selection) -> None:
    kind = str(one.WhichOneof("amount"))
    other.MergeFrom(pb.Selection(**{kind: getattr(one, kind)}))


def _amount(selection: pb.Selection) -> Any:
    kind = str(selection.WhichOneof("amount"))
    value = getattr(selection, kind)
    return _AMOUNTS[kind](value) if kind in _AMOUNTS else value


_AMOUNTS: dict[str, Callable[[Any], Plain]] = {
    "threshold": lambda value: {"threshold": {"value": value}},
    "bytes": lambda n: {"target_bytes": {"n": n}},
    "macs": lambda of: {"target_macs": {"target": of.target, "per_unit": dict(of.per_unit)}},
    "table": lambda table: {
        "table": {"fractions": {of.tensors: of.fraction for of in table.entries}}
    },
}


def _importance(selection: pb.Selection, files: Mapping[str, Any], is_grouped: bool) -> Plain:
    kind = str(selection.WhichOneof("importance"))
    value = getattr(selection, kind)
    if kind == "random":
        return {"importance": {"random": {"seed": value.seed}}}
    if kind == "activation":
        arguments = {"p": value.p, "power": files["power"], "relative": value.is_relative}
        return {"importance": {"activation": {"statistics": files["statistics"], **arguments}}}
    p = value.p if value.HasField("p") else _NORMS.get(value.matrix_norm, 1)
    if is_grouped:
        return _unless("p", p, 1)
    return {} if p == 1 else {"importance": {"magnitude": {"p": p}}}


_NORMS = {number: name for name, number in MATRIX_NORMS.items()}


def _ranking(selection: pb.Selection, default_scope: str) -> Plain:
    plain = _unless("scope", _scope(selection.scope), default_scope)
    if selection.normalization:
        plain["normalization"] = plain_name(pb.Normalization.DESCRIPTOR, selection.normalization)
    plain |= _given("of_all", selection.of_all)
    if selection.HasField("guard_rails"):
        plain["guard_rails"] = _guard_rails(selection.guard_rails)
    return plain


def _guard_rails(rails: pb.GuardRails) -> Plain:
    named = {rail.tensors[0]: _rail(rail) for rail in rails.rails if rail.tensors}
    plain = {name: v for rail in rails.rails if not rail.tensors for name, v in _rail(rail).items()}
    plain |= _given("keep_first", rails.keep_first) | _given("keep_last", rails.keep_last)
    return plain | _given("exclude", list(rails.exclude)) | _given("per_tensor", named)


def _rail(rail: pb.Rail) -> Plain:
    return {of.name: value for of, value in rail.ListFields() if of.name != "tensors"}


def _group(group: pb.Group) -> Plain:
    return {"name": group.name, "members": [*map(_member, group.members)]}


def _member(member: pb.Member) -> Plain:
    plain = {"tensor": member.tensor, **_given("dim", member.dim), **_given("units", member.units)}
    if member.indices:
        plain["indices"] = list(member.indices)
    else:
        plain |= _given("offset", member.offset) | _unless("stride", member.stride or 1, 1)
    flags = {"scored": not member.unscored, "masked": not member.unmasked}
    return plain | {name: False for name, is_on in flags.items() if not is_on}


def _scope(scope: int) -> str:
    return plain_name(pb.Scope.DESCRIPTOR, scope).removeprefix("per_")


def _block(selection: pb.Selection) -> Plain:
    shape = list(selection.block.shape)
    if selection.block.as_matrix:
        return {"blocks": {"rows": shape[0], "cols": shape[1]}}
    return {"blocks_of": {"shape": shape}}


_GRANULARITIES: dict[int, Callable[[pb.Selection], Any]] = {
    pb.GRANULARITY_ELEMENT: lambda _: "element",
    pb.GRANULARITY_SLICE: lambda given: {"slices": {"dim": given.dim}},
    pb.GRANULARITY_N_M: lambda given: {
        "n_m": {"n": given.pattern.n, "m": given.pattern.m, "dim": given.dim}
    },
    pb.GRANULARITY_BLOCK: _block,
}


def _given(name: str, value: Any) -> Plain:
    """An argument, unless its value is the default of its field."""
    return {name: value} if value else {}


def _unless(name: str, value: Any, default: Any) -> Plain:
    return {} if value == default else {name: value}
