"""Bounds of LAMP scores by buckets of magnitudes, and the LAMP scores of the units within bounds.

Both are made where the scores of a tensor are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from secateur_server.backends.keys import BITS
from secateur_server.backends.pieces import PART, Observed, Piece, Stored
from secateur_server.backends.protocol import Backend
from secateur_server.backends.scan import SPACING
from secateur_server.cut.drivers import Driver, Local
from secateur_server.cut.observe import observe_sample, observe_squares
from secateur_server.cut.score import Ranked, Ranking, in_this_process
from secateur_server.cut.sorted_keys import FEW
from secateur_server.runtime.context import RequestContext

# For a large tensor. More buckets take longer to search, and fewer leave more units to sort.
BUCKETS = 256

# Relative. Bounds are a little wider, as sums are rounded in an unknown order.
SLACK = 1e-9


class _Between(NamedTuple):
    """Keys from `low` on and below `high`, and the sum of squares of all units above them."""

    low: int
    high: int
    above: float


@dataclass(frozen=True)
class Buckets:
    """The units of a ranking, by their scores.

    Attributes:
        cuts: Ascending keys. Bucket j has the keys from cut j - 1 on and below cut j.
        up_to: int64, how many units are in the first j buckets.
        above: The sum of squares of all units from bucket j on.
        least, most: Bounds of the LAMP scores of each bucket, ascending.
    """

    cuts: Tensor
    up_to: Tensor
    above: Tensor
    least: Tensor
    most: Tensor

    def window(self, low: float, high: float) -> tuple[int, int, _Between]:
        """Finds the buckets whose LAMP scores may be in [low, high].

        Returns:
            How many units are before them, how many are in them, and their keys.
        """
        first = int(torch.searchsorted(self.most, low))
        end = max(first, int(torch.searchsorted(self.least, high, right=True)))
        before = int(self.up_to[first])
        beyond = torch.iinfo(self.cuts.dtype).max  # the key of units that are pruned already
        keys = [0, *self.cuts.tolist(), beyond]
        between = _Between(keys[first], keys[end], float(self.above[end]))
        return before, int(self.up_to[end]) - before, between


@dataclass(frozen=True)
class Window:
    """The units of a ranking that may be at the threshold. `before` units are surely below it."""

    before: int
    ranking: Ranked


def make_buckets(
    context: RequestContext, driver: Driver, rankings: Sequence[Ranked]
) -> list[Buckets]:
    """Makes the buckets of each ranking."""
    here = in_this_process(rankings)
    if here is None:
        there = [piece for of in rankings for piece in of.pieces(of.dtype, PART)]
        return driver.map(context, _buckets_there, there)
    return [_buckets(context, driver, of.pieces(of.dtype, PART)) for of in context.each(here)]


def _buckets_there(context: RequestContext, backend: Backend, observed: Observed) -> Buckets:
    return _buckets(context, Local(backend), observed.read(context))


def _buckets(context: RequestContext, driver: Driver, pieces: Sequence[Piece]) -> Buckets:
    """The buckets of a tensor, given pieces of PART units."""
    cuts, dtype = _sampled_cuts(context, driver, pieces), pieces[0].dtype
    parts = [(piece, scores) for piece in pieces if (scores := piece.scores.stored) is not None]
    found = observe_squares(context, driver, parts, cuts)
    # Units with the key of a cut are in the bucket after it.
    sums, counts = (sum(of[1:], start=of[0]) for of in found)
    energy, units = (torch.cat([of[:1], of[1::2] + of[2::2]]) for of in (sums, counts))
    up_to = torch.cat([torch.zeros(1, dtype=torch.int64), units.cumsum(0)])
    above = torch.cat([energy.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)])
    edges = cuts.cpu().view(dtype).to(torch.float64).square()
    return Buckets(cuts, up_to, above, *_bounds(edges, above))


def _bounds(edges: Tensor, above: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds of the LAMP scores in each bucket. `edges` are squares at the cuts."""
    least = torch.cat([torch.zeros(1, dtype=torch.float64), edges]) / above[:-1]
    most = torch.cat([edges / (above[1:-1] + edges), torch.full((1,), torch.inf)])
    least = least.nan_to_num(0.0, posinf=torch.inf) * (1 - SLACK)
    most = most.nan_to_num(torch.inf, posinf=torch.inf) * (1 + SLACK)
    return least.cummax(0).values, most.flip(0).cummin(0).values.flip(0)


