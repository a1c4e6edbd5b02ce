"""The texts that arguments take, as types: a type checker finds a wrong one.

A result has the type of its output, as in PruneResult[Literal["dense"]], so that a type checker
also finds what the output does not have. Without it, PruneResult may be of any output.
"""

from typing import TYPE_CHECKING, Any, Literal, TypeVar

Allocation = Literal["rank", "uniform", "erk", "lamp", "owl"]
Combination = Literal["mean", "sum", "max"]
Normalization = Literal["none", "mean", "norm", "z_score"]
Prior = Literal["masks", "zeros"]
RankedBy = Literal["l1", "random"]
RowScope = Literal["tensor", "row"]
Scope = Literal["tensor", "global", "isomorphic", "row"]

Output = Literal["masks", "reparametrized", "dense", "packed", "shrunk", "none"]
FinalOutput = Literal["dense", "packed", "shrunk"]

# The outputs that have data, those that have masks, and the default.
Form = Literal["masks", "reparametrized", "dense", "packed", "shrunk"]
Masked = Literal["masks", "reparametrized"]
Masks = Literal["masks"]
Shrunk = Literal["shrunk"]

if TYPE_CHECKING:
    # typing's own has no defaults before Python 3.13.
    from typing_extensions import TypeVar as _TypeVar

    Of = _TypeVar("Of", bound=str, covariant=True, default=Any)
else:
    Of = TypeVar("Of")

Out = TypeVar("Out", bound=Output)
