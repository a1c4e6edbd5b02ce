"""How many units go of each tensor, where tensors are ranked together under bounds.

Many cuts are looked for at once, by digits of the keys from the highest down (radix select): each
pass counts, in all rankings, the next digit of what lies where a cut may be. The wider a digit, the
fewer passes and the larger the tables of counts.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateur_server.backends import passes_of, spans
from secateur_server.backends.keys import BITS
from secateur_server.backends.passes import DIGIT_BITS, Passes, Piece
from secateur_server.cut.divide_small import SortedKeys, are_small
from secateur_server.cut.score import Ranking
from secateur_server.cut.select import FEW, piece_of, score_dtype
from secateur_server.runtime.context import RequestContext

# Counts in the tables of a pass, 8 bytes each: at most so many; and one for so many units, for the
# tables not to take longer than the pass, but there they may be of LEAST_BITS.
MOST_COUNTS = 1 << 24
UNITS_OF_COUNT = 16
LEAST_BITS = 8


@dataclass(frozen=True)
class Query:
    """Units go in the order of their scores until enough have.

    members: indices of rankings, in the order in which equal scores go.
    lowest, highest: for each member how many go at least, and at most; no more than are alive.
    target: the sum of costs, over all units that go, that is to be reached by as few as do; no more
    than that of the highest.
    costs: for each member of a unit, 0 or more; None is 1 each: then the target is met exactly.
    """

    members: tuple[int, ...]
    lowest: tuple[int, ...]
    highest: tuple[int, ...]
    target: float
    costs: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Division:
    """What goes.

    counts: for each member how many units.
    key: of the cut, in the common dtype; -1 where no unit goes by its rank.
    below, equal: for each member how many alive units have a key below the cut's, and that key.
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
    """The division of each query.

    The cut is the smallest key by which, with each member's units up to it, within the bounds, the
    target is reached. All below the cut go, then of those at it as many as it takes, member by
    member; but of each member within its bounds.
    dtype: in which the scores of all rankings compare, as of score_dtype.
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
    """As divide, of queries about one small ranking each."""
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
    """As divide, of one small ranking: its keys are sorted once."""
    passes = passes_of(ranking.device)
    keys = passes.keys(piece_of(ranking, dtype, 0, ranking.units))
    if ranking.candidates is not None:
        keys = keys[keys < torch.iinfo(keys.dtype).max]
    array: Any = passes.ascending(keys).cpu().numpy()
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
    """How far the cut of a query is known.

    prefix: its highest digits.  below: of each member the units with a key below all of that
    prefix.  equal: those with the prefix.
    """

    def __init__(self, query: Query) -> None:
        self.query, self.prefix = query, 0
        self.lowest, self.highest = torch.tensor(query.lowest), torch.tensor(query.highest)
        self.costs = query.costs or (1,) * len(query.members)
        # Where the caller has added the same costs in another order, all is still enough.
        self.target = min(query.target, self._cost(self.highest))
        self.below = self.equal = torch.zeros(len(query.members), dtype=torch.int64)
        self.is_met = self._is_enough(self.lowest)

    def _cost(self, counts: Tensor) -> float:
        if self.query.costs is None:
            return int(counts.sum())
        # Rounded once: no order of the members or of vectors shows.
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
        """Finds the cut among keys that are sorted."""
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
        """What goes, now that the cut is known."""
        below, equal = tuple(self.below.tolist()), tuple(self.equal.tolist())
        if self.is_met:
            return Division(self.query.lowest, -1, below, equal)
        counts, most = self._within(self.below), self._within(self.below + self.equal)

        def with_first(members: int) -> Tensor:
            return torch.cat([most[:members], counts[members:]])

        last = _first(len(most), lambda i: self._is_enough(with_first(i + 1)))
        counts = with_first(last)
        one = torch.arange(len(most)) == last
        room = int(most[last] - counts[last])
        counts[last] += _first(room, lambda more: self._is_enough(counts + more * one))
        return Division(tuple(counts.tolist()), self.prefix, below, equal)


def _first(count: int, is_true: Callable[[int], bool]) -> int:
    """The first of so many numbers, from 0, from which on it is true; `count` where it never is."""
    return bisect_left(range(count), True, key=is_true)


@dataclass(frozen=True)
class _Histogram:
    """Of a ranking for each prefix the units up to each digit.

    rows: of the prefixes, ascending.  up_to: int64, (prefixes, digits).
    """

    rows: dict[int, int]
    up_to: Tensor


@dataclass(frozen=True)
class _Chunk:
    """Pieces of a ranking that one thread counts.  prefixes: ascending."""

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
    """Counts the next digit behind the prefixes that are wanted of each ranking, in one pass.

    left: how many bits of the keys are behind the prefixes.
    Returns: the table of each ranking that something is wanted of; and the bits of the digit.
    """
    passes = passes_of(rankings[0].device)
    chunks = _chunks(context, rankings, prefixes, dtype, passes)
    width = _width(sum(ranking.units for ranking in rankings), chunks, left)

    def up_to(chunk: _Chunk) -> Tensor:
        prefixes = torch.tensor(chunk.prefixes, dtype=BITS[dtype], device=passes.device)
        size = len(prefixes), 1 << width
        counts = torch.zeros(size, dtype=torch.int64, device=passes.device)
        for piece in chunk.pieces:
            context.check()
            passes.count_many_digits(piece, prefixes, left - width, width, counts)
        return torch.cumsum(counts, 1, out=counts).cpu()

    histograms: dict[int, _Histogram] = {}
    for chunk, part in zip(chunks, passes.map(context, up_to, chunks), strict=True):
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
    passes: Passes,
) -> list[_Chunk]:
    """The pieces of each ranking that something is wanted of, some for each thread."""
    pieces = {
        i: _pieces(rankings[i], dtype, passes)
        for i, part in enumerate(context.each(prefixes))
        if part
    }
    size = -(-sum(map(len, pieces.values())) // (4 * passes.threads))
    return [
        _Chunk(i, sorted(prefixes[i]), part[begin:end])
        for i, part in pieces.items()
        for begin, end in spans(len(part) or 1, size)  # of no units there is a table of zeros
    ]


def _width(units: int, chunks: Sequence[_Chunk], left: int) -> int:
    """The bits of the next digit: as many as tables have room for, or fewer in as many passes."""
    rows = sum(len(chunk.prefixes) for chunk in chunks)
    room = min(MOST_COUNTS // rows, max(units // UNITS_OF_COUNT // rows, 1 << LEAST_BITS))
    most = min(left, DIGIT_BITS, max(1, room.bit_length() - 1))
    return -(-left // -(-left // most))


def _pieces(ranking: Ranking, dtype: torch.dtype, passes: Passes) -> list[Piece]:
    return [piece_of(ranking, dtype, *span) for span in spans(ranking.units, passes.piece)]


def count_below(
    context: RequestContext, rankings: Sequence[Ranking], key: int
) -> list[tuple[int, int]]:
    """How many alive units of each ranking have a key below `key`, and how many have that key.

    key: in the common dtype, as of score_dtype.
    """
    passes, dtype = passes_of(rankings[0].device), score_dtype(rankings)
    pieces = [_pieces(ranking, dtype, passes) for ranking in context.each(rankings)]
    flat = [piece for part in pieces for piece in part]
    found = iter(passes.map(context, lambda piece: passes.count_below(piece, key), flat))
    counts = [[next(found) for _ in part] for part in pieces]
    return [(sum(b for b, _ in part), sum(e for _, e in part)) for part in counts]
