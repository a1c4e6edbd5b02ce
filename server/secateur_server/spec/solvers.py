"""The kinds of rules that update weights: each decodes its own message, and calls its solver.

A new kind is a file of solvers/, a class here, and a line in SOLVERS.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from secateur_proto import spec_pb2 as pb
from secateur_server.errors import AmountOutOfRange, InvalidSpec, quote
from secateur_server.fields import chosen, fraction_of
from secateur_server.runtime.context import RequestContext
from secateur_server.solvers.alps import alps
from secateur_server.solvers.amounts import Amount, EachRow, Layer, Pattern
from secateur_server.solvers.refit import refit
from secateur_server.solvers.sparsegpt import sparsegpt

# As Selection and Pattern in spec.proto list them.
MOST_OF_PATTERN, MOST_COLUMNS, MOST_BLOCK = 1024, 1 << 16, 4096


class Weights(NamedTuple):
    """The weights of a layer as matrices [outputs, inputs].

    Attributes:
        target: As they came, float32.
        now: As the rules before have left them, float32. Pruned elements may have any value.
        kept: Bool: the elements that no mask prunes.
    """

    target: Tensor
    now: Tensor
    kept: Tensor


class Solver(Protocol):
    """Updates the kept weights of a layer. A kind inherits what it does not define itself."""

    # Bytes that it takes for each element of a weight, beside the weight; measured.
    element_bytes: int

    @property
    def is_pruning(self) -> bool:
        """Whether it prunes elements. Others only update weights."""
        return True

    @property
    def is_meant_whole(self) -> bool:
        """Whether the caller asks to prune whole tensors."""
        return False

    def steps(self, rows: int, inputs: int) -> int:
        """Returns the multiplications for a layer, at most."""
        ...

    def check(self, path: str, name: str, inputs: int) -> None:
        """Refuses a layer that cannot be solved.

        Args:
            path: The path of the rule in the request.
            name: The name of the weight.
            inputs: Columns of the weight.

        Raises:
            InvalidSpec: It cannot be solved.
        """
        return

    def solve(self, context: RequestContext, weights: Weights, gram: Tensor, field: str) -> Weights:
        """Solves a layer.

        Args:
            context: The request.
            weights: Are not written to.
            gram: float32, [inputs, inputs].
            field: The path of the Gram matrix, for errors.

        Returns:
            The weights with the same target.

        Raises:
            InvalidSpec: The Gram matrix is not one, or there are fewer elements than the amount.
        """
        ...


@dataclass(frozen=True)
class Refit(Solver):
    """The best kept weights for the mask."""

    damping: float

    is_pruning = False
    element_bytes = 40

    @classmethod
    def decode(cls, message: pb.Solver, path: str) -> "Refit":
        """Reads `refit`."""
        if message.WhichOneof("amount") or message.scope:
            raise InvalidSpec(f"{path}.amount", "cannot be used with refit, which prunes nothing")
        return cls(_damping(message.refit, 1e-4, f"{path}.refit"))

    def steps(self, rows: int, inputs: int) -> int:
        return 20 * rows * inputs**2

    def solve(self, context: RequestContext, weights: Weights, gram: Tensor, field: str) -> Weights:
        target, now, kept = weights
        if not kept.numel():
            return weights
        found = refit(context, target, now, kept, gram, self.damping, field=field)
        return weights._replace(now=found)


@dataclass(frozen=True)
class PruningSolver(Solver, Protocol):
    """A solver that prunes.

    Attributes:
        amount: What is pruned.
    """

    amount: Amount

    @property
    def is_meant_whole(self) -> bool:
        return _is_all(self.amount)

    def check(self, path: str, name: str, inputs: int) -> None:
        _check_pattern(self.amount, path, name, inputs)

    def solve(self, context: RequestContext, weights: Weights, gram: Tensor, field: str) -> Weights:
        target, now, kept = weights
        _check_count(self.amount, kept, field)
        if not kept.numel():
            return weights
        return Weights(target, *self.prune(context, now, gram, kept, field))

    def prune(
        self, context: RequestContext, now: Tensor, gram: Tensor, kept: Tensor, field: str
    ) -> tuple[Tensor, Tensor]:
        """Returns the new weights and mask of a layer that has elements. As for `solve`."""
        ...


@dataclass(frozen=True)
class SparseGpt(PruningSolver):
    """Prunes column by column.

    Attributes:
        damping: As of Refit.
        block_size: Columns that are pruned at once.
    """

    damping: float
    block_size: int

    element_bytes = 40

    @classmethod
    def decode(cls, message: pb.Solver, path: str) -> "SparseGpt":
        """Reads `sparsegpt`."""
        if message.scope not in (pb.SCOPE_UNSPECIFIED, pb.SCOPE_PER_TENSOR):
            raise InvalidSpec(f"{path}.scope", "sparsegpt needs SCOPE_PER_TENSOR")
        size = message.sparsegpt.block_size or 128
        if size > MOST_BLOCK:
            raise InvalidSpec(f"{path}.sparsegpt.block_size", f"{size} is above {MOST_BLOCK}")
        damping = _damping(message.sparsegpt, 0.01, f"{path}.sparsegpt")
        return cls(_amount(message, path), damping, size)

    def steps(self, rows: int, inputs: int) -> int:
        return inputs**3 + rows * inputs**2

    def prune(
        self, context: RequestContext, now: Tensor, gram: Tensor, kept: Tensor, field: str
    ) -> tuple[Tensor, Tensor]:
        sizes = self.damping, self.block_size
        return sparsegpt(context, now, gram, kept, self.amount, *sizes, field=field)


class Alps(PruningSolver):
    """ADMM, then a refit of its mask."""

    element_bytes = 80

    @classmethod
    def decode(cls, message: pb.Solver, path: str) -> "Alps":
        """Reads `alps`."""
        return cls(_amount(message, path))

    def steps(self, rows: int, inputs: int) -> int:
        return 100 * inputs**3 + 300 * rows * inputs**2

    def prune(
        self, context: RequestContext, now: Tensor, gram: Tensor, kept: Tensor, field: str
    ) -> tuple[Tensor, Tensor]:
        return alps(context, now, gram, kept, self.amount, field=field)


# Each decodes its own field of the message, whose path is for errors.
SOLVERS: dict[str, Callable[[pb.Solver, str], Solver]] = {
    "refit": Refit.decode,
    "sparsegpt": SparseGpt.decode,
    "alps": Alps.decode,
}


def _damping(message: pb.Refit | pb.SparseGpt, default: float, path: str) -> float:
    damping = message.damping if message.HasField("damping") else default
    if not (damping >= 0 and math.isfinite(damping)):
        raise InvalidSpec(f"{path}.damping", f"{damping} is not finite, and 0 or more")
    return damping


def _amount(message: pb.Solver, path: str) -> Amount:
    """Reads the amount and the scope."""
    kind = chosen(message, "amount", path)
    if message.scope not in (pb.SCOPE_UNSPECIFIED, pb.SCOPE_PER_TENSOR, pb.SCOPE_PER_ROW):
        raise InvalidSpec(f"{path}.scope", "a solver needs SCOPE_PER_TENSOR or SCOPE_PER_ROW")
    if kind == "pattern":
        n, m = message.pattern.n, message.pattern.m
        if not 1 <= n < m <= MOST_OF_PATTERN:
            raise InvalidSpec(
                f"{path}.pattern", f"{n}:{m} is not n:m with 1 <= n < m <= {MOST_OF_PATTERN}"
            )
        return Pattern(n, m)
    is_count = kind == "count"
    amount = message.count if is_count else fraction_of(message.fraction, f"{path}.fraction")
    return EachRow(amount) if message.scope == pb.SCOPE_PER_ROW else Layer(amount)


def _is_all(amount: Amount) -> bool:
    """Whether it is the fraction 1."""
    if not isinstance(amount, Layer | EachRow):
        return False
    return isinstance(amount.amount, float) and amount.amount == 1.0


def _check_pattern(amount: Amount, path: str, name: str, inputs: int) -> None:
    if isinstance(amount, Pattern) and inputs % amount.m:
        raise InvalidSpec(
            f"{path}.pattern.m", f"{amount.m} does not divide the {inputs} inputs of {quote(name)}"
        )


def _check_count(amount: Amount, kept: Tensor, field: str) -> None:
    """Refuses a count of more elements than the layer, or a row, still has."""
    if not isinstance(amount, Layer | EachRow) or not isinstance(amount.amount, int):
        return
    rows = kept.sum(1)
    is_by_row = isinstance(amount, EachRow) and len(rows) > 0
    most = int(rows.min() if is_by_row else rows.sum())
    if amount.amount > most:
        what = "a row" if isinstance(amount, EachRow) else "the layer"
        raise AmountOutOfRange(
            field, f"{amount.amount} is more than the {most} unpruned elements of {what}"
        )
