"""Work on units that are tiles of a tensor, or parts of tiles, some tiles at a time."""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from secateur_server.backends import allocate, backend_for
from secateur_server.backends.keys import ranked_as
from secateur_server.backends.masks import Mask
from secateur_server.backends.norms import rounded_to, vector_norms
from secateur_server.backends.protocol import Backend
from secateur_server.granularity.tiles import Box, Tiles
from secateur_server.runtime.context import RequestContext

# The dtypes of the results of Granularity.costs.
COSTS = (torch.int64, torch.float64)


def boxes_of(tiles: Tiles, backend: Backend) -> list[Box]:
    """Splits all tiles into boxes whose elements fit in the second-level cache as float64."""
    return tiles.boxes(backend.piece // 8)


def comparable(part: Tensor) -> Tensor:
    """Converts a part to the dtype in which its values are compared."""
    return part.to(ranked_as(part.dtype))


def neutral(p: float) -> float:
    """Returns the value that adds nothing to a norm of order p."""
    return math.inf if p < 0 else 0.0


def row_norms(rows: Tensor, counts: Tensor | None, p: float, backend: Backend) -> Tensor:
    """Computes the norm of each row, rounded once, or its power mean over `counts` elements.

    Args:
        rows: (1, units, elements), floating.
        counts: Of each unit. None: a norm.
        p: The order.
        backend: Of the device.

    Returns:
        As slice_norms.
    """
    norms = vector_norms(rows, 0, rows.shape[1], p, backend, counts)
    return norms.to(rounded_to(rows.dtype))


def tile_costs(
    context: RequestContext, tiles: Tiles, weight: Tensor, mask: Mask | None
) -> tuple[Tensor, Tensor]:
    """Does Granularity.costs for units that are whole tiles."""
    backend, by_tiles = backend_for(weight.device), weight.reshape(tiles.sizes)
    kept = None if mask is None else mask.whole(context, tiles.sizes)

    def costs_of(box: Box) -> tuple[Tensor, Tensor]:
        part = comparable(tiles.part(by_tiles, box))
        if kept is None:
            return tiles.counts(box, part.device), square_sums(tiles.rows(part, box, 0.0), backend)
        flags = tiles.part(kept, box)
        part = torch.where(flags, part, 0.0)
        counts = tiles.rows(flags, box, False).sum((0, 2))
        return counts, square_sums(tiles.rows(part, box, 0.0), backend)

    counts, squares = map_tiles(context, tiles, backend, COSTS, costs_of)
    return counts, squares


def square_sums(rows: Tensor, backend: Backend) -> Tensor:
    """Sums the squares of each row of (1, units, elements), as float64."""
    return backend.power_sums(rows, 0, rows.shape[1], 2)


def map_tiles(
    context: RequestContext,
    tiles: Tiles,
    backend: Backend,
    dtypes: Sequence[torch.dtype],
    work: Callable[[Box], Sequence[Tensor]],
) -> list[Tensor]:
    """Calls `work` with each box, and joins the results for its units.

    Each box is written to its place: parts that wait to be joined fragment the heap.

    Args:
        context: The request.
        tiles: Of the tensor.
        backend: Of the device.
        dtypes: Of the results.
        work: Returns flat results for the units of a box.

    Returns:
        Flat results for all units.
    """
    boxes = boxes_of(tiles, backend)
    ends = list(itertools.accumulate(_units(box) for box in boxes))
    found = [allocate(context, ends[-1] * d.itemsize, backend).view(d) for d in dtypes]

    def write(part: tuple[Box, int]) -> None:
        box, end = part
        for into, values in zip(found, work(box), strict=True):
            into[end - _units(box) : end] = values

    backend.map(context, write, list(zip(boxes, ends, strict=True)))
    return found


def _units(box: Box) -> int:
    return math.prod(last - first for first, last in box)
