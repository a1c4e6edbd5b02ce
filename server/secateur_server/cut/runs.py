"""Units of many small tensors in the order of their keys, and sums of squares up to any cut.

A run is the units of one tensor that have the same key. A cut is where a run begins in the order of
a tensor: `below` units are before it, and `equal` units have its key.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from secateur_server.backends.pieces import Batch
from secateur_server.cut.choice import Floats, Ints
from secateur_server.runtime.context import RequestContext

# Cells of an array (amounts, tensors) that are computed at once.
_CELLS = 1 << 20


@dataclass(frozen=True)
class Runs:
    """The candidates of tensors.

    Attributes:
        keys: Ascending for each tensor, one tensor after another.
        starts: Where each tensor begins in `keys`, and the end.
        place: The run of each unit, in the order of keys.
        begins: Where each run begins in `keys`, and the end.
        run: The run of each unit, in the order of the tensors' elements.
        square: The square of the score of each run.
    """

    keys: npt.NDArray[Any]
    starts: Ints
    place: Ints
    begins: Ints
    run: Ints
    square: Floats

    @property
    def sizes(self) -> Ints:
        """The number of candidates of each tensor."""
        return np.diff(self.starts)

    def cut_at(self, counts: Ints) -> tuple[Ints, Ints]:
        """Finds the cuts that prune `counts` units of each tensor, as `below` and `equal`."""
        has_cut = counts > 0
        at = np.where(has_cut, self.starts[:-1] + counts - 1, 0)
        run = self.place[at] if len(self.place) else at
        below = np.where(has_cut, self.begins[run] - self.starts[:-1], 0)
        return below, np.where(has_cut, self._lengths[run], 0)

    @cached_property
    def _lengths(self) -> Ints:
        return np.diff(self.begins, append=0)


def runs_of(batch: Batch) -> Runs:
    """Sorts a batch into runs."""
    bits: Any = batch.bits.numpy()
    candidates = np.unpackbits(batch.unpruned.numpy(), bitorder="little").view(np.bool_)
    keys = (bits & np.iinfo(bits.dtype).max)[candidates]
    up_to = np.concatenate([[0], np.cumsum(candidates)])
    starts = np.append(up_to[batch.begins], len(keys))
    order = _order(keys, np.diff(starts))
    ascending = keys[order]
    is_first = np.ones(len(keys), np.bool_)
    is_first[1:] = ascending[1:] != ascending[:-1]
    is_first[starts[:-1][starts[:-1] < len(keys)]] = True
    place = np.cumsum(is_first) - 1
    run = np.empty_like(place)
    run[order] = place
    begins = np.append(np.flatnonzero(is_first), len(keys))
    scores = torch.from_numpy(ascending[begins[:-1]]).view(batch.dtype).to(torch.float64)
    return Runs(ascending, starts, place, begins, run, scores.square().numpy())


def _order(keys: npt.NDArray[Any], sizes: Ints) -> Ints:
    """Indices that sort the units of each tensor by their keys."""
    if len(keys) and (sizes == sizes[0]).all():
        rows = keys.reshape(len(sizes), -1).argsort(1)
        places: Ints = (rows + np.arange(len(sizes))[:, np.newaxis] * sizes[0]).reshape(-1)
        return places
    order: Ints = np.lexsort((keys, np.repeat(np.arange(len(sizes)), sizes)))
    return order


def energies(
    context: RequestContext, runs: Runs, counts: Ints, below: Ints, equal: Ints
) -> tuple[Floats, Floats]:
    """Sums the squares that each amount prunes of each tensor, with the bits of energy.energies.

    Args:
        context: The request.
        runs: Of the tensors.
        counts: Units to prune, (amounts, tensors).
        below: Of the cuts, (amounts, tensors).
        equal: Of the cuts, (amounts, tensors).

    Returns:
        The sums, (amounts, tensors); and the sum over all candidates of each tensor.
    """
    energy, whole = np.zeros(counts.shape), np.zeros(counts.shape[1])
    step = max(1, _CELLS // len(counts))
    for first in range(0, counts.shape[1], step):
        context.check()
        part = slice(first, first + step)
        cuts_of_part = counts[:, part], below[:, part], equal[:, part]
        with np.errstate(over="ignore", invalid="ignore"):
            energy[:, part], whole[part] = _energies(runs, part, *cuts_of_part)
    return energy, whole


def _energies(
    runs: Runs, part: slice, counts: Ints, below: Ints, equal: Ints
) -> tuple[Floats, Floats]:
    """Does `energies` for consecutive tensors."""
    starts = runs.starts[part.start : part.stop + 1]
    base, end = int(starts[0]), int(starts[-1])
    starts = starts - base
    has_cut = counts > 0
    at = starts[:-1] + np.where(has_cut, below, 0)
    bucket, sums = _sums(runs, base, end, starts, [at[has_cut], (at + equal)[has_cut]])
    up_to, firsts = _running(bucket, sums, starts)
    tensors = np.arange(len(starts) - 1)
    whole = up_to[tensors, bucket[starts[1:]] - firsts]
    energy = up_to[tensors, bucket[at] - firsts]
    ties = counts - below
    has_run = has_cut & (equal > 0)
    run = runs.place[np.where(has_run, base + at, 0)] if end else np.zeros_like(at)
    all_ties = np.append(sums, 0.0)[np.where(has_run, bucket[at], len(sums))]
    some_ties = halved(np.where(has_run, ties, 0), runs.square[run] if end else np.zeros(at.shape))
    energy = energy + np.where(ties >= equal, all_ties, some_ties)
    return np.where(has_cut, energy, 0.0), whole


def _sums(runs: Runs, base: int, end: int, starts: Ints, cuts: list[Ints]) -> tuple[Ints, Floats]:
    """The sums of squares between cuts, added in the order of the tensors' elements.

    Returns: also the bucket of each place in the order of keys, and of its end.
    """
    is_cut = np.zeros(end - base + 1, np.int64)
    for places in (starts, *cuts):
        is_cut[places] = 1
    bucket = np.cumsum(is_cut) - 1
    units = runs.run[base:end]
    at = runs.begins[units] - base
    sums: Any = np.bincount(bucket[at], runs.square[units], int(bucket[-1]))
    return bucket, sums


def _running(bucket: Ints, sums: Floats, starts: Ints) -> tuple[Floats, Ints]:
    """The sums of each tensor's first buckets, from none to all, in rows; and the first buckets."""
    firsts = bucket[starts[:-1]]
    sizes = bucket[starts[1:]] - firsts
    up_to = np.zeros((len(sizes), int(sizes.max(initial=0)) + 1))
    rows = np.repeat(np.arange(len(sizes)), sizes)
    up_to[rows, np.arange(len(sums)) - firsts[rows] + 1] = sums
    return np.cumsum(up_to, 1), firsts


def halved(counts: Ints, values: Floats) -> Floats:
    """Sums `counts` times the same value with the bits of norms.row_sums, which adds by halves."""
    left, first, other = counts.copy(), np.where(counts > 0, values, 0.0), values.copy()
    while (more := left > 1).any():
        first = np.where(more, first + other, first)
        first = np.where(more & (left % 2 == 1), first + other, first)
        other, left = other * 2, left // 2
    return first
