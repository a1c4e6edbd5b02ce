"""Norms of parts of a tensor, the same bits on every machine and with every number of threads."""

import math

import torch
from torch import Tensor

from secateur_server.devices import passes_of, spans
from secateur_server.devices.passes import Passes, ranked_as
from secateur_server.pruning.masks import Mask, around


def slice_norms(
    values: Tensor, mask: Mask | None, dim: int, p: float | str, is_mean: bool = False
) -> Tensor:
    """The norm of each slice, as torch.norm over all other dimensions.

    values: at least 2-D.  mask: what is not kept counts as 0.
    Returns: 1-D; float64 for what ranks as float64, else float32, accumulated in float64 and
        rounded once, so that neither the machine nor the number of threads shows.
    """
    shape = around(values.shape, dim)
    by_slice = values.reshape(shape)
    kept = None if mask is None else mask.whole(shape)
    passes, dtype = passes_of(values.device), ranked_as(values.dtype)

    def norms_of(span: tuple[int, int]) -> Tensor:
        first, last = span
        if p == "nuc":
            slices = values.movedim(dim, 0)[first:last].to(torch.float64)
            if kept is not None:
                alive = kept.view(values.shape).movedim(dim, 0)[first:last]
                slices = torch.where(alive, slices, 0.0)
            return _nuclear_norms(slices)
        if kept is None:
            return vector_norms(by_slice, first, last, float(p), passes)
        block = torch.where(kept[:, first:last], by_slice[:, first:last].to(dtype), 0.0)
        return vector_norms(block, 0, last - first, float(p), passes)

    # Smaller pieces than elsewhere: as float64 they are to stay in the second-level cache.
    size = max(1, passes.piece // 8 // (shape[0] * shape[2]))
    joined = torch.cat(passes.each(norms_of, spans(shape[1], size)))
    if is_mean:
        joined = power_means(joined, shape[0] * shape[2], float(p))
    return joined if dtype == torch.float64 else joined.to(torch.float32)


def power_means(norms: Tensor, elements: Tensor | int, p: float) -> Tensor:
    """(mean of |x|^p)^(1/p) from (sum of |x|^p)^(1/p).

    elements: of each unit.  p: 0 is the share that is not zero; infinities the extremes.
    """
    if math.isinf(p):
        return norms
    count = torch.as_tensor(elements, dtype=torch.float64, device=norms.device)
    means = norms.to(torch.float64) / (count if p == 0 else count.pow(1 / p))
    return means.to(norms.dtype)


def vector_norms(values: Tensor, first: int, last: int, p: float, passes: Passes) -> Tensor:
    """Norms of the slices [first, last) along the second of three dimensions, in float64."""
    if (dtype := ranked_as(values.dtype)) != values.dtype:
        values, first, last = values[:, first:last].to(dtype), 0, last - first
    if (sums := passes.power_sums(values, first, last, p)) is not None:
        return sums.pow(1 / p)
    block = values[:, first:last]
    if math.isinf(p):
        extreme = block.abs().amax((0, 2)) if p > 0 else block.abs().amin((0, 2))
        return extreme.to(torch.float64)
    if p == 0:
        return block.count_nonzero((0, 2)).to(torch.float64)
    rows = block.transpose(0, 1).flatten(1).to(torch.float64)
    return row_sums(rows.abs().pow(p)).pow(1 / p)


def row_sums(rows: Tensor) -> Tensor:
    """Sums of rows by halves, in an order that depends on their length alone.

    torch's own sum adds in an order of its threads, its vectors and its device.
    """
    while rows.shape[1] > 1:
        half = rows.shape[1] // 2
        odd = rows[:, 2 * half :]
        rows = rows[:, :half] + rows[:, half : 2 * half]
        rows[:, :1] += odd if odd.shape[1] else 0.0
    return rows[:, 0]


def _nuclear_norms(matrices: Tensor) -> Tensor:
    """Sums of singular values; infinite for a matrix with an infinite element."""
    finite = matrices.isfinite().flatten(1).all(1)
    norms = torch.linalg.matrix_norm(torch.where(finite.view(-1, 1, 1), matrices, 0.0), "nuc")
    return torch.where(finite, norms, math.inf)
