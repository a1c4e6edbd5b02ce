"""N:M sparsity: at most n of m consecutive elements are kept."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur_proto import spec_pb2 as pb
from secateur_server.backends import allocate, backend_for
from secateur_server.backends.keys import as_keys, ranked_as
from secateur_server.backends.masks import Mask, mask_of_flags
from secateur_server.backends.norms import rounded_to
from secateur_server.backends.pieces import around
from secateur_server.errors import InvalidSpec, NotStructured, quote
from secateur_server.granularity.tiled import (
    COSTS,
    boxes_of,
    comparable,
    map_tiles,
    neutral,
    row_norms,
    square_sums,
)
from secateur_server.granularity.tiles import Box, Tiles
from secateur_server.runtime.context import RequestContext

# No hardware has longer patterns, and they take long to sort.
LONGEST_PATTERN = 1024


@dataclass(frozen=True)
class NM:
    """A unit is the `m - n` least important elements of a group of `m`.

    Units are candidates if their group has more than n unpruned elements. The last group of a line
    may be shorter; it is padded with pruned elements.

    Attributes:
        n: Elements of a group that are kept.
        m: Consecutive elements along `dim` that make up a group.
        dim: The dimension; negative counts from the end.
    """

    n: int
    m: int
    dim: int

    is_element, is_normed, is_part = False, False, True

    @classmethod
    def decode(cls, selection: pb.Selection, path: str) -> "NM":
        """Reads GRANULARITY_N_M, `pattern` and `dim`.

        Raises:
            InvalidSpec: The pattern is impossible.
        """
        n, m = selection.pattern.n, selection.pattern.m
        if not 1 <= n < m <= LONGEST_PATTERN:
            raise InvalidSpec(
                f"{path}.pattern",
                f"{n}:{m} is not a pattern; 1 <= n < m <= {LONGEST_PATTERN} is needed",
            )
        return cls(n, m, selection.dim)

    def check(self, path: str, name: str, shape: Sequence[int]) -> None:
        if not shape:
            why = "a pattern needs a dimension"
        elif not -len(shape) <= self.dim < len(shape):
            dims = self.dim + 1 if self.dim >= 0 else -self.dim
            why = (
                f"dim {self.dim} is not in [{-len(shape)}, {len(shape)}); name only tensors that "
                f"have it, as [n for n, t in state_dict.items() if t.ndim >= {dims}] does"
            )
        else:
            return
        raise NotStructured(f"{path}.dim", f"{quote(name)} has shape {list(shape)}: {why}")

    def grid(self, shape: Sequence[int]) -> tuple[int, ...]:
        dim = self.dim % len(shape)
        return (*shape[:dim], -(-shape[dim] // self.m), *shape[dim + 1 :])

    def candidates(self, context: RequestContext, values: Tensor, mask: Mask | None) -> Mask | None:
        tiles, backend = self._tiles(values.shape), backend_for(values.device)
        shorter = tiles.sizes[1] % self.m
        if mask is None and not 0 < shorter <= self.n:
            return None
        kept = None if mask is None else mask.whole(context, tiles.sizes)

        def candidates_of(box: Box) -> Sequence[Tensor]:
            if kept is None:
                return [tiles.counts(box, values.device) > self.n]
            return [tiles.rows(tiles.part(kept, box), box, False).sum((0, 2)) > self.n]

        (found,) = map_tiles(context, tiles, backend, [torch.bool], candidates_of)
        return mask_of_flags(context, found)

    def scores(
        self, context: RequestContext, values: Tensor, mask: Mask | None, p: float, is_mean: bool
    ) -> Tensor:
        tiles, backend = self._tiles(values.shape), backend_for(values.device)
        by_tiles = values.reshape(tiles.sizes)
        kept = None if mask is None else mask.whole(context, tiles.sizes)

        def scores_of(box: Box) -> Sequence[Tensor]:
            pruned = self._pruned(tiles, by_tiles, kept, box)
            rows = tiles.rows(comparable(tiles.part(by_tiles, box)), box, 0.0)
            rows = torch.where(pruned, rows, neutral(p))
            # A unit without elements is not a candidate, but its score must not be NaN.
            counts = pruned.sum((0, 2)).clamp(min=1) if is_mean else None
            return [row_norms(rows, counts, p, backend)]

        return map_tiles(context, tiles, backend, [rounded_to(values.dtype)], scores_of)[0]

    def expand(
        self, context: RequestContext, kept: Mask, values: Tensor, mask: Mask | None
    ) -> Mask:
        tiles, backend = self._tiles(values.shape), backend_for(values.device)
        by_tiles = values.reshape(tiles.sizes)
        before = None if mask is None else mask.whole(context, tiles.sizes)
        units = kept.whole(context, tiles.grid) if kept.kept(context) else None
        flags = allocate(context, values.numel(), backend).view(torch.bool)

        def expand_box(box: Box) -> None:
            kept_of_group = self._largest(self._keys(tiles, by_tiles, before, box))
            if units is not None:
                kept_of_group |= tiles.in_grid(units, box).reshape(len(kept_of_group), 1, -1)
            tiles.paste(flags.view(tiles.sizes), box, kept_of_group)

        backend.map(context, expand_box, boxes_of(tiles, backend))
        return mask_of_flags(context, flags)

    def unit_elements(self, shape: Sequence[int]) -> int | None:
        return None

    def costs(
        self, context: RequestContext, weight: Tensor, values: Tensor, mask: Mask | None
    ) -> tuple[Tensor, Tensor]:
        tiles, backend = self._tiles(values.shape), backend_for(values.device)
        by_tiles, weights = values.reshape(tiles.sizes), weight.reshape(tiles.sizes)
        kept = None if mask is None else mask.whole(context, tiles.sizes)

        def costs_of(box: Box) -> tuple[Tensor, Tensor]:
            pruned = self._pruned(tiles, by_tiles, kept, box)
            rows = tiles.rows(comparable(tiles.part(weights, box)), box, 0.0)
            return pruned.sum((0, 2)), square_sums(torch.where(pruned, rows, 0.0), backend)

        counts, squares = map_tiles(context, tiles, backend, COSTS, costs_of)
        return counts, squares

    def _tiles(self, shape: Sequence[int]) -> Tiles:
        # A group that is longer than a line would only get padding.
        outer, size, inner = around(shape, self.dim)
        return Tiles((outer, size, inner), (1, max(1, min(self.m, size)), 1))

    def _keys(self, tiles: Tiles, values: Tensor, kept: Tensor | None, box: Box) -> Tensor:
        """The keys of a box; -1 for pruned elements.  Returns: (groups, m, inner)."""
        part = tiles.part(values, box)
        keys = as_keys(part, ranked_as(part.dtype))
        if kept is not None:
            keys.masked_fill_(~tiles.part(kept, box), -1)
        _, _, (first, last) = box
        return tiles.padded(keys, box, -1).reshape(-1, tiles.lengths[1], last - first)

    def _pruned(self, tiles: Tiles, values: Tensor, kept: Tensor | None, box: Box) -> Tensor:
        """The elements of the units of a box: bool, in the shape of Tiles.rows."""
        keys = self._keys(tiles, values, kept, box)
        pruned = ~self._largest(keys) & (keys >= 0)
        return pruned.transpose(1, 2).reshape(1, -1, keys.shape[1])

    def _largest(self, keys: Tensor) -> Tensor:
        """The n most important elements of each group. `keys` are (groups, elements, inner)."""
        return backend_for(keys.device).largest(keys, min(self.n, keys.shape[1]))
