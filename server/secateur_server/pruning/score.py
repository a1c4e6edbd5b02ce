"""How important is each unit of a tensor."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur_server.devices import passes_of, spans
from secateur_server.devices.passes import INFINITY, Passes, Sample, Seen
from secateur_server.devices.randomness import RandomScores, random_scores
from secateur_server.errors import NanScores
from secateur_server.pruning.masks import Mask, around
from secateur_server.pruning.spec import Element, Magnitude, Parameter, Random, Slice


@dataclass(frozen=True)
class Ranking:
    """The units of one tensor, to be ranked by the absolute value of their scores.

    scores: flat, floating, without NaN where alive; or random ones.
    alive: of the units; None is all.
    sample: of the scores, where there is one already.
    """

    name: str
    units: int
    scores: Tensor | RandomScores
    alive: Mask | None
    device: torch.device
    sample: Sample | None = None


def rank(
    name: str,
    parameter: Parameter,
    scores: Tensor | None,
    importance: Magnitude | Random,
    granularity: Element | Slice,
    field: str,
) -> Ranking:
    """Scores the units of one tensor.

    scores: take the weight's place, same shape.  field: the path of what is scored, for errors.
    Errors: NanScores.
    """
    weight, mask = parameter.weight, parameter.mask
    alive = None if mask is None else granularity.alive(mask, weight.shape)
    units = granularity.units(weight.shape)
    if isinstance(importance, Random):
        return Ranking(name, units, random_scores(importance.seed, name), alive, weight.device)
    values, seen = (weight, parameter.seen) if scores is None else (scores, None)
    if scores is not None and alive is not None:
        mask = granularity.spread(alive, weight.shape)  # what of the scores is read
    refuse_nan(values, mask, field, seen)
    if isinstance(granularity, Slice):
        # As in torch: what is pruned counts as 0 in a weight's norm, and as it is in a caller's
        # scores.
        masked = mask if scores is None else None
        values, seen = slice_norms(values, masked, granularity, importance.p), None
    sample = seen.sample if seen else None
    return Ranking(name, units, values.reshape(-1), alive, weight.device, sample)


def refuse_nan(values: Tensor, mask: Mask | None, field: str, seen: Seen | None = None) -> None:
    """Refuses a NaN that is not pruned yet: it has no rank.

    seen: what a first look at `values` told.  Errors: NanScores.
    """
    passes, flat = passes_of(values.device), values.reshape(-1)
    if seen is None:
        parts = spans(len(flat), passes.piece)
        found = passes.each(lambda s: passes.extremes(flat[slice(*s)]), parts)
        largest = max((most for _, most in found), default=0)
    else:
        largest = seen.largest
    if largest <= INFINITY[values.dtype]:
        return
    nan = values.isnan() if mask is None else values.isnan() & mask.whole(values.shape)
    count = int(nan.count_nonzero())
    if count:
        first = nan.nonzero()[0].tolist()
        raise NanScores(field, f"is NaN at {first} and in {count} of {nan.numel()} elements")


def slice_norms(values: Tensor, mask: Mask | None, along: Slice, p: float | str) -> Tensor:
    """The norm of each slice, as torch.norm over all other dimensions.

    values: at least 2-D, floating.  mask: what is not kept counts as 0.
    Returns: 1-D; float64 for float64, else float32, accumulated in float64 and rounded once, so
        that neither the machine nor the number of threads shows.
    """
    shape = around(values.shape, along.dim)
    by_slice = values.reshape(shape)
    kept = None if mask is None else mask.whole(shape)
    passes = passes_of(values.device)

    def norms_of(span: tuple[int, int]) -> Tensor:
        first, last = span
        if p == "nuc":
            slices = values.movedim(along.dim, 0)[first:last]
            if kept is not None:
                alive = kept.view(values.shape).movedim(along.dim, 0)[first:last]
                slices = torch.where(alive, slices, 0.0)
            return _nuclear_norms(slices.to(torch.float64))
        if kept is None:
            return _vector_norms(by_slice, first, last, float(p), passes)
        block = torch.where(kept[:, first:last], by_slice[:, first:last], 0.0)
        return _vector_norms(block, 0, last - first, float(p), passes)

    # Smaller pieces than elsewhere: as float64 they are to stay in the second-level cache.
    size = max(1, passes.piece // 8 // (shape[0] * shape[2]))
    joined = torch.cat(passes.each(norms_of, spans(shape[1], size)))
    return joined if values.dtype == torch.float64 else joined.to(torch.float32)


def _vector_norms(values: Tensor, first: int, last: int, p: float, passes: Passes) -> Tensor:
    """Norms of the slices [first, last) along the second of three dimensions, in float64."""
    if (sums := passes.power_sums(values, first, last, p)) is not None:
        return sums.pow(1 / p)
    block = values[:, first:last]
    if math.isinf(p):
        extreme = block.abs().amax((0, 2)) if p > 0 else block.abs().amin((0, 2))
        return extreme.to(torch.float64)
    if p == 0:
        return block.count_nonzero((0, 2)).to(torch.float64)
    rows = block.transpose(0, 1).flatten(1).to(torch.float64)
    return _row_sums(rows.abs().pow(p)).pow(1 / p)


def _row_sums(rows: Tensor) -> Tensor:
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
