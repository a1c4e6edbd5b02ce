"""What is pruned as one: a unit, and how the elements of a tensor make up its units.

Every granularity has the same methods, of one tensor:
values: what its elements rank by: the weight, or a caller's scores.
mask: of its elements, prior pruning; None where there was none.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur_server.devices import passes_of, room_to_work
from secateur_server.devices.keys import as_keys, ranked_as
from secateur_server.devices.passes import Passes, around
from secateur_server.pruning.masks import Mask, any_of_slices, mask_of, spread
from secateur_server.pruning.norms import (
    rounded_to,
    row_sums,
    slice_norms,
    vector_norms,
)
from secateur_server.pruning.tiles import Box, Tiles
from secateur_server.runtime.context import RequestContext


@dataclass(frozen=True)
class Element:
    """Every element is a unit."""

    def fits(self, shape: Sequence[int]) -> str | None:
        """Why a tensor of this shape has no such units, in words; None where it has."""
        return None

    def grid(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape that the units of a tensor have."""
        return tuple(shape)

    def alive(self, context: RequestContext, values: Tensor, mask: Mask | None) -> Mask | None:
        """Which units can be pruned: those with an unpruned element; None is all of them."""
        return mask

    def scores(
        self,
        context: RequestContext,
        values: Tensor,
        mask: Mask | None,
        p: float | str,
        is_mean: bool,
    ) -> Tensor:
        """The importance of each unit, of which the absolute value counts.

        p: of the norm; "nuc" is the nuclear norm of a slice.
        is_mean: a power mean in place of the norm: divided by the elements of the unit to 1/p.
        Returns: flat, floating.
        """
        return values.reshape(-1)

    def spread(
        self, context: RequestContext, kept: Mask, values: Tensor, mask: Mask | None
    ) -> Mask:
        """Which elements stay when the units `kept` do; prior pruning need not be in it."""
        return kept

    def sizes(self, shape: Sequence[int]) -> int | None:
        """Elements of a unit; None where they differ, or are not all of them pruned with it."""
        return 1


@dataclass(frozen=True)
class Slice:
    """All elements with one index in a dimension are a unit.  dim: may be negative."""

    dim: int

    def fits(self, shape: Sequence[int]) -> str | None:
        """As Element.fits."""
        if len(shape) < 2:
            return "slices need 2 dimensions or more"
        return _outside(self.dim, shape)

    def grid(self, shape: Sequence[int]) -> tuple[int, ...]:
        """As Element.grid."""
        return (shape[self.dim],)

    def alive(self, context: RequestContext, values: Tensor, mask: Mask | None) -> Mask | None:
        """As Element.alive."""
        if mask is None:
            return None
        found = any_of_slices(context, mask.flags, values.shape, self.dim, mask.bits.device)
        return flags_mask(context, found)

    def scores(
        self,
        context: RequestContext,
        values: Tensor,
        mask: Mask | None,
        p: float | str,
        is_mean: bool,
    ) -> Tensor:
        """As Element.scores.  Returns: as slice_norms."""
        return slice_norms(context, values, mask, self.dim, p, is_mean)

    def spread(
        self, context: RequestContext, kept: Mask, values: Tensor, mask: Mask | None
    ) -> Mask:
        """As Element.spread."""
        return spread(context, kept.flags(0, kept.elements), values.shape, self.dim)

    def sizes(self, shape: Sequence[int]) -> int | None:
        """As Element.sizes."""
        outer, _, inner = around(shape, self.dim)
        return outer * inner

    def costs(
        self, context: RequestContext, weight: Tensor, values: Tensor, mask: Mask | None
    ) -> tuple[Tensor, Tensor]:
        """What goes with each unit, that is not pruned yet.

        Returns: how many elements, int64; the sum of their weights' squares, float64. Both flat.
        """
        outer, size, inner = around(weight.shape, self.dim)
        return _costs(context, Tiles((outer, size, inner), (outer, 1, inner)), weight, mask)


