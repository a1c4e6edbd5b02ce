"""Importances of several tensors brought to one scale.

Each is made of exact sums by halves, so that neither the machine nor the threads show.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur_server.devices import Span, passes_of, room_to_work, spans
from secateur_server.devices.keys import picked, ranked_as
from secateur_server.devices.passes import PART
from secateur_server.errors import InvalidSpec, quote
from secateur_server.pruning.masks import Mask
from secateur_server.pruning.norms import rounded_to, row_sums, total, vector_norms
from secateur_server.pruning.score import Ranking
from secateur_server.pruning.spec import Selection
from secateur_server.runtime.context import RequestContext


@dataclass(frozen=True)
class Scale:
    """A score |x| becomes (|x| - shift) / spread.  least: of the scaled ones."""

    shift: float
    spread: float
    least: float


def normalized(
    context: RequestContext, rule: Selection, rankings: Sequence[Ranking]
) -> list[Ranking]:
    """The rankings with scores on one scale; z-scores are moved up until none is negative.

    Errors: InvalidSpec, of infinite scores.
    """
    scales = [
        _scale(context, rule, ranking.name, _tensor_of(ranking), ranking.alive)
        for ranking in context.each(rankings)
    ]
    floor = min([0.0, *(scale.least for scale in scales)])
    return [
        ranking._replace(
            scores=_scaled(context, _tensor_of(ranking), scale, floor),
            offset=floor,
            sample=None,
        )
        for ranking, scale in zip(context.each(rankings), scales, strict=True)
    ]


def combined(
    context: RequestContext,
    rule: Selection,
    members: Sequence[Sequence[Tensor]],
    alive: Sequence[Mask | None],
    names: Sequence[str],
    sizes: Sequence[int],
) -> list[tuple[Tensor, float]]:
    """The scores of groups from those of their members, normalized member by member.

    members: for each group those of its members, float64, flat.
    sizes: of the sets of groups that are ranked together.
    Returns: also what was taken off from all scores of a set, so that none is negative.
    """
    if rule.normalization is None:  # no score is negative
        return [(scores, 0.0) for scores in _combined(context, rule, members)]
    scaled = []
    for scores, mask, name in zip(context.each(members), alive, names, strict=True):
        scales = [_scale(context, rule, name, of_member, mask) for of_member in scores]
        scaled.append([(s - c.shift) / c.spread for s, c in zip(scores, scales, strict=True)])
    groups = iter(_combined(context, rule, scaled))
    found = []
    for size in context.each(sizes):
        of_set = [next(groups) for _ in range(size)]
        floor = min([0.0, *(float(scores.min()) for scores in of_set if scores.numel())])
        found += [(scores - floor, floor) for scores in of_set]
    return found


def _combined(
    context: RequestContext, rule: Selection, members: Sequence[Sequence[Tensor]]
) -> list[Tensor]:
    """One score for each unit of each group: groups of as many members and units at once."""
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


def _scale(
    context: RequestContext, rule: Selection, name: str, scores: Tensor, alive: Mask | None
) -> Scale:
    """The scale of one tensor's scores, over those that are alive."""
    count, total, squares, least, most = _moments(context, scores, alive)
    if not math.isfinite(most) or not math.isfinite(squares):
        raise InvalidSpec(
            f"{rule.path}.normalization", f"{quote(name)} has scores too large to be normalized"
        )
    mean = total / count if count else 0.0
    if rule.normalization == "mean":
        shift, spread = 0.0, mean
    elif rule.normalization == "norm":
        shift, spread = 0.0, math.sqrt(squares)
    else:
        shift, spread = mean, _deviation(context, scores, alive, count, mean)
    spread = spread or 1.0  # all are equal
    return Scale(shift, spread, (least - shift) / spread if count else 0.0)


def _deviation(
    context: RequestContext, scores: Tensor, alive: Mask | None, count: int, mean: float
) -> float:
    """The standard deviation of a population, in a pass of its own: it cancels nothing."""

    def squares(span: tuple[int, int]) -> float:
        living = _living(scores, alive, *span).to(torch.float64).abs()
        return _sum(living - mean, 2.0)

    passes = passes_of(scores.device)
    parts = passes.map(context, squares, _parts(scores))
    return math.sqrt(total(parts) / count) if count else 0.0


def _moments(
    context: RequestContext, scores: Tensor, alive: Mask | None
) -> tuple[int, float, float, float, float]:
    """Count, sum, sum of squares, least and largest of the absolute scores that are alive."""

    def moments(span: tuple[int, int]) -> tuple[int, float, float, float, float]:
        living = _living(scores, alive, *span)
        if not len(living):
            return 0, 0.0, 0.0, math.inf, 0.0
        low, high = map(float, living.to(ranked_as(living.dtype)).abs().aminmax())
        return len(living), _sum(living, 1.0), _sum(living, 2.0), low, high

    passes = passes_of(scores.device)
    parts = passes.map(context, moments, _parts(scores))
    if not parts:
        return 0, 0.0, 0.0, 0.0, 0.0
    counts, totals, squares, lows, highs = zip(*parts, strict=True)
    return sum(counts), total(totals), total(squares), min(lows), max(highs)


def _parts(scores: Tensor) -> list[Span]:
    """Smaller pieces than elsewhere: as float64 they are to stay in the second-level cache."""
    return spans(len(scores), PART // 8)


def _living(scores: Tensor, alive: Mask | None, begin: int, end: int) -> Tensor:
    part = scores[begin:end]
    return part if alive is None else picked(part, alive.flags(begin, end))


def _sum(values: Tensor, p: float) -> float:
    """The sum of |x|^p.  p: 1 or 2."""
    if not len(values):
        return 0.0
    norm = vector_norms(values.view(1, 1, -1), 0, 1, p, passes_of(values.device))
    return math.pow(float(norm), p)


def _scaled(context: RequestContext, scores: Tensor, scale: Scale, floor: float) -> Tensor:
    """Returns: float64 for float64, else float32, computed in float64 and rounded once."""
    dtype = rounded_to(scores.dtype)
    passes = passes_of(scores.device)
    into = room_to_work(context, len(scores) * dtype.itemsize, passes).view(dtype)

    def fill(span: tuple[int, int]) -> None:
        part = scores[slice(*span)].to(torch.float64).abs()
        # What is pruned already may lie below the floor, and has no rank.
        into[slice(*span)] = (((part - scale.shift) / scale.spread) - floor).clamp_(min=0.0)

    passes.map(context, fill, _parts(scores))
    return into


def _tensor_of(ranking: Ranking) -> Tensor:
    assert isinstance(ranking.scores, Tensor), "random scores are not normalized"
    return ranking.scores
