"""Scores of elements that are products of weights and factors."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from secateur_server.backends import allocate, backend_for
from secateur_server.backends.keys import BITS, as_keys
from secateur_server.backends.masks import Mask
from secateur_server.backends.norms import rounded_to, slice_norms
from secateur_server.backends.pieces import EXACT_POWERS, MakeRandom
from secateur_server.granularity.tiles import Box, Tiles
from secateur_server.runtime.context import RequestContext


@dataclass(frozen=True)
class Products:
    """|w|^p times factors for each element, as pieces.Scores. Each is computed where it is needed.

    A score is computed in float64 and rounded once, so all devices compute the same one. It is NaN
    only where the weight is NaN.

    Attributes:
        weight: (rows, inputs, rest), of any dtype that can be pruned.
        power: p, above 0.
        factors: Each (rows, inputs, rest), or 1 in some of them; finite, not negative.
        sums: The sums of |w| of each row, and of each column; then |w| is its share of the one sum
            plus its share of the other. None: |w| is not relative.
        is_finite: Whether it is known that no weight is infinite or NaN.
    """

    weight: Tensor
    power: float
    factors: tuple[Tensor, ...]
    sums: tuple[Tensor, Tensor] | None = None
    is_finite: bool = False

    stored = None
    stream = (0, 0)

    @property
    def dtype(self) -> torch.dtype:
        return rounded_to(self.weight.dtype)

    def part(self, begin: int, end: int) -> "Products":
        """Returns the scores of the units [begin, end), which are whole rows."""
        _, inputs, rest = self.weight.shape
        width = inputs * rest
        assert begin % width == 0 == end % width, "part of a row"
        return self.box(((begin // width, end // width), (0, inputs), (0, rest)))

    def box(self, box: Box) -> "Products":
        """Returns the scores of the elements that lie in a box."""
        sums = None
        if self.sums is not None:
            of_rows, of_columns = self.sums
            sums = _part(of_rows, box), _part(of_columns, box)
        factors = tuple(_part(factor, box) for factor in self.factors)
        return replace(self, weight=_part(self.weight, box), factors=factors, sums=sums)

    def values(self) -> Tensor:
        """Computes the scores, of either sign, in the shape of the weight."""
        if self._is_one_product:
            (factor,) = self.factors
            scores = self.weight.to(self.dtype) * factor.to(self.dtype)
            if self.is_finite:
                return scores
        else:
            scores = self._in_float64().to(self.dtype)
        # An infinite weight ranks last, though its factor may be 0.
        return torch.where(scores.isnan() & ~self.weight.isnan(), torch.inf, scores)

    @property
    def _is_one_product(self) -> bool:
        """Whether a product in float32 has the bits of one in float64 that is rounded."""
        is_plain = self.power == 1 and self.sums is None and len(self.factors) == 1
        return is_plain and torch.promote_types(self.factors[0].dtype, self.dtype) == self.dtype

    def _in_float64(self) -> Tensor:
        scores = self.weight.to(torch.float64).abs()
        if self.sums is not None:
            of_rows, of_columns = self.sums
            scores = scores / of_rows + scores / of_columns
        if self.power != 1:
            scores = _raised(scores, self.power)
        for factor in self.factors:
            scores = scores * factor.to(torch.float64)
        return scores

    def keys(self, dtype: torch.dtype, units: int, make_random: MakeRandom) -> Tensor:
        return as_keys(self.values().reshape(-1), dtype)

    def bits(self, dtype: torch.dtype, units: int, make_random: MakeRandom) -> Tensor:
        return self.values().reshape(-1).to(dtype).view(BITS[dtype])

    def keys_at(self, dtype: torch.dtype, index: Tensor) -> Tensor:
        return as_keys(self.values().reshape(-1)[index], dtype)

    def store(self, context: RequestContext) -> Tensor:
        """Computes all scores, in pieces.  Returns: flat."""
        shape = tuple(self.weight.shape)
        backend = backend_for(self.weight.device)
        size = self.weight.numel() * self.dtype.itemsize
        found = allocate(context, size, backend).view(self.dtype)
        tiles = Tiles(shape, (1, 1, 1))

        def fill(box: Box) -> None:
            tiles.part(found.view(shape), box).copy_(self.box(box).values())

        backend.map(context, fill, tiles.boxes(backend.piece // 8))
        return found


def _part(tensor: Tensor, box: Box) -> Tensor:
    """A view of the elements of a box; dimensions of size 1 are whole."""
    along = zip(tensor.shape, box, strict=True)
    return tensor[tuple(slice(None) if size == 1 else slice(*span) for size, span in along)]


def _raised(values: Tensor, p: float) -> Tensor:
    """Values to the power p. Powers that are no products differ from device to device."""
    if p in EXACT_POWERS:
        return values.pow(p)
    return values.cpu().pow(p).to(values.device)


def sums_of(
    context: RequestContext, weight: Tensor, mask: Mask | None, shape: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Sums |w| over the unpruned elements of each row and of each column, for Products.sums.

    Args:
        context: The request.
        weight: The tensor.
        mask: Its prior mask.
        shape: (rows, inputs, rest).
    """
    rows, inputs, rest = shape
    matrix = weight.reshape(rows, inputs * rest)
    of_rows, of_columns = (_sums(context, matrix, mask, dim) for dim in (0, 1))
    return of_rows.view(rows, 1, 1), of_columns.view(1, inputs, rest)


def _sums(context: RequestContext, matrix: Tensor, mask: Mask | None, dim: int) -> Tensor:
    sums = slice_norms(context, matrix, mask, dim, 1.0).to(torch.float64)
    return torch.where(sums == 0, 1.0, sums)  # all elements are 0, and so are their shares
