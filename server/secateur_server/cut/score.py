"""How important is each unit of a tensor."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from secateur_server.backends import passes_of, spans
from secateur_server.backends.keys import INFINITY, ranked_as
from secateur_server.backends.looks import Sample, Seen
from secateur_server.backends.masks import Mask
from secateur_server.backends.randomness import RandomScores, random_scores
from secateur_server.errors import NanScores
from secateur_server.granularity import Granularity
from secateur_server.importance import Importance
from secateur_server.runtime.context import RequestContext
from secateur_server.state_dict.parameter import Parameter


class Ranking(NamedTuple):
    """The units of one tensor, to be ranked by the absolute value of their scores.

    scores: flat, floating, without NaN where alive; or random ones.
    alive: of the units; None is all.
    sample: of the scores, where there is one already.
    offset: what was taken off from the scores, for none to be negative; 0 or less.
    """

    name: str
    units: int
    scores: Tensor | RandomScores
    candidates: Mask | None
    device: torch.device
    sample: Sample | None = None
    offset: float = 0.0

    @property
    def dtype(self) -> torch.dtype:
        """In which the scores compare without loss; random ones have keys of 32 bits anyway."""
        return ranked_as(self.scores.dtype) if isinstance(self.scores, Tensor) else torch.float32

    def count_candidates(self, context: RequestContext) -> int:
        """Units that are still unpruned."""
        return self.units if self.candidates is None else self.candidates.kept(context)


def score_units(
    context: RequestContext,
    name: str,
    parameter: Parameter,
    scores: Tensor | None,
    importance: Importance,
    granularity: Granularity,
    is_mean: bool,
    is_all: bool,
    field: str,
) -> Ranking:
    """Scores the units of one tensor.

    scores: of its elements, or of its units; they take the weight's place.
    is_mean: units rank by power means, for units of several sizes to compare.
    is_all: all of them go, so any scores will do.
    field: the path of what is scored, for errors.
    Errors: NanScores.
    """
    weight, mask = parameter.weight, parameter.mask
    are_elementwise = scores is not None and scores.shape == weight.shape
    values = scores if scores is not None and are_elementwise else weight
    units = math.prod(granularity.grid(weight.shape))
    candidates = granularity.candidates(context, values, mask)
    if by_name := importance.by_name(name):
        return Ranking(name, units, by_name, candidates, weight.device)
    if scores is not None and not are_elementwise:
        refuse_nan(context, scores, candidates, field)
        return Ranking(name, units, scores.reshape(-1), candidates, weight.device)
    seen = parameter.seen if scores is None else None
    if scores is not None and candidates is not None and not granularity.is_part:
        mask = granularity.expand(context, candidates, values, mask)  # what of the scores is read
    refuse_nan(context, values, mask, field, seen)
    if is_all:
        return Ranking(name, units, random_scores(0, name), candidates, weight.device)
    # As in torch: what is pruned counts as 0 in a weight's norm, and as it is in a caller's scores.
    # But of an N:M group only what is unpruned can go.
    masked = mask if scores is None or granularity.is_part else None
    unit_scores = importance.scores(context, values, masked, granularity, is_mean)
    sample = seen.sample if seen and granularity.is_element and importance.is_value else None
    return Ranking(name, units, unit_scores, candidates, weight.device, sample)


def refuse_nan(
    context: RequestContext, values: Tensor, mask: Mask | None, field: str, seen: Seen | None = None
) -> None:
    """Refuses a NaN that is not pruned yet: it has no rank.

    seen: what a first look at `values` told.  Errors: NanScores.
    """
    if not values.dtype.is_floating_point:
        return
    passes, flat = passes_of(values.device), values.reshape(-1)
    if seen is None:
        parts = spans(len(flat), passes.ranked)
        found = passes.map(context, lambda s: passes.extremes(flat[slice(*s)]), parts)
        largest = max((most for _, most in found), default=0)
    else:
        largest = seen.largest
    if largest <= INFINITY[values.dtype]:
        return
    nan = values.isnan() if mask is None else values.isnan() & mask.whole(context, values.shape)
    count = int(nan.count_nonzero())
    if count:
        first = nan.nonzero()[0].tolist()
        raise NanScores(field, f"is NaN at {first} and in {count} of {nan.numel()} elements")