@dataclass(frozen=True)
class Block:
    """A block of elements is a unit; at the end of a dimension it may be smaller.

    shape: the lengths of a block; 0 is the whole dimension.
    as_matrix: a tensor counts as a matrix: its first dimension, and all others as one.
    """

    shape: tuple[int, ...]
    as_matrix: bool

    def fits(self, shape: Sequence[int]) -> str | None:
        """As Element.fits."""
        if not any(self.shape):
            return "a block needs a length that is not 0"
        if self.as_matrix and len(shape) < 2:
            return "a matrix needs 2 dimensions or more"
        dims = 2 if self.as_matrix else len(shape)
        if len(self.shape) != dims:
            return f"a block needs {dims} lengths, not {len(self.shape)}"
        return None

    def grid(self, shape: Sequence[int]) -> tuple[int, ...]:
        """As Element.grid."""
        return self._tiles(shape).grid

    def alive(self, context: RequestContext, values: Tensor, mask: Mask | None) -> Mask | None:
        """As Element.alive."""
        if mask is None:
            return None
        tiles, passes = self._tiles(values.shape), passes_of(values.device)
        kept = mask.whole(context, tiles.sizes)

        def alive_of(box: Box) -> Sequence[Tensor]:
            return [passes.any_along(tiles.rows(tiles.part(kept, box), box, False))]

        return flags_mask(context, _of_units(context, tiles, passes, [torch.bool], alive_of)[0])

    def scores(
        self,
        context: RequestContext,
        values: Tensor,
        mask: Mask | None,
        p: float | str,
        is_mean: bool,
    ) -> Tensor:
        """As Element.scores.  Returns: as slice_norms."""
        tiles, passes, order = self._tiles(values.shape), passes_of(values.device), float(p)
        by_tiles = values.reshape(tiles.sizes)
        kept = None if mask is None else mask.whole(context, tiles.sizes)

        def scores_of(box: Box) -> Sequence[Tensor]:
            part = _ranked(tiles.part(by_tiles, box))
            if kept is not None:
                part = torch.where(tiles.part(kept, box), part, 0.0)
            rows = tiles.rows(part, box, _neutral(order))
            counts = tiles.counts(box, rows.device) if is_mean else None
            return [_norms(rows, counts, order, passes)]

        return _of_units(context, tiles, passes, [rounded_to(values.dtype)], scores_of)[0]

    def spread(
        self, context: RequestContext, kept: Mask, values: Tensor, mask: Mask | None
    ) -> Mask:
        """As Element.spread."""
        tiles, passes = self._tiles(values.shape), passes_of(values.device)
        units = kept.whole(context, tiles.grid)
        flags = room_to_work(context, values.numel(), passes).view(torch.bool)

        def spread_box(box: Box) -> None:
            tiles.fill(flags.view(tiles.sizes), box, units)

        passes.map(context, spread_box, _boxes(tiles, passes))
        return flags_mask(context, flags)

    def sizes(self, shape: Sequence[int]) -> int | None:
        """As Element.sizes."""
        tiles = self._tiles(shape)
        return tiles.elements if tiles.divide else None

    def costs(
        self, context: RequestContext, weight: Tensor, values: Tensor, mask: Mask | None
    ) -> tuple[Tensor, Tensor]:
        """As Slice.costs."""
        return _costs(context, self._tiles(weight.shape), weight, mask)

    def _tiles(self, shape: Sequence[int]) -> Tiles:
        sizes = (shape[0], math.prod(shape[1:])) if self.as_matrix else tuple(shape)
        lengths = zip(self.shape, sizes, strict=True)
        return Tiles(sizes, tuple(max(1, min(length or size, size)) for length, size in lengths))


