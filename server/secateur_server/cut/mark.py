"""Marks pieces by a cut: the bits of the units that are kept."""

import itertools
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from secateur_server.backends.pieces import Cut, Piece, Split
from secateur_server.cut.drivers import Driver
from secateur_server.runtime.context import RequestContext

# A piece, and the bits of its candidates that are kept, which are written to.
Part = tuple[Piece, Tensor]


def mark(
    context: RequestContext, driver: Driver, parts: Sequence[Part], low: int, high: int
) -> list[Split]:
    """Keeps the candidates at the key `high` or above, and collects those in [low, high)."""

    def split(some: Sequence[Part]) -> list[Split]:
        pieces, kept = zip(*some, strict=True)
        return driver.backend.split(pieces, low, high, kept)

    batches = list(_batches(context.each(parts), driver.backend.batch))
    return list(itertools.chain.from_iterable(driver.map(context, split, batches)))


def _batches(parts: Iterable[Part], units: int) -> Iterator[list[Part]]:
    """Consecutive parts of at most so many units, or one of more: small ones cost a call each."""
    batch: list[Part] = []
    left = units
    for part in parts:
        if batch and part[0].units > left:
            yield batch
            batch, left = [], units
        batch.append(part)
        left -= part[0].units
    if batch:
        yield batch


def mark_ties(
    context: RequestContext, driver: Driver, parts: Sequence[Part], cut: Cut, equal: Sequence[int]
) -> None:
    """Keeps the candidates above the cut, and its ties after the first `cut.ties`.

    Args:
        context: The request.
        driver: Of the pieces.
        parts: In the order of their units.
        cut: Of all pieces.
        equal: How many ties each piece has.
    """

    def mark_part(part: tuple[Piece, Tensor, int, int]) -> None:
        piece, kept, equal, before = part
        pruned = min(max(cut.ties - before, 0), equal)
        # All or no ties of a piece are pruned, except in one piece, where the first ones are.
        low, high = cut.key + (pruned == equal), cut.key + (pruned > 0)
        (found,) = driver.backend.split([piece], low, high, [kept])
        places = torch.arange(len(found.at), device=found.at.device)
        driver.backend.keep(kept, found.at, places >= pruned)

    before = itertools.accumulate(equal, initial=0)
    marked = [(*part, n, b) for part, n, b in zip(parts, equal, before, strict=False)]
    driver.map(context, mark_part, marked)
