"""Slices along a dimension: rows, columns, filters, channels."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from secateur_proto import spec_pb2 as pb
from secateur_server.backends.masks import Mask, expand, kept_slices, mask_of_flags
from secateur_server.backends.norms import slice_norms
from secateur_server.backends.pieces import around
from secateur_server.errors import DimOutOfRange, NotStructured, quote
from secateur_server.granularity.tiled import tile_costs
from secateur_server.granularity.tiles import Tiles
from secateur_server.runtime.context import RequestContext


@dataclass(frozen=True)
class Slice:
    """A unit is all elements with one index in a dimension.

    Attributes:
        dim: The dimension; negative counts from the end.
    """

    dim: int

    is_element, is_normed, is_part = False, True, False

    @classmethod
    def decode(cls, selection: pb.Selection, path: str) -> "Slice":
        """Reads GRANULARITY_SLICE."""
        return cls(selection.dim)

    def check(self, path: str, name: str, shape: Sequence[int]) -> None:
        field = f"{path}.dim"
        if len(shape) < 2:
            raise NotStructured(
                field,
                f"{quote(name)} has shape {list(shape)}; slices need 2 dimensions or more: name "
                "only such tensors, as [n for n, t in state_dict.items() if t.ndim > 1] does",
            )
        if not -len(shape) <= self.dim < len(shape):
            raise DimOutOfRange(
                field,
                f"{self.dim} is not in [{-len(shape)}, {len(shape)}) of {quote(name)} "
                f"{list(shape)}",
            )

    def grid(self, shape: Sequence[int]) -> tuple[int, ...]:
        return (shape[self.dim],)

    def candidates(self, context: RequestContext, values: Tensor, mask: Mask | None) -> Mask | None:
        if mask is None:
            return None
        found = kept_slices(context, mask, values.shape, self.dim)
        return mask_of_flags(context, found)

    def scores(
        self, context: RequestContext, values: Tensor, mask: Mask | None, p: float, is_mean: bool
    ) -> Tensor:
        return slice_norms(context, values, mask, self.dim, p, is_mean)

    def expand(
        self, context: RequestContext, kept: Mask, values: Tensor, mask: Mask | None
    ) -> Mask:
        return expand(context, kept.flags(0, kept.elements), values.shape, self.dim)

    def unit_elements(self, shape: Sequence[int]) -> int | None:
        outer, _, inner = around(shape, self.dim)
        return outer * inner

    def costs(
        self, context: RequestContext, weight: Tensor, values: Tensor, mask: Mask | None
    ) -> tuple[Tensor, Tensor]:
        outer, size, inner = around(weight.shape, self.dim)
        return tile_costs(context, Tiles((outer, size, inner), (outer, 1, inner)), weight, mask)