@dataclass(frozen=True)
class NM:
    """What is too much in a group of elements is a unit: all but the `n` most important ones.

    m: elements of a group, side by side along `dim`, which may be negative.  The last group of a
        line may be shorter: as if it were filled up with pruned elements.
    """

    n: int
    m: int
    dim: int

    def fits(self, shape: Sequence[int]) -> str | None:
        """As Element.fits."""
        return _outside(self.dim, shape)

    def grid(self, shape: Sequence[int]) -> tuple[int, ...]:
        """As Element.grid."""
        dim = self.dim % len(shape)
        return (*shape[:dim], -(-shape[dim] // self.m), *shape[dim + 1 :])

    def alive(self, context: RequestContext, values: Tensor, mask: Mask | None) -> Mask | None:
        """Which units can be pruned: those with more than n unpruned elements; None is all."""
        tiles, passes = self._tiles(values.shape), passes_of(values.device)
        shorter = tiles.sizes[1] % self.m
        if mask is None and not 0 < shorter <= self.n:
            return None
        kept = None if mask is None else mask.whole(context, tiles.sizes)

        def alive_of(box: Box) -> Sequence[Tensor]:
            if kept is None:
                return [tiles.counts(box, values.device) > self.n]
            return [tiles.rows(tiles.part(kept, box), box, False).sum((0, 2)) > self.n]

        return flags_mask(context, _of_units(context, tiles, passes, [torch.bool], alive_of)[0])

    def scores(
        self,
        context: RequestContext,
        values: Tensor,
        mask: Mask | None,
        p: float | str,
        is_mean: bool,
    ) -> Tensor:
        """As Element.scores, of the elements that go with a unit.  Returns: as slice_norms."""
        tiles, passes, order = self._tiles(values.shape), passes_of(values.device), float(p)
        by_tiles = values.reshape(tiles.sizes)
        kept = None if mask is None else mask.whole(context, tiles.sizes)

        def scores_of(box: Box) -> Sequence[Tensor]:
            goes = self._goes(tiles, by_tiles, kept, box)
            rows = tiles.rows(_ranked(tiles.part(by_tiles, box)), box, 0.0)
            rows = torch.where(goes, rows, _neutral(order))
            # A unit that nothing goes with is no candidate, but its score must not be NaN.
            counts = goes.sum((0, 2)).clamp(min=1) if is_mean else None
            return [_norms(rows, counts, order, passes)]

        return _of_units(context, tiles, passes, [rounded_to(values.dtype)], scores_of)[0]

    def spread(
        self, context: RequestContext, kept: Mask, values: Tensor, mask: Mask | None
    ) -> Mask:
        """As Element.spread."""
        tiles, passes = self._tiles(values.shape), passes_of(values.device)
        by_tiles = values.reshape(tiles.sizes)
        before = None if mask is None else mask.whole(context, tiles.sizes)
        units = kept.whole(context, tiles.grid) if kept.kept(context) else None
        flags = room_to_work(context, values.numel(), passes).view(torch.bool)

        def spread_box(box: Box) -> None:
            stays = self._largest(self._keys(tiles, by_tiles, before, box))
            if units is not None:
                stays |= tiles.in_grid(units, box).reshape(len(stays), 1, -1)
            tiles.paste(flags.view(tiles.sizes), box, stays)

        passes.map(context, spread_box, _boxes(tiles, passes))
        return flags_mask(context, flags)

    def sizes(self, shape: Sequence[int]) -> int | None:
        """As Element.sizes."""
        return None

    def costs(
        self, context: RequestContext, weight: Tensor, values: Tensor, mask: Mask | None
    ) -> tuple[Tensor, Tensor]:
        """As Slice.costs."""
        tiles, passes = self._tiles(values.shape), passes_of(values.device)
        by_tiles, weights = values.reshape(tiles.sizes), weight.reshape(tiles.sizes)
        kept = None if mask is None else mask.whole(context, tiles.sizes)

        def costs_of(box: Box) -> tuple[Tensor, Tensor]:
            goes = self._goes(tiles, by_tiles, kept, box)
            rows = tiles.rows(_ranked(tiles.part(weights, box)), box, 0.0)
            return goes.sum((0, 2)), _squares(torch.where(goes, rows, 0.0), passes)

        counts, squares = _of_units(context, tiles, passes, _COSTS, costs_of)
        return counts, squares

    def _tiles(self, shape: Sequence[int]) -> Tiles:
        # A longer group than a line would be filled up with what is pruned.
        outer, size, inner = around(shape, self.dim)
        return Tiles((outer, size, inner), (1, max(1, min(self.m, size)), 1))

    def _keys(self, tiles: Tiles, values: Tensor, kept: Tensor | None, box: Box) -> Tensor:
        """The keys of a box; -1 of what is pruned.  Returns: (groups, m, inner)."""
        part = tiles.part(values, box)
        keys = as_keys(part, ranked_as(part.dtype))
        if kept is not None:
            keys.masked_fill_(~tiles.part(kept, box), -1)
        _, _, (first, last) = box
        return tiles.padded(keys, box, -1).reshape(-1, tiles.lengths[1], last - first)

    def _goes(self, tiles: Tiles, values: Tensor, kept: Tensor | None, box: Box) -> Tensor:
        """Which elements go with the units of a box.  Returns: bool, as Tiles.rows."""
        keys = self._keys(tiles, values, kept, box)
        goes = ~self._largest(keys) & (keys >= 0)
        return goes.transpose(1, 2).reshape(1, -1, keys.shape[1])

    def _largest(self, keys: Tensor) -> Tensor:
        """Which of a group's elements stay.  keys: (groups, elements, inner)."""
        return passes_of(keys.device).largest(keys, min(self.n, keys.shape[1]))


def _outside(dim: int, shape: Sequence[int]) -> str | None:
    if not shape:
        return "it has no dimension"
    if not -len(shape) <= dim < len(shape):
        return f"{dim} is not in [{-len(shape)}, {len(shape)})"
    return None


def _boxes(tiles: Tiles, passes: Passes) -> list[Box]:
    # As float64 they are to stay in the second-level cache.
    return tiles.boxes(passes.piece // 8)


def _ranked(part: Tensor) -> Tensor:
    return part.to(ranked_as(part.dtype))


def _neutral(p: float) -> float:
    """What adds nothing to a norm."""
    return math.inf if p < 0 else 0.0


def _norms(rows: Tensor, counts: Tensor | None, p: float, passes: Passes) -> Tensor:
    """The norm of each row, rounded once, or its power mean over `counts` elements.

    rows: (1, units, elements), floating.  Returns: as slice_norms.
    """
    norms = vector_norms(rows, 0, rows.shape[1], p, passes, counts)
    return norms.to(rounded_to(rows.dtype))


def _costs(
    context: RequestContext, tiles: Tiles, weight: Tensor, mask: Mask | None
) -> tuple[Tensor, Tensor]:
    """As Slice.costs, of units that go whole."""
    passes, by_tiles = passes_of(weight.device), weight.reshape(tiles.sizes)
    kept = None if mask is None else mask.whole(context, tiles.sizes)

    def costs_of(box: Box) -> tuple[Tensor, Tensor]:
        part = _ranked(tiles.part(by_tiles, box))
        if kept is None:
            return tiles.counts(box, part.device), _squares(tiles.rows(part, box, 0.0), passes)
        flags = tiles.part(kept, box)
        part = torch.where(flags, part, 0.0)
        counts = tiles.rows(flags, box, False).sum((0, 2))
        return counts, _squares(tiles.rows(part, box, 0.0), passes)

    counts, squares = _of_units(context, tiles, passes, _COSTS, costs_of)
    return counts, squares


def _squares(rows: Tensor, passes: Passes) -> Tensor:
    """The sum of squares of each row.  rows: (1, units, elements).  Returns: float64."""
    sums = passes.power_sums(rows, 0, rows.shape[1], 2)
    return row_sums(rows[0].to(torch.float64).square()) if sums is None else sums


_COSTS = (torch.int64, torch.float64)


def _of_units(
    context: RequestContext,
    tiles: Tiles,
    passes: Passes,
    dtypes: Sequence[torch.dtype],
    of_box: Callable[[Box], Sequence[Tensor]],
) -> list[Tensor]:
    """What `of_box` gives for the units of each box, for all of them.  Returns: flat ones.

    Each box is written where it belongs: parts that wait to be joined leave holes in the heap.
    """
    boxes = _boxes(tiles, passes)
    ends = list(itertools.accumulate(_units(box) for box in boxes))
    found = [room_to_work(context, ends[-1] * d.itemsize, passes).view(d) for d in dtypes]

    def write(part: tuple[Box, int]) -> None:
        box, end = part
        for into, values in zip(found, of_box(box), strict=True):
            into[end - _units(box) : end] = values

    passes.map(context, write, list(zip(boxes, ends, strict=True)))
    return found


def _units(box: Box) -> int:
    return math.prod(last - first for first, last in box)


def flags_mask(context: RequestContext, found: Tensor) -> Mask:
    """A mask from bool, flat."""
    return mask_of(context, lambda begin, end: found[begin:end], len(found), found.device)


Granularity = Element | Slice | Block | NM
