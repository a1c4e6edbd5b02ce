"""A tensor in tiles."""

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur_server.backends import Span, spans

# Tiles side by side: [first, last) of the grid in each dimension.
Box = tuple[Span, ...]


@dataclass(frozen=True)
class Tiles:
    """A tensor of shape `sizes`, in tiles of `lengths`, each 1 or more.

    Tiles are smaller at the end of a dimension that their length does not divide.
    """

    sizes: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def grid(self) -> tuple[int, ...]:
        """The number of tiles in each dimension."""
        return tuple(-(-s // length) for s, length in zip(self.sizes, self.lengths, strict=True))

    @property
    def elements(self) -> int:
        """Elements of a full tile."""
        return math.prod(self.lengths)

    @property
    def divide(self) -> bool:
        """Whether all tiles are full."""
        return not any(s % length for s, length in zip(self.sizes, self.lengths, strict=True))

    def boxes(self, most: int) -> list[Box]:
        """Splits all tiles, in row-major order, into boxes of one tile or up to `most` elements."""
        grid, tiles = self.grid, max(1, most // self.elements)
        axis = next(a for a in range(len(grid)) if math.prod(grid[a + 1 :]) <= tiles)
        step = tiles // math.prod(grid[axis + 1 :])
        before = itertools.product(*(spans(count, 1) for count in grid[:axis]))
        behind = [(0, count) for count in grid[axis + 1 :]]
        along = spans(grid[axis], step)
        return [(*first, span, *behind) for first in before for span in along]

    def part(self, tensor: Tensor, box: Box) -> Tensor:
        """Returns a view of the elements of a box. `tensor` has the shape `sizes`."""
        along = zip(box, self.lengths, strict=True)
        return tensor[tuple(slice(first * n, last * n) for (first, last), n in along)]

    def in_grid(self, units: Tensor, box: Box) -> Tensor:
        """Returns a view of the tiles of a box. `units` has the grid's shape."""
        return units[tuple(slice(*span) for span in box)]

    def padded(self, part: Tensor, box: Box, fill: float) -> Tensor:
        """Pads a part, so that all its tiles are full."""
        missing: list[int] = []
        for (first, last), length, size in zip(box, self.lengths, part.shape, strict=True):
            missing = [0, (last - first) * length - size, *missing]
        return torch.nn.functional.pad(part, missing, value=fill) if any(missing) else part

    def rows(self, part: Tensor, box: Box, fill: float) -> Tensor:
        """Makes a row of each tile of a part: (1, tiles, elements)."""
        dims = len(box)
        split = itertools.chain.from_iterable(
            (last - first, length) for (first, last), length in zip(box, self.lengths, strict=True)
        )
        by_tile = self.padded(part, box, fill).reshape(tuple(split))
        by_tile = by_tile.permute(*range(0, 2 * dims, 2), *range(1, 2 * dims, 2))
        return by_tile.reshape(1, -1, self.elements)

    def counts(self, box: Box, device: torch.device) -> Tensor:
        """Counts the elements of each tile of a box: int64, flat."""
        counts = torch.ones((), dtype=torch.int64, device=device)
        for (first, last), length, size in zip(box, self.lengths, self.sizes, strict=True):
            left = size - torch.arange(first, last, device=device) * length
            counts = counts.unsqueeze(-1) * left.clamp(max=length)
        return counts.reshape(-1)

    def fill(self, tensor: Tensor, box: Box, units: Tensor) -> None:
        """Writes the value of each tile of a box to its elements.

        Args:
            tensor: Of shape `sizes`.
            box: The tiles.
            units: The values, in the grid's shape.
        """
        tiles = self.in_grid(units, box)
        for dim, length in enumerate(self.lengths):
            tiles = tiles.repeat_interleave(length, dim)
        self.paste(tensor, box, tiles)

    def paste(self, tensor: Tensor, box: Box, padded: Tensor) -> None:
        """Writes a box without its padding.

        Args:
            tensor: Of shape `sizes`.
            box: The tiles.
            padded: As Tiles.padded returns it, in any shape.
        """
        along = zip(box, self.lengths, strict=True)
        whole = padded.reshape(tuple((last - first) * n for (first, last), n in along))
        target = self.part(tensor, box)
        target.copy_(whole[tuple(slice(size) for size in target.shape)])
