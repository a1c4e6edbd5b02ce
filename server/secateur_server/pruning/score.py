"""How important is each unit of a tensor."""

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur_server.errors import NanScores
from secateur_server.pruning import kernels, parallel
from secateur_server.pruning.kernels import BITS, GAMMA, MIX_1, MIX_2
from secateur_server.pruning.parallel import each, spans
from secateur_server.pruning.spec import Element, Magnitude, Parameter, Random, Slice


@dataclass(frozen=True)
class RandomScores:
    """Scores that are computed where they are needed.  state: of the stream, an int64."""

    state: int


@dataclass(frozen=True)
class Ranking:
    """The units of one tensor, to be ranked by the absolute value of their scores.

    scores: flat, floating, without NaN where alive; or random ones.
    alive: bool, flat, False is pruned already; None is all alive.
    """

    name: str
    units: int
    scores: Tensor | RandomScores
    alive: Tensor | None
    device: torch.device


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
    alive = None if mask is None else granularity.alive(mask)
    units = granularity.units(weight.shape)
    if isinstance(importance, Random):
        return Ranking(name, units, random_scores(importance.seed, name), alive, weight.device)
    values = weight if scores is None else scores
    if scores is not None and alive is not None:
        mask = granularity.spread(alive, weight.shape)  # what of the scores is read
    refuse_nan(values, mask, field)
    if isinstance(granularity, Slice):
        # As in torch: what is pruned counts as 0 in a weight's norm, and as it is in a caller's
        # scores.
        masked = mask if scores is None else None
        values = slice_norms(values, masked, granularity, importance.p)
    return Ranking(name, units, values.reshape(-1), alive, weight.device)


def refuse_nan(values: Tensor, mask: Tensor | None, field: str) -> None:
    """Refuses a NaN that is not pruned yet: it has no rank.  Errors: NanScores."""
    flat = values.reshape(-1)
    if len(flat) == 0:
        return
    # Twice as fast as isnan: the bits of a NaN are above those of infinity, once the sign is gone.
    bits = flat.view(BITS[flat.dtype])
    largest = torch.iinfo(bits.dtype).max
    infinity = int(torch.tensor(math.inf, dtype=flat.dtype).view(bits.dtype))
    if all(each(lambda s: int((bits[slice(*s)] & largest).max()) <= infinity, spans(len(flat)))):
        return
    nan = values.isnan() if mask is None else values.isnan() & mask
    count = int(nan.count_nonzero())
    if count:
        first = nan.nonzero()[0].tolist()
        raise NanScores(field, f"is NaN at {first} and in {count} of {nan.numel()} elements")


def slice_norms(values: Tensor, mask: Tensor | None, along: Slice, p: float | str) -> Tensor:
    """The norm of each slice, as torch.norm over all other dimensions.

    values: at least 2-D, floating.  mask: what is not kept counts as 0.
    Returns: 1-D; float64 for float64, else float32, accumulated in float64 and rounded once, so
        that neither the machine nor the number of threads shows.
    """
    slices = values.movedim(along.dim, 0)
    kept = None if mask is None else mask.movedim(along.dim, 0)
    # Smaller pieces than elsewhere: as float64 they are to stay in the second-level cache.
    size = max(1, parallel.PIECE // 4 // max(1, math.prod(slices.shape[1:])))

    def norms_of(span: tuple[int, int]) -> Tensor:
        block = slices[slice(*span)]
        if kept is not None:
            block = torch.where(kept[slice(*span)], block, 0.0)
        if p == "nuc":
            return _nuclear_norms(block.to(torch.float64))
        return _vector_norms(block.flatten(1), float(p))

    joined = torch.cat(each(norms_of, spans(len(slices), size)))
    return joined if values.dtype == torch.float64 else joined.to(torch.float32)


def _vector_norms(rows: Tensor, p: float) -> Tensor:
    """Norms of rows of one or more elements, in float64."""
    if p in (1, 2) and (sums := kernels.power_sums(rows, int(p))) is not None:
        return sums.pow(1 / p)
    magnitudes = rows.to(torch.float64).abs()
    if p == math.inf:
        return magnitudes.amax(1)
    if p == -math.inf:
        return magnitudes.amin(1)
    if p == 0:
        return magnitudes.count_nonzero(1).to(torch.float64)
    return _row_sums(magnitudes.pow(p)).pow(1 / p)


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


def random_scores(seed: int, name: str) -> RandomScores:
    """The scores of a tensor: they depend on the seed and the tensor's name alone."""
    digest = hashlib.sha256(seed.to_bytes(8, "little") + name.encode()).digest()
    return RandomScores(int.from_bytes(digest[:8], "little", signed=True))


def random_keys(scores: RandomScores, begin: int, end: int, device: torch.device) -> Tensor:
    """Pseudo-random keys of the units [begin, end).

    The top 30 bits of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number
    generators, OOPSLA 2014), which can begin anywhere in its stream.  Returns: int32, in [0, 2^30).
    """
    z = torch.arange(begin + 1, end + 1, dtype=torch.int64, device=device)
    z.mul_(GAMMA).add_(scores.state)
    z.bitwise_xor_(_shifted(z, 30)).mul_(MIX_1)
    z.bitwise_xor_(_shifted(z, 27)).mul_(MIX_2)
    z.bitwise_xor_(_shifted(z, 31))
    return _shifted(z, 34).to(torch.int32)


def _shifted(words: Tensor, by: int) -> Tensor:
    """A logical shift right; torch's keeps the sign."""
    return (words >> by) & ((1 << (64 - by)) - 1)
