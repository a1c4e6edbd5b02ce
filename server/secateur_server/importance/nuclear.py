"""The nuclear norm of a slice: the sum of its singular values, as in torch.norm(p="nuc")."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur_server.backends import backend_for, spans
from secateur_server.backends.masks import Mask
from secateur_server.backends.norms import rounded_to
from secateur_server.errors import InvalidSpec, NotStructured, quote
from secateur_server.granularity import Granularity
from secateur_server.importance.protocol import Importance
from secateur_server.runtime.context import RequestContext

# Steps of a singular value decomposition: about a second. It cannot be interrupted.
MOST_OF_SVD = 1 << 30


@dataclass(frozen=True)
class Nuclear(Importance):
    """The nuclear norm of each slice, which is a matrix.

    Attributes:
        dim: The dimension of the slices; may be negative.
    """

    dim: int

    ranks_zeros_lowest = True

    def check(self, path: str, name: str, shape: Sequence[int]) -> None:
        field = f"{path}.magnitude.matrix_norm"
        if len(shape) != 3:
            raise NotStructured(
                field, f"{quote(name)} has shape {list(shape)}; the nuclear norm needs 3 dimensions"
            )
        rows, columns = (size for index, size in enumerate(shape) if index != self.dim % 3)
        if rows * columns * min(rows, columns) > MOST_OF_SVD:
            raise InvalidSpec(
                field,
                f"a slice of {quote(name)} is a matrix of {rows} x {columns}: its singular values "
                "take too long, as rows * columns * the smaller of both is above the limit of 2^30 "
                "(1024 x 1024); use a matrix norm of another kind, or smaller slices",
            )

    def scores(
        self,
        context: RequestContext,
        values: Tensor,
        mask: Mask | None,
        granularity: Granularity,
        is_mean: bool,
    ) -> Tensor:
        kept = None if mask is None else mask.whole(context, values.shape).movedim(self.dim, 0)
        backend, slices = backend_for(values.device), values.movedim(self.dim, 0)

        def norms_of(span: tuple[int, int]) -> Tensor:
            matrices = slices[slice(*span)].to(torch.float64)
            if kept is not None:
                matrices = torch.where(kept[slice(*span)], matrices, 0.0)
            # On the CPU, as singular values differ between devices.
            return _nuclear_norms(matrices.cpu()).to(values.device)

        size = max(1, backend.piece // 8 // max(1, math.prod(slices.shape[1:])))
        parts = backend.map(context, norms_of, spans(len(slices), size))
        return torch.cat(parts).to(rounded_to(values.dtype))


def _nuclear_norms(matrices: Tensor) -> Tensor:
    """Sums of singular values; infinite for a matrix with an infinite element."""
    finite = matrices.isfinite().flatten(1).all(1)
    norms = torch.linalg.matrix_norm(torch.where(finite.view(-1, 1, 1), matrices, 0.0), "nuc")
    return torch.where(finite, norms, math.inf)