def _sampled_cuts(context: RequestContext, driver: Driver, pieces: Sequence[Piece]) -> Tensor:
    """Keys that divide a large tensor into buckets of about equal size; none for a small one."""
    units, bits = sum(piece.units for piece in pieces), BITS[pieces[0].dtype]
    if units <= FEW:
        return torch.empty(0, dtype=bits, device=driver.backend.device)
    spacing = min(SPACING, max(1, units // FEW))
    keys = observe_sample(context, driver, pieces, PART, spacing)
    some = driver.backend.ascending(keys)[:: max(1, len(keys) // BUCKETS)].tolist()
    return torch.tensor(sorted(set(some)), dtype=keys.dtype, device=driver.backend.device)


def make_windows(
    context: RequestContext,
    driver: Driver,
    rankings: Sequence[Ranked],
    buckets: Sequence[Buckets],
    low: float,
    high: float,
) -> list[Window]:
    """Makes the window of each ranking: the units whose LAMP scores may be in [low, high].

    Args:
        context: The request.
        driver: Of the tensors.
        rankings: By magnitude.
        buckets: Of each ranking.
        low: A LAMP score.
        high: A LAMP score.
    """
    found = [of.window(low, high) for of in context.each(buckets)]
    here = in_this_process(rankings)
    if here is None:
        return [
            Window(before, _FarWindow(ranking, driver, units, between))
            for ranking, (before, units, between) in zip(rankings, found, strict=True)
        ]
    return [
        Window(before, _ranking(context, driver, ranking.pieces(ranking.dtype, PART), between))
        for ranking, (before, _, between) in zip(context.each(here), found, strict=True)
    ]


def _ranking(
    context: RequestContext, driver: Driver, pieces: Sequence[Piece], between: _Between
) -> Ranking:
    """The units between bounds with their LAMP scores."""
    scores = lamp_scores(_falling(context, driver, pieces, between), between.above)
    device = driver.backend.device
    return Ranking("", len(scores), Stored(scores.to(device)), None, device)


def _falling(
    context: RequestContext, driver: Driver, pieces: Sequence[Piece], between: _Between
) -> Tensor:
    """The scores between bounds, the largest first, as float64 on the CPU.

    On the CPU, as a GPU makes running sums in an order of its own.
    """
    if between.low == between.high:
        return torch.empty(0, dtype=torch.float64)
    task = partial(_keys_between, low=between.low, high=between.high)
    keys = torch.cat(driver.map(context, task, pieces))
    falling = driver.backend.ascending(keys).cpu().view(pieces[0].dtype).flip(0)
    return falling.to(torch.float64)


def _keys_between(
    context: RequestContext, backend: Backend, piece: Piece, low: int, high: int
) -> Tensor:
    return backend.split([piece], low, high).keys


@dataclass(frozen=True)
class _FarWindow:
    """A window of a ranking whose scores are elsewhere. It is a Ranked."""

    of: Ranked
    elsewhere: Driver
    units: int
    between: _Between
    dtype: torch.dtype = torch.float64
    offset: float = 0.0

    def driver(self, context: RequestContext) -> Driver:
        """Returns the driver of the scores."""
        return self.elsewhere

    def pieces(self, dtype: torch.dtype, size: int) -> "list[_WindowThere]":
        """Returns all units, to be compared as `dtype`."""
        pieces = self.of.pieces(self.of.dtype, PART)
        return [_WindowThere(piece, self.units, self.between) for piece in pieces]


@dataclass(frozen=True)
class _WindowThere:
    """The units of a window. See backends.pieces.Observed."""

    of: Observed
    units: int
    between: _Between

    @property
    def place(self) -> object:
        """Where the scores are."""
        return self.of.place

    def read(self, context: RequestContext) -> list[Piece]:
        """Returns the units as pieces, in their order."""
        pieces = self.of.read(context)
        driver = Local.on(torch.device("cpu"))
        ranking = _ranking(context, driver, pieces, self.between)
        return ranking.pieces(ranking.dtype, driver.backend.ranked)


def lamp_scores(falling: Tensor, above: Tensor | float) -> Tensor:
    """Computes LAMP scores along the last dimension.

    Args:
        falling: Scores, the largest first. Written to.
        above: The sum of squares of the units before them.

    Returns:
        The scores in the same order.
    """
    squares = falling.square_()
    scores = squares / (squares.cumsum(-1) + above)
    scores[squares == 0] = 0.0  # also where the sum is 0
    scores[squares.isinf()] = torch.inf
    # Rounding must not change the order of two scores.
    return scores.cummin(-1).values if scores.numel() else scores
