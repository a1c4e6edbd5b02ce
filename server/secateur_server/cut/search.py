"""The search for cuts: finds the thresholds of any number of queries at once.

A key is a non-negative integer that orders units as their scores do (see backends/keys.py). A radix
select finds the key of each query's threshold digit by digit, from the highest; the digits that are
known are its prefix. Each pass over the keys observes histograms of the next digit, for the
prefixes that a threshold may have. With digits of 4 bits, to prune 2 of the keys 0x3A, 0x3C, 0x71:
the first histogram has 2 keys at 3 and 1 at 7, so the prefix is 3; the next one, of the keys with
that prefix, has 1 at A and 1 at C, so the threshold is 0x3C. The keys of few units are sorted
instead: see sorted_keys.py.
"""

import itertools
import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from secateur_server.backends.keys import BITS
from secateur_server.backends.pieces import Ints, Observed, Piece
from secateur_server.backends.protocol import Backend
from secateur_server.cut.drivers import Driver
from secateur_server.cut.observe import Histogram, observe_digits
from secateur_server.cut.score import Ranked, Ranking, in_this_process
from secateur_server.cut.sorted_keys import FEW, SortedKeys, is_sorting_faster
from secateur_server.runtime.context import RequestContext


@dataclass(frozen=True)
class Query:
    """Prune units in the order of their scores until a target is reached.

    Attributes:
        members: Indices of tensors. Equal scores are pruned in this order.
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


def search(
    context: RequestContext,
    driver: Driver,
    rankings: Sequence[Ranked],
    queries: Sequence[Query],
    dtype: torch.dtype,
) -> list[Division]:
    """Finds how each query divides its pruned units among its members.

    The threshold is the smallest key for which the units of all members up to it, within the
    bounds, reach the target. All units below the threshold are pruned, and then ties, member by
    member, until the target is reached; of each member within its bounds.

    Args:
        context: The request.
        driver: Of the tensors.
        rankings: The units of each tensor.
        queries: At least one.
        dtype: In which the scores of all rankings are compared, as of score_dtype.

    Returns:
        One division for each query.
    """
    here = in_this_process(rankings)
    are_single = all(len(query.members) == 1 and query.costs is None for query in queries)
    if here and are_single and all(ranking.units <= FEW for ranking in here):
        return _search_each(context, driver, here, queries, dtype)
    searches = [Search(query, dtype) for query in context.each(queries)]
    are_of_all = all(len(query.members) == len(rankings) for query in queries)
    if here and are_of_all and is_sorting_faster(here):
        keys = SortedKeys(context, driver, here, dtype)
        for one in context.each(searches):
            one.find(keys)
    else:
        size = driver.backend.piece
        members = [ranking.pieces(dtype, size) for ranking in context.each(rankings)]
        narrow(context, driver, members, searches, dtype)
    return [one.division() for one in context.each(searches)]


def _search_each(
    context: RequestContext,
    driver: Driver,
    rankings: Sequence[Ranking],
    queries: Sequence[Query],
    dtype: torch.dtype,
) -> list[Division]:
    """Does `search` for queries with one member each, of few units, which are sorted once."""
    by_member: dict[int, list[int]] = {}
    for index, query in enumerate(queries):
        by_member.setdefault(query.members[0], []).append(index)
    parts = []
    for member, indices in context.each(by_member.items()):
        some, ranking = [queries[index] for index in indices], rankings[member]
        lowest = np.array([query.lowest[0] for query in some])
        counts = np.array([min(int(query.target), *query.highest) for query in some])
        parts.append((ranking.piece(dtype, 0, ranking.units), lowest, counts))
    divisions = itertools.chain.from_iterable(driver.map(context, _divide_few, parts))
    order = itertools.chain.from_iterable(by_member.values())
    found = dict(zip(order, divisions, strict=True))
    return [found[index] for index in range(len(queries))]


def _divide_few(
    context: RequestContext, backend: Backend, part: tuple[Piece, Ints, Ints]
) -> list[Division]:
    """The divisions of queries with one member each, which is the piece: its lowest, and counts."""
    piece, lowest, counts = part
    keys = backend.keys(piece)
    candidates = keys if piece.unpruned is None else keys[keys < torch.iinfo(keys.dtype).max]
    ascending: Any = backend.ascending(candidates).cpu().numpy()
    has_cut = counts > lowest
    cuts = ascending[np.where(has_cut, counts - 1, 0)] if has_cut.any() else counts
    below = np.searchsorted(ascending, cuts)
    equal = np.searchsorted(ascending, cuts, "right") - below
    columns = [
        np.where(has_cut, of, other).tolist()
        for of, other in ((counts, lowest), (cuts, -1), (below, 0), (equal, 0))
    ]
    return [
        Division((count,), key, (under,), (at,))
        for count, key, under, at in zip(*columns, strict=True)
    ]


class Search:
    """The state of the search for a query's threshold.

    Attributes:
        query: What is searched for.
        prefix: The highest digits of the threshold.
        left: The bits of the threshold after the prefix.
        below: Units of each member whose key is lower than all keys with that prefix.
        equal: Units of each member that have the prefix.
    """

    def __init__(self, query: Query, dtype: torch.dtype) -> None:
        """Starts the search: at first all keys of `dtype` may be at the threshold."""
        self.query, self.prefix = query, 0
        self.left = torch.iinfo(BITS[dtype]).bits - 1  # keys have no sign
        self.lowest, self.highest = np.array(query.lowest), np.array(query.highest)
        self.costs = query.costs or (1,) * len(query.members)
        # The caller may have added the same costs in another order, and rounded otherwise.
        self.target = min(query.target, self._cost(self.highest))
        self.below: Ints = np.zeros(len(query.members), np.int64)
        self.equal = self.below
        self.is_met = self._is_enough(self.lowest)

    def _cost(self, counts: Ints) -> float:
        if self.query.costs is None:
            return int(counts.sum())
        # Rounded once, so that the order of the members does not matter.
        return math.fsum(c * n for c, n in zip(self.costs, counts.tolist(), strict=True))

    def _is_enough(self, counts: Ints) -> bool:
        return self._cost(counts) >= self.target

    def _within(self, counts: Ints) -> Ints:
        within: Ints = np.minimum(np.maximum(counts, self.lowest), self.highest)
        return within

    def _is_unbound(self, most: Ints) -> bool:
        """Whether the bounds change no count between `below` and `most`."""
        return bool((self.below >= self.lowest).all() and (most <= self.highest).all())

    def narrow(self, histograms: Mapping[int, Histogram], width: int) -> None:
        """Finds the next digit."""
        parts = [histograms[member] for member in self.query.members]
        found = [part.up_to[part.rows[self.prefix]] for part in parts]
        counts = np.stack(found) if len(found) > 1 else found[0][None]  # a view

        def up_to(digit: int) -> Ints:
            through: Ints = self.below + counts[:, digit]
            return through

        def is_enough(digit: int) -> bool:
            return self._is_enough(self._within(up_to(digit)))

        if self.query.costs is None and self._is_unbound(up_to(-1)):
            place = math.ceil(self.target) - int(self.below.sum())
            total = counts.sum(0) if len(found) > 1 else found[0]
            digit = int(np.searchsorted(total, place))
        else:
            digit = _first(1 << width, is_enough)
        through = up_to(digit)
        self.below = up_to(digit - 1) if digit else self.below
        self.equal = through - self.below
        self.prefix, self.left = self.prefix << width | digit, self.left - width

    def find(self, keys: SortedKeys) -> None:
        """Finds the threshold among sorted keys."""
        if self.is_met:
            return
        members = np.array(self.query.members)

        def up_to(key: int) -> Ints:
            counts: Ints = keys.up_to(key)[members]
            return counts

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

        def with_first(members: int) -> Ints:
            return np.concatenate([most[:members], counts[members:]])

        last = _first(len(most), lambda i: self._is_enough(with_first(i + 1)))
        counts = with_first(last)
        one = np.arange(len(most)) == last
        ties = int(most[last] - counts[last])
        counts[last] += _first(ties, lambda more: self._is_enough(counts + more * one))
        return Division(tuple(counts.tolist()), self.prefix, below, equal)


def _first(count: int, is_true: Callable[[int], bool]) -> int:
    """The first number in [0, count) from which on `is_true` holds; `count` if it never does."""
    return bisect_left(range(count), True, key=is_true)


def narrow(
    context: RequestContext,
    driver: Driver,
    members: Sequence[Sequence[Observed]],
    searches: Sequence[Search],
    dtype: torch.dtype,
    few: int = 0,
) -> None:
    """Finds digits of the thresholds, until at most `few` units have the prefix of each of them.

    Args:
        context: The request.
        driver: Of the pieces.
        members: The pieces of each member.
        searches: Of queries among the members.
        dtype: In which all scores are compared.
        few: So many units need no further digit; 0 finds all digits.
    """
    unfinished = [one for one in searches if not one.is_met]
    while unfinished:
        left = unfinished[0].left  # they all have as many digits
        prefixes: list[set[int]] = [set() for _ in members]
        for one in context.each(unfinished):
            for member in one.query.members:
                prefixes[member].add(one.prefix)
        histograms, width = observe_digits(
            context, driver, members, prefixes, left, dtype, is_last=few > 0
        )
        for one in context.each(unfinished):
            one.narrow(histograms, width)
        unfinished = [one for one in unfinished if one.left and int(one.equal.sum()) > few]
