"""Divides pruned units among tensors whose units are compared, within bounds.

A radix select finds the thresholds of all queries at once, digit by digit from the highest. Each
pass over the keys makes histograms of the next digit, for the prefixes that a threshold may have.
Wider digits need fewer passes and larger histograms.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateur_server.backends import backend_for, spans
from secateur_server.backends.keys import BITS
from secateur_server.backends.pieces import DIGIT_BITS, Piece
from secateur_server.backends.protocol import Backend
from secateur_server.cut.divide_small import SortedKeys, are_small
from secateur_server.cut.score import Ranking
from secateur_server.cut.select import FEW, piece_of, score_dtype
from secateur_server.runtime.context import RequestContext

# Counts in all histograms of a pass, 8 bytes each: the most, and units of the pass for each count,
# so that histograms do not take longer than the pass. Digits of LEAST_BITS are always allowed.
MOST_COUNTS = 1 << 24
UNITS_OF_COUNT = 16
LEAST_BITS = 8


@dataclass(frozen=True)
class Query:
    """Prune units in the order of their scores until a target is reached.

    Attributes:
        members: Indices of rankings. Equal scores are pruned in this order.
        lowest, highest: Bounds on how many units of each member are pruned; at most its candidates.
        target: The sum of the costs of all pruned units, to be reached with as few units as
            possible. At most the cost of `highest`.
        costs: The cost of a unit of each member, 0 or more. None: 1 each, and the target is met
            exactly.
    """

    members: tuple[int, ...]
    lowest: tuple[int, ...]
    highest: tuple[int, ...]
    target: float
    costs: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Division:
    """How many units are pruned of each member of a query.

    Attributes:
        counts: Pruned units of each member.
        key: The key of the threshold; -1 if no unit is pruned for its score.
        below, equal: Candidates of each member with a lower key than the threshold's, and with that
            key.
    """

    counts: tuple[int, ...]
    key: int
    below: tuple[int, ...]
    equal: tuple[int, ...]


def divide(
    context: RequestContext,
    rankings: Sequence[Ranking],
    queries: Sequence[Query],
    dtype: torch.dtype,
) -> list[Division]:
    """Finds the division of each query.

    The threshold is the smallest key for which the units of all members up to it, within the
    bounds, reach the target. All units below the threshold are pruned, and then ties, member by
    member, until the target is reached; of each member within its bounds.

    Args:
        context: The request.
        rankings: The units of each tensor.
        queries: At least one.
        dtype: In which the scores of all rankings are compared, as of score_dtype.

    Returns:
        One division for each query.
    """
    if all(len(query.members) == 1 and query.costs is None for query in queries) and all(
        ranking.units <= FEW for ranking in rankings
    ):
        return _divide_each(context, rankings, queries, dtype)
    searches = [_Search(query) for query in context.each(queries)]
    are_of_all = all(len(query.members) == len(rankings) for query in queries)
    if are_of_all and are_small(rankings):
        keys = SortedKeys(context, rankings, dtype)
        for search in context.each(searches):
            search.find(keys)
        return [search.division() for search in context.each(searches)]
    left = torch.iinfo(BITS[dtype]).bits - 1  # bits whose digits are not known yet
    while left and (open_ := [search for search in searches if not search.is_met]):
        prefixes: list[set[int]] = [set() for _ in rankings]
        for search in context.each(open_):
            for member in search.query.members:
                prefixes[member].add(search.prefix)
        histograms, width = _count_digits(context, rankings, prefixes, left, dtype)
        left -= width
        for search in context.each(open_):
            search.narrow(histograms, width)
    return [search.division() for search in context.each(searches)]


def _divide_each(
    context: RequestContext,
    rankings: Sequence[Ranking],
    queries: Sequence[Query],
    dtype: torch.dtype,
) -> list[Division]:
    """Does `divide` for queries with one small ranking each."""
    by_ranking: dict[int, list[int]] = {}
    for index, query in enumerate(queries):
        by_ranking.setdefault(query.members[0], []).append(index)
    found: dict[int, Division] = {}
    for member, indices in context.each(by_ranking.items()):
        divisions = _divide_few(
            context, rankings[member], [queries[index] for index in indices], dtype
        )
        found.update(zip(indices, divisions, strict=True))
    return [found[index] for index in range(len(queries))]


def _divide_few(
    context: RequestContext, ranking: Ranking, queries: Sequence[Query], dtype: torch.dtype
) -> list[Division]:
    """Does `divide` for one small ranking, whose keys are sorted once."""
    backend = backend_for(ranking.device)
    keys = backend.keys(piece_of(ranking, dtype, 0, ranking.units))
    if ranking.candidates is not None:
        keys = keys[keys < torch.iinfo(keys.dtype).max]
    array: Any = backend.ascending(keys).cpu().numpy()
    ascending = memoryview(array)
    found = []
    for query in context.each(queries):
        count = min(int(query.target), *query.highest)
        if count <= query.lowest[0]:
            found.append(Division(query.lowest, -1, (0,), (0,)))
            continue
        key = ascending[count - 1]
        below, up_to = bisect_left(ascending, key), bisect_right(ascending, key)
        found.append(Division((count,), key, (below,), (up_to - below,)))
    return found


class _Search:
    """The state of the search for a query's threshold.

    Attributes:
        prefix: The highest digits of the threshold.
        below: Units of each member whose key is lower than all keys with that prefix.
        equal: Units of each member that have the prefix.
    """

    def __init__(self, query: Query) -> None:
        self.query, self.prefix = query, 0
        self.lowest, self.highest = torch.tensor(query.lowest), torch.tensor(query.highest)
        self.costs = query.costs or (1,) * len(query.members)
        # The caller may have added the same costs in another order, and rounded otherwise.
        self.target = min(query.target, self._cost(self.highest))
        self.below = self.equal = torch.zeros(len(query.members), dtype=torch.int64)
        self.is_met = self._is_enough(self.lowest)

    def _cost(self, counts: Tensor) -> float:
        if self.query.costs is None:
            return int(counts.sum())
        # Rounded once, so that the order of the members does not matter.
        return math.fsum(c * n for c, n in zip(self.costs, counts.tolist(), strict=True))

    def _is_enough(self, counts: Tensor) -> bool:
        return self._cost(counts) >= self.target

    def _within(self, counts: Tensor) -> Tensor:
        return counts.clamp(self.lowest, self.highest)

    def narrow(self, histograms: Mapping[int, "_Histogram"], width: int) -> None:
        """Finds the next digit."""
        parts = [histograms[member] for member in self.query.members]
        counts = torch.stack([part.up_to[part.rows[self.prefix]] for part in parts])

        def up_to(digit: int) -> Tensor:
            return self.below + counts[:, digit]

        def is_enough(digit: int) -> bool:
            return self._is_enough(self._within(up_to(digit)))

        digit = _first(1 << width, is_enough)
        through = up_to(digit)
        self.below = up_to(digit - 1) if digit else self.below
        self.equal = through - self.below
        self.prefix = self.prefix << width | digit

    def find(self, keys: SortedKeys) -> None:
        """Finds the threshold among sorted keys."""
        if self.is_met:
            return
        members = torch.tensor(self.query.members)

        def up_to(key: int) -> Tensor:
            return keys.up_to(key)[members]

        def is_enough(place: int) -> bool:
            return self._is_enough(self._within(up_to(int(keys.ascending[place]))))

        first = _first(len(keys.ascending) - 1, is_enough)
        self.prefix = int(keys.ascending[first])
        self.below = up_to(self.prefix - 1)
        self.equal = up_to(self.prefix) - self.below

    def division(self) -> Division:
        """The division, once the threshold is known."""
        below, equal = tuple(self.below.tolist()), tuple(self.equal.tolist())
        if self.is_met:
            return Division(self.query.lowest, -1, below, equal)
        counts, most = self._within(self.below), self._within(self.below + self.equal)

        def with_first(members: int) -> Tensor:
            return torch.cat([most[:members], counts[members:]])

        last = _first(len(most), lambda i: self._is_enough(with_first(i + 1)))
        counts = with_first(last)
        one = torch.arange(len(most)) == last
        ties = int(most[last] - counts[last])
        counts[last] += _first(ties, lambda more: self._is_enough(counts + more * one))
        return Division(tuple(counts.tolist()), self.prefix, below, equal)


def _first(count: int, is_true: Callable[[int], bool]) -> int:
    """The first number in [0, count) from which on `is_true` holds; `count` if it never does."""
    return bisect_left(range(count), True, key=is_true)


@dataclass(frozen=True)
class _Histogram:
    """For each prefix the units of a ranking up to each digit.

    Attributes:
        rows: The row of each prefix, ascending.
        up_to: int64, (prefixes, digits).
    """

    rows: dict[int, int]
    up_to: Tensor


@dataclass(frozen=True)
class _Chunk:
    """Pieces of a ranking that one thread counts. `prefixes` are ascending."""

    ranking: int
    prefixes: Sequence[int]
    pieces: Sequence[Piece]


def _count_digits(
    context: RequestContext,
    rankings: Sequence[Ranking],
    prefixes: Sequence[set[int]],
    left: int,
    dtype: torch.dtype,
) -> tuple[dict[int, _Histogram], int]:
    """Makes histograms of the next digit after the prefixes of each ranking, in one pass.

    Args:
        context: The request.
        rankings: The units of each tensor.
        prefixes: The prefixes that are counted in each ranking.
        left: Bits of the keys after the prefixes.
        dtype: As for divide.

    Returns:
        The histogram of each ranking with prefixes, and the bits of the digit.
    """
    backend = backend_for(rankings[0].device)
    chunks = _chunks(context, rankings, prefixes, dtype, backend)
    width = _width(sum(ranking.units for ranking in rankings), chunks, left)

    def up_to(chunk: _Chunk) -> Tensor:
        prefixes = torch.tensor(chunk.prefixes, dtype=BITS[dtype], device=backend.device)
        size = len(prefixes), 1 << width
        counts = torch.zeros(size, dtype=torch.int64, device=backend.device)
        for piece in chunk.pieces:
            context.check()
            backend.count_digits(piece, prefixes, left - width, width, counts)
        return torch.cumsum(counts, 1, out=counts).cpu()

    histograms: dict[int, _Histogram] = {}
    for chunk, part in zip(chunks, backend.map(context, up_to, chunks), strict=True):
        if chunk.ranking in histograms:
            histograms[chunk.ranking].up_to.add_(part)
        else:
            rows = {prefix: row for row, prefix in enumerate(chunk.prefixes)}
            histograms[chunk.ranking] = _Histogram(rows, part)
    return histograms, width


def _chunks(
    context: RequestContext,
    rankings: Sequence[Ranking],
    prefixes: Sequence[set[int]],
    dtype: torch.dtype,
    backend: Backend,
) -> list[_Chunk]:
    """The pieces of each ranking that has prefixes, in chunks for the threads."""
    pieces = {
        i: _pieces(rankings[i], dtype, backend)
        for i, part in enumerate(context.each(prefixes))
        if part
    }
    size = -(-sum(map(len, pieces.values())) // (4 * backend.threads))
    return [
        _Chunk(i, sorted(prefixes[i]), part[begin:end])
        for i, part in pieces.items()
        for begin, end in spans(len(part) or 1, size)  # without units: a histogram of zeros
    ]


def _width(units: int, chunks: Sequence[_Chunk], left: int) -> int:
    """The bits of the next digit: as many as fit, or fewer if that takes as many passes."""
    rows = sum(len(chunk.prefixes) for chunk in chunks)
    digits = min(MOST_COUNTS // rows, max(units // UNITS_OF_COUNT // rows, 1 << LEAST_BITS))
    most = min(left, DIGIT_BITS, max(1, digits.bit_length() - 1))
    return -(-left // -(-left // most))


def _pieces(ranking: Ranking, dtype: torch.dtype, backend: Backend) -> list[Piece]:
    return [piece_of(ranking, dtype, *span) for span in spans(ranking.units, backend.piece)]


def count_below(
    context: RequestContext, rankings: Sequence[Ranking], key: int
) -> list[tuple[int, int]]:
    """Counts the candidates of each ranking with a key below `key`, and with that key.

    Args:
        context: The request.
        rankings: The units of each tensor.
        key: In the dtype of score_dtype.

    Returns:
        Both counts of each ranking.
    """
    backend, dtype = backend_for(rankings[0].device), score_dtype(rankings)
    pieces = [_pieces(ranking, dtype, backend) for ranking in context.each(rankings)]
    flat = [piece for part in pieces for piece in part]
    found = iter(backend.map(context, lambda piece: backend.count_below(piece, key), flat))
    counts = [[next(found) for _ in part] for part in pieces]
    return [(sum(b for b, _ in part), sum(e for _, e in part)) for part in counts]
