"""How many weights a solver prunes: of the layer, of each row, or of each group of a row."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from secateur_server.backends import backend_for, spans
from secateur_server.backends.keys import as_keys


class Amount(Protocol):
    """What is pruned of a weight [rows, columns].

    Attributes:
        is_by_row: Whether what is pruned of a row depends on no other row.
    """

    is_by_row: ClassVar[bool]

    def prune(self, scores: Tensor, candidates: Tensor) -> Tensor:
        """Selects the candidates with the lowest scores. Ties go to the lowest flat index.

        Args:
            scores: Float32, [rows, columns], 0 or more.
            candidates: Bool, the same shape.

        Returns:
            Bool, the same shape: which candidates are pruned. Exactly as many as the amount says.
        """
        ...

    def in_steps(self, candidates: Tensor, width: int) -> "Steps":
        """Divides the amount among blocks of columns, for a solver that prunes one after another.

        Args:
            candidates: Bool, [rows, columns].
            width: The width of a block, at most.

        Returns:
            How wide the blocks are, and what to prune of each.
        """
        ...


@dataclass(frozen=True)
class Steps:
    """The amounts of consecutive blocks of columns.

    Attributes:
        width: The columns of a block.
        amount: Returns the amount of the block that begins at a column.
    """

    width: int
    amount: Callable[[int], Amount]


@dataclass(frozen=True)
class Layer:
    """A share or a number of all candidates.

    Attributes:
        amount: An int is a count; a float is a fraction, rounded as `round` does.
    """

    amount: float | int

    is_by_row: ClassVar[bool] = False

    def prune(self, scores: Tensor, candidates: Tensor) -> Tensor:
        among = scores[candidates]
        pruned = torch.zeros_like(candidates)
        pruned[candidates] = _lowest(among, _count(self.amount, len(among)))
        return pruned

    def in_steps(self, candidates: Tensor, width: int) -> Steps:
        up_to = [0, *candidates.sum(0).cumsum(0).tolist()]
        count = _count(self.amount, up_to[-1])

        def share_of(begin: int) -> Amount:
            # Of the columns before, and with this block: shares so divided add up to the count.
            end = min(begin + width, len(up_to) - 1)
            before, after = (count * up_to[at] // max(1, up_to[-1]) for at in (begin, end))
            return Layer(after - before)

        return Steps(width, share_of)


@dataclass(frozen=True)
class EachRow:
    """A share or a number of the candidates of each row.

    Attributes:
        amount: An int is a count; a float is a fraction, rounded as `round` does; a tensor has the
            count of each row.
    """

    amount: float | int | Tensor

    is_by_row: ClassVar[bool] = True

    def prune(self, scores: Tensor, candidates: Tensor) -> Tensor:
        counts = self._counts(candidates)
        among = scores.masked_fill(~candidates, torch.inf)
        at = (counts - 1).clamp(min=0)
        threshold = among.sort(1).values.gather(1, at)
        below = (among < threshold) & (counts > 0)
        ties = (among == threshold) & candidates
        return below | (ties & (ties.cumsum(1) <= counts - below.sum(1, keepdim=True)))

    def in_steps(self, candidates: Tensor, width: int) -> Steps:
        counts = self._counts(candidates)
        up_to = [torch.zeros_like(counts)]
        for begin, end in spans(candidates.shape[1], width):
            up_to.append(up_to[-1] + candidates[:, begin:end].sum(1, keepdim=True))
        total = up_to[-1].clamp(min=1)

        def share_of(begin: int) -> Amount:
            before, after = up_to[begin // width : begin // width + 2]
            return EachRow(counts * after // total - counts * before // total)

        return Steps(width, share_of)

    def _counts(self, candidates: Tensor) -> Tensor:
        """The count of each row: int64, [rows, 1]."""
        if isinstance(self.amount, Tensor):
            return self.amount
        counts = [_count(self.amount, total) for total in candidates.sum(1).tolist()]
        return torch.tensor(counts, device=candidates.device).view(-1, 1)


@dataclass(frozen=True)
class Pattern:
    """N:M: all but n of m consecutive candidates of a row. The last group may be shorter.

    Attributes:
        n: Elements of a group that are kept, at most.
        m: Elements of a group.
    """

    n: int
    m: int

    is_by_row: ClassVar[bool] = True

    def prune(self, scores: Tensor, candidates: Tensor) -> Tensor:
        rows, columns = scores.shape
        keys = as_keys(scores, scores.dtype).masked_fill(~candidates, -1)
        padded = torch.nn.functional.pad(keys, (0, -columns % self.m), value=-1)
        groups = padded.view(-1, self.m, 1)
        kept = backend_for(scores.device).largest(groups, min(self.n, self.m))
        return candidates & ~kept.view(rows, -1)[:, :columns]

    def in_steps(self, candidates: Tensor, width: int) -> Steps:
        return Steps(self.m, lambda begin: self)


def _count(amount: float | int, total: int) -> int:
    return min(amount, total) if isinstance(amount, int) else round(amount * total)


def _lowest(scores: Tensor, count: int) -> Tensor:
    """Marks the `count` lowest of flat scores; ties go to the lowest index."""
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(count).values
    found = scores < threshold
    ties = (scores == threshold).nonzero().view(-1)
    found[ties[: count - int(found.sum())]] = True
    return found
