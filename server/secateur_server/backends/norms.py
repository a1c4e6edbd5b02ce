"""Norms of parts of a tensor, the same bits on every machine and with every number of threads."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from secateur_server.backends import backend_for, spans
from secateur_server.backends.keys import ranked_as
from secateur_server.backends.masks import Mask
from secateur_server.backends.pieces import around
from secateur_server.backends.protocol import Backend
from secateur_server.runtime.context import RequestContext


def slice_norms(
    context: RequestContext,
    values: Tensor,
    mask: Mask | None,
    dim: int,
    p: float,
    is_mean: bool = False,
) -> Tensor:
    """The norm of each slice, as torch.norm over all other dimensions.

    values: at least 2-D.  mask: what is not kept counts as 0.
    Returns: 1-D; float64 for what ranks as float64, else float32, accumulated in float64 and
        rounded once, so that neither the machine nor the number of threads shows.
    """
    shape = around(values.shape, dim)
    by_slice = values.reshape(shape)
    kept = None if mask is None else mask.whole(context, shape)
    backend, dtype = backend_for(values.device), ranked_as(values.dtype)

    elements = shape[0] * shape[2] if is_mean else None

    def norms_of(span: tuple[int, int]) -> Tensor:
        first, last = span
        if kept is None:
            return vector_norms(by_slice, first, last, p, backend, elements)
        block = torch.where(kept[:, first:last], by_slice[:, first:last].to(dtype), 0.0)
        return vector_norms(block, 0, last - first, p, backend, elements)

    # Smaller pieces than elsewhere: as float64 they are to stay in the second-level cache.
    size = max(1, backend.piece // 8 // (shape[0] * shape[2]))
    joined = torch.cat(backend.map(context, norms_of, spans(shape[1], size)))
    return joined.to(rounded_to(dtype))


def vector_norms(
    values: Tensor,
    first: int,
    last: int,
    p: float,
    backend: Backend,
    elements: Tensor | int | None = None,
) -> Tensor:
    """Norms of the slices [first, last) along the second of three dimensions, in float64.

    elements: of each slice; then the power means, (mean of |x|^p)^(1/p): for p = 0 the share that
    is not zero, and for infinities the extremes.
    """
    if (dtype := ranked_as(values.dtype)) != values.dtype:
        values, first, last = values[:, first:last].to(dtype), 0, last - first
    block = values[:, first:last]
    if math.isinf(p):
        extreme = block.abs().amax((0, 2)) if p > 0 else block.abs().amin((0, 2))
        return extreme.to(torch.float64)
    if p == 0:
        return _root(block.count_nonzero((0, 2)).to(torch.float64), elements, 1.0)
    return _root(backend.power_sums(values, first, last, p), elements, p)


def _root(sums: Tensor, elements: Tensor | int | None, p: float) -> Tensor:
    # Of a mean, not of a sum and then divided: for small p both would be infinite.
    means = sums if elements is None else sums / elements
    return means.cpu().pow(1 / p).to(sums.device)


def rounded_to(dtype: torch.dtype) -> torch.dtype:
    """What scores of values of a dtype, made in float64, are rounded to."""
    return torch.float64 if ranked_as(dtype) == torch.float64 else torch.float32


def total(values: Iterable[float]) -> float:
    """The sum, rounded once, so in any order; infinite where it leaves the doubles."""
    try:
        return math.fsum(values)
    except OverflowError:
        return math.inf
