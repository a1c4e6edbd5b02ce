"""Blocks of elements: tiles of a matrix, kernels of a convolution."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur_proto import spec_pb2 as pb
from secateur_server.backends import allocate, backend_for
from secateur_server.backends.masks import Mask, mask_of_flags
from secateur_server.backends.norms import rounded_to
from secateur_server.errors import InvalidSpec, NotStructured, quote
from secateur_server.granularity.tiled import (
    boxes_of,
    comparable,
    map_tiles,
    neutral,
    row_norms,
    tile_costs,
)
from secateur_server.granularity.tiles import Box, Tiles
from secateur_server.runtime.context import RequestContext


@dataclass(frozen=True)
class Block:
    """A unit is a block of elements, which may be smaller at the end of a dimension.

    Attributes:
        shape: The lengths of a block; 0 is the whole dimension.
        as_matrix: Whether a tensor counts as a matrix of its first dimension and all others.
    """

    shape: tuple[int, ...]
    as_matrix: bool

    is_element, is_normed, is_part = False, False, False

    @classmethod
    def decode(cls, selection: pb.Selection, path: str) -> "Block":
        """Reads GRANULARITY_BLOCK and `block`.

        Raises:
            InvalidSpec: The block has no length.
        """
        shape = tuple(selection.block.shape)
        if not any(shape):
            raise InvalidSpec(
                f"{path}.block.shape", "all lengths are 0; give at least one that is not 0"
            )
        return cls(shape, selection.block.as_matrix)

    def check(self, path: str, name: str, shape: Sequence[int]) -> None:
        dims = 2 if self.as_matrix else len(shape)
        if self.as_matrix and len(shape) < 2:
            why = (
                "a matrix needs 2 dimensions or more; name only such tensors, as "
                "[n for n, t in state_dict.items() if t.ndim > 1] does"
            )
        elif len(self.shape) != dims:
            why = f"a block needs {dims} lengths, not {len(self.shape)}"
        else:
            return
        raise NotStructured(f"{path}.block", f"{quote(name)} has shape {list(shape)}: {why}")

    def grid(self, shape: Sequence[int]) -> tuple[int, ...]:
        return self._tiles(shape).grid

    def candidates(self, context: RequestContext, values: Tensor, mask: Mask | None) -> Mask | None:
        if mask is None:
            return None
        tiles, backend = self._tiles(values.shape), backend_for(values.device)
        kept = mask.whole(context, tiles.sizes)

        def candidates_of(box: Box) -> Sequence[Tensor]:
            return [backend.any_along(tiles.rows(tiles.part(kept, box), box, False))]

        (found,) = map_tiles(context, tiles, backend, [torch.bool], candidates_of)
        return mask_of_flags(context, found)

    def scores(
        self, context: RequestContext, values: Tensor, mask: Mask | None, p: float, is_mean: bool
    ) -> Tensor:
        tiles, backend = self._tiles(values.shape), backend_for(values.device)
        by_tiles = values.reshape(tiles.sizes)
        kept = None if mask is None else mask.whole(context, tiles.sizes)

        def scores_of(box: Box) -> Sequence[Tensor]:
            part = comparable(tiles.part(by_tiles, box))
            if kept is not None:
                part = torch.where(tiles.part(kept, box), part, 0.0)
            rows = tiles.rows(part, box, neutral(p))
            counts = tiles.counts(box, rows.device) if is_mean else None
            return [row_norms(rows, counts, p, backend)]

        return map_tiles(context, tiles, backend, [rounded_to(values.dtype)], scores_of)[0]

    def expand(
        self, context: RequestContext, kept: Mask, values: Tensor, mask: Mask | None
    ) -> Mask:
        tiles, backend = self._tiles(values.shape), backend_for(values.device)
        units = kept.whole(context, tiles.grid)
        flags = allocate(context, values.numel(), backend).view(torch.bool)

        def expand_box(box: Box) -> None:
            tiles.fill(flags.view(tiles.sizes), box, units)

        backend.map(context, expand_box, boxes_of(tiles, backend))
        return mask_of_flags(context, flags)

    def unit_elements(self, shape: Sequence[int]) -> int | None:
        tiles = self._tiles(shape)
        return tiles.elements if tiles.divide else None

    def costs(
        self, context: RequestContext, weight: Tensor, values: Tensor, mask: Mask | None
    ) -> tuple[Tensor, Tensor]:
        return tile_costs(context, self._tiles(weight.shape), weight, mask)

    def _tiles(self, shape: Sequence[int]) -> Tiles:
        sizes = (shape[0], math.prod(shape[1:])) if self.as_matrix else tuple(shape)
        lengths = zip(self.shape, sizes, strict=True)
        return Tiles(sizes, tuple(max(1, min(length or size, size)) for length, size in lengths))
