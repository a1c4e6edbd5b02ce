"""The methods that make specs: those of torch.nn.utils.prune, and others in their manner."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from secateur.amounts import AnyAmount, amount_of
from secateur.checks import flag, made, one_of, patterns, shown, text_keys
from secateur.choices import (
    AnyGranularity,
    AnyImportance,
    blocks,
    granularity_of,
    importance_of,
    magnitude,
    n_m,
    norm,
    random,
    slices,
)
from secateur.errors import InvalidSpec, InvalidStateDict
from secateur.groups import Groups, groups_of
from secateur.mask_files import read_masks
from secateur.paths import source_path
from secateur.rails import AnyGuardRails, GuardRails, guard_rails
from secateur.spec import METHODS, Arrays, Rule, Spec
from secateur.tensors import is_text
from secateur_proto import spec_pb2 as pb
from secateur_proto.enums import values_by_name

Names = str | Sequence[str]

_ALLOCATIONS = values_by_name(pb.Allocation.DESCRIPTOR)
_COMBINATIONS = values_by_name(pb.Combination.DESCRIPTOR)
_NORMALIZATIONS = values_by_name(pb.Normalization.DESCRIPTOR)
# SCOPE_PER_ROW is "row" here, and SCOPE_PER_TENSOR "tensor".
_SCOPES = {
    name.removeprefix("per_"): scope for name, scope in values_by_name(pb.Scope.DESCRIPTOR).items()
}


def identity(tensors: Names) -> Spec:
    """Prunes nothing, but gives tensors a mask: torch.nn.utils.prune.identity.

    Args:
        tensors: As of `l1_unstructured`.
    """
    return l1_unstructured(tensors, 0)


def l1_unstructured(
    tensors: Names, amount: AnyAmount, importance_scores: Arrays | None = None
) -> Spec:
    """Prunes the elements with the lowest |w| of each tensor.

    As torch.nn.utils.prune.l1_unstructured.

    Args:
        tensors: A name, a glob, or a list of them.
        amount: An int is a number of elements, a float in [0, 1] the fraction of those that are
            still unpruned.
        importance_scores: Arrays of the tensors' shapes, by the tensors' names; their absolute
            values rank in place of the weights'.

    Raises:
        InvalidSpec: An argument cannot be sent.
    """
    return _selection(patterns(tensors), amount, importance_scores, magnitude=pb.Magnitude())


def random_unstructured(tensors: Names, amount: AnyAmount, seed: int = 0) -> Spec:
    """Prunes random elements of each tensor: torch.nn.utils.prune.random_unstructured.

    Args:
        tensors: As of `l1_unstructured`.
        amount: As of `l1_unstructured`.
        seed: In [0, 2^64). The same seed prunes the same elements on every machine.
    """
    return _selection(patterns(tensors), amount, **random(seed).fields)


def ln_structured(
    tensors: Names,
    amount: AnyAmount,
    n: float | str,
    dim: int,
    importance_scores: Arrays | None = None,
) -> Spec:
    """Prunes the slices with the lowest Ln norm of each tensor: torch.nn.utils.prune.ln_structured.

    Args:
        tensors: As of `l1_unstructured`.
        amount: As of `l1_unstructured`, of slices.
        n: A number, inf or -inf; "fro"; or "nuc" for tensors of 3 dimensions.
        dim: The dimension of the slices; negative counts from the end.
        importance_scores: As of `l1_unstructured`.
    """
    fields = {**norm("n", n).fields, **slices(dim).fields}
    return _selection(patterns(tensors), amount, importance_scores, **fields)


def random_structured(tensors: Names, amount: AnyAmount, dim: int, seed: int = 0) -> Spec:
    """Prunes random slices of each tensor: torch.nn.utils.prune.random_structured.

    Args:
        tensors: As of `l1_unstructured`.
        amount: As of `ln_structured`.
        dim: As of `ln_structured`.
        seed: As of `random_unstructured`.
    """
    return _selection(patterns(tensors), amount, **random(seed).fields, **slices(dim).fields)


def global_unstructured(
    tensors: Names,
    amount: AnyAmount,
    importance: str = "l1",
    seed: int = 0,
    importance_scores: Arrays | None = None,
) -> Spec:
    """Prunes elements ranked over all tensors: torch.nn.utils.prune.global_unstructured.

    Args:
        tensors: As of `l1_unstructured`.
        amount: As of `l1_unstructured`, of all tensors.
        importance: "l1", or "random".
        seed: As of `random_unstructured`.
        importance_scores: As of `l1_unstructured`; not with "random".
    """
    ranks = {"l1": magnitude(), "random": random(seed)}
    by = one_of("importance", importance, ranks)
    return select(tensors, amount, by, scope="global", importance_scores=importance_scores)


def custom_from_mask(masks: Arrays | str | os.PathLike[str]) -> Spec:
    """Prunes by the caller's masks: torch.nn.utils.prune.custom_from_mask.

    Args:
        masks: Arrays of the tensors' shapes, by the tensors' names, where 0 is pruned and 1 is
            kept; or the path of a file of them: what result.save(path, "masks") wrote, or
            .safetensors, .pt or .npz.
    """
    if isinstance(masks, str | os.PathLike):
        try:
            masks = read_masks(source_path(masks, InvalidStateDict))
        except InvalidStateDict as error:
            raise InvalidSpec(f"masks: {error}") from None
    masks = text_keys("masks", masks, "names to masks")
    return Spec((Rule(pb.Rule(custom_masks=pb.CustomMasks()), dict(masks)),))


def select(
    tensors: Names,
    amount: AnyAmount,
    importance: AnyImportance = "magnitude",
    granularity: AnyGranularity = "element",
    scope: str = "tensor",
    normalization: str | None = None,
    allocation: str | None = None,
    of_all: bool = False,
    guard_rails: AnyGuardRails | None = None,
    importance_scores: Arrays | None = None,
    scales: Mapping[str, str] | None = None,
) -> Spec:
    """Prunes the least important units of tensors, with each choice made by itself.

    Args:
        tensors: As of `l1_unstructured`.
        amount: As of `l1_unstructured`, or what `threshold`, `target_bytes`, `target_macs` or
            `table` returns.
        importance: What a function of secateur.choices returns, or its name.
        granularity: What a function of secateur.choices returns, or its name.
        scope: Which units are ranked together: those of each output "row" of a tensor, of each
            "tensor", of all tensors ("global"), or of tensors whose names differ in their numbers
            alone ("isomorphic").
        normalization: Of each tensor's importances: "mean", "norm" or "z_score".
        allocation: How a total is divided: by "rank" (None), "uniform", "erk" or "lamp".
        of_all: Whether the amount is of all units, pruned ones included.
        guard_rails: Bounds on what is pruned of each tensor.
        importance_scores: As of `l1_unstructured`, or with a score for each unit.
        scales: From a tensor's name to the name of the 1-D tensor of the model that ranks its
            units.
    """
    return _selection(
        patterns(tensors),
        amount,
        importance_scores,
        scales=_name_map("scales", scales),
        allocation=_named("allocation", allocation, _ALLOCATIONS),
        **importance_of(importance).fields,
        **granularity_of(granularity).fields,
        **_ranking(scope, normalization, of_all, guard_rails),
    )


def grouped(
    groups: Groups,
    amount: AnyAmount,
    p: float = 1,
    combination: str = "mean",
    normalization: str | None = None,
    scope: str = "global",
    of_all: bool = False,
    guard_rails: AnyGuardRails | None = None,
    importance: AnyImportance = "magnitude",
    importance_scores: Arrays | None = None,
) -> Spec:
    """Prunes units of groups: slices of several tensors that are pruned together.

    Args:
        groups: What `group`, `head_groups` or `query_head_groups` returns.
        amount: As of `select`.
        p: The order of the norm that ranks a member's part of a unit.
        combination: How the members' norms become the unit's importance: "mean", "sum" or "max".
        normalization: As of `select`.
        scope: Whether all groups are ranked together ("global") or each by itself ("tensor").
        of_all: As of `select`.
        guard_rails: As of `select`.
        importance: "magnitude" by p, or "random".
        importance_scores: Arrays with a score for each unit, by the groups' names.
    """
    if isinstance(importance, str) and importance == "magnitude":
        importance = magnitude(p)
    return _selection(
        (),
        amount,
        importance_scores,
        groups=groups_of(groups),
        granularity=pb.GRANULARITY_GROUP,
        combination=one_of("combination", combination, _COMBINATIONS),
        **importance_of(importance).fields,
        **_ranking(scope, normalization, of_all, guard_rails),
    )


def n_m_structured(tensors: Names, n: int = 2, m: int = 4, dim: int = 1) -> Spec:
    """Keeps n of each m elements: the N:M sparsity of sparse tensor cores.

    Args:
        tensors: As of `l1_unstructured`.
        n: As of `n_m`.
        m: As of `n_m`.
        dim: As of `n_m`.
    """
    return select(tensors, 1.0, granularity=n_m(n, m, dim))


def block_structured(tensors: Names, amount: AnyAmount, rows: int, cols: int, n: float = 1) -> Spec:
    """Prunes the blocks with the lowest Ln norm of each tensor.

    Args:
        tensors: As of `l1_unstructured`.
        amount: As of `l1_unstructured`, of blocks.
        rows: As of `blocks`.
        cols: As of `blocks`.
        n: As of `ln_structured`.
    """
    return select(tensors, amount, magnitude(n), blocks(rows, cols))


def global_structured(tensors: Names, amount: AnyAmount, n: float, dim: int) -> Spec:
    """Prunes the slices with the lowest power mean of order n, ranked over all tensors.

    Args:
        tensors: As of `l1_unstructured`.
        amount: As of `ln_structured`, of all tensors.
        n: A number, inf or -inf.
        dim: As of `ln_structured`.
    """
    return select(tensors, amount, magnitude(n), slices(dim), scope="global")


def lamp(tensors: Names, amount: AnyAmount) -> Spec:
    """Prunes elements by layer-adaptive magnitude over all tensors: Lee et al. 2021.

    Args:
        tensors: As of `l1_unstructured`.
        amount: As of `global_unstructured`.
    """
    return select(tensors, amount, scope="global", allocation="lamp")


def erk(tensors: Names, amount: AnyAmount) -> Spec:
    """Prunes elements by |w|, each tensor by its Erdos-Renyi-Kernel share: Evci et al. 2020.

    Args:
        tensors: As of `l1_unstructured`.
        amount: As of `global_unstructured`.
    """
    return select(tensors, amount, scope="global", allocation="erk")


METHODS.update(
    (method.__name__, method)
    for method in (
        identity,
        l1_unstructured,
        random_unstructured,
        ln_structured,
        random_structured,
        global_unstructured,
        custom_from_mask,
        n_m_structured,
        block_structured,
        global_structured,
        lamp,
        erk,
        select,
        grouped,
    )
)


def _selection(
    tensors: Sequence[str], amount: AnyAmount, scores: Arrays | None = None, **choices: Any
) -> Spec:
    """The spec of one Selection; `choices` are its other fields."""
    arrays = {} if scores is None else text_keys("importance_scores", scores, "names to arrays")
    defaults = {"granularity": pb.GRANULARITY_ELEMENT, "scope": pb.SCOPE_PER_TENSOR}
    fields = {**defaults, **choices, **amount_of(amount).fields}
    selection = pb.Selection(tensors=tensors, **fields)
    return Spec((Rule(pb.Rule(selection=selection), dict(arrays)),))


def _ranking(
    scope: str, normalization: str | None, of_all: bool, rails: AnyGuardRails | None
) -> dict[str, Any]:
    """The fields that selections of all granularities have."""
    bounds = None if rails is None else made("guard_rails", rails, GuardRails, guard_rails).message
    return {
        "scope": one_of("scope", scope, _SCOPES),
        "normalization": _named("normalization", normalization, _NORMALIZATIONS),
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
