"""The two functions that make every rule with an amount: `select` and `grouped`."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from secateur.amounts import AnyAmount, amount_of
from secateur.array_files import AnyArrays, arrays_of, files_of
from secateur.checks import dimension, flag, integer, made, one_of, patterns, shown, text_keys
from secateur.choices import (
    AnyGranularity,
    AnyImportance,
    Importance,
    granularity_of,
    importance_of,
    magnitude,
)
from secateur.errors import InvalidSpec
from secateur.factors import Factors, calibrated_names
from secateur.grouping import Groups, example_inputs_of, groups_of
from secateur.literals import Allocation, Combination, Normalization, Scope
from secateur.rails import AnyGuardRails, GuardRails, guard_rails
from secateur.spec import SCORES, Arrays, Rule, Spec
from secateur.tables import listed
from secateur.tensors import is_text
from secateur_proto import spec_pb2 as pb
from secateur_proto.enums import values_by_name

Names = str | Sequence[str]

ALLOCATIONS = values_by_name(pb.Allocation.DESCRIPTOR)
COMBINATIONS = values_by_name(pb.Combination.DESCRIPTOR)
NORMALIZATIONS = values_by_name(pb.Normalization.DESCRIPTOR)
# SCOPE_PER_ROW is "row" here, and SCOPE_PER_TENSOR "tensor".
SCOPES = {
    name.removeprefix("per_"): scope for name, scope in values_by_name(pb.Scope.DESCRIPTOR).items()
}


def select(
    tensors: Names,
    amount: AnyAmount,
    importance: AnyImportance = "magnitude",
    granularity: AnyGranularity = "element",
    scope: Scope = "tensor",
    normalization: Normalization | None = None,
    allocation: Allocation | None = None,
    of_all: bool = False,
    guard_rails: AnyGuardRails | None = None,
    importance_scores: AnyArrays | None = None,
    scales: Mapping[str, str] | None = None,
    row_dims: Mapping[str, int] | None = None,
) -> Spec:
    """Prunes the least important units of tensors, with each choice made by itself.

    Args:
        tensors: See `l1_unstructured`.
        amount: See `l1_unstructured`; or what `threshold`, `target_bytes`, `target_macs` or
            `table` returns.
        importance: What a function of secateur.choices returns, or its name.
        granularity: What a function of secateur.choices returns, or its name.
        scope: Which units are ranked together: those of each output "row" of a tensor, of each
            "tensor", of all tensors ("global"), or of tensors whose names differ in their numbers
            alone ("isomorphic").
        normalization: How each tensor's importances are scaled: "mean", "norm" or "z_score".
        allocation: How a total is divided: by "rank" (None), "uniform", "erk" or "lamp". With the
            scopes "row" and "tensor" how much each layer loses: "owl".
        of_all: Whether the amount is of all units, pruned ones included.
        guard_rails: Bounds on what is pruned of each tensor.
        importance_scores: See `l1_unstructured`; or a score for each unit.
        scales: From a tensor's name to the name of the 1-D tensor of the model that ranks its
            units.
        row_dims: For scope "row": the dimension of the outputs, by name or glob; the first that
            matches a tensor counts. Of other tensors it is 0. With `activation` the default is 1
            for weights whose inputs lie along dimension 0, as in transposed layers and the Conv1D
            of transformers.
    """
    chosen = importance_of(importance)
    names = patterns(tensors)
    if chosen.factors is not None:
        names = calibrated_names(chosen.factors.statistics, names)
        if scope == "row" and row_dims is None:
            row_dims = dict.fromkeys(chosen.factors.by_input_dim(names).get(0, ()), 1)
    return _selection(
        amount,
        chosen,
        importance_scores,
        names,
        tensors=names,
        scales=_name_map("scales", scales),
        allocation=_named("allocation", allocation, ALLOCATIONS),
        row_dims=_row_dims(row_dims),
        **granularity_of(granularity).fields,
        **_ranking(scope, normalization, of_all, guard_rails),
    )


def grouped(
    groups: Groups,
    amount: AnyAmount,
    p: float = 1,
    combination: Combination = "mean",
    normalization: Normalization | None = None,
    scope: Scope = "global",
    of_all: bool = False,
    guard_rails: AnyGuardRails | None = None,
    importance: AnyImportance = "magnitude",
    importance_scores: AnyArrays | None = None,
    align: int | None = None,
) -> Spec:
    """Prunes units of groups: slices of several tensors that are pruned together.

    Args:
        groups: What `group`, `head_groups` or `query_head_groups` returns.
        amount: See `select`.
        p: The order of the norm that ranks a member's part of a unit.
        combination: How the members' norms become the unit's importance: "mean", "sum" or "max".
        normalization: See `select`.
        scope: Whether all groups are ranked together ("global") or each by itself ("tensor").
        of_all: See `select`.
        guard_rails: See `select`.
        importance: "magnitude" by p, "random", or what `activation` returns. Then members without
            statistics, such as biases, do not count.
        importance_scores: Arrays with a score for each unit, by the groups' names; or the path of a
            file of them.
        align: Each group keeps a multiple of this many units; 1 is any number. None is 1, and with
            output="shrunk" a multiple of up to 16 that suits the group's size.
    """
    if isinstance(importance, str) and importance == "magnitude":
        importance = magnitude(p)
    chosen, messages = importance_of(importance), groups_of(groups)
    scored: list[str] = []
    if chosen.factors is not None:
        messages, scored = _scored_groups(chosen.factors, messages)
    spec = _selection(
        amount,
        chosen,
        importance_scores,
        scored,
        groups=messages,
        granularity=pb.GRANULARITY_GROUP,
        combination=one_of("combination", combination, COMBINATIONS),
        align=0 if align is None else integer("align", align, 1, 4097),
        **_ranking(scope, normalization, of_all, guard_rails),
    )
    return Spec((replace(spec.rules[0], example_inputs=example_inputs_of(groups)),))


def _selection(
    amount: AnyAmount,
    importance: Importance,
    scores: AnyArrays | None,
    scored: Sequence[str],
    **choices: Any,
) -> Spec:
    """The spec of one Selection.

    Args:
        amount: As of `select`.
        importance: How units are scored.
        scores: As of `select`.
        scored: The names of the tensors that factors of the importance are sent for.
        choices: The other fields.
    """
    given = {} if scores is None else arrays_of("importance_scores", scores)
    fields = {**choices, **importance.fields, **amount_of(amount).fields}
    arrays: dict[str, Arrays] = {SCORES: given}
    files: dict[str, Any] = files_of("importance_scores", scores)
    if importance.factors is not None:
        arrays |= importance.factors.arrays(scored)
        files |= {**importance.factors.files, "power": importance.factors.power}
    return Spec((Rule(pb.Rule(selection=pb.Selection(**fields)), arrays, files=files),))


def _row_dims(value: Mapping[str, int] | None) -> list[pb.RowDim]:
    dims = {} if value is None else text_keys("row_dims", value, "names or globs to dimensions")
    return [pb.RowDim(tensors=name, dim=dimension(dim, "row_dims")) for name, dim in dims.items()]


def _scored_groups(
    factors: Factors, groups: Sequence[pb.Group]
) -> tuple[list[pb.Group], list[str]]:
    """Groups whose members count if they have statistics, and the names of these."""
    found, scored = [], dict[str, None]()
    for given in groups:
        one = pb.Group()
        one.CopyFrom(given)
        for part in one.members:
            part.unscored |= not part.unmasked and part.tensor not in factors.statistics
        names = [m.tensor for m in one.members if not (m.unscored or m.unmasked)]
        if not names:
            members = [member.tensor for member in one.members]
            raise InvalidSpec(
                f"groups: no member of {given.name!r} has statistics ({listed(members, 3)}); "
                "calibrate their layers"
            )
        scored |= dict.fromkeys(names)
        found.append(one)
    return found, list(scored)


def _ranking(
    scope: str, normalization: str | None, of_all: bool, rails: AnyGuardRails | None
) -> dict[str, Any]:
    """The fields that selections of all granularities have."""
    bounds = None if rails is None else made("guard_rails", rails, GuardRails, guard_rails).message
    return {
        "scope": one_of("scope", scope, SCOPES),
        "normalization": _named("normalization", normalization, NORMALIZATIONS),
        "of_all": flag("of_all", of_all),
        "guard_rails": bounds,
    }


def _named(field: str, value: str | None, known: Mapping[str, int]) -> int | None:
    return None if value is None else one_of(field, value, known)


def _name_map(field: str, value: Mapping[str, str] | None) -> dict[str, str]:
    named = {} if value is None else text_keys(field, value, "names to names")
    if not all(map(is_text, named.values())):
        raise InvalidSpec(f"{field}: {shown(value)} is not a mapping from names to names")
    return dict(named)
