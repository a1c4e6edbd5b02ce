"""Marks pieces by a cut: the bits of the units that are kept."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from secateur_server.backends import allocate
from secateur_server.backends.pieces import Cut, Piece, Split
from secateur_server.backends.protocol import Backend
from secateur_server.cut.drivers import Driver, Task
from secateur_server.runtime.context import Found, Item, RequestContext

# Units whose bits `map` returns at once where the request's memory has no limit: 1 GiB of them.
MOST_UNITS = 1 << 33


def mark(
    context: RequestContext, driver: Driver, pieces: Sequence[Piece], low: int, high: int
) -> tuple[Tensor, list[Split]]:
    """Keeps the candidates at the key `high` or above, and collects those in [low, high).

    Args:
        context: The request.
        driver: Of the pieces.
        pieces: In the order of their units.
        low: A key.
        high: A key.

    Returns:
        The bits of all pieces, each from a new byte on; and the splits of consecutive pieces, whose
        `kept` are views of these bits.
    """
    batches = list(_batches(context.each(pieces), driver.backend.batch, _units))
    task = partial(_split, low=low, high=high)
    if len(batches) == 1:
        (split,) = driver.map(context, task, batches)
        return split.kept, [split]
    kept, found = _kept(context, driver, pieces), []
    end = 0
    for split in _mapped(context, driver, task, batches, _units_of_all):
        begin, end = end, end + len(split.kept)
        found.append(replace(split, kept=kept[begin:end].copy_(split.kept)))
    return kept, found


def _split(
    context: RequestContext, backend: Backend, pieces: Sequence[Piece], low: int, high: int
) -> Split:
    return backend.split(pieces, low, high)


def mark_ties(
    context: RequestContext, driver: Driver, pieces: Sequence[Piece], cut: Cut, equal: Sequence[int]
) -> Tensor:
    """Keeps the candidates above the cut, and its ties after the first `cut.ties`.

    Args:
        context: The request.
        driver: Of the pieces.
        pieces: In the order of their units.
        cut: Of all pieces.
        equal: How many ties each piece has.

    Returns:
        The bits of all pieces, each from a new byte on.
    """
    before = itertools.accumulate(equal, initial=0)
    parts = list(zip(pieces, equal, before, strict=False))
    kept, end = _kept(context, driver, pieces), 0
    task = partial(_mark_ties, cut=cut)
    for bits in _mapped(context, driver, task, parts, lambda part: part[0].units):
        begin, end = end, end + len(bits)
        kept[begin:end] = bits
    return kept


def _mark_ties(
    context: RequestContext, backend: Backend, part: tuple[Piece, int, int], cut: Cut
) -> Tensor:
    """Marks a piece by its number of ties, and that of all ties in the pieces before it."""
    piece, equal, before = part
    pruned = min(max(cut.ties - before, 0), equal)
    # All or no ties of a piece are pruned, except in one piece, where the first ones are.
    low, high = cut.key + (pruned == equal), cut.key + (pruned > 0)
    found = backend.split([piece], low, high)
    places = torch.arange(len(found.at), device=found.at.device)
    backend.keep(found.kept, found.at, places >= pruned)
    return found.kept


def _kept(context: RequestContext, driver: Driver, pieces: Sequence[Piece]) -> Tensor:
    return allocate(context, sum((piece.units + 7) // 8 for piece in pieces), driver.backend)


def _mapped(
    context: RequestContext,
    driver: Driver,
    task: Task[Item, Found],
    items: Sequence[Item],
    units: Callable[[Item], int],
) -> Iterator[Found]:
    """Yields the results of `map`, of so many items at once that their bits fit in the memory."""
    # An eighth of the work memory: larger masks are on the disk, see backends.allocate.
    for some in _batches(items, context.work_memory or MOST_UNITS, units):
        yield from driver.map(context, task, some)


def _batches(
    items: Iterable[Item], most: int, units: Callable[[Item], int]
) -> Iterator[list[Item]]:
    """Consecutive items of at most so many units, or one of more: small ones cost a call each."""
    batch: list[Item] = []
    left = most
    for item in items:
        if batch and units(item) > left:
            yield batch
            batch, left = [], most
        batch.append(item)
        left -= units(item)
    if batch:
        yield batch


def _units(piece: Piece) -> int:
    return piece.units


def _units_of_all(pieces: Sequence[Piece]) -> int:
    return sum(piece.units for piece in pieces)
