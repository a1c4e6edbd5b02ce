"""The methods that update the weights which are kept, from Gram matrices of calibration."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from secateur.amounts import AnyAmount, pattern_of, units_of
from secateur.array_files import files_of
from secateur.calibration.statistics import Statistics
from secateur.calibration.triangle import Triangle
from secateur.checks import integer, number, one_of, patterns, shown
from secateur.errors import FewInputs, InvalidSpec
from secateur.factors import AnyStatistics, calibrated_names, statistics_of
from secateur.literals import RowScope
from secateur.selections import Names
from secateur.spec import GRAMS, METHODS, Rule, Spec
from secateur.tables import listed
from secateur_proto import spec_pb2 as pb

# Names in a warning.
_SHOWN = 3

_SCOPES = {"tensor": pb.SCOPE_PER_TENSOR, "row": pb.SCOPE_PER_ROW}


def refit(tensors: Names, statistics: AnyStatistics, damping: float = 1e-4) -> Spec:
    """Gives the kept weights the values that change the layers' outputs least.

    It is for the masks that the rules before it make: `l1_unstructured(...) + refit(...)`. For
    each row it minimises ||X (w - w')||^2 over the kept weights w'; w are the weights as they came.
    The result has other weights, so ask for output="dense" or "reparametrized".

    Args:
        tensors: Names or globs of calibrated weights. Globs mean those with a Gram matrix.
        statistics: From `calibrate(..., gram=True)`, or the path of its file.
        damping: Is added to the diagonal of X^T X, times its mean.

    Raises:
        InvalidSpec: An argument is wrong.
        InvalidStatistics: A weight has no Gram matrix.

    Warns:
        FewInputs: The calibration had fewer inputs than a layer has channels.
    """
    return _solver(tensors, statistics, refit=pb.Refit(damping=_damping(damping)))


def sparsegpt(
    tensors: Names,
    amount: AnyAmount | None,
    statistics: AnyStatistics,
    n_m: Sequence[int] | None = None,
    damping: float = 0.01,
    block_size: int = 128,
) -> Spec:
    """Prunes each layer column by column, and makes up for it: SparseGPT, Frantar & Alistarh 2023.

    Args:
        tensors: See `refit`.
        amount: Of each layer: an int is a number of weights, a float a fraction. None with `n_m`.
        statistics: See `refit`.
        n_m: Keeps n of each m weights of a row, such as (2, 4), in place of an amount.
        damping: See `refit`.
        block_size: Columns that are pruned at once, at most 4096.

    Raises:
        InvalidSpec: See `refit`.
    """
    method = pb.SparseGpt(
        damping=_damping(damping), block_size=integer("block_size", block_size, 1, 4096)
    )
    return _solver(tensors, statistics, sparsegpt=method, **_amount(amount, n_m))


def alps(
    tensors: Names,
    amount: AnyAmount | None,
    statistics: AnyStatistics,
    n_m: Sequence[int] | None = None,
    scope: RowScope = "tensor",
) -> Spec:
    """Prunes each layer by ADMM, then refits it: ALPS, Meng et al. 2024. The best, and the slowest.

    Args:
        tensors: See `refit`.
        amount: See `sparsegpt`.
        statistics: See `refit`.
        n_m: See `sparsegpt`.
        scope: Whether the amount is of each "tensor" or of each "row" of it.

    Raises:
        InvalidSpec: See `refit`.
    """
    fields = _amount(amount, n_m)
    return _solver(
        tensors, statistics, alps=pb.Alps(), scope=one_of("scope", scope, _SCOPES), **fields
    )


def _solver(tensors: Names, statistics: AnyStatistics, **fields: Any) -> Spec:
    """The spec of one Solver."""
    found = statistics_of(statistics)
    names = calibrated_names(found, patterns(tensors), by_gram=True)
    message = pb.Solver(tensors=names, **fields)
    arrays = {name: found.triangle(name) for name in names}
    _warn_of_few(found, arrays)
    for name in names:
        message.grams[name].is_transposed = found[name].input_dim == 0
    files = files_of("statistics", statistics)
    return Spec((Rule(pb.Rule(solver=message), {GRAMS: arrays}, files=files),))


def _warn_of_few(statistics: Statistics, triangles: Mapping[str, Triangle]) -> None:
    """Warns of Gram matrices of fewer inputs than they have rows: their rank is too low."""
    few = [name for name, triangle in triangles.items() if statistics[name].count < triangle.size]
    if few:
        first = few[0]
        warnings.warn(
            f"{listed(few, _SHOWN)}: too few inputs: {statistics[first].count:,.0f} of "
            f"{triangles[first].size:,} channels{' of the first' if len(few) > 1 else ''}, so that "
            "the weights are fitted to these inputs alone; calibrate on several inputs for each "
            "channel, or use `wanda`",
            FewInputs,
            stacklevel=4,
        )


def _amount(amount: AnyAmount | None, n_m: Sequence[int] | None) -> dict[str, Any]:
    """The fields of an amount, or of a pattern."""
    pattern = pattern_of(amount, n_m)
    if pattern is None:
        return units_of("amount", amount)
    n, m = pattern
    return {"pattern": pb.Pattern(n=n, m=m)}


def _damping(value: float) -> float:
    if not (found := number("damping", value)) >= 0:
        raise InvalidSpec(f"damping: {shown(value)} is negative")
    return found


METHODS.update((method.__name__, method) for method in (refit, sparsegpt, alps))
