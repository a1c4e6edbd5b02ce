"""The choices of a rule that say how important a unit is, and what is one unit.

In plain data, as a spec file has it, a choice is the name of one of these functions, or a mapping
with one entry from the name to the function's arguments.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from secateur.array_files import files_of
from secateur.checks import UINT32, chosen, dimension, flag, integer, integers, number, shown
from secateur.errors import InvalidSpec
from secateur.factors import AnyStatistics, Factors, statistics_of
from secateur_proto import spec_pb2 as pb

Plain = Mapping[str, Any]

# The names are those of torch.linalg.
MATRIX_NORMS = {"fro": pb.MATRIX_NORM_FROBENIUS, "nuc": pb.MATRIX_NORM_NUCLEAR}


@dataclass(frozen=True)
class Chosen:
    """A choice of a rule.

    Attributes:
        fields: The fields of the message Selection that it sets.
    """

    fields: Plain


@dataclass(frozen=True)
class Importance(Chosen):
    """How important a unit is.

    Attributes:
        factors: What the arrays that a rule sends with it are computed from, if it needs any.
    """

    factors: Factors | None = None


class Granularity(Chosen):
    """What is pruned as one unit."""


AnyImportance = Importance | str | Plain
AnyGranularity = Granularity | str | Plain


def magnitude(p: float | str = 1) -> Importance:
    """Ranks units by their norm; elements by their absolute value.

    Args:
        p: The order of the norm: a number, inf or -inf; "fro"; or "nuc" for slices of tensors of
            3 dimensions.
    """
    return norm("p", p)


def norm(field: str, value: Any) -> Importance:
    """Does what `magnitude` does, for an argument of another name."""
    if isinstance(value, str):
        if value not in MATRIX_NORMS:
            raise InvalidSpec(f"{field}: {shown(value)} is not a number, 'fro' or 'nuc'")
        return Importance({"magnitude": pb.Magnitude(matrix_norm=MATRIX_NORMS[value])})
    return Importance({"magnitude": pb.Magnitude(p=number(field, value))})


def random(seed: int = 0) -> Importance:
    """Ranks units at random.

    Args:
        seed: In [0, 2^64). The same seed prunes the same units on every machine.
    """
    return Importance({"random": pb.Random(seed=integer("seed", seed))})


def activation(
    statistics: AnyStatistics, p: float = 1, power: float = 1, relative: bool = False
) -> Importance:
    """Ranks elements by |w|^p times the root mean square of their input, to a power.

    Larger units have the mean of their elements' importances. A rule's names and globs mean weights
    that have statistics: globs neither biases nor embeddings.

    Args:
        statistics: What `calibrate` returns, or the path of a file of it.
        p: The exponent of |w|, above 0.
        power: The exponent of the root mean square, 0 or more.
        relative: Whether |w| is its share of the sum of |w| over its row, plus its share of that
            over its column.
    """
    order, exponent = number("p", p), number("power", power)
    if not 0 < order < math.inf:
        raise InvalidSpec(f"p: {p} is not above 0, and finite")
    if not 0 <= exponent < math.inf:
        raise InvalidSpec(f"power: {power} is not 0 or more, and finite")
    message = pb.Activation(p=order, is_relative=flag("relative", relative))
    files = files_of("statistics", statistics)
    return Importance({"activation": message}, Factors(statistics_of(statistics), exponent, files))


def element() -> Granularity:
    """Makes each element a unit."""
    return Granularity({"granularity": pb.GRANULARITY_ELEMENT})


def slices(dim: int = 0) -> Granularity:
    """Makes all elements with the same index in a dimension a unit.

    Args:
        dim: The dimension; negative counts from the end.
    """
    return Granularity({"granularity": pb.GRANULARITY_SLICE, "dim": dimension(dim)})


def rows() -> Granularity:
    """Makes each row of a matrix a unit: slices(0)."""
    return slices(0)


def filters() -> Granularity:
    """Makes each filter of a convolution a unit, so all of one output channel: slices(0)."""
    return slices(0)


def columns() -> Granularity:
    """Makes each column a unit; the tensor is a matrix of its first dimension and all others."""
    return blocks(0, 1)


def heads(head_dim: int) -> Granularity:
    """Makes each attention head of a matrix a unit: a block of whole rows.

    Args:
        head_dim: Rows of a head.
    """
    return blocks(integer("head_dim", head_dim), 0)


def kernels(dims: int = 4) -> Granularity:
    """Makes all elements of one filter and one input channel of a convolution a unit.

    Args:
        dims: Dimensions of the tensor, 3 or more; a Conv2d has 4.
    """
    return blocks_of([1, 1, *[0] * (integer("dims", dims, 3, 65) - 2)])


def blocks(rows: int, cols: int) -> Granularity:
    """Makes blocks of a matrix the units; the matrix has the first dimension and all others.

    At the end of a dimension that a length does not divide, blocks are smaller.

    Args:
        rows: Rows of a block; 0 is all.
        cols: Columns of a block; 0 is all.
    """
    shape = [integer("rows", rows), integer("cols", cols)]
    return Granularity(
        {"granularity": pb.GRANULARITY_BLOCK, "block": pb.Block(shape=shape, as_matrix=True)}
    )


def blocks_of(shape: Sequence[int]) -> Granularity:
    """Makes blocks of the tensor's own dimensions the units.

    Args:
        shape: A length for each dimension, as of `blocks`.
    """
    block = pb.Block(shape=integers("shape", shape))
    return Granularity({"granularity": pb.GRANULARITY_BLOCK, "block": block})


def n_m(n: int = 2, m: int = 4, dim: int = 1) -> Granularity:
    """Keeps at most n of each m elements; an amount of 1.0 is the pattern of sparse tensor cores.

    Args:
        n: In [1, m).
        m: At most 1024.
        dim: The dimension along which the m elements lie.
    """
    pattern = pb.Pattern(n=integer("n", n, end=UINT32), m=integer("m", m, end=UINT32))
    return Granularity(
        {"granularity": pb.GRANULARITY_N_M, "pattern": pattern, "dim": dimension(dim)}
    )


IMPORTANCES: dict[str, Callable[..., Importance]] = {
    make.__name__: make for make in (magnitude, random, activation)
}
GRANULARITIES: dict[str, Callable[..., Granularity]] = {
    make.__name__: make
    for make in (element, slices, rows, columns, filters, heads, kernels, blocks, blocks_of, n_m)
}


def importance_of(value: Any) -> Importance:
    """Returns an importance, given itself or as plain data."""
    return chosen("importance", value, Importance, IMPORTANCES)


def granularity_of(value: Any) -> Granularity:
    """Returns a granularity, given itself or as plain data."""
    return chosen("granularity", value, Granularity, GRANULARITIES)
