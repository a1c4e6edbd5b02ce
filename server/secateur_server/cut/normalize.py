"""Brings the scores of several tensors to one scale.

Statistics are sums by halves, so that they do not depend on the machine or the threads.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from secateur_server.backends import Span, allocate, backend_for, spans
from secateur_server.backends.keys import picked, ranked_as
from secateur_server.backends.masks import Mask
from secateur_server.backends.norms import rounded_to, total, vector_norms
from secateur_server.backends.pieces import PART, Stored, row_sums
from secateur_server.cut.score import Ranking
from secateur_server.errors import InvalidSpec, quote
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.rules import Selection

Found = TypeVar("Found")

# Scores that are read at once: as float64 they fit in the second-level cache.
AT_ONCE = PART // 8


@dataclass(frozen=True)
class Scale:
    """A score |x| becomes (|x| - shift) / spread. `least` is the smallest scaled score."""

    shift: float
    spread: float
    least: float


class Moments(NamedTuple):
    """Statistics of the absolute scores of the candidates of a tensor, or of a part of it."""

    units: int
    total: float
    squares: float
    least: float
    most: float

    @property
    def mean(self) -> float:
        """The mean; 0 without scores."""
        return self.total / self.units if self.units else 0.0


NONE = Moments(0, 0.0, 0.0, math.inf, 0.0)


def normalized(
    context: RequestContext, rule: Selection, rankings: Sequence[Ranking]
) -> list[Ranking]:
    """Scales the scores of tensors. Z-scores are shifted so that none is negative.

    Raises:
        InvalidSpec: A score is infinite.
    """
    names, candidates = [ranking.name for ranking in rankings], [r.candidates for r in rankings]
    scales = _scales(context, rule, names, [ranking.values for ranking in rankings], candidates)
    floor = min([rule.floor, *(scale.least for scale in scales)])
    return [
        ranking._replace(
            scores=Stored(_scaled(context, ranking.values, scale, floor)),
            offset=floor,
            sample=None,
        )
        for ranking, scale in zip(context.each(rankings), scales, strict=True)
    ]


def moments_of(context: RequestContext, ranking: Ranking) -> Moments:
    """Measures the scores of the candidates of a tensor. They must be stored."""
    scores, candidates = [ranking.values], [ranking.candidates]
    (parts,) = _measure_parts(context, scores, candidates, _moments)
    return _joined(parts)


def combined(
    context: RequestContext,
    rule: Selection,
    members: Sequence[Sequence[Tensor]],
    candidates: Sequence[Mask | None],
    names: Sequence[str],
    sizes: Sequence[int],
) -> list[tuple[Tensor, float]]:
    """Combines the scores of the members of groups, which are normalized member by member.

    Args:
        context: The request.
        rule: Says how to normalize and combine.
        members: For each group the scores of its members, float64, flat.
        candidates: The candidates of each group.
        names: Of the groups, for errors.
        sizes: How many groups are in each set of groups that are compared.

    Returns:
        The scores of each group, and what was subtracted from all scores of its set, so that none
        is negative.

    Raises:
        InvalidSpec: A score is infinite.
    """
    if rule.normalization is None:  # no score is negative
        return [(scores, 0.0) for scores in _combined(context, rule, members)]
    every = [
        (name, member_scores, mask)
        for scores, mask, name in zip(context.each(members), candidates, names, strict=True)
        for member_scores in scores
    ]
    scales = _scales(context, rule, *map(list, zip(*every, strict=True)))
    scaled = (
        (scores - scale.shift) / scale.spread
        for (_, scores, _), scale in zip(context.each(every), scales, strict=True)
    )
    groups = iter(_combined(context, rule, [[next(scaled) for _ in of] for of in members]))
    found = []
    for size in context.each(sizes):
        scores_of_set = [next(groups) for _ in range(size)]
        floor = min([0.0, *(float(scores.min()) for scores in scores_of_set if scores.numel())])
        found += [(scores - floor, floor) for scores in scores_of_set]
    return found


def _combined(
    context: RequestContext, rule: Selection, members: Sequence[Sequence[Tensor]]
) -> list[Tensor]:
    """One score for each unit of each group. Groups of equal sizes are combined at once."""
    alike: dict[tuple[int, int], list[int]] = defaultdict(list)
    for place, scores in enumerate(context.each(members)):
        alike[len(scores), len(scores[0])].append(place)
    done: dict[int, Tensor] = {}
    for (count, units), places in alike.items():
        for begin, end in context.each(spans(len(places), max(1, PART // (count * units)))):
            some = places[begin:end]
            stacked = torch.stack([scores for place in some for scores in members[place]])
            stacked = stacked.view(-1, count, units)
            if rule.combination == "max":
                combined = stacked.amax(1)
            else:
                combined = row_sums(stacked.transpose(1, 2).reshape(-1, count)).view(-1, units)
            if rule.combination == "mean":
                combined = combined / count
            done |= zip(some, combined.unbind(), strict=True)
    return [done[place] for place in range(len(members))]


def _scales(
    context: RequestContext,
    rule: Selection,
    names: Sequence[str],
    scores: Sequence[Tensor],
    candidates: Sequence[Mask | None],
) -> list[Scale]:
    """The scale of each tensor, over the scores of its candidates."""
    every = [_joined(parts) for parts in _measure_parts(context, scores, candidates, _moments)]
    for name, of in zip(names, every, strict=True):
        if not math.isfinite(of.most) or not math.isfinite(of.squares):
            raise InvalidSpec(
                f"{rule.path}.normalization",
                f"{quote(name)} has scores that are too large to normalize; use NORMALIZATION_NONE",
            )
    shifts, spreads = [0.0] * len(every), [of.mean for of in every]
    if rule.normalization == "norm":
        spreads = [math.sqrt(of.squares) for of in every]
    elif rule.normalization == "z_score":
        shifts, spreads = spreads, _deviations(context, scores, candidates, every)
    spreads = [spread or 1.0 for spread in spreads]  # 0: all scores are equal
    return [
        Scale(shift, spread, (of.least - shift) / spread if of.units else 0.0)
        for of, shift, spread in zip(every, shifts, spreads, strict=True)
    ]


def _deviations(
    context: RequestContext,
    scores: Sequence[Tensor],
    candidates: Sequence[Mask | None],
    every: Sequence[Moments],
) -> list[float]:
    """Standard deviations of populations, in a separate pass, so that no digits cancel."""

    def squares(rows: Tensor, places: Sequence[int]) -> list[float]:
        means = torch.tensor([every[place].mean for place in places], dtype=torch.float64)
        return _sums(rows.to(torch.float64).abs() - means.to(rows.device).view(-1, 1), 2.0)

    found = _measure_parts(context, scores, candidates, squares)
    return [math.sqrt(total(p) / max(1, of.units)) for of, p in zip(every, found, strict=True)]


def _moments(rows: Tensor, places: Sequence[int]) -> list[Moments]:
    if not rows.shape[1]:
        return [NONE] * len(rows)
    absolute = rows.abs()  # aminmax takes ten times as long along rows
    extremes = absolute.amin(1).tolist(), absolute.amax(1).tolist()
    found = _sums(rows, 1.0), _sums(rows, 2.0), *extremes
    return [Moments(rows.shape[1], *of) for of in zip(*found, strict=True)]


def _joined(parts: Sequence[Moments]) -> Moments:
    """The moments of a tensor from those of its parts."""
    counts, totals, squares, lows, highs = zip(NONE, *parts, strict=True)
    return Moments(sum(counts), total(totals), total(squares), min(lows), max(highs))


def _measure_parts(
    context: RequestContext,
    scores: Sequence[Tensor],
    candidates: Sequence[Mask | None],
    measure_rows: Callable[[Tensor, Sequence[int]], Sequence[Found]],
) -> list[list[Found]]:
    """What `measure_rows` returns for each part of each tensor. Parts of one length are stacked.

    `measure_rows` is given rows with the scores of candidates, and the indices of their tensors.
    """
    alike: dict[tuple[int, torch.dtype], list[tuple[int, Span]]] = defaultdict(list)
    for place, values in enumerate(context.each(scores)):
        for begin, end in spans(len(values), AT_ONCE):
            alike[end - begin, values.dtype].append((place, (begin, end)))

    def work(parts: Sequence[tuple[int, Span]]) -> list[tuple[int, Found]]:
        by_length: dict[int, list[tuple[int, Tensor]]] = defaultdict(list)
        for place, span in parts:
            part = _candidate_scores(scores[place], candidates[place], *span)
            by_length[len(part)].append((place, part))
        found: list[tuple[int, Found]] = []
        for places, rows in (zip(*same_length, strict=True) for same_length in by_length.values()):
            # A single part is not copied.
            joined = torch.stack(rows) if len(rows) > 1 else rows[0].view(1, -1)
            found += zip(places, measure_rows(joined, places), strict=True)
        return found

    batches = [
        parts[slice(*span)]
        for (size, _), parts in alike.items()
        for span in spans(len(parts), AT_ONCE // size)
    ]
    found: list[list[Found]] = [[] for _ in scores]
    backend = backend_for(scores[0].device)
    for place, result in chain.from_iterable(backend.map(context, work, batches)):
        found[place].append(result)
    return found


def _candidate_scores(scores: Tensor, candidates: Mask | None, begin: int, end: int) -> Tensor:
    part = scores[begin:end]
    part = part if candidates is None else picked(part, candidates.flags(begin, end))
    return part.to(ranked_as(part.dtype))


def _sums(rows: Tensor, p: float) -> list[float]:
    """The sum of |x|^p of each row. `p` is 1 or 2."""
    if not rows.shape[1]:
        return [0.0] * len(rows)
    norms = vector_norms(rows[None], 0, len(rows), p, backend_for(rows.device))
    return [math.pow(norm, p) for norm in norms.tolist()]


def _scaled(context: RequestContext, scores: Tensor, scale: Scale, floor: float) -> Tensor:
    """Scaled scores: float64 for float64, else float32; computed in float64 and rounded once."""
    dtype = rounded_to(scores.dtype)
    backend = backend_for(scores.device)
    into = allocate(context, len(scores) * dtype.itemsize, backend).view(dtype)

    def fill(span: tuple[int, int]) -> None:
        part = scores[slice(*span)].to(torch.float64).abs()
        # The scores of pruned units may be below the floor. They are not used.
        into[slice(*span)] = (((part - scale.shift) / scale.spread) - floor).clamp_(min=0.0)

    backend.map(context, fill, spans(len(scores), AT_ONCE))
    return into
